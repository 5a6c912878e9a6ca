//! Groups of ranks in threads of one process, over real sockets and shared memory.

#[allow(dead_code, reason = "each test file uses its own part of this module")]
pub mod convert;
#[allow(dead_code, reason = "each test file uses its own part of this module")]
pub mod exact;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kernels::{BLOCK_TOKENS, Cpu, Device, Isa};
use worker::collective::{GroupConfig, Hub, Local, Sealing, Shm, Tcp, Wire};
use worker::file::ModelFile;
use worker::model::{RankModel, Span, StepBatch, follow};
use worker::plan::ShardPlan;

/// How ranks exchange.
#[derive(Clone, Copy, PartialEq)]
#[allow(dead_code, reason = "each test file uses its own part of this module")]
pub enum Over {
    Tcp,
    Shm,
}

/// The small language model that the set-up fetched.
#[allow(dead_code, reason = "each test file uses its own part of this module")]
pub fn smollm2() -> PathBuf {
    fetched("SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// A file that the set-up fetched.
#[allow(dead_code, reason = "each test file uses its own part of this module")]
pub fn fetched(name: &str) -> PathBuf {
    let folder = std::env::var_os("VERBUND_MODELS")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let home =
                || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
            cache.unwrap_or_else(home).join("verbund/models")
        });
    let path = folder.join(name);
    assert!(
        path.exists(),
        "{} is missing: run `make test`, or point VERBUND_MODELS to the folder that holds it",
        path.display()
    );
    path
}

/// One thread of this processor.
#[allow(dead_code, reason = "each test file uses its own part of this module")]
pub fn cpu() -> Cpu {
    Cpu::new(1, Isa::detect())
}

/// Runs `work` on the leader of a group of `plan`'s size, each rank on a `device` of its own; the other ranks follow.
#[allow(dead_code, reason = "each test file uses its own part of this module")]
pub fn on_ranks<D: Device, T>(
    file: &ModelFile,
    plan: &ShardPlan,
    over: Over,
    device: impl Fn() -> D + Sync,
    work: impl FnOnce(&mut RankModel<D>) -> T,
) -> T {
    let files = vec![file.clone(); plan.shards.len()];
    on_ranks_with(&files, plan, over, device, work)
}

/// [`on_ranks`] where each rank has a file of its own.
#[allow(dead_code, reason = "each test file uses its own part of this module")]
pub fn on_ranks_with<D: Device, T>(
    files: &[ModelFile],
    plan: &ShardPlan,
    over: Over,
    device: impl Fn() -> D + Sync,
    work: impl FnOnce(&mut RankModel<D>) -> T,
) -> T {
    let size = plan.shards.len();
    assert_eq!(files.len(), size);
    if size == 1 {
        return work(
            &mut RankModel::load(&files[0], plan, Box::new(Local::default()), device()).unwrap(),
        );
    }
    let hubs: Vec<Hub> = (0..size)
        .map(|_| Hub::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap())
        .collect();
    let rank = |rank: usize| {
        let peers = hubs.iter().map(Hub::local_addr).collect();
        let group = GroupConfig {
            group: 1,
            epoch: 1,
            rank,
            peers,
            key: [1; 32],
            wire: Wire::Exact,
            sealing: Sealing::Encrypted,
            overlap: true,
        };
        let tcp = Tcp::join(&hubs[rank], group, Duration::from_secs(60)).unwrap();
        let ranks = if over == Over::Shm {
            Shm::upgrade(tcp).unwrap()
        } else {
            Box::new(tcp)
        };
        RankModel::load(&files[rank], plan, ranks, device()).unwrap()
    };
    std::thread::scope(|scope| {
        let rank = &rank;
        let followers: Vec<_> = (1..size)
            .map(|r| scope.spawn(move || follow(&mut rank(r)).unwrap()))
            .collect();
        let mut leader = rank(0);
        let out = work(&mut leader);
        leader.stop().unwrap();
        followers.into_iter().for_each(|f| f.join().unwrap());
        out
    })
}

/// A span of `tokens` after `context` positions, appended to a step.
#[allow(dead_code, reason = "each test file uses its own part of this module")]
pub fn push(batch: &mut StepBatch, tokens: &[u32], context: usize, blocks: &[u32]) {
    let first_row = batch.tokens.len();
    for (i, &token) in tokens.iter().enumerate() {
        let position = context + i;
        batch.tokens.push(token);
        batch.positions.push(position as u32);
        batch.slots.push(
            blocks[position / BLOCK_TOKENS] * BLOCK_TOKENS as u32
                + (position % BLOCK_TOKENS) as u32,
        );
    }
    batch.spans.push(Span {
        first_row,
        rows: tokens.len(),
        context,
        blocks: blocks.to_vec(),
    });
}
