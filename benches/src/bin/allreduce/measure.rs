//! Sums of one group over one kind of connection, timed on every rank.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use worker::collective::{Collective, GroupConfig, Hub, Sealing, Shm, Tcp, Wire};

use crate::relay::{self, Line, Relay};

/// How long ranks may take to meet, the slowest line included.
const JOIN: Duration = Duration::from_secs(20);
/// Calls before those that count.
const WARM_UP: usize = 3;
/// Calls that are timed at least and at most.
const CALLS: std::ops::RangeInclusive<usize> = 4..=400;
/// Ports in a namespace of one's own.
const DATA_PORT: u16 = 7000;
const BARE_PORT: u16 = 7001;
/// Bytes before and after an encrypted payload.
const FRAME_BYTES: usize = 44;
/// Largest message that is also exchanged without a collective.
const BARE_BYTES: usize = 4 << 20;

/// What connects the ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Transport {
    Shm,
    Loopback,
    Line(Line),
}

/// Some sums of one size.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    pub transport: String,
    pub delay_us: f64,
    pub gbit_per_s: Option<f64>,
    pub ranks: usize,
    /// `bare` is a plain exchange of as many bytes over one busy-polled TCP connection, without a collective.
    pub format: String,
    pub encrypted: bool,
    /// Of the summed numbers as f32.
    pub bytes: usize,
    /// That one rank sends to one other if everybody sends everything.
    pub wire_bytes: usize,
    pub calls: usize,
    /// Of each call the mean of all ranks, which do not begin at the same moment.
    pub fastest_us: f64,
    pub median_us: f64,
    pub p99_us: f64,
    /// One-way delay and wire time, of one hop or of shares, whichever is less. On loopback the bare exchange of as many bytes.
    pub floor_us: Option<f64>,
    /// A plain exchange of as many bytes over the same kind of connection.
    pub bare_us: Option<f64>,
    /// Largest sum that took one hop, in bytes on the wire, where there are more than two ranks.
    pub one_hop_bytes: usize,
}

/// A way to run the group.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub wire: Wire,
    pub sealing: Sealing,
}

impl Transport {
    /// Whether large sums take so long on it that few can be timed.
    pub fn is_slow(self) -> bool {
        matches!(self, Transport::Line(line) if line.bits_per_s < 5e9)
    }

    pub fn name(self) -> String {
        match self {
            Transport::Shm => "shm".into(),
            Transport::Loopback => "loopback".into(),
            Transport::Line(line) => format!(
                "{} ms, {} Gbit/s",
                line.delay.as_secs_f64() * 1e3,
                line.bits_per_s / 1e9
            ),
        }
    }
}

/// Puts the calling thread on a core of its own, as far as there are any, so that two ranks never take turns on one while another
/// idles; with `realtime` nothing else gets the core while the thread wants it, which is how to measure on a busy machine.
pub fn place(core: Option<usize>, realtime: bool) {
    if let Some(core) = core {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // SAFETY: all zeros is an empty set; the call reads it and affects the calling thread only.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(core % cores, &mut set);
            libc::sched_setaffinity(0, size_of_val(&set), &set);
        }
    }
    if realtime {
        let lowest = libc::sched_param { sched_priority: 1 };
        // SAFETY: reads one parameter and affects the calling thread only. Refused without the right to it; then nothing changes.
        unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &lowest) };
    }
}

/// Runs a group of `ranks` over `transport` in each setting, and times sums of each size (bytes as f32) for about `budget`.
pub fn group(
    transport: Transport,
    ranks: usize,
    settings: &[Setting],
    sizes: &[usize],
    budget: Duration,
    realtime: bool,
) -> Result<Vec<Cell>> {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let in_namespaces = matches!(transport, Transport::Line(_));
    let hubs = if in_namespaces {
        Vec::new()
    } else {
        let hubs = (0..ranks).map(|_| Hub::bind(loopback));
        hubs.collect::<Result<Vec<_>, _>>()?
    };
    let bare_listener = TcpListener::bind(loopback)?;
    let bare = if in_namespaces {
        SocketAddr::from((relay::address(0), BARE_PORT))
    } else {
        bare_listener.local_addr()?
    };
    let peers: Vec<SocketAddr> = (0..ranks)
        .map(|rank| match hubs.get(rank) {
            Some(hub) => hub.local_addr(),
            None => SocketAddr::from((relay::address(rank), DATA_PORT)),
        })
        .collect();
    std::thread::scope(|scope| {
        let (devices, arrived) = mpsc::channel();
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                let (devices, peers, hubs) = (devices.clone(), &peers, &hubs);
                let bare_listener = &bare_listener;
                scope.spawn(move || -> Result<Vec<Cell>> {
                    place(Some(rank), realtime);
                    let own_listener;
                    let (hub, listener) = if in_namespaces {
                        let device = relay::enter(rank);
                        let entered = device.is_ok();
                        devices.send((rank, device))?;
                        if !entered {
                            bail!("rank {rank} has no network");
                        }
                        own_listener = TcpListener::bind((relay::address(rank), BARE_PORT))?;
                        (Hub::bind(peers[rank])?, &own_listener)
                    } else {
                        (hubs[rank].clone(), bare_listener)
                    };
                    let place = Place {
                        transport,
                        rank,
                        peers,
                        hub,
                    };
                    let mut cells = place.sums(settings, sizes, budget)?;
                    if ranks == 2 && transport != Transport::Shm {
                        cells.extend(place.bare(listener, bare, sizes, budget)?);
                    }
                    Ok(cells)
                })
            })
            .collect();
        let mut relay = None;
        if let Transport::Line(line) = transport {
            let mut devices: Vec<_> = arrived.iter().take(ranks).collect();
            devices.sort_by_key(|(rank, _)| *rank);
            let devices = devices.into_iter().map(|(_, device)| device);
            relay = Some(Relay::start(
                devices.collect::<Result<_>>()?,
                line,
                realtime,
            )?);
        }
        let mut all = Vec::new();
        for thread in threads {
            all.push(thread.join().map_err(|_| anyhow!("a rank panicked"))?);
        }
        drop(relay);
        let failed: Vec<String> = all
            .iter()
            .enumerate()
            .filter_map(|(rank, cells)| Some(format!("rank {rank}: {:#}", cells.as_ref().err()?)))
            .collect();
        if !failed.is_empty() {
            bail!("{}", failed.join("; "));
        }
        all.swap_remove(0)
    })
}

struct Place<'a> {
    transport: Transport,
    rank: usize,
    peers: &'a [SocketAddr],
    hub: Hub,
}

impl Place<'_> {
    fn sums(&self, settings: &[Setting], sizes: &[usize], budget: Duration) -> Result<Vec<Cell>> {
        let mut cells = Vec::new();
        let mut one_hop_bytes = None;
        for (epoch, setting) in settings.iter().enumerate() {
            let config = GroupConfig {
                group: 1,
                epoch: epoch as u64 + 1,
                rank: self.rank,
                peers: self.peers.to_vec(),
                key: [7; 32],
                wire: setting.wire,
                sealing: setting.sealing,
                overlap: true,
            };
            let mut tcp = Tcp::join(&self.hub, config, JOIN)?;
            match one_hop_bytes {
                None => tcp.calibrate()?,
                Some(bytes) => tcp.set_one_hop_bytes(bytes)?,
            }
            let measured = tcp.one_hop_bytes()?;
            one_hop_bytes = Some(measured);
            let mut collective: Box<dyn Collective> = match self.transport {
                Transport::Shm => Shm::upgrade(tcp)?,
                _ => Box::new(tcp),
            };
            for &bytes in sizes {
                let samples = self.time(collective.as_mut(), bytes, budget)?;
                let wire_bytes = match self.transport {
                    Transport::Shm => bytes * 2,
                    _ => encoded_bytes(setting.wire, bytes / 4),
                };
                let mut cell = self.cell(bytes, samples);
                cell.format = setting.wire.to_string();
                cell.encrypted = setting.sealing == Sealing::Encrypted;
                cell.wire_bytes = wire_bytes;
                cell.one_hop_bytes = measured;
                if let Transport::Line(line) = self.transport {
                    cell.floor_us = Some(floor_us(line, self.peers.len(), wire_bytes));
                }
                cells.push(cell);
            }
        }
        Ok(cells)
    }

    /// Microseconds of each call: on the leader the mean of all ranks', on the others this rank's.
    fn time(&self, group: &mut dyn Collective, bytes: usize, budget: Duration) -> Result<Vec<f64>> {
        let entered = Instant::now();
        let original = contribution(self.rank, bytes / 4);
        let mut data = original.clone();
        let mut call = |group: &mut dyn Collective| -> Result<Duration> {
            data.copy_from_slice(&original);
            let start = Instant::now();
            group.all_reduce_f64(&mut data)?;
            Ok(start.elapsed())
        };
        let mut fastest = Duration::MAX;
        let started = Instant::now();
        for warm_up in 0..WARM_UP {
            fastest = fastest.min(call(group)?);
            // The leader's word: a slow line needs no warming, and each rank must do the same.
            let mut over = vec![u8::from(warm_up == 0 && started.elapsed() > budget)];
            group.broadcast(&mut over)?;
            if over == [1] {
                break;
            }
        }
        let calls = (budget.as_secs_f64() / fastest.as_secs_f64().max(1e-6)) as usize;
        let mut calls = (calls.clamp(*CALLS.start(), *CALLS.end()) as u32)
            .to_le_bytes()
            .to_vec();
        group.broadcast(&mut calls)?;
        let calls = calls.first_chunk().map_or(1, |b| u32::from_le_bytes(*b));
        let mut samples = Vec::new();
        for _ in 0..calls {
            samples.push(call(group)?.as_secs_f64() * 1e6);
        }
        let mine: Vec<u8> = samples.iter().flat_map(|s| s.to_le_bytes()).collect();
        let all = group.gather_to_leader(&mine)?.concat();
        if self.rank == 0 {
            let all: Vec<f64> = all
                .as_chunks()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b))
                .collect();
            // A rank that begins late waits shorter by what the others wait longer.
            let (calls, ranks) = (samples.len(), self.peers.len());
            let mean = |call| (0..ranks).map(|r| all[r * calls + call]).sum::<f64>() / ranks as f64;
            samples = (0..calls).map(mean).collect();
        }
        // The kernel suspends real-time threads that take more than 95 % of a second.
        std::thread::sleep(entered.elapsed() / 8);
        Ok(samples)
    }

    /// A plain exchange with the one other rank.
    fn bare(
        &self,
        listener: &TcpListener,
        address: SocketAddr,
        sizes: &[usize],
        budget: Duration,
    ) -> Result<Vec<Cell>> {
        let mut stream = if self.rank == 0 {
            listener.accept()?.0
        } else {
            dial(address)?
        };
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let mut cells = Vec::new();
        for &bytes in sizes.iter().filter(|&&bytes| bytes <= BARE_BYTES) {
            let (out, mut back) = (vec![1; bytes], vec![0; bytes]);
            let start = Instant::now();
            exchange(&mut stream, &out, &mut back)?;
            let calls = budget.as_secs_f64() / start.elapsed().as_secs_f64().max(1e-6);
            let calls = (calls as u32).clamp(*CALLS.start() as u32, *CALLS.end() as u32);
            let mut agreed = [0; 4];
            exchange(&mut stream, &calls.to_le_bytes(), &mut agreed)?;
            let calls = calls.min(u32::from_le_bytes(agreed));
            let mut samples = Vec::new();
            for _ in 0..calls {
                let start = Instant::now();
                exchange(&mut stream, &out, &mut back)?;
                samples.push(start.elapsed().as_secs_f64() * 1e6);
            }
            let mine: Vec<u8> = samples.iter().flat_map(|s| s.to_le_bytes()).collect();
            let mut theirs = vec![0; mine.len()];
            exchange(&mut stream, &mine, &mut theirs)?;
            for (own, other) in samples.iter_mut().zip(theirs.as_chunks().0) {
                *own = (*own + f64::from_le_bytes(*other)) / 2.0;
            }
            let mut cell = self.cell(bytes, samples);
            cell.format = "bare".into();
            cell.wire_bytes = bytes;
            if let Transport::Line(line) = self.transport {
                cell.floor_us = Some(floor_us(line, 2, bytes));
            }
            cells.push(cell);
        }
        Ok(cells)
    }

    fn cell(&self, bytes: usize, mut samples: Vec<f64>) -> Cell {
        samples.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = ((samples.len() as f64 * share).ceil() as usize).max(1) - 1;
            samples.get(index).copied().unwrap_or(f64::NAN)
        };
        let line = match self.transport {
            Transport::Line(line) => Some(line),
            _ => None,
        };
        Cell {
            transport: self.transport.name(),
            delay_us: line.map_or(0.0, |l| l.delay.as_secs_f64() * 1e6),
            gbit_per_s: line.map(|l| l.bits_per_s / 1e9),
            ranks: self.peers.len(),
            format: String::new(),
            encrypted: false,
            bytes,
            wire_bytes: 0,
            calls: samples.len(),
            fastest_us: at(0.0),
            median_us: at(0.5),
            p99_us: at(0.99),
            floor_us: None,
            bare_us: None,
            one_hop_bytes: 0,
        }
    }
}

/// The least that a sum of `bytes` on the wire takes: everybody's everything in one hop, or shares in two.
fn floor_us(line: Line, ranks: usize, bytes: usize) -> f64 {
    let delay = line.delay.as_secs_f64();
    let wire = (bytes + FRAME_BYTES) as f64 * 8.0 / line.bits_per_s;
    let others = (ranks - 1) as f64;
    let one_hop = delay + others * wire;
    let shares = 2.0 * delay + 2.0 * others / ranks as f64 * wire;
    one_hop.min(shares) * 1e6
}

/// Numbers as a model's partial sums are: on the grid, of about one.
fn contribution(rank: usize, len: usize) -> Vec<f64> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(rank as u64 + 1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..len).map(|_| kernels::to_grid(next())).collect()
}

fn encoded_bytes(wire: Wire, len: usize) -> usize {
    // Blocks of one kind of numbers are alike.
    let sample = contribution(0, len.min(1 << 16));
    wire.encoded_bytes(&sample) * len / sample.len().max(1)
}

fn dial(address: SocketAddr) -> Result<TcpStream> {
    let start = Instant::now();
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return Ok(stream),
            Err(e) if start.elapsed() > JOIN => return Err(e).context("plain connection"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// So many polls without a byte, and the kernel's own threads get the cores: with real-time priority they starve otherwise.
const STARVED_POLLS: u32 = 1 << 20;

/// Sends and receives at once, busy polling.
fn exchange(stream: &mut TcpStream, out: &[u8], back: &mut [u8]) -> Result<()> {
    let (mut sent, mut received) = (0, 0);
    let (mut moved, mut polls) = (0, 0);
    while sent < out.len() || received < back.len() {
        polls = if sent + received == moved {
            polls + 1
        } else {
            0
        };
        moved = sent + received;
        if polls > STARVED_POLLS {
            std::thread::sleep(Duration::from_millis(1));
        }
        if sent < out.len() {
            match stream.write(&out[sent..]) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
        if received < back.len() {
            match stream.read(&mut back[received..]) {
                Ok(0) => bail!("the other end is gone"),
                Ok(n) => received += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}
