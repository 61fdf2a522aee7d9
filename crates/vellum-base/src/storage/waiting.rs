//! What others are told of threads that wait for the host's disk: the thread next door, which takes
//! the next request meanwhile, and whoever watches this process, who must not take a slow disk for a
//! process that hangs.

use std::cell::{Cell, RefCell};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::LocalKey;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

thread_local! {
    static LISTENER: RefCell<Option<Box<dyn Fn()>>> = const { RefCell::new(None) };
    static NOTE: Cell<Option<usize>> = const { Cell::new(None) };
    static WAITS: Cell<Refusal> = const { Cell::new(Refusal::Off) };
    static STALLS: Cell<Refusal> = const { Cell::new(Refusal::Off) };
}

/// Whether this thread may wait for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// It may.
    Off,
    /// It may not.
    On,
    /// It may not, and would have had to.
    Refused,
}

impl Refusal {
    /// Does `work` while it is on; `None` where something was refused.
    fn around<T>(cell: &'static LocalKey<Cell<Refusal>>, work: impl FnOnce() -> T) -> Option<T> {
        let before = cell.replace(Refusal::On);
        let result = work();
        (cell.replace(before) != Refusal::Refused).then_some(result)
    }

    fn refuses(cell: &'static LocalKey<Cell<Refusal>>) -> bool {
        let refuses = cell.get() != Refusal::Off;
        if refuses {
            cell.set(Refusal::Refused);
        }
        refuses
    }
}

/// Does `work`, in which reads of what the page cache does not hold fail; `None` where one did, after
/// which the work has to be done again, by whoever may wait. For work that changes nothing.
pub fn unless_it_waits<T>(work: impl FnOnce() -> T) -> Option<T> {
    Refusal::around(&WAITS, work)
}

/// Does `work`, which may wait for this host's disk, but fails where it would wait for blocks from elsewhere; `None` where it
/// would have, after which it has to be done again, by whoever may. For work that bears that.
pub fn unless_it_stalls<T>(work: impl FnOnce() -> T) -> Option<T> {
    Refusal::around(&STALLS, work)
}

/// True where a read must fail instead of waiting, within [`unless_it_waits`].
pub fn refuses_to_wait() -> bool {
    Refusal::refuses(&WAITS)
}

/// True where a read must fail instead of waiting for blocks from elsewhere, within [`unless_it_stalls`] and
/// [`unless_it_waits`].
pub fn refuses_to_stall() -> bool {
    Refusal::refuses(&STALLS) || refuses_to_wait()
}

/// Where the threads of this process note what they wait for: see [`note_waits_in`].
static NOTES: OnceLock<&'static [AtomicU64]> = OnceLock::new();

/// Has `listener` called on this thread, from now until the thread ends, before each call that may
/// wait for the disk. It must not use the storage itself.
pub fn listen(listener: impl Fn() + 'static) {
    LISTENER.with(|slot| *slot.borrow_mut() = Some(Box::new(listener)));
}

/// To be called before waiting for the disk, or for somebody who waits for it.
pub fn about_to_wait() {
    LISTENER.with(|slot| {
        if let Some(listener) = &*slot.borrow() {
            listener();
        }
    });
}

/// From now on every thread of this process notes in one of these since when it waits for the host,
/// in nanoseconds of CLOCK_MONOTONIC; 0 while it does not. Threads beyond their number share them:
/// then a wait may go unnoted. Only the first call counts.
pub fn note_waits_in(notes: &'static [AtomicU64]) {
    let _ = NOTES.set(notes);
}

/// Says that this thread is in the hands of the host, on purpose and for as long as that takes, until
/// the answer is dropped: in a call that may wait for a disk, or held back because the disk is full.
/// A thread that waits within a wait notes the first of them.
pub fn waits() -> Waits {
    let note = NOTES.get().and_then(|notes| {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let index = NOTE.get().unwrap_or_else(|| {
            let index = NEXT.fetch_add(1, Ordering::Relaxed);
            NOTE.set(Some(index));
            index
        });
        notes.get(index % notes.len().max(1))
    });
    let note = note.filter(|note| note.load(Ordering::Relaxed) == 0);
    if let Some(note) = note {
        note.store(monotonic_ns(), Ordering::Release);
    }
    Waits(note)
}

/// See [`waits`].
pub struct Waits(Option<&'static AtomicU64>);

impl Drop for Waits {
    fn drop(&mut self) {
        if let Some(note) = self.0 {
            note.store(0, Ordering::Release);
        }
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a host share, to some milliseconds: for
/// what happens often and is looked at in seconds.
pub fn monotonic_ns() -> u64 {
    clock_ns(ClockId::CLOCK_MONOTONIC_COARSE)
}

/// Nanoseconds of one of the clocks that every kernel has, from where it began.
///
/// # Panics
/// For any other clock.
pub fn clock_ns(clock: ClockId) -> u64 {
    #[expect(
        clippy::expect_used,
        reason = "callers name clocks that every kernel has"
    )]
    let now = clock_gettime(clock).expect("a clock of every kernel");
    #[expect(
        clippy::cast_possible_truncation,
        reason = "2^64 nanoseconds are 584 years"
    )]
    let nanoseconds = Duration::from(now).as_nanos() as u64;
    nanoseconds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_the_disk_alone_refuses_to_stall_and_who_waits_for_nothing_refuses_both() {
        assert_eq!(unless_it_stalls(refuses_to_wait), Some(false));
        assert_eq!(unless_it_stalls(refuses_to_stall), None);
        assert_eq!(unless_it_waits(refuses_to_stall), None);
        assert!(!refuses_to_wait() && !refuses_to_stall());
    }

    #[test]
    fn a_wait_is_noted_until_it_ends_and_one_within_it_changes_nothing() {
        static NOTES: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
        let noted = || NOTES.iter().map(|note| note.load(Ordering::Acquire)).max();
        drop(waits());
        note_waits_in(&NOTES);
        let outer = waits();
        let since = noted();
        assert_ne!(since, Some(0));
        drop(waits());
        assert_eq!(noted(), since);
        drop(outer);
        assert_eq!(noted(), Some(0));
    }
}
