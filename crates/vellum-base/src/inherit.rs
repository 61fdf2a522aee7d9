//! What a process inherits from whoever starts it, and must not depend on: the file mode mask, open
//! descriptors, blocked and ignored signals, limits.
//!
//! * [`at_start`] is for the whole program: files have the modes that the code names, and nothing that
//!   it starts gets the caller's descriptors, so that a lock that a script holds ends with the script.
//! * [`for_child`] is for what runs in a container, [`lift_limits`] for what outlives the command.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::stat::{Mode, umask};

/// Limits that are about one command of a user, not about what it leaves running for others.
const LIMITS: [Resource; 6] = [
    Resource::RLIMIT_FSIZE,
    Resource::RLIMIT_CPU,
    Resource::RLIMIT_AS,
    Resource::RLIMIT_DATA,
    Resource::RLIMIT_RSS,
    Resource::RLIMIT_NPROC,
];
/// The last signal of Linux.
const LAST_SIGNAL: libc::c_int = 64;

/// The caller's file mode mask.
static CALLERS_UMASK: AtomicU32 = AtomicU32::new(0o022);

/// Frees the program of what the caller left it. First thing in `main`, while it has one thread.
pub fn at_start() {
    let callers = umask(Mode::from_bits_truncate(0o022));
    CALLERS_UMASK.store(callers.bits(), Ordering::Relaxed);
    // Else a blocked SIGTERM would never end us. It cannot fail: the set is valid.
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
    // SAFETY: no other thread runs yet; ignoring SIGCHLD would take our children's statuses away.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    // SAFETY: it closes nothing and touches no memory; descriptors that we were given by number stay
    // open here, and are only not passed on. Before Linux 5.11 it fails, and they are passed on.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3 as libc::c_uint,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
}

/// The mode of a new file that a user named for a result: as the user's own mask has it.
pub fn result_mode() -> u32 {
    0o666 & !CALLERS_UMASK.load(Ordering::Relaxed)
}

/// Takes back the limits that a shell's `ulimit` set, as far as this process may.
pub fn lift_limits() {
    for limit in LIMITS {
        if setrlimit(limit, RLIM_INFINITY, RLIM_INFINITY).is_err()
            && let Ok((_, hard)) = getrlimit(limit)
        {
            let _ = setrlimit(limit, hard, hard);
        }
    }
}

/// The command starts as from a fresh system: no signal blocked or ignored, no limit of the caller's.
pub fn for_child(command: &mut Command) -> &mut Command {
    let reset = || {
        // The kernel's own structure, larger than on any architecture: all zeros are the default
        // action, without flags and with nothing blocked. (The C library hides two signals.)
        let default = [0u64; 8];
        for signal in 1..=LAST_SIGNAL {
            // SAFETY: the kernel reads the structure alone, and no handler is set. It fails for SIGKILL
            // and SIGSTOP, which nobody can ignore.
            unsafe {
                libc::syscall(
                    libc::SYS_rt_sigaction,
                    signal,
                    default.as_ptr(),
                    std::ptr::null_mut::<u64>(),
                    size_of::<u64>(),
                )
            };
        }
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
        lift_limits();
        Ok(())
    };
    // SAFETY: the closure makes system calls alone, and takes no lock and no memory.
    unsafe { command.pre_exec(reset) }
}
