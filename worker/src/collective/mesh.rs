//! Encrypted links from one rank to every other, and the loop that moves bytes over all of them at once.
//!
//! Everybody may send before anybody receives: writes and reads are interleaved without blocking, so full socket buffers cannot
//! lock two ranks up. Waiting is a short busy poll (a loopback round trip is 14 µs polled, 86 µs blocked), then poll(2).

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::frame::{HEADER_BYTES, Kind, MAX_PAYLOAD_BYTES, Opener, Sealer, TAG_BYTES};
use super::{Error, Interrupter};

/// Busy polling before a wait blocks: about one hop on a fast network; longer would steal the core that computes.
const SPIN: Duration = Duration::from_micros(50);
/// Longest uninterruptible wait.
const NAP: Duration = Duration::from_millis(20);
/// Ranks that compute may be this far apart: the longest step of one rank, generously.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest message: all logits of a large step.
pub const MAX_MESSAGE_BYTES: usize = 512 << 20;
/// Room for received bytes: the largest frame, and as much again of the next so that a read is seldom cut short.
const INCOMING_BYTES: usize = 2 * (HEADER_BYTES + MAX_PAYLOAD_BYTES + TAG_BYTES);

/// One rank's connections, by rank; `None` at its own place.
pub struct Mesh {
    pub rank: usize,
    links: Vec<Option<Link>>,
    pub interrupter: Interrupter,
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
    /// The message being put together.
    message: Vec<u8>,
    complete: bool,
    wanted: bool,
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
        sealer.seal(Kind::Proof, b"proof", &mut outgoing)?;
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
            message: Vec::new(),
            complete: false,
            wanted: false,
        })
    }

    /// Seals a message into the outgoing bytes.
    fn queue(&mut self, message: &[u8]) -> Result<(), Error> {
        let mut pieces = message.chunks(MAX_PAYLOAD_BYTES).peekable();
        if pieces.peek().is_none() {
            return self.sealer.seal(Kind::Last, &[], &mut self.outgoing);
        }
        while let Some(piece) = pieces.next() {
            let kind = if pieces.peek().is_some() {
                Kind::Part
            } else {
                Kind::Last
            };
            self.sealer.seal(kind, piece, &mut self.outgoing)?;
        }
        Ok(())
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
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(moved),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.lost(&e.to_string())),
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(moved)
    }

    /// Reads what is there, and opens frames until the message is complete; returns whether anything moved.
    fn read(&mut self) -> Result<bool, Error> {
        let mut moved = false;
        while !self.complete {
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
        let (kind, payload) = self
            .opener
            .open(&mut self.incoming[self.used..self.used + len])?;
        if self.message.len() + payload.len() > MAX_MESSAGE_BYTES {
            return Err(Error::TooLarge {
                got: self.message.len() + payload.len(),
                max: MAX_MESSAGE_BYTES,
            });
        }
        self.message.extend_from_slice(payload);
        self.complete = kind != Kind::Part;
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
    pub fn new(rank: usize, links: Vec<Option<Link>>, timeout: Duration) -> Result<Mesh, Error> {
        let mut mesh = Mesh {
            rank,
            links,
            interrupter: Interrupter::default(),
        };
        let others: Vec<usize> = mesh.others().collect();
        mesh.exchange(&[], &others, Some(timeout))?;
        for other in others {
            if mesh.message(other) != b"proof" {
                return Err(Error::WrongKey { rank: other });
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

    /// Sends messages, and receives one from each rank of `from`, all at once. Read them with [`Mesh::message`]. Without a timeout
    /// it waits for as long as the connections live.
    pub fn exchange(
        &mut self,
        to: &[(usize, &[u8])],
        from: &[usize],
        timeout: Option<Duration>,
    ) -> Result<(), Error> {
        for &(rank, message) in to {
            if let Some(link) = &mut self.links[rank] {
                link.queue(message)?;
            }
        }
        for &rank in from {
            if let Some(link) = &mut self.links[rank] {
                link.message.clear();
                link.complete = false;
                link.wanted = true;
            }
        }
        let done = self.pump(timeout);
        for link in self.links.iter_mut().flatten() {
            link.wanted = false;
        }
        done
    }

    /// The last message from a rank.
    pub fn message(&self, rank: usize) -> &[u8] {
        self.links[rank].as_ref().map_or(&[], |l| &l.message)
    }

    /// Takes the last message from a rank out.
    pub fn take_message(&mut self, rank: usize) -> Vec<u8> {
        self.links[rank]
            .as_mut()
            .map(|l| std::mem::take(&mut l.message))
            .unwrap_or_default()
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

    /// Moves bytes until everything is out and everything wanted is in.
    fn pump(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        let mut still = Instant::now();
        loop {
            let mut moved = false;
            let mut waiting_for = None;
            for link in self.links.iter_mut().flatten() {
                if !link.outgoing.is_empty() {
                    moved |= link.write()?;
                }
                if link.wanted && !link.complete {
                    moved |= link.read()?;
                }
                if !link.outgoing.is_empty() || (link.wanted && !link.complete) {
                    waiting_for = Some(link.rank);
                }
            }
            let Some(rank) = waiting_for else {
                return Ok(());
            };
            if moved {
                still = Instant::now();
                continue;
            }
            let waited = still.elapsed();
            if timeout.is_some_and(|t| waited > t) {
                return Err(Error::PeerLost {
                    rank,
                    why: format!("no answer for {} ms", waited.as_millis()),
                });
            }
            if waited < SPIN {
                std::hint::spin_loop();
                continue;
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
            if link.wanted && !link.complete {
                events |= libc::POLLIN;
            }
            if !link.outgoing.is_empty() {
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
