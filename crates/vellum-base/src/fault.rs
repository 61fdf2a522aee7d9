//! What a process that serves does after a fault of its own.

/// From now on a panic of any thread ends this process, by SIGABRT, after the panic's own message and
/// `advice`, which says what is lost and what to do.
///
/// A thread that unwinds leaves behind what it was in the middle of: a request that is never answered,
/// a lock's data half changed. A dead process leaves no more than a killed one, which is what
/// recovery is made for and tested with, and whoever watches over it sees that it died.
pub fn abort_on_panic(advice: &'static str) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        eprintln!("{advice}");
        std::process::abort();
    }));
}
