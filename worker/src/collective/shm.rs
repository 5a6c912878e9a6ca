//! Ranks in different processes of one host: sums through a shared file in memory, everything else over TCP.
//!
//! Layout: a turn counter, a count of sleepers, each rank's sequence number, then two slots of numbers for each rank. For its n-th
//! sum a rank writes slot n mod 2, posts n, waits until all have posted n, and adds all slots up in rank order. Nobody can still be
//! reading slot n mod 2 when a rank writes sum n + 2 there: it waited for all to post n + 1, which each does after reading n.
//!
//! The TCP connections stay open and tell when a process is gone.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use rand::RngCore;

use super::mesh::STEP_TIMEOUT;
use super::{Collective, Error, Interrupter, Tcp};

/// Numbers in a slot; longer sums go in pieces. 256 KiB, so that slots stay in a core's own cache: four times as much takes twice as
/// long for 1 MiB of f32, and a quarter of it half as long again.
const SLOT_LEN: usize = 32 << 10;
/// Busy polling before a rank sleeps: ranks on one host are seldom further apart, and one that sleeps wakes up late.
const SPIN: Duration = Duration::from_micros(500);
/// Busy polling before each further look lets other threads have the core first: ranks may be more than cores.
const SPIN_ALONE: Duration = Duration::from_micros(8);
/// Longest sleep before a rank looks whether the others still live.
const NAP: Duration = Duration::from_millis(5);
/// Counters in front of the slots, each on a cache line of its own.
const LINE_BYTES: usize = 64;
const FOLDER: &str = "/dev/shm";

/// The collective through shared memory.
pub struct Shm {
    tcp: Tcp,
    map: MmapRaw,
    /// Sums taken so far.
    sequence: u64,
    alive_checked: Instant,
}

impl Shm {
    /// Goes over to shared memory if all ranks are on one host and can open the same file; otherwise stays with TCP. All ranks call it.
    pub fn upgrade(mut tcp: Tcp) -> Result<Box<dyn Collective>, Error> {
        if tcp.size() == 1 {
            return Ok(Box::new(tcp));
        }
        let host = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let hosts = tcp.gather_to_leader(&host)?;
        let mut created = None;
        if tcp.rank() == 0 && !host.is_empty() && hosts.iter().all(|h| *h == host) {
            created = create(&tcp).ok();
        }
        let mut name = created
            .as_ref()
            .map(|(path, _)| path.to_string_lossy().into_owned().into_bytes())
            .unwrap_or_default();
        tcp.broadcast(&mut name)?;
        if name.is_empty() {
            tcp.calibrate()?;
            return Ok(Box::new(tcp));
        }
        let size = tcp.size();
        let map = match created.as_ref() {
            Some((_, file)) => map(file, size),
            None => open(&name).and_then(|file| map(&file, size)),
        };
        let answers = tcp.gather_to_leader(&[u8::from(map.is_ok())])?;
        // Every rank has it open: without a name it cannot outlive them.
        if let Some((path, _)) = &created {
            let _ = std::fs::remove_file(path);
        }
        let mut agreed = vec![u8::from(answers.iter().all(|a| *a == [1]))];
        tcp.broadcast(&mut agreed)?;
        match map {
            Ok(map) if agreed == [1] => Ok(Box::new(Shm {
                tcp,
                map,
                sequence: 0,
                alive_checked: Instant::now(),
            })),
            _ => {
                tcp.calibrate()?;
                Ok(Box::new(tcp))
            }
        }
    }

    fn sum(&mut self, data: &mut [f64]) -> Result<(), Error> {
        self.sequence += 1;
        let (rank, size, sequence) = (self.tcp.rank(), self.tcp.size(), self.sequence);
        let half = (sequence % 2) as usize;
        // SAFETY: `slot` lies inside the map and holds SLOT_LEN ≥ data.len() numbers. Only this rank writes it, and nobody reads it
        // now (see the module's comment); the post below publishes it.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.slot(rank, half), data.len()) };
        self.posted(rank).store(sequence, Ordering::Release);
        self.turn().fetch_add(1, Ordering::AcqRel);
        if self.sleepers().load(Ordering::Acquire) > 0 {
            wake(self.turn());
        }
        for other in 0..size {
            self.wait(other, sequence)?;
        }
        // Of two addends the order does not matter.
        if size > 2 {
            data.fill(0.0);
        }
        for other in (0..size).filter(|&other| size > 2 || other != rank) {
            // SAFETY: inside the map; that rank posted this sum, which made its numbers visible here, and will not write this slot
            // again before this rank has posted the next sum.
            let slot = unsafe { std::slice::from_raw_parts(self.slot(other, half), data.len()) };
            data.iter_mut().zip(slot).for_each(|(sum, v)| *sum += v);
        }
        Ok(())
    }

    /// Waits until `rank` has posted sum `sequence`.
    fn wait(&mut self, rank: usize, sequence: u64) -> Result<(), Error> {
        let start = Instant::now();
        loop {
            let turn = self.turn().load(Ordering::Acquire);
            if self.posted(rank).load(Ordering::Acquire) >= sequence {
                return Ok(());
            }
            let waited = start.elapsed();
            if waited < SPIN_ALONE {
                std::hint::spin_loop();
                continue;
            }
            if waited < SPIN {
                std::thread::yield_now();
                continue;
            }
            if self.alive_checked.elapsed() > NAP {
                self.tcp.check_alive()?;
                self.alive_checked = Instant::now();
            }
            if waited > STEP_TIMEOUT {
                return Err(Error::PeerLost {
                    rank,
                    why: format!("no answer for {} ms", waited.as_millis()),
                });
            }
            self.sleepers().fetch_add(1, Ordering::AcqRel);
            sleep(self.turn(), turn);
            self.sleepers().fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn turn(&self) -> &AtomicU32 {
        // SAFETY: line 0 of the map, aligned to 64 bytes, only ever used as this atomic; it lives as long as self.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().cast()) }
    }

    fn sleepers(&self) -> &AtomicU32 {
        // SAFETY: line 1 of the map, as for `turn`.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().add(LINE_BYTES).cast()) }
    }

    fn posted(&self, rank: usize) -> &AtomicU64 {
        debug_assert!(rank < self.tcp.size());
        // SAFETY: line 2 + rank of the map, which has one for each rank, as for `turn`.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add((2 + rank) * LINE_BYTES).cast()) }
    }

    fn slot(&self, rank: usize, half: usize) -> *mut f64 {
        debug_assert!(rank < self.tcp.size() && half < 2);
        let at =
            (2 + self.tcp.size()) * LINE_BYTES + (rank * 2 + half) * SLOT_LEN * size_of::<f64>();
        // SAFETY: `bytes` made the map large enough for two slots a rank.
        unsafe { self.map.as_mut_ptr().add(at).cast() }
    }
}

impl Collective for Shm {
    fn rank(&self) -> usize {
        self.tcp.rank()
    }

    fn size(&self) -> usize {
        self.tcp.size()
    }

    fn all_reduce_f64(&mut self, data: &mut [f64]) -> Result<(), Error> {
        data.chunks_mut(SLOT_LEN)
            .try_for_each(|piece| self.sum(piece))
    }

    fn all_reduce_exact(&mut self, data: &mut [f64]) -> Result<(), Error> {
        self.all_reduce_f64(data)
    }

    fn gather_to_leader(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.tcp.gather_to_leader(mine)
    }

    fn broadcast(&mut self, message: &mut Vec<u8>) -> Result<(), Error> {
        self.tcp.broadcast(message)
    }

    fn interrupter(&self) -> Interrupter {
        self.tcp.interrupter()
    }
}

fn bytes(size: usize) -> usize {
    (2 + size) * LINE_BYTES + size * 2 * SLOT_LEN * size_of::<f64>()
}

/// A new file that only this user can open.
fn create(tcp: &Tcp) -> std::io::Result<(PathBuf, File)> {
    let (group, epoch) = (tcp.group().group, tcp.group().epoch);
    let suffix = rand::rng().next_u64();
    let path = Path::new(FOLDER).join(format!("verbund-{group}-{epoch}-{suffix:016x}"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    file.set_len(bytes(tcp.size()) as u64)?;
    Ok((path, file))
}

/// Opens the file the leader named, which must be one of ours in the shared folder.
fn open(name: &[u8]) -> std::io::Result<File> {
    let refused = || std::io::Error::other("not a shared file of a group");
    let path = Path::new(std::str::from_utf8(name).map_err(|_| refused())?);
    let ours = path
        .file_name()
        .and_then(|n| n.to_str())
        .is_some_and(|n| n.starts_with("verbund-"));
    if path.parent() != Some(Path::new(FOLDER)) || !ours {
        return Err(refused());
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

fn map(file: &File, size: usize) -> std::io::Result<MmapRaw> {
    if file.metadata()?.len() != bytes(size) as u64 {
        return Err(std::io::Error::other("shared file of another size"));
    }
    MmapRaw::map_raw(file)
}

/// Sleeps until `word` is no longer `seen`, somebody wakes it, or [`NAP`] has passed.
fn sleep(word: &AtomicU32, seen: u32) {
    let timeout = libc::timespec {
        tv_sec: 0,
        tv_nsec: NAP.as_nanos() as libc::c_long,
    };
    // SAFETY: FUTEX_WAIT on a live, aligned word with a live timeout; every outcome is followed by another look.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            seen,
            &raw const timeout,
        )
    };
}

/// Wakes all that sleep on `word`.
fn wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE on a live, aligned word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
