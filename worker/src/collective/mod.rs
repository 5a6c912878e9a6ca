//! How the ranks of a group add up and exchange. Belongs here: the trait, its transports, their frames and keys. Does not
//! belong here: what is summed.
//!
//! Sums are exact unless the group is told otherwise ([`Wire`]): a partial sum is rounded to a fixed grid ([`kernels::to_grid`])
//! before it is added up in f64, where sums of grid points are free of rounding; so neither order nor number of ranks changes a bit
//! of the result. In every format all ranks hold the same bits.
//!
//! [`wire`]: what a number becomes by travelling. [`frame`]: bytes of a connection, encrypted. [`hub`], [`join`]: how ranks meet.
//! [`mesh`]: moving messages over all connections at once. [`reduce`]: a sum over a mesh. [`tcp`], [`shm`], [`local`]: the
//! collectives.

mod frame;
mod hub;
mod join;
mod local;
mod mesh;
mod reduce;
mod shm;
mod tcp;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use frame::Sealing;
pub use hub::Hub;
pub use local::Local;
pub use shm::Shm;
pub use tcp::{GroupConfig, Tcp};
pub use wire::Wire;

/// Why an exchange failed. After any of these the group is broken: drop it and form a new one with a larger epoch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("rank {rank} is gone ({why}); the group must be formed again")]
    PeerLost { rank: usize, why: String },
    #[error("rank {rank} is in epoch {got}, expected {expected}; the older side must leave")]
    StaleEpoch {
        rank: usize,
        expected: u64,
        got: u64,
    },
    #[error(
        "rank {rank} did not prove that it has the group's key; check that it belongs to this cluster"
    )]
    WrongKey { rank: usize },
    #[error(
        "rank {rank} sent {got}, expected {expected}; the ranks run different versions or lost step"
    )]
    Protocol {
        rank: usize,
        expected: String,
        got: String,
    },
    #[error(
        "rank {rank} did not join within {waited_ms} ms; check that its worker runs and that its data address can be reached"
    )]
    NotJoined { rank: usize, waited_ms: u64 },
    #[error("interrupted: this rank was told to leave the group")]
    Interrupted,
    #[error("a message of {got} bytes, at most {max} are allowed")]
    TooLarge { got: usize, max: usize },
    #[error("{what}: {why}")]
    Io { what: &'static str, why: String },
}

/// What the ranks of a group do together. Every rank makes the same calls in the same order. No call waits forever.
pub trait Collective: Send {
    /// This rank's number, from 0 (the leader).
    fn rank(&self) -> usize;
    /// Ranks in the group.
    fn size(&self) -> usize;
    /// Replaces `data` by the sum over all ranks in the group's format; all hold the same bits afterwards. The length must be the
    /// same everywhere.
    fn all_reduce_f64(&mut self, data: &mut [f64]) -> Result<(), Error>;
    /// The same without loss, whatever the group's format.
    fn all_reduce_exact(&mut self, data: &mut [f64]) -> Result<(), Error>;
    /// Brings every rank's bytes to the leader, in rank order; empty on the others.
    fn gather_to_leader(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Error>;
    /// Replaces `message` by the leader's on every other rank. Followers may wait here for as long as the leader lives.
    fn broadcast(&mut self, message: &mut Vec<u8>) -> Result<(), Error>;
    /// Lets another thread end a call that waits.
    fn interrupter(&self) -> Interrupter;
    /// Sums that go on while this rank computes; `None` where nothing is gained by that.
    fn background(&mut self) -> Option<&mut dyn Background> {
        None
    }
}

/// Sums in the background. Every rank begins the same ones in the same order, and finishes all before any other call.
pub trait Background {
    /// Begins the sum of `data` over all ranks in the group's format.
    fn begin(&mut self, data: Vec<f64>) -> Result<(), Error>;
    /// Waits for the oldest sum begun, and gives it.
    fn finish(&mut self) -> Result<Vec<f64>, Error>;
}

/// Ends waiting calls of a group from another thread.
#[derive(Clone, Default)]
pub struct Interrupter {
    told: Arc<AtomicBool>,
}

impl Interrupter {
    /// Every waiting and later call of the group returns [`Error::Interrupted`], within 50 ms.
    pub fn interrupt(&self) {
        self.told.store(true, Ordering::Release);
    }

    fn check(&self) -> Result<(), Error> {
        if self.told.load(Ordering::Acquire) {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
