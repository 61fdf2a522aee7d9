//! Places where a test has this process die, as if it had been killed there.
//!
//! `VELLUM_CRASH_AT=NAME`, or `NAME:3`, names one of [`ALL`]; the process that called [`arm`] sends
//! itself SIGKILL when it comes by for the first, or the third, time. Builds without debug assertions contain nothing of it, and processes
//! that never call [`arm`], such as device servers, come to no harm.

/// The variable that names the place.
pub const VARIABLE: &str = "VELLUM_CRASH_AT";

/// Every place, in the order in which a snapshot comes by them.
pub const ALL: [&str; 36] = [
    "prepare: key taken",
    "prepare: layer made",
    "prepare: layer published",
    "prepare: record in place",
    "mount: directory made",
    "mount: device attached",
    "mount: mounted",
    "mount: grown",
    "prepare: done",
    "remote: record in place",
    "update: record in place",
    "grow: layer grown",
    "grow: device grown",
    "commit: mounted",
    "commit: unmounted",
    "commit: sealed",
    "commit: next layer published",
    "commit: next layer recorded",
    "commit: synced",
    "commit: frozen",
    "commit: sealed under users",
    "commit: thawed",
    "commit: hidden",
    "commit: record in place",
    "commit: done",
    "remove: begun",
    "remove: record gone",
    "remove: hidden",
    "remove: done",
    "retire: unmounted",
    "retire: device detached",
    "retire: released",
    "retire: layer in the trash",
    "retire: layer discarded",
    "retire: checksums made",
    "storage: file written aside",
];

#[cfg(debug_assertions)]
static ARMED: std::sync::OnceLock<(String, std::sync::atomic::AtomicU64)> =
    std::sync::OnceLock::new();

/// Reads the variable.
///
/// # Errors
/// [`crate::ErrorKind::InvalidInput`] for a name that is not in [`ALL`].
pub fn arm() -> crate::Result<()> {
    #[cfg(debug_assertions)]
    if let Ok(text) = std::env::var(VARIABLE) {
        let (name, time) = match text.rsplit_once(':') {
            Some((name, time)) if time.parse::<u64>().is_ok() => (name, time.parse().ok()),
            _ => (text.as_str(), Some(1)),
        };
        if !ALL.contains(&name) {
            return Err(crate::Error::new(
                crate::ErrorKind::InvalidInput,
                format!("{VARIABLE}={text:?}: there is no such place"),
            ));
        }
        let time = std::sync::atomic::AtomicU64::new(time.unwrap_or(1));
        // A second call changes nothing.
        let _ = ARMED.set((name.to_owned(), time));
    }
    Ok(())
}

/// Dies here, if that is where this process shall.
#[inline]
pub fn here(name: &'static str) {
    #[cfg(debug_assertions)]
    {
        debug_assert!(ALL.contains(&name), "{name:?} is not listed");
        if let Some((armed, time)) = ARMED.get()
            && armed == name
            && time.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) == 1
        {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
    }
    #[cfg(not(debug_assertions))]
    let _ = name;
}
