//! Limits that a process inherits from whoever started it.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// A chain has an open file for each layer: takes as many as the host lets us have.
pub(super) fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // The old limit stays otherwise, and a deep chain says which file it could not open.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Has a write beyond `ulimit -f` fail with EFBIG, which is told as any error is, instead of killing
/// the process. By a handler, not by ignoring the signal: programs that we start begin as usual.
pub(super) fn survive_size_limit() {
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing, so it is safe at any point.
    // The signal is one that can be handled, which is all that could fail.
    let _ = unsafe { sigaction(Signal::SIGXFSZ, &action) };
}

extern "C" fn nothing(_: i32) {}

/// Takes the limit on the size of files away, as far as this process may: it was meant for the
/// command that happened to mount, not for the device, which lives on.
pub(super) fn lift_size_limit() {
    if setrlimit(Resource::RLIMIT_FSIZE, RLIM_INFINITY, RLIM_INFINITY).is_ok() {
        return;
    }
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_FSIZE) {
        // Lower than needed or not, a write beyond it is an error that says so.
        let _ = setrlimit(Resource::RLIMIT_FSIZE, hard, hard);
    }
}
