//! One store group on this node: its replica, what is derived from it, and how commands are proposed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coordinator::ids::{NodeId, TenantId};
use coordinator::replication::{self, Replica, StateMachine, Txn, View};
use tokio::sync::Notify;

use crate::crypto::{Key, Sealed};
use crate::index::follow::{Change, Follower};
use crate::store::machine::{self, State};
use crate::store::reader::{OpenDocument, ReadError, Reader};
use crate::store::{Command, DocumentId, Entry, Error, Reply, keys};

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    NotLeader {
        leader: Option<NodeId>,
    },
    /// Asking again may help; it may have taken effect.
    Again {
        why: String,
    },
    /// This replica cannot, another one may; it may have taken effect.
    Elsewhere {
        why: String,
        /// What fails here is that the disk is full.
        disk_full: bool,
    },
    Final(Error),
}

impl Refusal {
    /// What is wrong on this node alone.
    pub fn elsewhere(why: impl Into<String>) -> Self {
        Self::Elsewhere {
            why: why.into(),
            disk_full: false,
        }
    }
}

impl From<replication::Error> for Refusal {
    fn from(error: replication::Error) -> Self {
        use replication::Error as E;
        match error {
            E::NotLeader { leader } => Self::NotLeader { leader },
            E::Overloaded | E::Interrupted | E::Timeout => Self::Again {
                why: error.to_string(),
            },
            E::Storage { ref why } => Self::Elsewhere {
                disk_full: says_full(why),
                why: error.to_string(),
            },
            E::Closed | E::Format { .. } | E::Locked { .. } | E::Foreign { .. } => {
                Self::elsewhere(error.to_string())
            }
            E::TooLarge { bytes } => Self::Final(Error::TooLarge {
                limit: replication::MAX_COMMAND_BYTES as u64,
                got: bytes as u64,
            }),
            E::Config { .. } => Self::Final(Error::unavailable(error.to_string())),
        }
    }
}

/// A replica also stands aside for other reasons (a bad block, a panic): only the system's own words mean a full disk.
fn says_full(why: &str) -> bool {
    ["No space left on device", "Disk quota exceeded"]
        .iter()
        .any(|words| why.contains(words))
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl From<ReadError> for Refusal {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::NotFound => Self::Final(Error::NotFound),
            ReadError::Replica(error) => error.into(),
            ReadError::Unreadable(why) => Self::elsewhere(why),
        }
    }
}

impl From<crate::crypto::OpenError> for Refusal {
    fn from(error: crate::crypto::OpenError) -> Self {
        Self::elsewhere(error.to_string())
    }
}

/// The state machine with what follows it.
pub struct GroupMachine {
    pub follower: Follower,
    /// Wakes ingestion.
    pub queued: Notify,
    /// Wakes the removal of what deleted collections left.
    pub garbage: Notify,
    /// Wakes the compaction of the key table, for these tenants.
    pub erased: Notify,
    /// Whether keys were destroyed in this run, or maybe in an earlier one.
    erased_tenants: Mutex<BTreeMap<TenantId, bool>>,
}

impl GroupMachine {
    /// Starts the indexes' thread.
    pub fn new(root: Key) -> std::io::Result<Self> {
        Ok(Self {
            follower: Follower::start(root)?,
            queued: Notify::new(),
            garbage: Notify::new(),
            erased: Notify::new(),
            erased_tenants: Mutex::new(BTreeMap::new()),
        })
    }

    /// Tenants with destroyed keys since the last call, each with whether that happened in this run, under views that are
    /// open now.
    pub fn take_erased(&self) -> BTreeMap<TenantId, bool> {
        std::mem::take(&mut self.erased())
    }

    fn erased(&self) -> MutexGuard<'_, BTreeMap<TenantId, bool>> {
        self.erased_tenants
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn erase(&self, tenant: &TenantId) {
        self.erased().insert(tenant.clone(), true);
        self.erased.notify_one();
    }

    /// What an earlier run destroyed may still be in the files of any tenant's key table.
    fn erase_earlier(&self, view: &View) {
        for entry in view.scan_prefix(keys::TENANTS) {
            match entry {
                Ok((key, _)) => {
                    if let Some(tenant) = keys::tenant_of(&key) {
                        self.erased().entry(tenant).or_insert(false);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "key tables are not compacted before the next start");
                    break;
                }
            }
        }
        self.erased.notify_one();
    }
}

struct TxnState<'a, 'b>(&'a mut Txn<'b>);

impl State for TxnState<'_, '_> {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.get(key)
    }

    fn put(&mut self, key: &[u8], value: &[u8]) {
        self.0.put(key, value);
    }

    fn delete(&mut self, key: &[u8]) {
        self.0.delete(key);
    }

    fn delete_prefix(&mut self, prefix: &[u8]) {
        self.0.delete_prefix(prefix);
    }

    fn keys(&self, prefix: &[u8]) -> Vec<Vec<u8>> {
        self.0
            .scan_prefix(prefix)
            .into_iter()
            .map(|(key, _)| key)
            .collect()
    }
}

impl StateMachine for GroupMachine {
    fn apply(&self, _index: u64, command: &[u8], txn: &mut Txn<'_>) -> Vec<u8> {
        machine::apply_bytes(command, &mut TxnState(txn))
    }

    fn applied(&self, _index: u64, command: &[u8], view: &View) {
        let Ok(Entry { tenant, command }) = postcard::from_bytes::<Entry>(command) else {
            return;
        };
        match command {
            Command::CommitDocument { .. } => self.queued.notify_one(),
            Command::Ready { document, .. } => {
                self.follower.push(Change::Ready { tenant, document }, view)
            }
            Command::DeleteDocument { document } => {
                self.erase(&tenant);
                self.follower
                    .push(Change::Deleted { tenant, document }, view);
            }
            Command::DeleteCollection { id } => {
                self.erase(&tenant);
                self.garbage.notify_one();
                self.follower.push(
                    Change::CollectionDeleted {
                        tenant,
                        collection: id,
                    },
                    view,
                );
            }
            _ => {}
        }
    }

    fn reloaded(&self, view: &View) {
        self.follower.push(Change::Reloaded, view);
        self.erase_earlier(view);
        self.queued.notify_one();
    }
}

/// A group on this node.
pub struct Group {
    pub replica: Replica,
    pub machine: Arc<GroupMachine>,
    pub root: Key,
    pub node: NodeId,
    /// The replica's folder.
    pub dir: PathBuf,
    /// Free space that an upload must leave.
    pub min_free_bytes: AtomicU64,
}

impl Group {
    /// Has a command committed and applied here.
    pub async fn propose(&self, tenant: &TenantId, command: Command) -> Result<Reply, Refusal> {
        let entry = machine::encode(&Entry {
            tenant: tenant.clone(),
            command,
        });
        let reply = self.replica.propose(entry).await?;
        postcard::from_bytes(&reply)
            .map_err(|_| Error::unavailable("the store's reply is of another version").into())
    }

    /// As [`Group::propose`] for commands whose only good reply is `Done`.
    pub async fn change(&self, tenant: &TenantId, command: Command) -> Result<(), Refusal> {
        match self.propose(tenant, command).await? {
            Reply::Done | Reply::TenantKey(_) => Ok(()),
            Reply::NotFound => Err(Error::NotFound.into()),
            Reply::Exists => Err(Error::Exists {
                what: "a collection of this name".into(),
            }
            .into()),
            Reply::Stale => Err(Error::invalid(
                "document",
                "it is finished or being read by another node",
            )
            .into()),
            Reply::Incomplete => {
                Err(Error::invalid("document", "parts of it have not come; send it again").into())
            }
            // Every replica would answer so, hence no use in asking elsewhere.
            Reply::Malformed => Err(Error::unavailable(
                "the nodes run different versions; upgrade all of them",
            )
            .into()),
        }
    }

    /// A view that shows everything acknowledged before.
    pub async fn fresh_view(&self) -> Result<View, Refusal> {
        Ok(self.replica.read_index().await?)
    }

    /// The tenant's key; made when it has none.
    pub async fn tenant_key(&self, tenant: &TenantId) -> Result<Key, Refusal> {
        if let Some(key) = Reader::new(&self.replica.local_view(), &self.root).tenant_key(tenant)? {
            return Ok(key);
        }
        let place = keys::tenant_key(tenant);
        let wrapped_key = self.root.wrap(&place, &Key::generate());
        match self
            .propose(tenant, Command::EnsureTenant { wrapped_key })
            .await?
        {
            Reply::TenantKey(stored) => Ok(self.root.unwrap_key(&place, &stored)?),
            other => Err(Error::unavailable(format!(
                "the store gave no key for the tenant ({other:?})"
            ))
            .into()),
        }
    }

    /// A document with its key. Looks again with everything acknowledged when this replica does not have it, since a new
    /// leader may not have applied all of it yet.
    pub async fn open_document(
        &self,
        tenant: &TenantId,
        id: DocumentId,
    ) -> Result<(View, OpenDocument), Refusal> {
        let view = self.replica.local_view();
        match Reader::new(&view, &self.root).open(tenant, id) {
            Ok(open) => Ok((view, open)),
            Err(ReadError::NotFound) => {
                let view = self.fresh_view().await?;
                let open = Reader::new(&view, &self.root).open(tenant, id)?;
                Ok((view, open))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Seals a value for a place with the document's key.
    pub fn seal_chunk(
        tenant: &TenantId,
        open: &OpenDocument,
        ordinal: u32,
        plain: &[u8],
    ) -> Sealed {
        open.key.seal(&keys::chunk(tenant, open.id, ordinal), plain)
    }

    /// Before a check that only the leader's own state or disk can answer.
    pub fn check_leads(&self) -> Result<(), Refusal> {
        let status = self.replica.status();
        if status.is_leader {
            return Ok(());
        }
        Err(match status.failure {
            Some(why) => Refusal::Elsewhere {
                disk_full: says_full(&why),
                why,
            },
            None => Refusal::NotLeader {
                leader: status.leader,
            },
        })
    }

    /// [`Error::DiskFull`] when storing `bytes` would leave less than the reserve.
    pub fn check_space(&self, bytes: u64) -> Result<(), Error> {
        let Some(free) = free_bytes(&self.dir) else {
            return Ok(());
        };
        // Once in the log and once in the state, and compaction rewrites before it removes.
        let needed = bytes
            .saturating_mul(3)
            .saturating_add(self.min_free_bytes.load(Ordering::Relaxed));
        if free >= needed {
            return Ok(());
        }
        Err(Error::DiskFull {
            why: format!(
                "{} has {} MB free, {} MB are needed",
                self.dir.display(),
                free >> 20,
                needed >> 20
            ),
        })
    }
}

/// Bytes free for this process on the file system of `dir`; `None` where it does not say.
fn free_bytes(dir: &std::path::Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes()).ok()?;
    let mut stats = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is a NUL-terminated string and `stats` has room for one `statvfs`, which the call fills when it returns 0.
    let stats = unsafe {
        if libc::statvfs(path.as_ptr(), stats.as_mut_ptr()) != 0 {
            return None;
        }
        stats.assume_init()
    };
    Some((stats.f_bavail as u64).saturating_mul(stats.f_frsize as u64))
}
