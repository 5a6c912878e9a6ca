//! `verbund model` and `verbund plan`: what the cluster serves, and how a model would be divided.

use std::path::Path;

use anyhow::{Context, Result, bail};
use coordinator::control::{Command, Deployment, GroupState, ModelKind};
use serde_json::json;
use worker::kv::KvFormat;
use worker::plan::RankCapacity;

use super::{Operator, bytes, print_json, print_table};
use crate::models;

pub async fn list(operator: &Operator, as_json: bool) -> Result<()> {
    let state = operator.control.read().await?;
    let text = |d: &Deployment| match state.group_of(&d.model).map(|g| &g.state) {
        None => "waits for workers".to_owned(),
        Some(GroupState::Forming) => "forming".to_owned(),
        Some(GroupState::Ready) => "ready".to_owned(),
        Some(GroupState::Failed { reason }) => format!("failed: {reason}"),
    };
    if as_json {
        let all: Vec<_> = state
            .deployments
            .values()
            .map(|d| {
                let ranks = state.group_of(&d.model).map_or(0, |g| g.ranks.len());
                json!({"model": d.model, "kind": d.kind, "path": d.path, "ranks_wished": d.ranks, "ranks": ranks, "state": text(d)})
            })
            .collect();
        return print_json(&json!(all));
    }
    let row = |d: &Deployment| {
        let ranks = state.group_of(&d.model).map_or(0, |g| g.ranks.len());
        let kind = if d.kind == ModelKind::Embed {
            "embed"
        } else {
            "generate"
        };
        vec![
            d.model.clone(),
            kind.to_owned(),
            format!("{ranks}/{}", d.ranks),
            text(d),
            d.path.clone(),
        ]
    };
    let rows: Vec<_> = state.deployments.values().map(row).collect();
    print_table(&["MODEL", "KIND", "RANKS", "STATE", "PATH"], &rows);
    Ok(())
}

/// What `model add` was told.
pub struct NewModel<'a> {
    pub path: &'a Path,
    pub name: Option<String>,
    pub ranks: u32,
    pub context_tokens: u32,
    pub kind: Option<ModelKind>,
}

/// The path must be the same on every worker; where it exists here, it is looked at first.
pub async fn add(operator: &Operator, new: NewModel<'_>, as_json: bool) -> Result<()> {
    if !new.path.is_absolute() {
        bail!(
            "expected an absolute path, the same on every worker, got {}",
            new.path.display()
        );
    }
    if new.path.exists()
        && new.kind != Some(ModelKind::Embed)
        && models::kind_of(new.path) == ModelKind::Generate
    {
        models::plan_for(
            new.path,
            &vec![unbounded(); new.ranks as usize],
            new.context_tokens as usize,
            KvFormat::default(),
        )?;
    }
    let model = new.name.unwrap_or_else(|| models::id_of(new.path));
    let kind = new.kind.unwrap_or_else(|| models::kind_of(new.path));
    let path = new.path.display().to_string();
    let deployment = Deployment {
        model: model.clone(),
        kind,
        path,
        ranks: new.ranks,
        context_tokens: new.context_tokens,
    };
    let as_value = serde_json::to_value(&deployment)?;
    operator
        .control
        .propose(Command::SetDeployment(deployment))
        .await?;
    if as_json {
        return print_json(&as_value);
    }
    println!("{model} is being loaded; follow it with `verbund status`");
    Ok(())
}

pub async fn remove(operator: &Operator, model: &str, as_json: bool) -> Result<()> {
    operator
        .control
        .propose(Command::RemoveDeployment {
            model: model.to_owned(),
        })
        .await?;
    if as_json {
        return print_json(&json!({"model": model, "removed": true}));
    }
    println!("{model} is served no more");
    Ok(())
}

/// Prints how a model would be divided; needs no cluster.
pub fn plan(
    path: &Path,
    ranks: u32,
    memory: &[u64],
    speed: &[u64],
    context_tokens: usize,
    kv_format: KvFormat,
    as_json: bool,
) -> Result<()> {
    if memory.len() > 1 && memory.len() != ranks as usize {
        bail!(
            "--memory: expected one value, or one for each of the {ranks} ranks, got {}",
            memory.len()
        );
    }
    if speed.len() > 1 && speed.len() != ranks as usize {
        bail!(
            "--speed: expected one value, or one for each of the {ranks} ranks, got {}",
            speed.len()
        );
    }
    let nth = |values: &[u64], at: usize, default| {
        values
            .get(at)
            .or(values.first())
            .copied()
            .unwrap_or(default)
    };
    let capacities: Vec<_> = (0..ranks as usize)
        .map(|at| RankCapacity {
            memory_bytes: nth(memory, at, unbounded().memory_bytes),
            read_bytes_per_s: nth(speed, at, 1),
        })
        .collect();
    let plan = models::plan_for(path, &capacities, context_tokens, kv_format)
        .context("this division is not possible")?;
    if as_json {
        return print_json(&serde_json::to_value(&plan)?);
    }
    println!(
        "{} · context {} tokens · {} KV blocks in {}",
        models::id_of(path),
        plan.context_tokens,
        plan.kv_blocks,
        plan.kv_format
    );
    let range = |r: &std::ops::Range<usize>| format!("{}..{} ({})", r.start, r.end, r.len());
    let rows: Vec<_> = plan
        .shards
        .iter()
        .enumerate()
        .map(|(rank, s)| {
            vec![
                rank.to_string(),
                range(&s.query_heads),
                range(&s.kv_heads),
                range(&s.ffn_columns),
                range(&s.vocab_rows),
                bytes(s.weight_bytes),
                bytes(s.kv_bytes),
            ]
        })
        .collect();
    print_table(
        &[
            "RANK",
            "HEADS",
            "KV HEADS",
            "FFN COLUMNS",
            "VOCABULARY",
            "WEIGHTS",
            "KV CACHE",
        ],
        &rows,
    );
    Ok(())
}

/// A rank whose memory is not in question; a quarter of the range leaves room for sums.
fn unbounded() -> RankCapacity {
    RankCapacity {
        memory_bytes: u64::MAX / 4,
        read_bytes_per_s: 1,
    }
}
