//! How the ranks of a group find each other and become a mesh.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rand::RngCore;

use super::frame::{self, Conversation, Opener, Sealer};
use super::hub::{self, CallError, GREETING, Welcome};
use super::mesh::{Link, Mesh};
use super::{Error, GroupConfig, Hub, Interrupter};

/// Longest attempt to connect, which cannot be interrupted: far above a round trip inside a region.
const CONNECT: Duration = Duration::from_millis(500);
/// Between attempts to reach a rank that is not there yet.
const RETRY: Duration = Duration::from_millis(20);

/// Connects to all other ranks: dials the lower ones, waits at `hub` for the higher ones.
pub fn connect(
    hub: &Hub,
    group: &GroupConfig,
    timeout: Duration,
    interrupter: Interrupter,
) -> Result<Mesh, Error> {
    let patience = Patience {
        deadline: Instant::now() + timeout,
        timeout,
        interrupter,
    };
    hub.enter(group.group, group.epoch, group.rank)?;
    let mut links = Vec::new();
    for rank in 0..group.peers.len() {
        links.push(match rank.cmp(&group.rank) {
            std::cmp::Ordering::Less => Some(dial(group, rank, &patience)?),
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Greater => Some(accept(hub, group, rank, &patience)?),
        });
    }
    Mesh::new(group.rank, links, GREETING, patience.interrupter)
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
                    Sealer::new(&out, group.epoch, group.sealing)?,
                    Opener::new(&back, group.epoch, rank, group.sealing)?,
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
            Sealer::new(&mine, group.epoch, group.sealing)?,
            Opener::new(&theirs, group.epoch, rank, group.sealing)?,
        );
    }
}

/// Makes the keys of a connection its own; not a secret.
fn fresh_nonce() -> [u8; 32] {
    let mut nonce = [0; 32];
    rand::rng().fill_bytes(&mut nonce);
    nonce
}
