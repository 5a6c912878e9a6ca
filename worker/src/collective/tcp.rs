//! Ranks in different processes, on one host or several, over TCP.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::frame::Sealing;
use super::hub::GREETING;
use super::join;
use super::mesh::{Mesh, STEP_TIMEOUT};
use super::reduce::Reducer;
use super::wire::Wire;
use super::{Background, Collective, Error, Hub, Interrupter};

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
    /// How sums travel; the leader's holds for all.
    pub wire: Wire,
    /// Whether frames are encrypted, which only a measurement may want otherwise.
    pub sealing: Sealing,
    /// Whether sums may go on in the background, which only a measurement of what that gains may want otherwise. All ranks must agree.
    pub overlap: bool,
}

/// The collective over TCP.
pub struct Tcp {
    core: Arc<Mutex<Core>>,
    group: GroupConfig,
    interrupter: Interrupter,
    /// Sums begun and not yet finished.
    under_way: usize,
    helper: Option<Helper>,
}

/// What the rank's own thread and its helper use in turn.
struct Core {
    mesh: Mesh,
    reducer: Reducer,
}

/// A thread that sums while the rank's own computes. It ends when its first half is dropped.
struct Helper {
    begun: Sender<Vec<f64>>,
    finished: Receiver<Result<Vec<f64>, Error>>,
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
        mut group: GroupConfig,
        timeout: Duration,
        interrupter: Interrupter,
    ) -> Result<Tcp, Error> {
        let mut mesh = join::connect(hub, &group, timeout, interrupter.clone())?;
        group.wire = agree(&mut mesh, group.wire)?;
        let reducer = Reducer::default();
        Ok(Tcp {
            core: Arc::new(Mutex::new(Core { mesh, reducer })),
            group,
            interrupter,
            under_way: 0,
            helper: None,
        })
    }

    /// Measures on this group's network up to which size a sum had better take one hop. All ranks call it, once, before anything
    /// else; without it a fixed size holds. What a sum is does not depend on it.
    pub fn calibrate(&mut self) -> Result<(), Error> {
        let mut core = self.core()?;
        let Core { mesh, reducer } = &mut *core;
        reducer.calibrate(mesh)
    }

    /// Bytes on the wire up to which a sum takes one hop where there are more than two ranks.
    pub fn one_hop_bytes(&mut self) -> Result<usize, Error> {
        Ok(self.core()?.reducer.one_hop_bytes)
    }

    /// Sets what [`Tcp::calibrate`] would measure; the same on all ranks.
    pub fn set_one_hop_bytes(&mut self, bytes: usize) -> Result<(), Error> {
        self.core()?.reducer.one_hop_bytes = bytes;
        Ok(())
    }

    pub(super) fn group(&self) -> &GroupConfig {
        &self.group
    }

    pub(super) fn check_alive(&mut self) -> Result<(), Error> {
        self.core()?.mesh.check_alive()
    }

    /// The mesh, for a call of this rank's own thread. Sums that were begun and not finished, as after an error, come first.
    fn core(&mut self) -> Result<MutexGuard<'_, Core>, Error> {
        while self.under_way > 0 {
            self.finish()?;
        }
        Ok(self.core.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn sum(&mut self, wire: Wire, data: &mut [f64]) -> Result<(), Error> {
        let mut core = self.core()?;
        let Core { mesh, reducer } = &mut *core;
        reducer.all_reduce(mesh, wire, data)
    }
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.group.rank
    }

    fn size(&self) -> usize {
        self.group.peers.len()
    }

    fn all_reduce_f64(&mut self, data: &mut [f64]) -> Result<(), Error> {
        self.sum(self.group.wire, data)
    }

    fn all_reduce_exact(&mut self, data: &mut [f64]) -> Result<(), Error> {
        self.sum(Wire::Exact, data)
    }

    fn gather_to_leader(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let mesh = &mut self.core()?.mesh;
        if mesh.rank != 0 {
            return mesh.exchange(&[(0, mine)], &[], Some(STEP_TIMEOUT));
        }
        let others: Vec<usize> = mesh.others().collect();
        let mut all = mesh.exchange(&[], &others, Some(STEP_TIMEOUT))?;
        all.insert(0, mine.to_vec());
        Ok(all)
    }

    fn broadcast(&mut self, message: &mut Vec<u8>) -> Result<(), Error> {
        let mesh = &mut self.core()?.mesh;
        if mesh.rank == 0 {
            mesh.check_alive()?;
            let to: Vec<(usize, &[u8])> = mesh
                .others()
                .map(|rank| (rank, message.as_slice()))
                .collect();
            mesh.exchange(&to, &[], Some(STEP_TIMEOUT))?;
        } else if let Some(leaders) = mesh.exchange(&[], &[0], None)?.pop() {
            *message = leaders;
        }
        Ok(())
    }

    fn interrupter(&self) -> Interrupter {
        self.interrupter.clone()
    }

    fn background(&mut self) -> Option<&mut dyn Background> {
        (self.size() > 1 && self.group.overlap).then_some(self)
    }
}

impl Background for Tcp {
    fn begin(&mut self, data: Vec<f64>) -> Result<(), Error> {
        let gone = |_| Error::Io {
            what: "the thread that sums",
            why: "it has ended".into(),
        };
        let helper = match &self.helper {
            Some(helper) => helper,
            None => self.helper.insert(start(&self.core, self.group.wire)?),
        };
        helper.begun.send(data).map_err(gone)?;
        self.under_way += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<Vec<f64>, Error> {
        let helper = self.helper.as_ref().filter(|_| self.under_way > 0);
        let finished = helper.and_then(|helper| helper.finished.recv().ok());
        self.under_way = self.under_way.saturating_sub(1);
        finished.unwrap_or_else(|| {
            Err(Error::Io {
                what: "the thread that sums",
                why: "it has nothing under way".into(),
            })
        })
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        // A helper that waits for others would keep the connections open.
        if self.under_way > 0 {
            self.interrupter.interrupt();
        }
    }
}

/// Tells the others the leader's format.
fn agree(mesh: &mut Mesh, own: Wire) -> Result<Wire, Error> {
    if mesh.rank == 0 {
        let others: Vec<usize> = mesh.others().collect();
        let name = own.name().as_bytes();
        let to: Vec<_> = others.iter().map(|&rank| (rank, name)).collect();
        mesh.exchange(&to, &[], Some(GREETING))?;
        return Ok(own);
    }
    let name = mesh.exchange(&[], &[0], Some(GREETING))?.concat();
    let name = String::from_utf8_lossy(&name);
    name.parse().map_err(|_| Error::Protocol {
        rank: 0,
        expected: "the name of a wire format".into(),
        got: format!("{name:.20}"),
    })
}

fn start(core: &Arc<Mutex<Core>>, wire: Wire) -> Result<Helper, Error> {
    let (begun, work) = channel::<Vec<f64>>();
    let (done, finished) = channel();
    let core = core.clone();
    let body = move || {
        while let Ok(mut data) = work.recv() {
            let mut core = core.lock().unwrap_or_else(PoisonError::into_inner);
            let Core { mesh, reducer } = &mut *core;
            // The cores belong to those who compute.
            let spin = std::mem::take(&mut mesh.spin);
            let summed = reducer.all_reduce(mesh, wire, &mut data);
            mesh.spin = spin;
            drop(core);
            if done.send(summed.map(|()| data)).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("collective".into())
        .spawn(body)
        .map_err(|e| Error::Io {
            what: "a thread that sums",
            why: e.to_string(),
        })?;
    Ok(Helper { begun, finished })
}
