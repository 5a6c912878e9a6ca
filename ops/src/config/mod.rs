//! A node's configuration: one TOML file, every key documented in `ops/examples/node.toml`, unknown keys refused with the
//! nearest known one named, `VERBUND_<SECTION>_<KEY>` environment variables on top.
//!
//! Here belong keys, defaults and checks that need nothing but the file. Not here: what the values do (room `node`).

mod keys;
mod nearest;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use coordinator::ids::{NodeId, Role, TenantId};
use gateway::GatewayConfig;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use nearest::nearest;

/// Largest share of a tenant: the scheduler's counters divide by it, and beyond they round noticeably.
pub const MAX_TENANT_WEIGHT: u32 = 1000;

/// What is wrong with a configuration. The text says expected, got, remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the configuration {path}: {why}")]
    File { path: PathBuf, why: std::io::Error },
    #[error("the configuration {path} is not TOML: {why}")]
    Syntax { path: PathBuf, why: String },
    #[error("unknown key {key} in {place}{}", suggestion(.nearest.as_deref()))]
    UnknownKey {
        key: String,
        place: String,
        nearest: Option<String>,
    },
    #[error("{key} in {place}: expected {expected}, got {got}")]
    Invalid {
        key: String,
        place: String,
        expected: String,
        got: String,
    },
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest
        .map(|n| format!("; did you mean {n}?"))
        .unwrap_or_default()
}

/// Everything that one node is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    pub node: NodeSection,
    #[serde(default)]
    pub cluster: ClusterSection,
    #[serde(default)]
    pub worker: WorkerSection,
    #[serde(default)]
    pub gateway: GatewayConfig,
    #[serde(default)]
    pub log: LogSection,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSection {
    pub name: String,
    /// Identity, replicas and caches.
    pub data: PathBuf,
    pub roles: BTreeSet<Role>,
    pub listen: SocketAddr,
    /// What others dial; `listen` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<SocketAddr>,
    /// `/health` and `/metrics` over plain HTTP; off when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_listen: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSection {
    pub name: String,
    /// Coordinators to ask first.
    pub seeds: Vec<SocketAddr>,
    /// The first coordinators, by node id; the same on each of them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub bootstrap: BTreeMap<String, SocketAddr>,
}

impl Default for ClusterSection {
    fn default() -> Self {
        ClusterSection {
            name: "verbund".to_owned(),
            seeds: Vec::new(),
            bootstrap: BTreeMap::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerSection {
    /// Where collectives listen; a free port of `node.listen`'s address when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_listen: Option<SocketAddr>,
    /// What other ranks dial; `data_listen` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_advertise: Option<SocketAddr>,
    /// CPU threads; 0 takes all cores.
    pub threads: u32,
    /// Memory for weights and KV cache; 0 takes three quarters of the machine's.
    pub memory_bytes: u64,
    /// Streaming read of the memory; 0 measures it at start.
    pub read_bytes_per_s: u64,
    /// How sums travel between ranks on different hosts: `exact` (the default; answers do not depend on the number of ranks), `f32`,
    /// `bf16` or `int8`. What rank 0's node says holds for its group.
    pub wire: worker::collective::Wire,
    /// How keys and values are kept: `f16` (the default) or `int8`, about half the memory. What rank 0's node says holds for its group.
    pub kv_format: worker::kv::KvFormat,
    /// Whether tokens are guessed ahead where that pays; answers are the same. What rank 0's node says holds for its group.
    pub speculate: bool,
    /// Requests that may wait in one group; at least 1. As all below, what rank 0's node says holds for its group.
    pub max_waiting: u32,
    /// Rows of prompts and guesses in a step in which answers go on; at least 1.
    pub mixed_rows: u32,
    /// Requests of one tenant that are answered at once; 0 sets no limit of its own.
    pub tenant_running: u32,
    /// Requests of one tenant that may wait; 0 sets no limit of its own.
    pub tenant_waiting: u32,
    /// Shares by tenant id, 1 to [`MAX_TENANT_WEIGHT`]; whoever is not named has 1.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tenant_weights: BTreeMap<String, u32>,
}

impl Default for WorkerSection {
    fn default() -> Self {
        Self {
            data_listen: None,
            data_advertise: None,
            threads: 0,
            memory_bytes: 0,
            read_bytes_per_s: 0,
            wire: Default::default(),
            kv_format: Default::default(),
            speculate: true,
            max_waiting: 512,
            mixed_rows: 48,
            tenant_running: 0,
            tenant_waiting: 0,
            tenant_weights: BTreeMap::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSection {
    /// A `tracing` filter, as `info` or `info,coordinator=debug`.
    pub level: String,
    /// `json` or `text`.
    pub format: LogFormat,
    /// Standard error when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The file is rotated at this size; one older file is kept.
    pub max_bytes: u64,
}

impl Default for LogSection {
    fn default() -> Self {
        LogSection {
            level: "info".to_owned(),
            format: LogFormat::Json,
            file: None,
            max_bytes: 4 * 1024 * 1024,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Json,
    Text,
}

impl NodeConfig {
    /// Reads `path`, with this process's environment on top.
    ///
    /// # Errors
    /// [`Error`] names the key and what was expected.
    pub fn load(path: &Path) -> Result<NodeConfig, Error> {
        let text = std::fs::read_to_string(path).map_err(|why| Error::File {
            path: path.to_owned(),
            why,
        })?;
        NodeConfig::parse(&text, path, std::env::vars())
    }

    /// Reads `text`, which came from `path`, with the variables of `env` on top.
    ///
    /// # Errors
    /// [`Error`] names the key and what was expected.
    pub fn parse(
        text: &str,
        path: &Path,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<NodeConfig, Error> {
        let place = path.display().to_string();
        let mut table: Table = text.parse().map_err(|e: toml::de::Error| Error::Syntax {
            path: path.to_owned(),
            why: e.to_string(),
        })?;
        refuse_unknown(&table, &place)?;
        for (name, value) in env {
            override_from(&mut table, &name, &value)?;
        }
        let config = NodeConfig::deserialize(Value::Table(table)).map_err(|e| Error::Invalid {
            key: "a key".to_owned(),
            place: place.clone(),
            expected: "the form shown in ops/examples/node.toml".to_owned(),
            got: e.to_string().trim().to_owned(),
        })?;
        config.check(&place)?;
        Ok(config)
    }

    fn check(&self, place: &str) -> Result<(), Error> {
        let invalid = |key: &str, expected: &str, got: String| {
            Err(Error::Invalid {
                key: key.to_owned(),
                place: place.to_owned(),
                expected: expected.to_owned(),
                got,
            })
        };
        if self.node.name.is_empty() || self.node.name.chars().count() > 64 {
            return invalid(
                "node.name",
                "1 to 64 characters",
                format!("{:?}", self.node.name),
            );
        }
        if self.node.roles.is_empty() {
            return invalid(
                "node.roles",
                "at least one of coordinator, store, worker, gateway",
                "none".to_owned(),
            );
        }
        let advertised = self.node.advertise.unwrap_or(self.node.listen);
        if advertised.ip().is_unspecified() {
            let expected =
                "an address that other nodes can dial, because node.listen is a wildcard";
            return invalid("node.advertise", expected, advertised.to_string());
        }
        if self.seeds().is_empty() {
            let expected = "at least one coordinator's address, or cluster.bootstrap";
            return invalid("cluster.seeds", expected, "none".to_owned());
        }
        if let Some(key) = self
            .cluster
            .bootstrap
            .keys()
            .find(|k| k.parse::<NodeId>().is_err())
        {
            return invalid(
                "cluster.bootstrap",
                "node ids as keys, as in 1 = \"10.0.0.1:7443\"",
                format!("{key:?}"),
            );
        }
        for (key, value) in [
            ("worker.max_waiting", self.worker.max_waiting),
            ("worker.mixed_rows", self.worker.mixed_rows),
        ] {
            if value == 0 {
                return invalid(key, "at least 1", value.to_string());
            }
        }
        for (tenant, &weight) in &self.worker.tenant_weights {
            let key = format!("worker.tenant_weights.{tenant}");
            if let Err(why) = TenantId::new(tenant.as_str()) {
                let expected = "tenant ids as keys, as in musterstadt = 2";
                return invalid("worker.tenant_weights", expected, why.to_string());
            }
            if !(1..=MAX_TENANT_WEIGHT).contains(&weight) {
                let expected = format!("1 to {MAX_TENANT_WEIGHT}");
                return invalid(&key, &expected, weight.to_string());
            }
        }
        Ok(())
    }

    /// What others dial.
    pub fn advertised(&self) -> SocketAddr {
        self.node.advertise.unwrap_or(self.node.listen)
    }

    /// The shares of the tenants that are named.
    pub fn tenant_weights(&self) -> BTreeMap<TenantId, u32> {
        let weights = self.worker.tenant_weights.iter();
        weights
            .filter_map(|(id, &weight)| Some((TenantId::new(id.as_str()).ok()?, weight)))
            .collect()
    }

    /// The first coordinators; `None` on a node that joined a running cluster.
    pub fn bootstrap(&self) -> Option<BTreeMap<NodeId, SocketAddr>> {
        let members: BTreeMap<_, _> = self
            .cluster
            .bootstrap
            .iter()
            .filter_map(|(id, addr)| Some((id.parse().ok()?, *addr)))
            .collect();
        (!members.is_empty()).then_some(members)
    }

    /// Coordinators to ask first: the configured ones and those of the bootstrap.
    pub fn seeds(&self) -> Vec<SocketAddr> {
        let mut seeds = self.cluster.seeds.clone();
        seeds.extend(
            self.cluster
                .bootstrap
                .values()
                .filter(|a| !self.cluster.seeds.contains(a)),
        );
        seeds
    }

    /// As a file, for nodes that are set up by this program.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }
}

/// Every key of the file must be a known one.
fn refuse_unknown(table: &Table, place: &str) -> Result<(), Error> {
    for (section, value) in table {
        let Some(keys) = keys::of_section(section) else {
            let nearest = nearest(section, keys::sections()).map(|n| format!("[{n}]"));
            return Err(Error::UnknownKey {
                key: format!("[{section}]"),
                place: place.to_owned(),
                nearest,
            });
        };
        let Value::Table(inner) = value else {
            return Err(Error::Invalid {
                key: section.clone(),
                place: place.to_owned(),
                expected: format!("a section [{section}]"),
                got: value.type_str().to_owned(),
            });
        };
        if let Some(key) = inner
            .keys()
            .find(|key| !keys.iter().any(|k| k.name == **key))
        {
            let nearest =
                nearest(key, keys.iter().map(|k| k.name)).map(|n| format!("{section}.{n}"));
            return Err(Error::UnknownKey {
                key: format!("{section}.{key}"),
                place: place.to_owned(),
                nearest,
            });
        }
    }
    Ok(())
}

/// Applies `VERBUND_<SECTION>_<KEY>`; other variables are none of ours.
fn override_from(table: &mut Table, name: &str, text: &str) -> Result<(), Error> {
    let Some((section, key)) = name
        .strip_prefix("VERBUND_")
        .and_then(|rest| rest.split_once('_'))
    else {
        return Ok(());
    };
    let section = section.to_ascii_lowercase();
    let Some(keys) = keys::of_section(&section) else {
        return Ok(());
    };
    let key = key.to_ascii_lowercase();
    let Some(known) = keys.iter().find(|k| k.name == key) else {
        let nearest = nearest(&key, keys.iter().map(|k| k.name)).map(|n| {
            format!(
                "VERBUND_{}_{}",
                section.to_ascii_uppercase(),
                n.to_ascii_uppercase()
            )
        });
        return Err(Error::UnknownKey {
            key: name.to_owned(),
            place: "the environment".to_owned(),
            nearest,
        });
    };
    let value = known.kind.read(text).ok_or_else(|| Error::Invalid {
        key: name.to_owned(),
        place: "the environment".to_owned(),
        expected: known.kind.expected().to_owned(),
        got: format!("{text:?}"),
    })?;
    let entry = table
        .entry(section.clone())
        .or_insert_with(|| Value::Table(Table::new()));
    if let Value::Table(inner) = entry {
        inner.insert(key, value);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
