//! What proves who a node or an operator is, on disk: certificates, the CA where it is kept, the cluster key.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use coordinator::control::{OPERATOR, random_secret};
use coordinator::identity::{Ca, Identity};
use coordinator::ids::{NodeId, Role};

use crate::up::write_whole;

/// Below a node's data directory.
pub const IDENTITY_DIR: &str = "identity";
/// Below a cluster's or first node's data directory.
pub const OPERATOR_DIR: &str = "operator";
const CLUSTER_KEY_FILE: &str = "cluster.key";
const SEEDS_FILE: &str = "seeds";

/// What the whole cluster's trust hangs on.
pub struct ClusterSecrets {
    pub ca: Ca,
    /// Wraps the tenants' keys.
    pub cluster_key: [u8; 32],
}

/// One node's share of it.
pub struct NodeSecrets {
    pub identity: Identity,
    /// Coordinators sign joins.
    pub ca_key_pem: Option<String>,
    /// Coordinators and stores.
    pub cluster_key: Option<[u8; 32]>,
}

impl ClusterSecrets {
    pub fn create(name: &str) -> Result<ClusterSecrets> {
        Ok(ClusterSecrets {
            ca: Ca::create(name)?,
            cluster_key: random_secret(),
        })
    }

    pub fn load(dir: &Path) -> Result<ClusterSecrets> {
        let cluster_key = read_key(&dir.join(CLUSTER_KEY_FILE))?;
        Ok(ClusterSecrets {
            ca: Ca::load_dir(dir)?,
            cluster_key,
        })
    }

    pub fn save(&self, dir: &Path) -> Result<()> {
        write_whole(&dir.join(CLUSTER_KEY_FILE), &self.cluster_key, 0o600)?;
        Ok(self.ca.save_dir(dir)?)
    }

    /// Identity and, by its roles, the secrets of a node that this process sets up itself.
    pub fn issue(
        &self,
        id: NodeId,
        name: &str,
        roles: impl Iterator<Item = Role>,
    ) -> Result<NodeSecrets> {
        let roles: Vec<_> = roles.collect();
        let coordinates = roles.contains(&Role::Coordinator);
        Ok(NodeSecrets {
            identity: self.ca.issue(id, name)?,
            ca_key_pem: coordinates.then(|| self.ca.key_pem().to_owned()),
            cluster_key: (coordinates || roles.contains(&Role::Store)).then_some(self.cluster_key),
        })
    }
}

impl NodeSecrets {
    /// Reads what is below a node's data directory.
    pub fn load(data: &Path) -> Result<NodeSecrets> {
        let dir = data.join(IDENTITY_DIR);
        let identity = Identity::load(&dir).with_context(|| {
            format!(
                "no identity in {}; run `verbund init` or `verbund join` first",
                dir.display()
            )
        })?;
        let key = dir.join(CLUSTER_KEY_FILE);
        let cluster_key = if key.exists() {
            Some(read_key(&key)?)
        } else {
            None
        };
        let ca_key = dir.join("ca.key");
        let ca_key_pem = if ca_key.exists() {
            Some(fs::read_to_string(&ca_key)?)
        } else {
            None
        };
        Ok(NodeSecrets {
            identity,
            ca_key_pem,
            cluster_key,
        })
    }

    /// Writes below a node's data directory, readable by the owner only; the certificate comes last.
    pub fn save(&self, data: &Path) -> Result<()> {
        let dir = data.join(IDENTITY_DIR);
        if let Some(key) = &self.cluster_key {
            write_whole(&dir.join(CLUSTER_KEY_FILE), key, 0o600)?;
        }
        if let Some(pem) = &self.ca_key_pem {
            write_whole(&dir.join("ca.key"), pem.as_bytes(), 0o600)?;
        }
        Ok(self.identity.save(&dir)?)
    }

    /// The CA, on a node that may sign.
    pub fn ca(&self) -> Result<Ca> {
        let Some(key) = &self.ca_key_pem else {
            bail!(
                "a coordinator needs the cluster's CA key; join again with a token for the role coordinator"
            );
        };
        Ok(Ca::load(&self.identity.ca_pem, key)?)
    }

    /// The cluster key, on a node that keeps data.
    pub fn cluster_key(&self) -> Result<[u8; 32]> {
        self.cluster_key
            .context("this role needs the cluster key; join again with a token for the role store")
    }
}

/// Makes an operator's identity, if there is none, and notes where the coordinators are.
pub fn save_operator(data: &Path, ca: &Ca, seeds: &[SocketAddr]) -> Result<()> {
    let dir = data.join(OPERATOR_DIR);
    if !dir.join("node.crt").exists() {
        ca.issue(OPERATOR, "operator")?.save(&dir)?;
    }
    let lines: String = seeds.iter().map(|s| format!("{s}\n")).collect();
    write_whole(&dir.join(SEEDS_FILE), lines.as_bytes(), 0o600)
}

/// The operator's identity and where the coordinators are.
pub fn load_operator(data: &Path) -> Result<(Identity, Vec<SocketAddr>)> {
    let dir: PathBuf = data.join(OPERATOR_DIR);
    let identity = Identity::load(&dir).with_context(|| {
        format!(
            "no operator identity in {}; give the directory of `verbund up` or `verbund init` with --data",
            dir.display()
        )
    })?;
    let path = dir.join(SEEDS_FILE);
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let seeds = text
        .lines()
        .map(|line| {
            line.trim()
                .parse()
                .with_context(|| format!("{}: {line:?} is no address", path.display()))
        })
        .collect::<Result<_>>()?;
    Ok((identity, seeds))
}

fn read_key(path: &Path) -> Result<[u8; 32]> {
    let bytes = fs::read(path)
        .with_context(|| format!("cannot read the cluster key {}", path.display()))?;
    let got = bytes.len();
    bytes
        .try_into()
        .ok()
        .with_context(|| format!("{}: expected 32 bytes, got {got}", path.display()))
}
