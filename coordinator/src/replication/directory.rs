//! The replica's directory: whose it is, in which format, and that nobody else uses it.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::Error;
use crate::clock::{Duration, monotonic};
use crate::ids::{NodeId, RaftGroupId};

/// What this program writes and reads. A new number needs a migration, or a refusal that names the remedy.
const FORMAT: &str = "verbund-replica 1";

/// Who has just ended, or ends a last reading, holds the lock a moment longer; who works holds it for good.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_LOOK: Duration = Duration::from_millis(20);

const FORMAT_FILE: &str = "FORMAT";
const LOCK_FILE: &str = "LOCK";
const DB_DIR: &str = "db";

/// A directory that is checked and locked.
pub(super) struct Directory {
    path: PathBuf,
    /// Its lock ends with the process, however that ends.
    _lock: File,
}

impl Directory {
    pub(super) fn open(path: &Path, group: RaftGroupId, node: NodeId) -> Result<Self, Error> {
        fs::create_dir_all(path).map_err(|e| storage(path, &e))?;
        let lock_path = path.join(LOCK_FILE);
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(|e| storage(&lock_path, &e))?;
        let patience = monotonic() + LOCK_PATIENCE;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if monotonic() < patience => {
                    std::thread::sleep(LOCK_LOOK);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Locked {
                        dir: path.to_owned(),
                    });
                }
                Err(TryLockError::Error(e)) => return Err(storage(&lock_path, &e)),
            }
        }
        check_format(path, group, node)?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    pub(super) fn db(&self) -> PathBuf {
        self.path.join(DB_DIR)
    }
}

/// The file has two lines: the format, and whose data it is.
fn check_format(dir: &Path, group: RaftGroupId, node: NodeId) -> Result<(), Error> {
    let path = dir.join(FORMAT_FILE);
    let owner = format!("Raft group {group} on node {node}");
    match fs::read(&path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let mut lines = text.lines();
            let found = lines.next().unwrap_or_default().trim();
            if found != FORMAT {
                return Err(Error::Format {
                    dir: dir.to_owned(),
                    found: found.chars().take(80).collect(),
                    expected: FORMAT.to_owned(),
                    remedy: "start the version of verbund that wrote it, or give this one an empty directory",
                });
            }
            match lines.next().map(str::trim) {
                Some(found) if found == owner => Ok(()),
                found => Err(Error::Foreign {
                    dir: dir.to_owned(),
                    found: found.unwrap_or("nobody").chars().take(80).collect(),
                    expected: owner,
                }),
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            if dir.join(DB_DIR).exists() {
                return Err(Error::Format {
                    dir: dir.to_owned(),
                    found: "no FORMAT file".to_owned(),
                    expected: FORMAT.to_owned(),
                    remedy: "restore the FORMAT file from a backup, or give this node an empty directory",
                });
            }
            let write = || {
                let part = path.with_extension("part");
                let mut file = File::create(&part)?;
                writeln!(file, "{FORMAT}\n{owner}")?;
                file.sync_all()?;
                fs::rename(&part, &path)?;
                File::open(dir)?.sync_all()
            };
            write().map_err(|e| storage(&path, &e))
        }
        Err(e) => Err(storage(&path, &e)),
    }
}

fn storage(path: &Path, error: &std::io::Error) -> Error {
    Error::Storage {
        why: format!("{}: {error}", path.display()),
    }
}
