//! A few threads that stay, for operations of some microseconds.
//!
//! Between operations a thread spins briefly, since the next one is mostly near, and then sleeps: the machine is shared.
//! A thread that the system has put aside delays nobody: whoever is awake takes the tasks, and the caller waits only for
//! threads that have begun. Each begins with a share of neighbouring tasks, so that what one fetches ahead is its own, and
//! then takes from the others' shares.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Looks at the door before a thread goes to sleep: about 20 µs.
const SPINS: u32 = 600;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Threads for one [`Cpu`](super::Cpu).
pub(crate) struct Pool {
    shared: Arc<Shared>,
    handles: Vec<std::thread::JoinHandle<()>>,
    /// One operation at a time; a second caller works alone.
    turn: Mutex<()>,
}

struct Shared {
    /// Generation of the job (upper half), [`OPEN`], and the number of threads inside.
    door: AtomicU64,
    /// The job: set while the door is shut and nobody is inside.
    job: std::cell::UnsafeCell<Option<(*const Task<'static>, usize)>>,
    /// Each thread's next task, in its share.
    next: Box<[Next]>,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: Mutex<usize>,
    wake: Condvar,
}

/// A cache line of its own.
#[repr(align(64))]
struct Next(AtomicUsize);

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

// SAFETY: `job` is written only by the holder of `turn` while the door is shut and nobody is inside, and read only by
// threads that went in through the open door; `door`'s acquire and release order the two.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            door: AtomicU64::new(0),
            job: std::cell::UnsafeCell::new(None),
            next: (0..threads).map(|_| Next(AtomicUsize::new(0))).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
        });
        let handles = (1..threads)
            .filter_map(|i| {
                let shared = shared.clone();
                let spawned = std::thread::Builder::new()
                    .name(format!("kernels-{i}"))
                    .spawn(move || shared.work(i));
                spawned
                    .inspect_err(|error| tracing::warn!(%error, "one kernel thread fewer"))
                    .ok()
            })
            .collect();
        Pool {
            shared,
            handles,
            turn: Mutex::new(()),
        }
    }

    /// Threads that take tasks, the caller's included.
    pub fn threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Calls `task` with each of `0..count`, on any thread and in any order.
    pub fn run(&self, count: usize, task: &Task<'_>) {
        let turn = if count > 1 && !self.handles.is_empty() {
            match self.turn.try_lock() {
                Ok(turn) => Some(turn),
                Err(std::sync::TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
                Err(std::sync::TryLockError::WouldBlock) => None,
            }
        } else {
            None
        };
        match turn {
            Some(turn) => self.run_shared(count, task, turn),
            None => (0..count).for_each(task),
        }
    }

    fn run_shared(&self, count: usize, task: &Task<'_>, _turn: MutexGuard<'_, ()>) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Nobody reads the pointer after this call: it leaves by `Shut`'s drop, which
        // shuts the door and waits until nobody is inside.
        let pointer = unsafe {
            std::mem::transmute::<*const Task<'_>, *const Task<'static>>(std::ptr::from_ref(task))
        };
        // SAFETY: the door is shut and nobody is inside, since the last holder of the turn left by `Shut`.
        unsafe { *shared.job.get() = Some((pointer, count)) };
        for (thread, next) in shared.next.iter().enumerate() {
            next.0.store(shared.share(thread, count).start, Relaxed);
        }
        let generation = (shared.door.load(Relaxed) >> 32).wrapping_add(1) & 0xffff_ffff;
        shared.door.store(generation << 32 | OPEN, SeqCst);
        if *shared.lock() > 0 {
            shared.wake.notify_all();
        }
        struct Shut<'a>(&'a Shared);
        impl Drop for Shut<'_> {
            fn drop(&mut self) {
                self.0.door.fetch_and(!OPEN, AcqRel);
                let mut spins = 0u32;
                while self.0.door.load(Acquire) & INSIDE != 0 {
                    spins += 1;
                    if spins.is_multiple_of(SPINS) {
                        std::thread::yield_now()
                    } else {
                        std::hint::spin_loop()
                    }
                }
            }
        }
        {
            let _shut = Shut(shared);
            shared.take(0, task, count);
        }
        assert!(
            !shared.panicked.swap(false, Relaxed),
            "a kernel task panicked on another thread"
        );
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        drop(self.shared.lock());
        self.shared.wake.notify_all();
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tasks that a thread begins with.
    fn share(&self, thread: usize, count: usize) -> std::ops::Range<usize> {
        let cut = |thread: usize| thread * count / self.next.len();
        cut(thread)..cut(thread + 1)
    }

    fn take(&self, thread: usize, task: &Task<'_>, count: usize) {
        let threads = self.next.len();
        for thread in (thread..threads).chain(0..thread) {
            let share = self.share(thread, count);
            loop {
                let i = self.next[thread].0.fetch_add(1, Relaxed);
                if i >= share.end {
                    break;
                }
                task(i);
            }
        }
    }

    /// A pool thread's life.
    fn work(&self, thread: usize) {
        let mut done = 0;
        while let Some(door) = self.next_door(done) {
            done = door >> 32;
            let entered = self
                .door
                .fetch_update(AcqRel, Acquire, |d| {
                    (d >> 32 == done && d & OPEN != 0).then_some(d + 1)
                })
                .is_ok();
            if !entered {
                continue;
            }
            // SAFETY: inside through the open door: the job is set, and its caller waits until we leave.
            let (task, count) = unsafe {
                (*self.job.get())
                    .map(|(task, count)| (&*task, count))
                    .unwrap_unchecked()
            };
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.take(thread, task, count)
            }));
            if result.is_err() {
                self.panicked.store(true, Relaxed);
            }
            self.door.fetch_sub(1, AcqRel);
        }
    }

    /// Waits for a door that is open and of another generation than `done`; `None` when the pool stops.
    fn next_door(&self, done: u64) -> Option<u64> {
        let fresh = |door: u64| door & OPEN != 0 && door >> 32 != done;
        for _ in 0..SPINS {
            let door = self.door.load(Acquire);
            if fresh(door) {
                return Some(door);
            }
            std::hint::spin_loop();
        }
        let mut sleepers = self.lock();
        *sleepers += 1;
        let found = loop {
            if self.stop.load(SeqCst) {
                break None;
            }
            let door = self.door.load(SeqCst);
            if fresh(door) {
                break Some(door);
            }
            sleepers = self
                .wake
                .wait(sleepers)
                .unwrap_or_else(PoisonError::into_inner);
        };
        *sleepers -= 1;
        found
    }
}
