//! Ranks in different processes, on one host or several, over TCP.

use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use bytemuck::cast_slice;
use rand::RngCore;

use super::frame::{self, Conversation, Opener, Sealer};
use super::hub::{self, CallError, GREETING, Welcome};
use super::mesh::{Link, Mesh, STEP_TIMEOUT};
use super::{Collective, Error, Hub, Interrupter};

/// Up to this many bytes everybody sends everything to everybody: one hop. Above, each rank adds up its share and sends it round,
/// which moves less. Two ranks move the same either way, in one hop less.
const ONE_HOP_BYTES: usize = 64 << 10;
/// Numbers added up at once; bounds buffers.
const PIECE_LEN: usize = 128 << 10;
/// Longest attempt to connect, which cannot be interrupted: far above a round trip inside a region.
const CONNECT: Duration = Duration::from_millis(500);
/// Between attempts to reach a rank that is not there yet.
const RETRY: Duration = Duration::from_millis(20);

/// A group as one of its ranks sees it.
#[derive(Clone)]
pub struct GroupConfig {
    /// Number of the group; the same on all ranks.
    pub group: u64,
    /// Forming of the group; all ranks must agree, older ones are refused.
    pub epoch: u64,
    pub rank: usize,
    /// Data addresses of all ranks, in rank order; their number is the group's size.
    pub peers: Vec<SocketAddr>,
    /// The key of this epoch, from the coordinator.
    pub key: [u8; 32],
}

/// The collective over TCP.
pub struct Tcp {
    mesh: Mesh,
    group: GroupConfig,
}

impl Tcp {
    /// Connects to all other ranks: dials the lower ones, waits at `hub` for the higher ones. Blocks up to `timeout`.
    pub fn join(hub: &Hub, group: GroupConfig, timeout: Duration) -> Result<Tcp, Error> {
        Self::join_with(hub, group, timeout, Interrupter::default())
    }

    /// [`Tcp::join`] with an interrupter made before, which ends the joining as well.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::Interrupted`] when told so.
    pub fn join_with(
        hub: &Hub,
        group: GroupConfig,
        timeout: Duration,
        interrupter: Interrupter,
    ) -> Result<Tcp, Error> {
        let patience = Patience {
            deadline: Instant::now() + timeout,
            timeout,
            interrupter,
        };
        hub.enter(group.group, group.epoch, group.rank)?;
        let mut links = Vec::new();
        for rank in 0..group.peers.len() {
            links.push(match rank.cmp(&group.rank) {
                std::cmp::Ordering::Less => Some(dial(&group, rank, &patience)?),
                std::cmp::Ordering::Equal => None,
                std::cmp::Ordering::Greater => Some(accept(hub, &group, rank, &patience)?),
            });
        }
        let mut mesh = Mesh::new(group.rank, links, GREETING)?;
        mesh.interrupter = patience.interrupter;
        Ok(Tcp { mesh, group })
    }

    pub(super) fn group(&self) -> &GroupConfig {
        &self.group
    }

    pub(super) fn check_alive(&self) -> Result<(), Error> {
        self.mesh.check_alive()
    }

    fn one_hop(&mut self, data: &mut [f64]) -> Result<(), Error> {
        let bytes: &[u8] = cast_slice(data);
        let others: Vec<usize> = self.mesh.others().collect();
        let to: Vec<_> = others.iter().map(|&rank| (rank, bytes)).collect();
        self.mesh.exchange(&to, &others, Some(STEP_TIMEOUT))?;
        self.add_up(data)
    }

    /// Adds the other ranks' last messages to `data`, in rank order, so that all ranks hold the same bits.
    fn add_up(&self, data: &mut [f64]) -> Result<(), Error> {
        let own = data.to_vec();
        data.fill(0.0);
        for rank in 0..self.mesh.size() {
            if rank == self.mesh.rank {
                add(data, own.iter().copied());
            } else {
                let bytes = numbers(rank, self.mesh.message(rank), data.len())?;
                add(data, bytes);
            }
        }
        Ok(())
    }

    fn scatter_and_gather(&mut self, data: &mut [f64]) -> Result<(), Error> {
        let (rank, size) = (self.mesh.rank, self.mesh.size());
        let share = |rank: usize| -> Range<usize> { data_share(data.len(), rank, size) };
        let shares: Vec<Range<usize>> = (0..size).map(share).collect();
        let others: Vec<usize> = self.mesh.others().collect();
        let to: Vec<(usize, &[u8])> = others
            .iter()
            .map(|&r| (r, cast_slice(&data[shares[r].clone()])))
            .collect();
        self.mesh.exchange(&to, &others, Some(STEP_TIMEOUT))?;
        let mut mine = data[shares[rank].clone()].to_vec();
        self.add_up(&mut mine)?;
        let to: Vec<(usize, &[u8])> = others.iter().map(|&r| (r, cast_slice(&mine))).collect();
        self.mesh.exchange(&to, &others, Some(STEP_TIMEOUT))?;
        data[shares[rank].clone()].copy_from_slice(&mine);
        for other in others {
            let part = &mut data[shares[other].clone()];
            let sums = numbers(other, self.mesh.message(other), part.len())?;
            part.iter_mut().zip(sums).for_each(|(v, sum)| *v = sum);
        }
        Ok(())
    }
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.mesh.rank
    }

    fn size(&self) -> usize {
        self.mesh.size()
    }

    fn all_reduce_f64(&mut self, data: &mut [f64]) -> Result<(), Error> {
        for piece in data.chunks_mut(PIECE_LEN) {
            if self.mesh.size() == 2 || size_of_val(piece) <= ONE_HOP_BYTES {
                self.one_hop(piece)?;
            } else {
                self.scatter_and_gather(piece)?;
            }
        }
        Ok(())
    }

    fn gather_to_leader(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        if self.mesh.rank != 0 {
            self.mesh.exchange(&[(0, mine)], &[], Some(STEP_TIMEOUT))?;
            return Ok(Vec::new());
        }
        let others: Vec<usize> = self.mesh.others().collect();
        self.mesh.exchange(&[], &others, Some(STEP_TIMEOUT))?;
        let mut all = vec![mine.to_vec()];
        all.extend(others.into_iter().map(|rank| self.mesh.take_message(rank)));
        Ok(all)
    }

    fn broadcast(&mut self, message: &mut Vec<u8>) -> Result<(), Error> {
        if self.mesh.rank == 0 {
            self.mesh.check_alive()?;
            let to: Vec<(usize, &[u8])> = self
                .mesh
                .others()
                .map(|rank| (rank, message.as_slice()))
                .collect();
            return self.mesh.exchange(&to, &[], Some(STEP_TIMEOUT));
        }
        self.mesh.exchange(&[], &[0], None)?;
        *message = self.mesh.take_message(0);
        Ok(())
    }

    fn interrupter(&self) -> Interrupter {
        self.mesh.interrupter.clone()
    }
}

/// The part of `len` numbers that `rank` adds up.
fn data_share(len: usize, rank: usize, size: usize) -> Range<usize> {
    len * rank / size..len * (rank + 1) / size
}

fn add(data: &mut [f64], values: impl Iterator<Item = f64>) {
    data.iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
}

/// A message as numbers; exactly `len` of them.
fn numbers(rank: usize, bytes: &[u8], len: usize) -> Result<impl Iterator<Item = f64>, Error> {
    if bytes.len() != len * size_of::<f64>() {
        let (expected, got) = (format!("{len} numbers"), format!("{} bytes", bytes.len()));
        return Err(Error::Protocol {
            rank,
            expected,
            got,
        });
    }
    Ok(bytes
        .chunks_exact(8)
        .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])))
}

/// How long a rank waits for the others while it joins.
struct Patience {
    deadline: Instant,
    timeout: Duration,
    interrupter: Interrupter,
}

impl Patience {
    /// Time left, or why there is none.
    fn left(&self, rank: usize) -> Result<Duration, Error> {
        self.interrupter.check()?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::NotJoined {
                rank,
                waited_ms: self.timeout.as_millis() as u64,
            });
        }
        Ok(left)
    }
}

/// Dials a lower rank until it answers.
fn dial(group: &GroupConfig, rank: usize, patience: &Patience) -> Result<Link, Error> {
    let about = Conversation {
        group: group.group,
        epoch: group.epoch,
        dialler: group.rank as u32,
        acceptor: rank as u32,
    };
    loop {
        let left = patience.left(rank)?;
        match call(group.peers[rank], about, patience) {
            Ok((Welcome::Come, stream, own, theirs)) => {
                let (out, back) = frame::keys(&group.key, about, (&own, &theirs));
                return Link::new(
                    rank,
                    stream,
                    Sealer::new(&out, group.epoch),
                    Opener::new(&back, group.epoch, rank),
                );
            }
            Ok((Welcome::Stale { newest }, ..)) => {
                return Err(Error::StaleEpoch {
                    rank,
                    expected: group.epoch,
                    got: newest,
                });
            }
            Err(CallError::Interrupted(error)) => return Err(error),
            // Not started yet, or still loading an older epoch.
            Err(CallError::Io(error)) => {
                tracing::trace!(%error, rank, "no answer yet");
                std::thread::sleep(RETRY.min(left));
            }
        }
    }
}

type Called = (Welcome, TcpStream, [u8; 32], [u8; 32]);

fn call(addr: SocketAddr, about: Conversation, patience: &Patience) -> Result<Called, CallError> {
    let mut stream = TcpStream::connect_timeout(&addr, CONNECT)?;
    let own = fresh_nonce();
    std::io::Write::write_all(&mut stream, &hub::hello(about, &own))?;
    let (welcome, theirs) =
        hub::read_welcome(&mut stream, patience.deadline, &patience.interrupter)?;
    Ok((welcome, stream, own, theirs))
}

/// Waits for a higher rank.
fn accept(hub: &Hub, group: &GroupConfig, rank: usize, patience: &Patience) -> Result<Link, Error> {
    let about = Conversation {
        group: group.group,
        epoch: group.epoch,
        dialler: rank as u32,
        acceptor: group.rank as u32,
    };
    loop {
        patience.left(rank)?;
        let arrived = hub.wait_for(about, patience.deadline, &patience.interrupter)?;
        let Some(mut arrival) = arrived else {
            continue;
        };
        let own = fresh_nonce();
        if std::io::Write::write_all(&mut arrival.stream, &hub::welcome(Welcome::Come, &own))
            .is_err()
        {
            continue;
        }
        let (theirs, mine) = frame::keys(&group.key, about, (&arrival.nonce, &own));
        return Link::new(
            rank,
            arrival.stream,
            Sealer::new(&mine, group.epoch),
            Opener::new(&theirs, group.epoch, rank),
        );
    }
}

/// Makes the keys of a connection its own; not a secret.
fn fresh_nonce() -> [u8; 32] {
    let mut nonce = [0; 32];
    rand::rng().fill_bytes(&mut nonce);
    nonce
}
