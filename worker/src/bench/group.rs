//! A group of ranks in this process, each in a thread of its own, so that one process measures what several would do.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use kernels::{Cpu, Isa};
use rand::RngCore;

use super::Error;
use crate::collective::{self, Collective, GroupConfig, Hub, Local, Sealing, Shm, Tcp, Wire};
use crate::file::ModelFile;
use crate::model::{self, RankModel, follow};
use crate::plan::ShardPlan;

/// How long the ranks may take to meet; they are threads that start at once.
const JOIN: Duration = Duration::from_secs(20);

/// The group that a benchmark runs on.
#[derive(Debug, Clone)]
pub struct Ranks {
    /// 1 is the whole model on one rank.
    pub count: usize,
    /// Sums over TCP even though all ranks are on this host.
    pub tcp: bool,
    /// How sums travel over TCP.
    pub wire: Wire,
    /// Whether they do so while the ranks compute.
    pub overlap: bool,
}

impl Default for Ranks {
    fn default() -> Self {
        Ranks {
            count: 1,
            tcp: false,
            wire: Wire::Exact,
            overlap: true,
        }
    }
}

/// Loads the ranks of `plan`, each with an equal part of `threads` (at least one), and runs `work` on the leader; the others follow.
/// Gives the seconds that loading took as well.
pub(super) fn on_ranks<T>(
    file: &ModelFile,
    plan: &ShardPlan,
    ranks: &Ranks,
    threads: usize,
    isa: Isa,
    work: impl FnOnce(&mut RankModel<Cpu>) -> Result<T, Error>,
) -> Result<(T, f64), Error> {
    let start = Instant::now();
    let device = || Cpu::new((threads / ranks.count).max(1), isa);
    let join = |hubs: &[Hub], rank: usize, key: [u8; 32]| -> Result<Box<dyn Collective>, Error> {
        let group = GroupConfig {
            group: 1,
            epoch: 1,
            rank,
            peers: hubs.iter().map(Hub::local_addr).collect(),
            key,
            wire: ranks.wire,
            sealing: Sealing::Encrypted,
            overlap: ranks.overlap,
        };
        let mut tcp = Tcp::join(&hubs[rank], group, JOIN).map_err(failed)?;
        if ranks.tcp {
            tcp.calibrate().map_err(failed)?;
            return Ok(Box::new(tcp));
        }
        Shm::upgrade(tcp).map_err(failed)
    };
    if ranks.count == 1 {
        let mut rank = RankModel::load(file, plan, Box::new(Local::default()), device())?;
        let load_s = start.elapsed().as_secs_f64();
        return Ok((work(&mut rank)?, load_s));
    }
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let hubs = (0..ranks.count)
        .map(|_| Hub::bind(loopback).map_err(failed))
        .collect::<Result<Vec<_>, _>>()?;
    let mut key = [0; 32];
    rand::rng().fill_bytes(&mut key);
    std::thread::scope(|scope| {
        let (join, device, hubs) = (&join, &device, &hubs);
        let followers: Vec<_> = (1..ranks.count)
            .map(|rank| {
                scope.spawn(move || -> Result<(), Error> {
                    let group = join(hubs, rank, key)?;
                    let mut rank = RankModel::load(file, plan, group, device())?;
                    Ok(follow(&mut rank)?)
                })
            })
            .collect();
        let lead = || -> Result<(T, f64), Error> {
            let mut leader = RankModel::load(file, plan, join(hubs, 0, key)?, device())?;
            let load_s = start.elapsed().as_secs_f64();
            let out = work(&mut leader);
            // After a failure the group is broken anyway; its first error is the one to report.
            let stopped = leader.stop();
            let out = out?;
            stopped?;
            Ok((out, load_s))
        };
        let out = lead();
        let mut ended = Ok(());
        for follower in followers {
            ended = ended.and(follower.join().unwrap_or(Ok(())));
        }
        let out = out?;
        ended.map(|()| out)
    })
}

fn failed(error: collective::Error) -> Error {
    model::Error::from(error).into()
}
