//! Encrypted links from one rank to every other, and the loop that moves bytes over all of them at once.
//!
//! Everybody may send before anybody receives: writes and reads are interleaved without blocking, so full socket buffers cannot
//! lock two ranks up. A call says how many messages it wants of whom before it waits, and nothing beyond them is read: who is
//! ahead waits in the kernel's buffers, and what was not asked for is an error.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::frame::{HEADER_BYTES, Kind, LANES, MAX_PAYLOAD_BYTES, Opener, Sealer, TAG_BYTES};
use super::{Error, Interrupter};

/// Busy polling before a wait blocks. A blocked thread is 30 to 70 µs late, so this covers a hop of 1 ms and the others' arriving
/// a little later.
pub const SPIN: Duration = Duration::from_micros(2500);
/// Busy polling before each further poll lets other threads have the core first: ranks and threads may be more than cores, but where
/// somebody else computes, giving way can cost a whole slice of the scheduler's, some milliseconds.
const SPIN_ALONE: Duration = Duration::from_micros(8);
/// Longest uninterruptible wait.
const NAP: Duration = Duration::from_millis(20);
/// Ranks that compute may be this far apart: the longest step of one rank, generously.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest message: all logits of a large step.
pub const MAX_MESSAGE_BYTES: usize = 512 << 20;
/// Room for received bytes: the largest frame, and as much again of the next so that a read is seldom cut short.
const INCOMING_BYTES: usize = 2 * (HEADER_BYTES + MAX_PAYLOAD_BYTES + TAG_BYTES);
/// Sent bytes that may lie in front of unsent ones.
const COMPACT_BYTES: usize = 256 << 10;
/// Empty buffers that a lane keeps for later messages.
const SPARE: usize = 4;

/// One rank's connections, by rank; `None` at its own place.
pub struct Mesh {
    pub rank: usize,
    links: Vec<Option<Link>>,
    pub interrupter: Interrupter,
    /// Busy polling before a wait blocks; none where another thread has use for the core.
    pub spin: Duration,
}

/// A connection to one other rank.
pub struct Link {
    rank: usize,
    stream: TcpStream,
    sealer: Sealer,
    opener: Opener,
    /// Sealed bytes on their way out, and how many are gone.
    outgoing: Vec<u8>,
    sent: usize,
    /// Received bytes lie in `incoming[used..filled]`; the buffer keeps its length, since a read happens at every poll.
    incoming: Box<[u8]>,
    used: usize,
    filled: usize,
    lanes: [Lane; LANES],
}

/// Messages of one lane that came in, in order.
#[derive(Default)]
struct Lane {
    complete: VecDeque<Vec<u8>>,
    /// The message being put together.
    partial: Vec<u8>,
    /// Messages that the call under way still expects.
    wanted: usize,
    spare: Vec<Vec<u8>>,
}

impl Link {
    /// Takes a connected, greeted stream. Sends the proof of the key; [`Mesh::new`] checks the other side's.
    pub fn new(
        rank: usize,
        stream: TcpStream,
        mut sealer: Sealer,
        opener: Opener,
    ) -> Result<Link, Error> {
        let io = |what| {
            move |e: std::io::Error| Error::PeerLost {
                rank,
                why: format!("{what}: {e}"),
            }
        };
        stream.set_nodelay(true).map_err(io("nodelay"))?;
        stream.set_nonblocking(true).map_err(io("nonblocking"))?;
        notice_dead_hosts(&stream);
        let mut outgoing = Vec::new();
        sealer.seal(Kind::Proof, 0, b"proof", &mut outgoing)?;
        Ok(Link {
            rank,
            stream,
            sealer,
            opener,
            outgoing,
            sent: 0,
            incoming: vec![0; INCOMING_BYTES].into_boxed_slice(),
            used: 0,
            filled: 0,
            lanes: Default::default(),
        })
    }

    /// Seals a message into the outgoing bytes and writes what fits, frame by frame: the first is on its way while the next is
    /// being encrypted.
    fn send(&mut self, lane: usize, message: &[u8]) -> Result<(), Error> {
        let mut rest = message;
        loop {
            let (piece, after) = rest.split_at(rest.len().min(MAX_PAYLOAD_BYTES));
            let kind = if after.is_empty() {
                Kind::Last
            } else {
                Kind::Part
            };
            self.sealer.seal(kind, lane, piece, &mut self.outgoing)?;
            self.write()?;
            if after.is_empty() {
                return Ok(());
            }
            rest = after;
        }
    }

    /// Writes what fits; returns whether anything moved.
    fn write(&mut self) -> Result<bool, Error> {
        let mut moved = false;
        while self.sent < self.outgoing.len() {
            match self.stream.write(&self.outgoing[self.sent..]) {
                Ok(0) => return Err(self.lost("connection closed")),
                Ok(n) => {
                    self.sent += n;
                    moved = true;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    // A buffer that is never quite empty must not grow with all that ever went through it.
                    if self.sent >= COMPACT_BYTES {
                        self.outgoing.drain(..self.sent);
                        self.sent = 0;
                    }
                    return Ok(moved);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.lost(&e.to_string())),
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(moved)
    }

    fn wants(&self) -> bool {
        self.lanes.iter().any(|lane| lane.wanted > 0)
    }

    fn unsent(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    /// Reads what is there, and opens frames until nothing more is wanted; returns whether anything moved.
    fn read(&mut self) -> Result<bool, Error> {
        let mut moved = false;
        while self.wants() {
            if self.open_one()? {
                moved = true;
                continue;
            }
            self.make_room();
            match self.stream.read(&mut self.incoming[self.filled..]) {
                Ok(0) => return Err(self.lost("connection closed")),
                Ok(n) => {
                    self.filled += n;
                    moved = true;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(moved),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.lost(&e.to_string())),
            }
        }
        Ok(moved)
    }

    /// Moves a frame that has begun to the front when the rest of it might not fit behind it.
    fn make_room(&mut self) {
        if self.used == self.filled {
            (self.used, self.filled) = (0, 0);
        } else if self.incoming.len() - self.used < INCOMING_BYTES / 2 {
            self.incoming.copy_within(self.used..self.filled, 0);
            self.filled -= self.used;
            self.used = 0;
        }
    }

    /// Opens the next frame if all of it is there.
    fn open_one(&mut self) -> Result<bool, Error> {
        let waiting = &self.incoming[self.used..self.filled];
        let Some(header) = waiting.first_chunk::<HEADER_BYTES>() else {
            return Ok(false);
        };
        let len = HEADER_BYTES + self.opener.expect(header)?;
        if waiting.len() < len {
            return Ok(false);
        }
        let frame = self
            .opener
            .open(&mut self.incoming[self.used..self.used + len])?;
        let lane = &mut self.lanes[frame.lane];
        if lane.wanted == 0 {
            return Err(Error::Protocol {
                rank: self.rank,
                expected: format!("no message on lane {}", frame.lane),
                got: format!("{} bytes of one", frame.payload.len()),
            });
        }
        let message_bytes = lane.partial.len() + frame.payload.len();
        if message_bytes > MAX_MESSAGE_BYTES {
            return Err(Error::TooLarge {
                got: message_bytes,
                max: MAX_MESSAGE_BYTES,
            });
        }
        lane.partial.extend_from_slice(frame.payload);
        if frame.kind != Kind::Part {
            let empty = lane.spare.pop().unwrap_or_default();
            let message = std::mem::replace(&mut lane.partial, empty);
            lane.complete.push_back(message);
            lane.wanted -= 1;
        }
        self.used += len;
        Ok(true)
    }

    fn lost(&self, why: &str) -> Error {
        Error::PeerLost {
            rank: self.rank,
            why: why.into(),
        }
    }
}

impl Mesh {
    /// Takes the links of all other ranks and waits until each has proven the key.
    pub fn new(
        rank: usize,
        links: Vec<Option<Link>>,
        timeout: Duration,
        interrupter: Interrupter,
    ) -> Result<Mesh, Error> {
        let mut mesh = Mesh {
            rank,
            links,
            interrupter,
            spin: SPIN,
        };
        let others: Vec<usize> = mesh.others().collect();
        for (other, proof) in others
            .iter()
            .zip(mesh.exchange(&[], &others, Some(timeout))?)
        {
            if proof != b"proof" {
                return Err(Error::WrongKey { rank: *other });
            }
        }
        Ok(mesh)
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.links.len()
    }

    /// All ranks but this one.
    pub fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.links.len()).filter(move |&r| r != rank)
    }

    /// Sends messages, and receives one from each rank of `from`, all at once; gives those. Without a timeout it waits for as long
    /// as the connections live.
    pub fn exchange(
        &mut self,
        to: &[(usize, &[u8])],
        from: &[usize],
        timeout: Option<Duration>,
    ) -> Result<Vec<Vec<u8>>, Error> {
        from.iter().for_each(|&rank| self.want(rank, 0, 1));
        for &(rank, message) in to {
            self.send(rank, 0, message)?;
        }
        self.run(timeout, |mesh| {
            Ok(from.iter().all(|&rank| mesh.message(rank, 0).is_some()))
        })?;
        let received = from.iter().filter_map(|&rank| self.take(rank, 0));
        Ok(received.collect())
    }

    /// The call under way will wait for `count` more messages of a rank.
    pub fn want(&mut self, rank: usize, lane: usize, count: usize) {
        if let Some(link) = &mut self.links[rank] {
            link.lanes[lane].wanted += count;
        }
    }

    /// Begins to send a message; [`Mesh::run`] sees to the rest of it.
    pub fn send(&mut self, rank: usize, lane: usize, message: &[u8]) -> Result<(), Error> {
        match &mut self.links[rank] {
            Some(link) => link.send(lane, message),
            None => Ok(()),
        }
    }

    /// Most bytes that wait on any link because the kernel takes no more.
    pub fn backlog(&self) -> usize {
        let unsent = self.links.iter().flatten().map(Link::unsent);
        unsent.max().unwrap_or(0)
    }

    /// The oldest message of a rank, if one is complete.
    pub fn message(&self, rank: usize, lane: usize) -> Option<&[u8]> {
        let link = self.links[rank].as_ref()?;
        link.lanes[lane].complete.front().map(Vec::as_slice)
    }

    /// Whether every other rank's next message is complete.
    pub fn all_have(&self, lane: usize) -> bool {
        let mut links = self.links.iter().flatten();
        links.all(|link| !link.lanes[lane].complete.is_empty())
    }

    /// Takes the oldest message of a rank out.
    pub fn take(&mut self, rank: usize, lane: usize) -> Option<Vec<u8>> {
        let link = self.links[rank].as_mut()?;
        link.lanes[lane].complete.pop_front()
    }

    /// The oldest message of a rank was read; its memory serves again.
    pub fn done_with(&mut self, rank: usize, lane: usize) {
        if let Some(link) = &mut self.links[rank] {
            let lane = &mut link.lanes[lane];
            if let Some(mut message) = lane.complete.pop_front()
                && lane.spare.len() < SPARE
            {
                message.clear();
                lane.spare.push(message);
            }
        }
    }

    /// Errors if a connection was closed from the other side. Reads nothing.
    pub fn check_alive(&self) -> Result<(), Error> {
        self.interrupter.check()?;
        for link in self.links.iter().flatten() {
            let mut byte = [0];
            match link.stream.peek(&mut byte) {
                Ok(0) => return Err(link.lost("connection closed")),
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => return Err(link.lost(&e.to_string())),
            }
        }
        Ok(())
    }

    /// Calls `step`, which sends and takes messages and says when it is done, and moves bytes, until it is and everything is out.
    /// Without a timeout it waits for as long as the connections live.
    pub fn run(
        &mut self,
        timeout: Option<Duration>,
        mut step: impl FnMut(&mut Mesh) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let mut still = None;
        loop {
            let done = step(self)?;
            let mut moved = false;
            let mut waiting_for = None;
            for link in self.links.iter_mut().flatten() {
                if link.unsent() > 0 {
                    moved |= link.write()?;
                }
                if link.wants() {
                    moved |= link.read()?;
                }
                if link.unsent() > 0 || link.wants() {
                    waiting_for = Some(link.rank);
                }
            }
            let Some(rank) = waiting_for else {
                if done {
                    return Ok(());
                }
                // What was wanted has just come; the step takes it.
                continue;
            };
            if moved {
                still = None;
                continue;
            }
            let waited = still.get_or_insert_with(Instant::now).elapsed();
            if waited < self.spin {
                if waited > SPIN_ALONE {
                    std::thread::yield_now();
                }
                continue;
            }
            if timeout.is_some_and(|t| waited > t) {
                return Err(Error::PeerLost {
                    rank,
                    why: format!("no answer for {} ms", waited.as_millis()),
                });
            }
            self.interrupter.check()?;
            self.nap();
        }
    }

    /// Blocks until a socket is ready, for at most [`NAP`].
    fn nap(&self) {
        let mut polls: Vec<libc::pollfd> = Vec::with_capacity(self.links.len());
        for link in self.links.iter().flatten() {
            let mut events = 0;
            if link.wants() {
                events |= libc::POLLIN;
            }
            if link.unsent() > 0 {
                events |= libc::POLLOUT;
            }
            if events != 0 {
                polls.push(libc::pollfd {
                    fd: link.stream.as_raw_fd(),
                    events,
                    revents: 0,
                });
            }
        }
        // SAFETY: the array is live for the call and its length is its own; the descriptors belong to live streams.
        unsafe {
            libc::poll(
                polls.as_mut_ptr(),
                polls.len() as libc::nfds_t,
                NAP.as_millis() as libc::c_int,
            )
        };
    }
}

/// Lets the kernel find out within about four seconds that the other host is gone without a word (power, cable) while nothing is
/// under way to it; a dead process closes its connections at once. There is no `TCP_USER_TIMEOUT`: it would also end a connection
/// whose reader only computes for long and takes nothing in meanwhile, and it would replace the count of probes here. Bytes that
/// are under way to a dead host are [`STEP_TIMEOUT`]'s to notice.
fn notice_dead_hosts(stream: &TcpStream) {
    let options = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3),
    ];
    for (level, name, value) in options {
        let value: libc::c_int = value;
        // SAFETY: the descriptor is live, and the value is a c_int of the length given. A refused option only means later notice.
        unsafe {
            let value = (&raw const value).cast();
            libc::setsockopt(
                stream.as_raw_fd(),
                level,
                name,
                value,
                size_of::<libc::c_int>() as libc::socklen_t,
            );
        }
    }
}
