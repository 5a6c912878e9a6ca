//! The directory of a cluster on one machine: made on the first start, checked and found again on every other.
//!
//!     DIR/FORMAT          version of this layout
//!     DIR/lock            held while `verbund up` runs
//!     DIR/ca/             the cluster's CA and cluster key
//!     DIR/operator/       the operator's identity and where the coordinators are
//!     DIR/keys.json       the demo tenant's API keys (0600)
//!     DIR/<name>/         one node: node.toml, identity, replicas, log
//!     DIR/demo.json       address, keys and processes, for programs
//!     DIR/served          the models that the last start asked for
//!     DIR/uploaded        the example documents that were uploaded once
//!     DIR/removed         ids of workers that left for good; an id is never given twice

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use coordinator::identity::Identity;
use coordinator::ids::{NodeId, Role, TenantId};
use gateway::GatewayConfig;
use serde::{Deserialize, Serialize};

use crate::config::{
    ClusterSection, LogFormat, LogSection, NodeConfig, NodeSection, WorkerSection,
};
use crate::credentials::{self, ClusterSecrets};

const FORMAT: &str = "verbund 1";
/// Coordinators and stores: the fewest that survive the death of one.
const CONTROL_NODES: u64 = 3;
/// Workers have node ids from here on, so that more can be added later.
const FIRST_WORKER: u64 = 11;
/// The command line takes no more ranks.
pub const MAX_WORKERS: u64 = 64;
const GATEWAY: u64 = 4;
const CLUSTER_NAME: &str = "verbund-demo";
/// Open answers get so long when a demo cluster stops; whoever presses Ctrl-C is waiting.
const DRAIN_S: u64 = 2;
/// The tenant of the demo.
pub const DEMO_TENANT: &str = "demo";

/// A cluster directory that nobody else can claim until this is dropped.
pub struct Claim {
    pub dir: PathBuf,
    _lock: File,
}

/// An open cluster directory.
pub struct Layout {
    pub dir: PathBuf,
    pub members: Vec<Member>,
    /// Workers of an earlier start with more ranks.
    pub former: Vec<Former>,
    pub keys: Keys,
    pub fresh: bool,
    _claim: Claim,
}

/// A worker that is no member any more.
pub struct Former {
    pub id: NodeId,
    pub name: String,
    pub dir: PathBuf,
}

/// One process of the cluster.
#[derive(Clone)]
pub struct Member {
    pub name: String,
    pub role: &'static str,
    pub dir: PathBuf,
}

/// The demo tenant's keys.
#[derive(Clone, Serialize, Deserialize)]
pub struct Keys {
    pub api_key: String,
    pub admin_api_key: String,
}

/// What each rank may use.
#[derive(Clone, Copy)]
pub struct RankShare {
    pub threads: u32,
    pub memory_bytes: u64,
    pub read_bytes_per_s: u64,
}

impl Claim {
    /// Claims `dir`, making it if it is not there.
    ///
    /// # Errors
    /// When the directory is of another format, in use, or cannot be written.
    pub fn take(dir: &Path) -> Result<Claim> {
        check_format(dir)?;
        fs::create_dir_all(dir)
            .with_context(|| format!("cannot make the data directory {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        let lock = lock(&dir)?;
        Ok(Claim { dir, _lock: lock })
    }
}

impl Layout {
    /// Opens what is claimed, making what is missing for `ranks` workers and a gateway at `listen`.
    ///
    /// # Errors
    /// When something in the directory is damaged or cannot be written.
    pub fn open(claim: Claim, listen: SocketAddr, ranks: u32, share: RankShare) -> Result<Layout> {
        let dir = claim.dir.clone();
        let fresh = !dir.join("FORMAT").exists();
        let secrets = if dir.join("ca/ca.key").exists() {
            ClusterSecrets::load(&dir.join("ca"))?
        } else {
            let secrets = ClusterSecrets::create(CLUSTER_NAME)?;
            secrets.save(&dir.join("ca"))?;
            secrets
        };
        let mut planned = Planned {
            dir: &dir,
            secrets: &secrets,
            members: Vec::new(),
        };
        let control = planned.control_nodes()?;
        let seeds: Vec<_> = control.values().copied().collect();
        for at in 0..u64::from(ranks) {
            planned.worker(at, &seeds, share)?;
        }
        planned.gateway(listen, &seeds)?;
        let former = planned.former(ranks)?;
        let members = planned.members;
        credentials::save_operator(&dir, &secrets.ca, &seeds)?;
        let keys = load_or_make_keys(&dir.join("keys.json"))?;
        write_whole(&dir.join("FORMAT"), format!("{FORMAT}\n").as_bytes(), 0o644)?;
        Ok(Layout {
            dir,
            members,
            former,
            keys,
            fresh,
            _claim: claim,
        })
    }
}

/// Looks without writing: a directory of another version stays as it is.
fn check_format(dir: &Path) -> Result<()> {
    match fs::read_to_string(dir.join("FORMAT")) {
        Ok(found) if found.trim() == FORMAT => Ok(()),
        Ok(found) => bail!(
            "the data directory {} has format {:?}, this program reads {FORMAT:?}; use the version that wrote it, or \
             another directory (--data)",
            dir.display(),
            found.trim()
        ),
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(why) => {
            Err(why).with_context(|| format!("cannot read {}", dir.join("FORMAT").display()))
        }
    }
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    // SAFETY: the descriptor is open for the whole call; flock touches no memory of ours.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        bail!(
            "the data directory {} is in use by another `verbund up`; stop that one, or use another directory (--data)",
            dir.display()
        );
    }
    Ok(file)
}

/// The members as they are made or found.
struct Planned<'a> {
    dir: &'a Path,
    secrets: &'a ClusterSecrets,
    members: Vec<Member>,
}

impl Planned<'_> {
    fn control_nodes(&mut self) -> Result<BTreeMap<NodeId, SocketAddr>> {
        let names: Vec<_> = (1..=CONTROL_NODES)
            .map(|id| (NodeId(id), format!("node{id}")))
            .collect();
        // Addresses are chosen once; members know each other by them.
        let mut bootstrap = BTreeMap::new();
        for (id, name) in &names {
            let addr = match self.existing(name)? {
                Some(config) => config.node.listen,
                None => free_udp()?,
            };
            bootstrap.insert(*id, addr);
        }
        for (id, name) in names {
            let mut config = self.config(&name, &[Role::Coordinator, Role::Store], bootstrap[&id]);
            config.cluster.bootstrap = bootstrap
                .iter()
                .map(|(id, addr)| (id.to_string(), *addr))
                .collect();
            self.add(id, "coordinator+store", config)?;
        }
        Ok(bootstrap)
    }

    fn worker(&mut self, at: u64, seeds: &[SocketAddr], share: RankShare) -> Result<()> {
        let name = worker_name(at);
        let id = self.worker_id(&name)?;
        let existing = self.existing(&name)?;
        let listen = existing
            .as_ref()
            .map_or_else(free_udp, |c| Ok(c.node.listen))?;
        let kept = |address: fn(&NodeConfig) -> Option<SocketAddr>| {
            let address = existing.as_ref().and_then(address);
            address
                .filter(|addr| TcpListener::bind(addr).is_ok())
                .map_or_else(free_tcp, Ok)
        };
        let (data, admin) = (
            kept(|c| c.worker.data_listen)?,
            kept(|c| c.node.admin_listen)?,
        );
        let mut config = self.config(&name, &[Role::Worker], listen);
        // The engine's metrics are a worker's; the gateway shows only its own.
        config.node.admin_listen = Some(admin);
        config.cluster.seeds = seeds.to_vec();
        config.worker = WorkerSection {
            data_listen: Some(data),
            threads: share.threads,
            memory_bytes: share.memory_bytes,
            read_bytes_per_s: share.read_bytes_per_s,
            ..WorkerSection::default()
        };
        self.add(id, "worker", config)
    }

    /// The id that the worker has, or one that no worker ever had: the cluster refuses for good an id that it removed.
    fn worker_id(&self, name: &str) -> Result<NodeId> {
        if let Some(id) = identity_of(&self.dir.join(name))? {
            return Ok(id);
        }
        let mut given = removed(self.dir);
        for at in 0..MAX_WORKERS {
            given.extend(identity_of(&self.dir.join(worker_name(at)))?);
        }
        (FIRST_WORKER..u64::MAX)
            .map(NodeId)
            .find(|id| !given.contains(id))
            .context("no node id is left")
    }

    fn former(&self, ranks: u32) -> Result<Vec<Former>> {
        let mut former = Vec::new();
        for name in (u64::from(ranks)..MAX_WORKERS).map(worker_name) {
            let dir = self.dir.join(&name);
            if let Some(id) = identity_of(&dir)? {
                former.push(Former { id, name, dir });
            }
        }
        Ok(former)
    }

    fn gateway(&mut self, listen: SocketAddr, seeds: &[SocketAddr]) -> Result<()> {
        let existing = self.existing("gateway")?;
        let transport = existing.map_or_else(free_udp, |c| Ok(c.node.listen))?;
        let mut config = self.config("gateway", &[Role::Gateway], transport);
        config.cluster.seeds = seeds.to_vec();
        config.gateway.listen = listen;
        config.gateway.operator_tenant = Some(TenantId::new(DEMO_TENANT)?);
        self.add(NodeId(GATEWAY), "gateway", config)
    }

    fn config(&self, name: &str, roles: &[Role], listen: SocketAddr) -> NodeConfig {
        let data = self.dir.join(name);
        NodeConfig {
            node: NodeSection {
                name: name.to_owned(),
                roles: BTreeSet::from_iter(roles.iter().copied()),
                listen,
                advertise: None,
                admin_listen: None,
                data: data.clone(),
            },
            cluster: ClusterSection {
                name: CLUSTER_NAME.to_owned(),
                ..ClusterSection::default()
            },
            worker: WorkerSection::default(),
            gateway: GatewayConfig {
                drain_s: DRAIN_S,
                ..GatewayConfig::default()
            },
            log: LogSection {
                format: LogFormat::Json,
                file: Some(data.join("log")),
                ..LogSection::default()
            },
        }
    }

    /// The addresses of an earlier start are kept as long as nobody else has taken them.
    fn existing(&self, name: &str) -> Result<Option<NodeConfig>> {
        let path = self.dir.join(name).join("node.toml");
        if !path.exists() {
            return Ok(None);
        }
        let config = NodeConfig::parse(&fs::read_to_string(&path)?, &path, std::iter::empty())?;
        Ok(Some(config).filter(|c| UdpSocket::bind(c.node.listen).is_ok()))
    }

    fn add(&mut self, id: NodeId, role: &'static str, config: NodeConfig) -> Result<()> {
        let dir = config.node.data.clone();
        let identity = dir.join(credentials::IDENTITY_DIR);
        if !identity.join("node.crt").exists() {
            self.secrets
                .issue(id, &config.node.name, config.node.roles.iter().copied())?
                .save(&dir)?;
        }
        write_whole(&dir.join("node.toml"), config.to_toml().as_bytes(), 0o600)?;
        self.members.push(Member {
            name: config.node.name.clone(),
            role,
            dir,
        });
        Ok(())
    }
}

fn worker_name(at: u64) -> String {
    format!("worker{}", at + 1)
}

/// The id in a node's certificate, if it has one yet.
fn identity_of(dir: &Path) -> Result<Option<NodeId>> {
    let identity = dir.join(credentials::IDENTITY_DIR);
    if !identity.join("node.crt").exists() {
        return Ok(None);
    }
    Ok(Some(Identity::load(&identity)?.node_id))
}

/// Workers that left for good.
fn removed(dir: &Path) -> BTreeSet<NodeId> {
    let text = fs::read_to_string(dir.join("removed")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Remembers that `id` left, before it does.
pub fn note_removed(dir: &Path, id: NodeId) -> Result<()> {
    let mut ids = removed(dir);
    ids.insert(id);
    let lines: String = ids.iter().map(|id| format!("{id}\n")).collect();
    write_whole(&dir.join("removed"), lines.as_bytes(), 0o600)
}

fn load_or_make_keys(path: &Path) -> Result<Keys> {
    if path.exists() {
        let text = fs::read(path)?;
        return serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged", path.display()));
    }
    let key = || {
        format!(
            "{}{}",
            coordinator::control::API_KEY_PREFIX,
            hex(&coordinator::control::random_secret())
        )
    };
    let keys = Keys {
        api_key: key(),
        admin_api_key: key(),
    };
    write_whole(path, &serde_json::to_vec_pretty(&keys)?, 0o600)?;
    Ok(keys)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Replaces `path` as a whole: a reader sees the old content or the new one. The same content is not written again, so
/// that a cluster starts on a full disk too.
pub fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    if fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    let part = path.with_extension("part");
    let write = || -> std::io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(mode)
            .open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn free_udp() -> Result<SocketAddr> {
    Ok(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|s| s.local_addr())?)
}

fn free_tcp() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|s| s.local_addr())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARE: RankShare = RankShare {
        threads: 1,
        memory_bytes: 1 << 30,
        read_bytes_per_s: 1,
    };

    fn open(dir: &Path, ranks: u32) -> Layout {
        let claim = Claim::take(dir).expect("claimed");
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
        Layout::open(claim, listen, ranks, SHARE).expect("opened")
    }

    fn config_of(dir: &Path, name: &str) -> NodeConfig {
        let path = dir.join(name).join("node.toml");
        let text = fs::read_to_string(&path).expect("node.toml");
        NodeConfig::parse(&text, &path, std::iter::empty()).expect("configuration")
    }

    #[test]
    fn addresses_are_kept_unless_somebody_else_took_them() {
        let dir = tempfile::tempdir().expect("directory");
        drop(open(dir.path(), 2));
        let before = ["node1", "worker1", "worker2"].map(|name| config_of(dir.path(), name));
        let taken_tcp = before[1].worker.data_listen.expect("data_listen");
        let _tcp = TcpListener::bind(taken_tcp).expect("the worker's TCP port");
        let _udp = UdpSocket::bind(before[2].node.listen).expect("the worker's UDP port");
        drop(open(dir.path(), 2));
        let after = ["node1", "worker1", "worker2"].map(|name| config_of(dir.path(), name));
        assert_eq!(after[0], before[0]);
        assert_eq!(after[1].node.listen, before[1].node.listen);
        assert_ne!(after[1].worker.data_listen, Some(taken_tcp));
        assert_ne!(after[2].node.listen, before[2].node.listen);
    }

    #[test]
    fn a_worker_that_left_for_good_never_gives_its_id_to_another() {
        let dir = tempfile::tempdir().expect("directory");
        drop(open(dir.path(), 3));
        let layout = open(dir.path(), 1);
        let former: Vec<_> = layout.former.iter().map(|f| (&*f.name, f.id.0)).collect();
        assert_eq!(former, [("worker2", 12), ("worker3", 13)]);
        for former in &layout.former {
            note_removed(&layout.dir, former.id).expect("noted");
            fs::remove_dir_all(&former.dir).expect("removed");
        }
        drop(layout);
        let layout = open(dir.path(), 3);
        assert!(layout.former.is_empty());
        let id_of = |name| identity_of(&layout.dir.join(name)).expect("identity");
        let ids = ["worker1", "worker2", "worker3"].map(id_of);
        assert_eq!(ids, [11, 14, 15].map(|id| Some(NodeId(id))));
    }

    #[test]
    fn a_directory_is_claimed_once() {
        let dir = tempfile::tempdir().expect("directory");
        let claim = Claim::take(dir.path()).expect("claimed");
        let Err(error) = Claim::take(dir.path()) else {
            panic!("claimed twice");
        };
        assert!(error.to_string().contains("in use"), "{error}");
        drop(claim);
        Claim::take(dir.path()).expect("free again");
    }
}
