//! A small network inside this process: each host is a thread in a network namespace of its own with a tun device, and a relay
//! between the devices delays what passes and limits its rate. (The kernel's own netem is often not there.)
//!
//! Each host has a full-duplex port on one switch: a packet leaves when its port is free, takes bytes/rate, enters the other port
//! when that is free, and arrives after the delay. Namespaces have no name, so nothing is left behind however the process ends.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Largest packet: few of them a second keep the relay out of the cores' way.
const MTU_BYTES: usize = 65_535;
/// Packets that one device hands over in a turn.
const TURN: usize = 16;
/// The relay gives way to others between turns, and sleeps when nothing has passed for so long.
const QUIET: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_millis(1);
/// Packets kept for reuse.
const SPARE: usize = 256;

/// What the wires do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    pub delay: Duration,
    pub bits_per_s: f64,
}

/// Address of a host.
pub fn address(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, host as u8 + 1)
}

/// Puts the calling thread, and threads that it will start, into a new network namespace with the device of `host`.
///
/// # Errors
/// No right to do so, or no /dev/net/tun.
pub fn enter(host: usize) -> Result<File> {
    // SAFETY: affects the calling thread only; no memory is involved.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(std::io::Error::last_os_error()).context("a new network namespace needs root");
    }
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    let mut request = named("tun0");
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    control(&device, libc::TUNSETIFF as libc::Ioctl, &mut request)?;
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    set_address(&socket, libc::SIOCSIFADDR, address(host))?;
    set_address(
        &socket,
        libc::SIOCSIFNETMASK,
        Ipv4Addr::new(255, 255, 255, 0),
    )?;
    let mut request = named("tun0");
    request.ifr_ifru.ifru_mtu = MTU_BYTES as i32;
    control(&socket, libc::SIOCSIFMTU, &mut request)?;
    let mut request = named("tun0");
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    control(&socket, libc::SIOCSIFFLAGS, &mut request)?;
    Ok(device)
}

fn named(device: &str) -> libc::ifreq {
    // SAFETY: all zeros is a valid ifreq: plain numbers and an empty name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, &from) in request.ifr_name.iter_mut().zip(device.as_bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn set_address(socket: &impl AsRawFd, what: libc::Ioctl, address: Ipv4Addr) -> Result<()> {
    let mut request = named("tun0");
    // SAFETY: all zeros is a valid sockaddr_in, which is as large as the sockaddr whose place it takes.
    let mut place: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    place.sin_family = libc::AF_INET as libc::sa_family_t;
    place.sin_addr.s_addr = u32::from(address).to_be();
    // SAFETY: both are plain bytes of one size.
    request.ifr_ifru.ifru_addr =
        unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(place) };
    control(socket, what, &mut request)
}

fn control(file: &impl AsRawFd, what: libc::Ioctl, request: &mut libc::ifreq) -> Result<()> {
    // SAFETY: these calls read and write one ifreq, which is live.
    if unsafe { libc::ioctl(file.as_raw_fd(), what, std::ptr::from_mut(request)) } != 0 {
        return Err(std::io::Error::last_os_error()).context("setting up a tun device");
    }
    Ok(())
}

/// Ends the relay when it goes.
pub struct Relay {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Relay {
    /// Connects the devices of hosts 0, 1, … by `line`.
    pub fn start(devices: Vec<File>, line: Line, realtime: bool) -> Result<Relay> {
        if devices.is_empty() {
            bail!("no device to connect");
        }
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || {
                crate::measure::place(None, realtime);
                Ports::new(devices, line).run(&told);
            })?;
        Ok(Relay {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Ports {
    line: Line,
    ports: Vec<Port>,
    spare: Vec<Vec<u8>>,
}

struct Port {
    device: File,
    /// When the way out of the host, and the way into it, are free again.
    out_free: Instant,
    in_free: Instant,
    /// Packets on their way to this host, in the order of their arrival.
    arriving: VecDeque<(Instant, Vec<u8>)>,
}

impl Ports {
    fn new(devices: Vec<File>, line: Line) -> Ports {
        let now = Instant::now();
        let port = |device| Port {
            device,
            out_free: now,
            in_free: now,
            arriving: VecDeque::new(),
        };
        Ports {
            line,
            ports: devices.into_iter().map(port).collect(),
            spare: Vec::new(),
        }
    }

    fn run(&mut self, stop: &AtomicBool) {
        let mut quiet_since = Instant::now();
        while !stop.load(Ordering::Acquire) {
            let moved = self.take_in() | self.hand_out();
            let now = Instant::now();
            if moved || self.ports.iter().any(|p| !p.arriving.is_empty()) {
                quiet_since = now;
            }
            if now - quiet_since > QUIET {
                std::thread::sleep(NAP);
            } else if !moved {
                std::thread::yield_now();
            }
        }
    }

    /// Reads what hosts send, and decides when it arrives.
    fn take_in(&mut self) -> bool {
        let mut moved = false;
        for from in 0..self.ports.len() {
            for _ in 0..TURN {
                let mut packet = self.spare.pop().unwrap_or_default();
                packet.resize(MTU_BYTES, 0);
                let len = match self.ports[from].device.read(&mut packet) {
                    Ok(len) => len,
                    Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                    Err(_) => {
                        self.spare.push(packet);
                        break;
                    }
                };
                moved = true;
                packet.truncate(len);
                self.schedule(from, packet);
            }
        }
        moved
    }

    fn schedule(&mut self, from: usize, packet: Vec<u8>) {
        // The last byte of an IPv4 destination in our network.
        let host = packet.get(19).map_or(0, |&b| usize::from(b));
        let version = packet.first().map_or(0, |b| b >> 4);
        if version != 4 || host == 0 || host > self.ports.len() {
            return;
        }
        let on_wire = Duration::from_secs_f64(packet.len() as f64 * 8.0 / self.line.bits_per_s);
        let now = Instant::now();
        let out = &mut self.ports[from].out_free;
        *out = (*out).max(now) + on_wire;
        let left = *out;
        let port = &mut self.ports[host - 1];
        // The switch passes on while it receives: the second port adds time only where packets meet.
        port.in_free = left.max(port.in_free + on_wire);
        let at = port.in_free + self.line.delay;
        port.arriving.push_back((at, packet));
    }

    /// Writes what has arrived.
    fn hand_out(&mut self) -> bool {
        let mut moved = false;
        let now = Instant::now();
        for port in &mut self.ports {
            while let Some((at, packet)) = port.arriving.front() {
                if *at > now {
                    break;
                }
                match port.device.write(packet) {
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    // What a host does not take is lost, as on any network.
                    _ => {}
                }
                moved = true;
                if let Some((_, packet)) = port.arriving.pop_front()
                    && self.spare.len() < SPARE
                {
                    self.spare.push(packet);
                }
            }
        }
        moved
    }
}
