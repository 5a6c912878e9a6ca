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

/// Calls that a reader never needs: they fail with EPERM.
#[cfg(target_os = "linux")]
const FORBIDDEN: &[libc::c_long] = &[
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_mkdirat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_mount,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kill,
    libc::SYS_tgkill,
    libc::SYS_bpf,
    libc::SYS_io_uring_setup,
    libc::SYS_unshare,
    libc::SYS_setns,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
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

/// A filter that compares each call's number with [`FORBIDDEN`].
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
    for call in FORBIDDEN {
        filter.push(op(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, *call as u32));
        filter.push(refuse);
    }
    filter.push(op(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: no memory arguments; without it an unprivileged process may not install a filter.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: `program` points to `filter.len()` instructions that outlive the call; the kernel copies and checks them.
    unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// In a forked process, so that the test's own stays free. Each failed check sets a bit of the exit status.
    #[test]
    fn inside_there_are_no_files_no_network_no_programs_and_little_memory() {
        // SAFETY: the child only runs the checks below and leaves by _exit, never returning into the test harness.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            enter();
            let mut failed = 0;
            failed |= i32::from(File::open("/etc/hostname").is_ok());
            failed |= i32::from(File::create("/tmp/verbund-sandbox-test").is_ok()) << 1;
            failed |= i32::from(std::net::UdpSocket::bind("127.0.0.1:0").is_ok()) << 2;
            let dialled = std::net::TcpStream::connect("127.0.0.1:9")
                .map(drop)
                .map_err(|e| e.raw_os_error());
            failed |= i32::from(dialled != Err(Some(libc::EPERM))) << 3;
            failed |= i32::from(std::process::Command::new("/bin/true").spawn().is_ok()) << 4;
            let most = usize::try_from(CHILD_MEMORY_BYTES).unwrap_or(usize::MAX);
            failed |= i32::from(Vec::<u8>::new().try_reserve_exact(most).is_ok()) << 5;
            // SAFETY: ends this process without running the parent's destructors.
            unsafe { libc::_exit(failed) };
        }
        let mut status = 0;
        // SAFETY: `status` is a valid place and `child` is our own child.
        let waited = unsafe { libc::waitpid(child, &mut status, 0) };
        assert_eq!(waited, child);
        assert!(
            libc::WIFEXITED(status),
            "ended by signal {}",
            libc::WTERMSIG(status)
        );
        assert_eq!(
            libc::WEXITSTATUS(status),
            0,
            "walls that did not hold, as bits"
        );
    }
}
