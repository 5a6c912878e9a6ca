//! Walls around the child process: limits that always hold, and on Linux no network, no files, no new programs.
//!
//! Every wall is best effort: where the system refuses one (a container without namespaces, say), the others stand.

use std::fs::File;
use std::os::fd::FromRawFd;

use super::{CHILD_CPU_S, CHILD_MEMORY_BYTES};

/// Takes standard output for the protocol; what libraries print goes nowhere from then on.
pub(super) fn take_stdout() -> std::io::Result<File> {
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
    // SAFETY: dup has no memory arguments; a negative result is handled.
    let own = unsafe { libc::dup(libc::STDOUT_FILENO) };
    if own < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: both descriptors are open: `null` is held above, standard output was just duplicated.
    let replaced =
        unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&null), libc::STDOUT_FILENO) };
    // SAFETY: `own` came from dup and nobody else owns it.
    let file = unsafe { File::from_raw_fd(own) };
    if replaced < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(file)
    }
}

/// Raises the walls. The process can afterwards only compute and use the descriptors it already has.
pub(super) fn enter() {
    limit(libc::RLIMIT_AS, CHILD_MEMORY_BYTES, CHILD_MEMORY_BYTES);
    limit(libc::RLIMIT_CPU, CHILD_CPU_S, CHILD_CPU_S + 2);
    limit(libc::RLIMIT_FSIZE, 0, 0);
    limit(libc::RLIMIT_CORE, 0, 0);
    // Open descriptors stay usable above the limit; new ones cannot be made.
    limit(libc::RLIMIT_NOFILE, 0, 0);
    #[cfg(target_os = "linux")]
    {
        leave_network();
        // After the change of namespaces, which takes it back.
        end_with_parent();
        forbid_calls();
    }
}

#[cfg(target_os = "linux")]
type Resource = libc::__rlimit_resource_t;
#[cfg(not(target_os = "linux"))]
type Resource = libc::c_int;

fn limit(resource: Resource, soft: u64, hard: u64) {
    let limit = libc::rlimit {
        rlim_cur: soft as libc::rlim_t,
        rlim_max: hard as libc::rlim_t,
    };
    // SAFETY: `limit` is a valid rlimit that outlives the call; a refusal leaves the old limit, which is allowed here.
    unsafe { libc::setrlimit(resource, &limit) };
}

/// A parent killed by -9 cannot kill its child. The kernel does it when the thread ends that started the child; those of the
/// runtime live as long as the process.
#[cfg(target_os = "linux")]
fn end_with_parent() {
    // SAFETY: no memory arguments; a refusal leaves the child to its limit on processor time.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// A network namespace of its own has no interface but a loopback that is down.
#[cfg(target_os = "linux")]
fn leave_network() {
    // SAFETY: unshare has no memory arguments and this process has one thread; a refusal changes nothing.
    let left = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    if !left {
        // SAFETY: as above; without privileges a user namespace may give the right to a network namespace.
        unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) };
    }
}

/// All that a reader calls: memory, its open descriptors, time, its own signals and its end. Everything else fails with EPERM,
/// calls that are not invented yet included.
#[cfg(target_os = "linux")]
const ALLOWED: &[libc::c_long] = &[
    // The protocol's descriptors. None can be made anew.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    // Locks, scheduling and time of this thread; there is no other.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_membarrier,
    // Its own signal handlers (a stack overflow is one); none can be sent.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

#[cfg(target_os = "linux")]
fn forbid_calls() {
    #[cfg(target_arch = "x86_64")]
    const ARCH: u32 = 0xc000_003e;
    #[cfg(target_arch = "aarch64")]
    const ARCH: u32 = 0xc000_00b7;
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return;
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    install(ARCH);
}

/// A filter that compares each call's number with [`ALLOWED`].
#[cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
fn install(arch: u32) {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};
    let op = |code: u32, jt: u8, jf: u8, k: u32| sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let load = |offset: usize| op(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset as u32);
    let refuse = op(
        BPF_RET | BPF_K,
        0,
        0,
        libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
    );
    let mut filter = vec![
        load(std::mem::offset_of!(libc::seccomp_data, arch)),
        op(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, arch),
        refuse,
        load(std::mem::offset_of!(libc::seccomp_data, nr)),
        // The x32 twins of the calls have this bit.
        op(BPF_JMP | BPF_JGE | BPF_K, 0, 1, 0x4000_0000),
        refuse,
    ];
    let allow = op(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW);
    for call in ALLOWED {
        filter.push(op(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, *call as u32));
        filter.push(allow);
    }
    filter.push(refuse);
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: no memory arguments; without it an unprivileged process may not install a filter.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: `program` points to `filter.len()` instructions that outlive the call; the kernel copies and checks them.
    unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
}

/// Raises the walls and tries what must fail inside: 0, or 100 and the number of the first wall that did not hold. For a
/// process of its own, which then ends.
#[cfg(target_os = "linux")]
pub(super) fn breaches() -> i32 {
    /// A call with arguments that would do nothing worse than fail or change a file of this name.
    fn refused(call: libc::c_long, args: [usize; 4]) -> bool {
        // SAFETY: pointers among the arguments are NUL-terminated strings of this function's callers or null; numbers are
        // chosen so that a call that is let through by mistake harms no memory of this process.
        let result = unsafe { libc::syscall(call, args[0], args[1], args[2], args[3]) };
        result == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
    }
    enter();
    let name = c"/tmp/verbund-sandbox-test";
    let path = name.as_ptr() as usize;
    let here = libc::AT_FDCWD as usize;
    // SAFETY: getpid has no arguments.
    let me = unsafe { libc::getpid() } as usize;
    let dialled = std::net::TcpStream::connect("127.0.0.1:9")
        .map(drop)
        .map_err(|e| e.raw_os_error());
    let most = usize::try_from(CHILD_MEMORY_BYTES).unwrap_or(usize::MAX);
    #[allow(unused_mut)] // more calls where the machine has more spellings
    let mut breaches = vec![
        File::open("/etc/hostname").is_ok(),
        File::create("/tmp/verbund-sandbox-test").is_ok(),
        std::net::UdpSocket::bind("127.0.0.1:0").is_ok(),
        dialled != Err(Some(libc::EPERM)),
        std::process::Command::new("/bin/true").spawn().is_ok(),
        Vec::<u8>::new().try_reserve_exact(most).is_ok(),
        // Changing files by name.
        !refused(libc::SYS_truncate, [path, 0, 0, 0]),
        !refused(libc::SYS_fchmodat, [here, path, 0o777, 0]),
        !refused(libc::SYS_fchownat, [here, path, 0, 0]),
        !refused(libc::SYS_mknodat, [here, path, 0o644, 0]),
        !refused(libc::SYS_renameat2, [here, path, here, path]),
        // Signals, to itself with number 0, which only asks; other processes; messages.
        !refused(libc::SYS_kill, [me, 0, 0, 0]),
        !refused(libc::SYS_tkill, [me, 0, 0, 0]),
        !refused(libc::SYS_rt_sigqueueinfo, [me, 0, 0, 0]),
        !refused(libc::SYS_pidfd_open, [me, 0, 0, 0]),
        !refused(libc::SYS_prlimit64, [0, 0, 0, 0]),
        !refused(libc::SYS_sendmmsg, [0, 0, 0, 0]),
        !refused(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as usize, 0, 0, 0]),
    ];
    #[cfg(target_arch = "x86_64")]
    breaches.extend(
        [
            libc::SYS_chmod,
            libc::SYS_chown,
            libc::SYS_mkdir,
            libc::SYS_rmdir,
            libc::SYS_unlink,
            libc::SYS_mknod,
            libc::SYS_link,
            libc::SYS_symlink,
            libc::SYS_rename,
            libc::SYS_renameat,
        ]
        .map(|call| !refused(call, [path, path, path, path])),
    );
    let held = breaches.iter().position(|breach| *breach);
    held.map_or(0, |first| 100 + first as i32)
}
