//! `DIR/demo.json`: how programs find the demo cluster, its keys and its processes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::layout::{Keys, Member};
use super::write_whole;

#[derive(Serialize)]
pub struct Demo {
    pub base_url: String,
    pub api_key: String,
    pub admin_api_key: String,
    /// Process id of `verbund up` itself.
    pub pid: u32,
    pub processes: Vec<Process>,
}

#[derive(Serialize)]
pub struct Process {
    pub name: String,
    pub role: String,
    pub pid: Option<u32>,
    pub data: String,
    pub log: String,
}

impl Demo {
    pub fn new(
        base_url: &str,
        keys: &Keys,
        members: &[Member],
        pids: &BTreeMap<String, u32>,
    ) -> Demo {
        let processes = members
            .iter()
            .map(|m| Process {
                name: m.name.clone(),
                role: m.role.to_owned(),
                pid: pids.get(&m.name).copied(),
                data: m.dir.display().to_string(),
                log: m.dir.join("log").display().to_string(),
            })
            .collect();
        Demo {
            base_url: base_url.to_owned(),
            api_key: keys.api_key.clone(),
            admin_api_key: keys.admin_api_key.clone(),
            pid: std::process::id(),
            processes,
        }
    }

    /// Replaces the file as a whole; only the owner may read the keys in it.
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_whole(
            &dir.join("demo.json"),
            &serde_json::to_vec_pretty(self)?,
            0o600,
        )
    }
}
