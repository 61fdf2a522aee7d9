//! The flush queue: one leader at a time flushes or writes ahead, and clients whose flush it covers
//! wait for it. It also knows the pace of the clients: whether a flush is likely to come next.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::layer::shared::Shared;
use vellum_base::error::{Error, Result};
use vellum_base::storage::about_to_wait;

/// A client that writes more often than this between two flushes gains nothing by a record ahead:
/// its flush carries them all in one record.
const FEW_WRITES: u32 = 4;

/// Where the flushes of a layer stand.
#[derive(Debug, Default)]
pub(super) struct FlushQueue {
    state: Mutex<State>,
    /// A leader ended.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Number of the last flush that began.
    begun: u64,
    /// Number of the last flush that ended.
    done: u64,
    /// There is a leader.
    running: bool,
    pace: Pace,
    /// When a flush was last asked for.
    last: Option<Instant>,
    /// The last flush that failed.
    failed: Option<Failed>,
}

impl State {
    /// A client asks for a flush.
    fn note_flush(&mut self) {
        self.last = Some(Instant::now());
        self.pace.flushed();
    }
}

/// A flush that failed, for the clients that it was to cover.
#[derive(Debug)]
struct Failed {
    number: u64,
    error: Error,
}

/// What becomes of a client that asks for a flush.
pub(super) enum Turn<'a> {
    /// It has to flush, for all that wait.
    Lead(Leading<'a>),
    /// Another's flush covered it, with this outcome.
    Covered(Result<()>),
}

impl FlushQueue {
    /// A client asks for a flush of which nothing is to be done.
    pub(super) fn note_flush(&self) {
        self.state.lock().note_flush();
    }

    /// A client asks for a flush: waits for the running one, which may have begun before what the
    /// client wrote, and then for the next, or leads that itself.
    pub(super) fn enter<'a>(&'a self, shared: &'a Shared) -> Turn<'a> {
        let mut state = self.state.lock();
        state.note_flush();
        // Only a flush that begins from now on covers us.
        let mine = state.begun + 1;
        while state.running && state.done < mine {
            about_to_wait();
            self.ended.wait(&mut state);
        }
        if state.done < mine {
            return Turn::Lead(self.begin(state, shared));
        }
        Turn::Covered(match &state.failed {
            Some(failed) if failed.number >= mine => Err(failed.error.clone()),
            _ => Ok(()),
        })
    }

    /// Waits until there is no leader, then leads.
    pub(super) fn lead<'a>(&'a self, shared: &'a Shared) -> Leading<'a> {
        let mut state = self.state.lock();
        while state.running {
            self.ended.wait(&mut state);
        }
        self.begin(state, shared)
    }

    fn begin<'a>(&'a self, mut state: MutexGuard<'a, State>, shared: &'a Shared) -> Leading<'a> {
        assert!(!state.running, "two leaders at a time");
        assert_eq!(state.begun, state.done, "a flush that has no leader");
        state.running = true;
        state.begun += 1;
        Leading {
            queue: self,
            shared,
            number: Some(state.begun),
            ended: false,
        }
    }

    /// Leads something that is no flush and covers no client; `None` where there is a leader.
    pub(super) fn lead_if_idle<'a>(&'a self, shared: &'a Shared) -> Option<Leading<'a>> {
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.running, true) {
            return None;
        }
        Some(Leading {
            queue: self,
            shared,
            number: None,
            ended: false,
        })
    }

    fn end(&self, number: Option<u64>, failure: Option<Error>) {
        let mut state = self.state.lock();
        assert!(state.running, "a leader that another took for none");
        state.running = false;
        // What is no flush covers no client.
        if let Some(number) = number {
            state.done = number;
            state.failed = failure
                .map(|error| Failed { number, error })
                .or(state.failed.take());
        }
        drop(state);
        self.ended.notify_all();
    }

    /// A client wrote: true where it can be expected to flush soon.
    pub(super) fn wrote(&self) -> bool {
        self.state.lock().pace.wrote()
    }

    /// Whether a client asked for a flush within this time.
    pub(super) fn flushed_within(&self, time: Duration) -> bool {
        let last = self.state.lock().last;
        last.is_some_and(|last| last.elapsed() < time)
    }
}

/// The right to flush, which one thread has at a time.
///
/// A leader that does not come to [`Leading::end`] panicked. What it had frozen is then neither
/// durable nor among what a later flush would freeze, so no later flush may succeed: the layer stops,
/// and the clients that wait are told.
#[must_use]
pub(super) struct Leading<'a> {
    queue: &'a FlushQueue,
    shared: &'a Shared,
    /// Of the flush; `None` where it is none.
    number: Option<u64>,
    ended: bool,
}

impl Leading<'_> {
    /// Hands the right on and tells the clients that waited.
    pub(super) fn end(mut self, outcome: Result<()>) -> Result<()> {
        self.ended = true;
        self.queue.end(self.number, outcome.as_ref().err().cloned());
        outcome
    }
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let error = self.shared.stop("a flush panicked");
        self.queue.end(self.number, Some(error));
    }
}

/// How a client writes and flushes.
#[derive(Debug)]
struct Pace {
    /// Writes since the last flush was asked for.
    since: u32,
    /// Writes between the two flushes before.
    before: u32,
}

impl Default for Pace {
    /// No client has flushed yet.
    fn default() -> Self {
        Pace {
            since: u32::MAX,
            before: u32::MAX,
        }
    }
}

impl Pace {
    /// A client asked for a flush.
    fn flushed(&mut self) {
        self.before = std::mem::take(&mut self.since);
    }

    /// A client wrote: true where it can be expected to flush soon.
    fn wrote(&mut self) -> bool {
        // A client may write without end; beyond `FEW_WRITES` the number means nothing.
        self.since = self.since.saturating_add(1);
        self.since <= FEW_WRITES && self.before <= FEW_WRITES
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Arc, mpsc};

    use super::*;
    use crate::layer::{Header, LayerOptions, WritableLayer};
    use vellum_base::block::Block;
    use vellum_base::error::ErrorKind;
    use vellum_base::storage::SimStorage;

    fn pace(writes: &[u32]) -> Pace {
        let mut pace = Pace::default();
        for &count in writes {
            pace.flushed();
            (0..count).for_each(|_| {
                pace.wrote();
            });
        }
        pace
    }

    #[test]
    fn a_flush_is_expected_of_a_client_that_flushes_after_few_writes() {
        assert!(!pace(&[]).wrote());
        assert!(!pace(&[0]).wrote(), "nobody knows yet how it writes");
        assert!(pace(&[1, 0]).wrote());
        assert!(pace(&[1, 3]).wrote());
        assert!(!pace(&[1, 4]).wrote(), "it does not flush after all");
        assert!(!pace(&[5, 0]).wrote());
        assert!(pace(&[5, 1, 0]).wrote());
    }

    fn layer(storage: &SimStorage) -> Arc<WritableLayer> {
        let options = LayerOptions::default();
        WritableLayer::open(Arc::new(storage.clone()), Path::new("/layer"), options).unwrap()
    }

    #[test]
    fn a_flush_that_panics_fails_those_that_wait_for_it_and_all_that_come_later() {
        let storage = SimStorage::new();
        let header = Header::new(None, 1 << 20).unwrap();
        WritableLayer::create(&storage, Path::new("/layer"), &header).unwrap();
        let dying = layer(&storage);
        dying.put(3, &[7; 4096]).unwrap();
        let (leads, led) = mpsc::channel();
        let (waits, waited) = mpsc::channel();
        std::thread::scope(|scope| {
            let dying = &*dying;
            let leader = scope.spawn(move || {
                dying.flusher.lead(|_| {
                    let _frozen = dying.shared.map.write().freeze();
                    leads.send(()).unwrap();
                    waited.recv().unwrap();
                    std::panic::resume_unwind(Box::new("injected"));
                })
            });
            led.recv().unwrap();
            let client = scope.spawn(move || {
                vellum_base::storage::listen_for_waits(move || waits.send(()).unwrap());
                dying.flush()
            });
            leader.join().unwrap_err();
            let error = client.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Poisoned);
            assert!(error.to_string().contains("a flush panicked"), "{error}");
        });
        // What it froze is lost to a later flush, so none may succeed.
        for outcome in [
            dying.flush(),
            dying.close(),
            dying.put(0, &[1; 4096]).map(drop),
        ] {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Poisoned);
        }
        dying.flush_ahead();
        drop(dying);
        let successor = layer(&storage);
        let mut bytes = [0; 4096];
        successor.read_blocks(&mut bytes, Block::new(3)).unwrap();
        assert_eq!((bytes, successor.data_blocks().get()), ([7; 4096], 1));
        successor.flush().unwrap();
    }
}
