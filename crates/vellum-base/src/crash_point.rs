//! Places where a test has this process die, as if it had been killed there, or panic.
//!
//! `VELLUM_CRASH_AT=NAME`, or `NAME:3`, names one of [`ALL`], [`SNAPSHOTS`], [`RESIZES`], [`BACKUPS`],
//! [`LAYER_FILES`], [`PULLS`], [`REMOTE`] or [`SERVING`]; the process that called [`arm`] sends itself SIGKILL when it comes by
//! for the first, or the third, time. With `VELLUM_PANIC_AT` it panics there. Builds without debug
//! assertions contain nothing of it, and processes that never call [`arm`], such as device servers, come
//! to no harm.

/// The variable that names the place of a death.
pub const VARIABLE: &str = "VELLUM_CRASH_AT";
/// The variable that names the place of a panic.
pub const PANIC_VARIABLE: &str = "VELLUM_PANIC_AT";

/// Every place, in the order in which a snapshot comes by them.
pub const ALL: [&str; 39] = [
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
    "diff: begun",
    "diff: written",
    "diff: committed",
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

/// Every place that snapshots, forks, rollbacks and merges of containers have beside those of a commit.
pub const SNAPSHOTS: [&str; 6] = [
    "fork: sealed",
    "rollback: present kept",
    "rollback: layer published",
    "rollback: put back",
    "merge: layer published",
    "merge: records replaced",
];

/// Every place that a growth of a container has beside those of `grow: …`.
pub const RESIZES: [&str; 4] = [
    "resize: layer grown",
    "resize: record in place",
    "resize: unmounted",
    "resize: file system grown",
];

/// Every place that backups and their restoration have beside those of a snapshot.
pub const BACKUPS: [&str; 6] = [
    "backup: snapshot taken",
    "backup: piece written",
    "backup: file complete",
    "restore: piece written",
    "restore: layer published",
    "restore: record in place",
];

/// Every place that the import of a layer file has.
pub const LAYER_FILES: [&str; 4] = [
    "layer file: piece written",
    "layer file: layer staged",
    "layer file: layer published",
    "layer file: record in place",
];

/// Every place that a pull from a registry has; one of tars has those of an import besides.
pub const PULLS: [&str; 5] = [
    "pull: tables fetched",
    "pull: blobs fetched",
    "pull: layer staged",
    "pull: layer published",
    "pull: record in place",
];

/// Every place that a layer of a registry's blocks has as it becomes a snapshot; those of a pull's layers come before.
pub const REMOTE: [&str; 2] = ["remote: layers published", "remote: lazy record in place"];

/// Every place in a server of clients.
pub const SERVING: [&str; 6] = [
    "nbd: flush",
    "vhost: taken",
    "vhost: flush",
    "vhost: done",
    "vhost: answers",
    "vhost: answered",
];

#[cfg(debug_assertions)]
struct Armed {
    name: String,
    /// Visits that are left.
    left: std::sync::atomic::AtomicU64,
    panics: bool,
}

#[cfg(debug_assertions)]
static ARMED: std::sync::OnceLock<Armed> = std::sync::OnceLock::new();

/// Reads the variables; [`VARIABLE`] comes first.
///
/// # Errors
/// [`crate::ErrorKind::InvalidInput`] for a name that is in none of the lists.
pub fn arm() -> crate::Result<()> {
    #[cfg(debug_assertions)]
    for (variable, panics) in [(VARIABLE, false), (PANIC_VARIABLE, true)] {
        let Ok(text) = std::env::var(variable) else {
            continue;
        };
        let (name, time) = match text.rsplit_once(':') {
            Some((name, time)) if time.parse::<u64>().is_ok() => (name, time.parse().ok()),
            _ => (text.as_str(), Some(1)),
        };
        if !is_place(name) {
            return Err(crate::Error::new(
                crate::ErrorKind::InvalidInput,
                format!("{variable}={text:?}: there is no such place"),
            ));
        }
        // A second call changes nothing.
        let _ = ARMED.set(Armed {
            name: name.to_owned(),
            left: std::sync::atomic::AtomicU64::new(time.unwrap_or(1)),
            panics,
        });
    }
    Ok(())
}

#[cfg(debug_assertions)]
fn is_place(name: &str) -> bool {
    let places = ALL.iter().chain(&SNAPSHOTS).chain(&RESIZES);
    let places = places.chain(&BACKUPS).chain(&LAYER_FILES);
    let mut places = places.chain(&PULLS).chain(&REMOTE).chain(&SERVING);
    places.any(|place| *place == name)
}

/// Dies or panics here, if that is where this process shall.
#[inline]
#[cfg_attr(
    debug_assertions,
    expect(clippy::panic, reason = "a test asked for it, by name")
)]
pub fn here(name: &'static str) {
    #[cfg(debug_assertions)]
    {
        debug_assert!(is_place(name), "{name:?} is not listed");
        if let Some(armed) = ARMED.get()
            && armed.name == name
            && armed.left.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) == 1
        {
            if armed.panics {
                panic!("{PANIC_VARIABLE}={name:?}");
            }
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
    }
    #[cfg(not(debug_assertions))]
    let _ = name;
}
