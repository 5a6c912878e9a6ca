//! `verbund init` and `verbund join`: a node's directory, made once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use coordinator::identity::{self, JoinRequest, JoinToken, PendingIdentity};
use coordinator::ids::{NodeId, Role};
use serde_json::json;

use crate::config::{ClusterSection, LogSection, NodeConfig, NodeSection, WorkerSection};
use crate::credentials::{self, ClusterSecrets, IDENTITY_DIR, NodeSecrets};
use crate::machine;
use crate::operator::print_json;
use crate::up::write_whole;

/// What `init` and `join` share.
pub struct NewNode {
    pub data: PathBuf,
    pub name: String,
    pub roles: BTreeSet<Role>,
    pub listen: SocketAddr,
    pub advertise: Option<SocketAddr>,
}

impl NewNode {
    fn config(&self, cluster: ClusterSection) -> NodeConfig {
        NodeConfig {
            node: NodeSection {
                name: self.name.clone(),
                data: self.data.clone(),
                roles: self.roles.clone(),
                listen: self.listen,
                advertise: self.advertise,
                admin_listen: None,
            },
            cluster,
            worker: WorkerSection::default(),
            gateway: Default::default(),
            log: LogSection::default(),
        }
    }

    fn advertised(&self) -> Result<SocketAddr> {
        let addr = self.advertise.unwrap_or(self.listen);
        if addr.ip().is_unspecified() || addr.port() == 0 {
            bail!("--advertise: expected the address and port that other nodes dial, got {addr}");
        }
        Ok(addr)
    }

    /// Nothing is overwritten: an identity that is lost cannot be made again.
    fn must_be_new(&self) -> Result<()> {
        let config = self.data.join("node.toml");
        if config.exists() || self.data.join(IDENTITY_DIR).exists() {
            bail!(
                "{} holds a node already; choose another directory with --data",
                self.data.display()
            );
        }
        Ok(())
    }

    fn write(&self, config: &NodeConfig) -> Result<PathBuf> {
        let path = self.data.join("node.toml");
        write_whole(&path, config.to_toml().as_bytes(), 0o600)?;
        Ok(path)
    }
}

/// Makes a new cluster whose first node this is.
pub fn init(cluster: &str, mut node: NewNode, as_json: bool) -> Result<()> {
    node.must_be_new()?;
    node.roles.insert(Role::Coordinator);
    let addr = node.advertised()?;
    let secrets = ClusterSecrets::create(cluster)?;
    let id = NodeId(1);
    let bootstrap = BTreeMap::from([(id.to_string(), addr)]);
    let config = node.config(ClusterSection {
        name: cluster.to_owned(),
        seeds: vec![addr],
        bootstrap,
    });
    secrets
        .issue(id, &node.name, node.roles.iter().copied())?
        .save(&node.data)?;
    credentials::save_operator(&node.data, &secrets.ca, &[addr])?;
    let path = node.write(&config)?;
    if as_json {
        return print_json(
            &json!({"cluster": cluster, "node": id, "config": path.display().to_string()}),
        );
    }
    println!("Cluster {cluster} made; this machine is node 1. Next:");
    println!(
        "  start it           verbund node --config {}",
        path.display()
    );
    println!(
        "  let a node join    verbund token --data {} --roles worker",
        node.data.display()
    );
    println!(
        "Keep {} safe: whoever reads it can let nodes in.",
        node.data.join(IDENTITY_DIR).display()
    );
    Ok(())
}

/// Joins a running cluster with a token.
pub async fn join(token: &JoinToken, node: NewNode, as_json: bool) -> Result<()> {
    node.must_be_new()?;
    let addr = node.advertised()?;
    let pending = PendingIdentity::new(&node.name)?;
    let request = JoinRequest {
        secret: token.secret,
        csr_pem: pending.csr_pem().to_owned(),
        name: node.name.clone(),
        roles: node.roles.clone(),
        addr,
        data_addr: None,
        devices: if node.roles.contains(&Role::Worker) {
            vec![machine::cpu_device(&WorkerSection::default())]
        } else {
            Vec::new()
        },
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let reply = ask(token, &request).await?;
    let identity = pending.complete(reply.node_id, &reply.cert_pem, &reply.ca_pem)?;
    let secrets = NodeSecrets {
        identity,
        ca_key_pem: reply.ca_key_pem.map(coordinator::Redacted::into_inner),
        cluster_key: reply.cluster_key.map(coordinator::Redacted::into_inner),
    };
    secrets.save(&node.data)?;
    let seeds = if reply.seeds.is_empty() {
        token.addrs.clone()
    } else {
        reply.seeds
    };
    let config = node.config(ClusterSection {
        seeds,
        ..ClusterSection::default()
    });
    let path = node.write(&config)?;
    if as_json {
        return print_json(&json!({"node": reply.node_id, "config": path.display().to_string()}));
    }
    println!(
        "Joined as node {}. Start it: verbund node --config {}",
        reply.node_id,
        path.display()
    );
    Ok(())
}

/// Asks the addresses of the token in turn. A refusal is final, since the token names one cluster.
async fn ask(token: &JoinToken, request: &JoinRequest) -> Result<identity::JoinReply> {
    let mut last = None;
    for addr in &token.addrs {
        match identity::join(*addr, token, request.clone()).await {
            Ok(reply) => return Ok(reply),
            Err(refused @ identity::Error::JoinRefused { .. }) => return Err(refused.into()),
            Err(error) => last = Some(error),
        }
    }
    let error =
        last.context("the join token names no address; make a new one with `verbund token`")?;
    Err(error.into())
}
