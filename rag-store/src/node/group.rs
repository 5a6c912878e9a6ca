//! One store group on this node: its replica, what is derived from it, and how commands are proposed.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use coordinator::ids::{NodeId, TenantId};
use coordinator::replication::{self, Replica, StateMachine, Txn, View};
use tokio::sync::Notify;

use crate::crypto::{Key, Sealed};
use crate::index::follow::{Change, Follower};
use crate::store::machine::{self, State};
use crate::store::reader::{OpenDocument, Reader};
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
    Final(Error),
}

impl From<replication::Error> for Refusal {
    fn from(error: replication::Error) -> Self {
        use replication::Error as E;
        match error {
            E::NotLeader { leader } => Self::NotLeader { leader },
            E::Storage { why } => Self::Final(Error::DiskFull { why }),
            E::Overloaded | E::Interrupted | E::Timeout | E::Closed => Self::Again {
                why: error.to_string(),
            },
            E::Format { .. }
            | E::Locked { .. }
            | E::Foreign { .. }
            | E::Config { .. }
            | E::TooLarge { .. } => Self::Final(Error::unavailable(error.to_string())),
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl From<crate::crypto::OpenError> for Refusal {
    fn from(error: crate::crypto::OpenError) -> Self {
        Self::Final(error.into())
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
    erased_tenants: Mutex<BTreeSet<TenantId>>,
}

impl GroupMachine {
    /// Starts the indexes' thread.
    pub fn new(root: Key) -> std::io::Result<Self> {
        Ok(Self {
            follower: Follower::start(root)?,
            queued: Notify::new(),
            garbage: Notify::new(),
            erased: Notify::new(),
            erased_tenants: Mutex::new(BTreeSet::new()),
        })
    }

    /// Tenants with destroyed keys since the last call.
    pub fn take_erased(&self) -> BTreeSet<TenantId> {
        std::mem::take(
            &mut self
                .erased_tenants
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    pub fn erase(&self, tenant: &TenantId) {
        self.erased_tenants
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(tenant.clone());
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
    pub min_free_bytes: u64,
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
            Err(Error::NotFound) => {
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

    /// [`Error::DiskFull`] when storing `bytes` would leave less than the reserve.
    pub fn check_space(&self, bytes: u64) -> Result<(), Error> {
        let Some(free) = free_bytes(&self.dir) else {
            return Ok(());
        };
        // Once in the log and once in the state, and compaction rewrites before it removes.
        let needed = bytes.saturating_mul(3).saturating_add(self.min_free_bytes);
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
