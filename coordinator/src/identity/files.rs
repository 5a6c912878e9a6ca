//! A node's identity on disk.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use super::ca::{certificate, node_id_of};
use super::{Ca, Error};
use crate::ids::NodeId;

const CERT_FILE: &str = "node.crt";
const KEY_FILE: &str = "node.key";
const CA_FILE: &str = "ca.crt";
const CA_KEY_FILE: &str = "ca.key";

/// Who a node is: its number, its certificate and key, and the authority it trusts (all PEM).
#[derive(Clone)]
pub struct Identity {
    pub node_id: NodeId,
    pub cert_pem: String,
    pub key_pem: String,
    pub ca_pem: String,
}

impl Identity {
    /// Reads `node.crt`, `node.key` and `ca.crt`.
    ///
    /// # Errors
    /// A file is missing or is no certificate of a node.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let cert_pem = read(&dir.join(CERT_FILE))?;
        let node_id = node_id_of(&certificate(&cert_pem, "the node certificate")?)
            .ok_or_else(|| Error::invalid("the node certificate", "it names no node"))?;
        Ok(Self {
            node_id,
            cert_pem,
            key_pem: read(&dir.join(KEY_FILE))?,
            ca_pem: read(&dir.join(CA_FILE))?,
        })
    }

    /// Writes the three files, readable by the owner only, each replaced whole.
    ///
    /// # Errors
    /// The directory cannot be made or written.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        fs::create_dir_all(dir).map_err(|why| Error::File {
            path: dir.to_owned(),
            why,
        })?;
        write(&dir.join(CA_FILE), &self.ca_pem)?;
        write(&dir.join(KEY_FILE), &self.key_pem)?;
        // Last, since its presence makes the identity whole.
        write(&dir.join(CERT_FILE), &self.cert_pem)
    }

    /// SHA-256 of the CA certificate (DER).
    ///
    /// # Errors
    /// The CA certificate is not PEM.
    pub fn ca_fingerprint(&self) -> Result<[u8; 32], Error> {
        use sha2::{Digest, Sha256};
        Ok(Sha256::digest(certificate(&self.ca_pem, "the CA certificate")?).into())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("node_id", &self.node_id)
            .finish_non_exhaustive()
    }
}

impl Ca {
    /// Reads `ca.crt` and `ca.key`.
    ///
    /// # Errors
    /// A file is missing, or they do not belong together.
    pub fn load_dir(dir: &Path) -> Result<Self, Error> {
        Self::load(&read(&dir.join(CA_FILE))?, &read(&dir.join(CA_KEY_FILE))?)
    }

    /// Writes `ca.crt` and `ca.key`, readable by the owner only.
    ///
    /// # Errors
    /// The directory cannot be made or written.
    pub fn save_dir(&self, dir: &Path) -> Result<(), Error> {
        fs::create_dir_all(dir).map_err(|why| Error::File {
            path: dir.to_owned(),
            why,
        })?;
        write(&dir.join(CA_KEY_FILE), self.key_pem())?;
        write(&dir.join(CA_FILE), self.cert_pem())
    }
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|why| Error::File {
        path: path.to_owned(),
        why,
    })
}

/// A reader sees the old file or the new one, never a half.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    let write = || {
        let part = path.with_extension("part");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&part, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|why| Error::File {
        path: path.to_owned(),
        why,
    })
}
