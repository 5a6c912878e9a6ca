//! The data port of a process: accepts connections of ranks of any group and hands each to the group that waits for it.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::frame::Conversation;
use super::{Error, Interrupter};

/// Connections that may wait for their group; a group has at most as many ranks as KV heads.
const MAX_WAITING: usize = 256;
/// Connections that may be in the middle of their greeting.
const MAX_GREETING: usize = 64;
/// How long a connection waits for its group before it is dropped.
const WAIT: Duration = Duration::from_secs(60);
/// Between attempts to accept after one failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(20);
/// How long a greeting may take.
pub(super) const GREETING: Duration = Duration::from_secs(3);

/// Longest uninterruptible wait.
const SLICE: Duration = Duration::from_millis(50);

const MAGIC: [u8; 8] = *b"VBHELLO1";
/// Magic, group, epoch, dialler, acceptor, nonce.
const HELLO_BYTES: usize = 8 + 8 + 8 + 4 + 4 + 32;
/// Status, epoch, nonce.
const WELCOME_BYTES: usize = 1 + 8 + 32;

/// A process's listener for data connections. Cheap to clone; it closes with its last clone.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
    _stop: Arc<Stop>,
}

struct Shared {
    addr: SocketAddr,
    state: Mutex<State>,
    arrived: Condvar,
    closed: AtomicBool,
    greeting: AtomicUsize,
}

#[derive(Default)]
struct State {
    /// Newest epoch this process has joined, by group.
    epochs: HashMap<u64, u64>,
    waiting: Vec<Arrival>,
}

/// Why a call to another rank's data port got no answer.
pub(super) enum CallError {
    /// Not there yet, or gone again; another attempt may succeed.
    Io(std::io::Error),
    /// This rank was told to leave.
    Interrupted(Error),
}

impl From<std::io::Error> for CallError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        Self::Interrupted(error)
    }
}

/// A connection that said hello.
pub(super) struct Arrival {
    pub about: Conversation,
    pub nonce: [u8; 32],
    pub stream: TcpStream,
    since: Instant,
}

/// Ends the accepting thread with the last clone of the hub.
struct Stop(Arc<Shared>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect_timeout(&self.0.addr, Duration::from_millis(200));
    }
}

impl Hub {
    /// Listens on `listen`.
    pub fn bind(listen: SocketAddr) -> Result<Hub, Error> {
        let io = |e: std::io::Error| Error::Io {
            what: "data port",
            why: format!("{listen}: {e}; choose another data address"),
        };
        let listener = TcpListener::bind(listen).map_err(io)?;
        let addr = listener.local_addr().map_err(io)?;
        let shared = Arc::new(Shared {
            addr,
            state: Mutex::default(),
            arrived: Condvar::new(),
            closed: AtomicBool::new(false),
            greeting: AtomicUsize::new(0),
        });
        let accepting = shared.clone();
        std::thread::Builder::new()
            .name("data-port".into())
            .spawn(move || accept(&listener, &accepting))
            .map_err(io)?;
        Ok(Hub {
            _stop: Arc::new(Stop(shared.clone())),
            shared,
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.addr
    }

    /// From now on only `epoch` and later ones of `group` are let in. Errors if a later one was entered before.
    pub(super) fn enter(&self, group: u64, epoch: u64, rank: usize) -> Result<(), Error> {
        let mut state = self.shared.lock();
        let newest = state.epochs.entry(group).or_insert(epoch);
        if *newest > epoch {
            return Err(Error::StaleEpoch {
                rank,
                expected: *newest,
                got: epoch,
            });
        }
        *newest = epoch;
        state
            .waiting
            .retain(|a| a.about.group != group || a.about.epoch >= epoch);
        Ok(())
    }

    /// The connection of `about`, as soon as it is there; `None` after `deadline`.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(super) fn wait_for(
        &self,
        about: Conversation,
        deadline: Instant,
        interrupter: &Interrupter,
    ) -> Result<Option<Arrival>, Error> {
        let mut state = self.shared.lock();
        loop {
            interrupter.check()?;
            if let Some(at) = state.waiting.iter().position(|a| a.about == about) {
                return Ok(Some(state.waiting.swap_remove(at)));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            state = self
                .shared
                .arrived
                .wait_timeout(state, left.min(SLICE))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.closed.load(Ordering::Acquire) {
            return;
        }
        let stream = match accepted {
            Ok((stream, _)) => stream,
            // One caller that gave up, or no descriptors for the moment; the port must outlive both.
            Err(error) => {
                tracing::warn!(%error, "the data port could not accept a connection");
                std::thread::sleep(ACCEPT_RETRY);
                continue;
            }
        };
        if shared.greeting.fetch_add(1, Ordering::AcqRel) >= MAX_GREETING {
            shared.greeting.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let own = shared.clone();
        let greeting = std::thread::Builder::new()
            .name("data-greeting".into())
            .spawn(move || {
                greet(stream, &own);
                own.greeting.fetch_sub(1, Ordering::AcqRel);
            });
        if greeting.is_err() {
            shared.greeting.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Reads a hello and puts the connection where its group looks for it, or refuses it.
fn greet(mut stream: TcpStream, shared: &Shared) {
    let mut hello = [0; HELLO_BYTES];
    if stream.set_read_timeout(Some(GREETING)).is_err()
        || stream.read_exact(&mut hello).is_err()
        || hello[..8] != MAGIC
    {
        return;
    }
    let u64_at = |at: usize| {
        hello[at..at + 8]
            .iter()
            .rev()
            .fold(0u64, |v, &b| v << 8 | u64::from(b))
    };
    let u32_at = |at: usize| {
        hello[at..at + 4]
            .iter()
            .rev()
            .fold(0u32, |v, &b| v << 8 | u32::from(b))
    };
    let about = Conversation {
        group: u64_at(8),
        epoch: u64_at(16),
        dialler: u32_at(24),
        acceptor: u32_at(28),
    };
    let mut nonce = [0; 32];
    nonce.copy_from_slice(&hello[32..]);
    let mut state = shared.lock();
    if let Some(&newest) = state
        .epochs
        .get(&about.group)
        .filter(|&&newest| newest > about.epoch)
    {
        drop(state);
        let _ = stream.write_all(&welcome(Welcome::Stale { newest }, &[0; 32]));
        return;
    }
    state
        .waiting
        .retain(|a| a.since.elapsed() < WAIT && a.about != about);
    if state.waiting.len() < MAX_WAITING {
        state.waiting.push(Arrival {
            about,
            nonce,
            stream,
            since: Instant::now(),
        });
        shared.arrived.notify_all();
    }
}

/// The answer to a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Welcome {
    Come,
    Stale { newest: u64 },
}

/// What a dialler says first.
pub(super) fn hello(about: Conversation, nonce: &[u8; 32]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&about.group.to_le_bytes());
    out.extend_from_slice(&about.epoch.to_le_bytes());
    out.extend_from_slice(&about.dialler.to_le_bytes());
    out.extend_from_slice(&about.acceptor.to_le_bytes());
    out.extend_from_slice(nonce);
    out
}

pub(super) fn welcome(answer: Welcome, nonce: &[u8; 32]) -> [u8; WELCOME_BYTES] {
    let mut out = [0; WELCOME_BYTES];
    if let Welcome::Stale { newest } = answer {
        out[0] = 1;
        out[1..9].copy_from_slice(&newest.to_le_bytes());
    }
    out[9..].copy_from_slice(nonce);
    out
}

/// Reads the answer to a hello, with the acceptor's nonce. It comes when the acceptor has got so far, by `deadline` at the latest.
pub(super) fn read_welcome(
    stream: &mut TcpStream,
    deadline: Instant,
    interrupter: &Interrupter,
) -> Result<(Welcome, [u8; 32]), CallError> {
    let mut bytes = [0; WELCOME_BYTES];
    let mut filled = 0;
    stream.set_read_timeout(Some(SLICE))?;
    while filled < WELCOME_BYTES {
        interrupter.check()?;
        if Instant::now() >= deadline {
            return Err(std::io::Error::from(ErrorKind::TimedOut).into());
        }
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(std::io::Error::from(ErrorKind::UnexpectedEof).into()),
            Ok(read) => filled += read,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let mut nonce = [0; 32];
    nonce.copy_from_slice(&bytes[9..]);
    let newest = bytes[1..9]
        .iter()
        .rev()
        .fold(0u64, |v, &b| v << 8 | u64::from(b));
    Ok((
        if bytes[0] == 0 {
            Welcome::Come
        } else {
            Welcome::Stale { newest }
        },
        nonce,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_accepts_do_not_end_the_data_port() {
        // Without anybody calling, every accept on such a listener fails.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            addr,
            state: Mutex::default(),
            arrived: Condvar::new(),
            closed: AtomicBool::new(false),
            greeting: AtomicUsize::new(0),
        });
        let accepting = shared.clone();
        let thread = std::thread::spawn(move || accept(&listener, &accepting));
        let hub = Hub {
            _stop: Arc::new(Stop(shared.clone())),
            shared,
        };
        std::thread::sleep(3 * ACCEPT_RETRY);
        let about = Conversation {
            group: 1,
            epoch: 1,
            dialler: 1,
            acceptor: 0,
        };
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.write_all(&hello(about, &[7; 32])).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let arrived = hub.wait_for(about, deadline, &Interrupter::default());
        assert_eq!(arrived.unwrap().map(|a| a.nonce), Some([7; 32]));
        drop(hub);
        thread.join().unwrap();
    }
}
