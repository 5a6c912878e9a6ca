//! The directory of a cluster on one machine: made on the first start, checked and found again on every other.
//!
//!     DIR/FORMAT          version of this layout
//!     DIR/lock            held while `verbund up` runs
//!     DIR/ca/             the cluster's CA and cluster key
//!     DIR/operator/       the operator's identity and where the coordinators are
//!     DIR/keys.json       the demo tenant's API keys (0600)
//!     DIR/<name>/         one node: node.toml, identity, replicas, log
//!     DIR/demo.json       address, keys and processes, for programs

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
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
const GATEWAY: u64 = 4;
const CLUSTER_NAME: &str = "verbund-demo";
/// Open answers get so long when a demo cluster stops; whoever presses Ctrl-C is waiting.
const DRAIN_S: u64 = 2;
/// The tenant of the demo.
pub const DEMO_TENANT: &str = "demo";

/// An open cluster directory; nobody else can open it until this is dropped.
pub struct Layout {
    pub dir: PathBuf,
    pub members: Vec<Member>,
    pub keys: Keys,
    pub fresh: bool,
    _lock: File,
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

impl Layout {
    /// Opens `dir`, making what is missing for `ranks` workers and a gateway at `listen`.
    ///
    /// # Errors
    /// When the directory is of another format, in use, or cannot be written.
    pub fn open(dir: &Path, listen: SocketAddr, ranks: u32, share: RankShare) -> Result<Layout> {
        check_format(dir)?;
        fs::create_dir_all(dir)
            .with_context(|| format!("cannot make the data directory {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        let lock = lock(&dir)?;
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
        let members = planned.members;
        credentials::save_operator(&dir, &secrets.ca, &seeds)?;
        let keys = load_or_make_keys(&dir.join("keys.json"))?;
        write_whole(&dir.join("FORMAT"), format!("{FORMAT}\n").as_bytes(), 0o644)?;
        Ok(Layout {
            dir,
            members,
            keys,
            fresh,
            _lock: lock,
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
        let name = format!("worker{}", at + 1);
        let existing = self.existing(&name)?;
        let listen = existing
            .as_ref()
            .map_or_else(free_udp, |c| Ok(c.node.listen))?;
        let data = existing
            .and_then(|c| c.worker.data_listen)
            .map_or_else(free_tcp, Ok)?;
        let mut config = self.config(&name, &[Role::Worker], listen);
        config.cluster.seeds = seeds.to_vec();
        config.worker = WorkerSection {
            data_listen: Some(data),
            data_advertise: None,
            threads: share.threads,
            memory_bytes: share.memory_bytes,
            read_bytes_per_s: share.read_bytes_per_s,
        };
        self.add(NodeId(FIRST_WORKER + at), "worker", config)
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

/// Replaces `path` as a whole: a reader sees the old content or the new one.
pub fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
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
