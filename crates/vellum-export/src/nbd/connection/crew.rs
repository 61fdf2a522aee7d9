//! The threads of a connection: who reads next, and how many there are.
//!
//! A thread that waits to read is *idle*. The reader wakes one of them when it gives up its role, or
//! else starts another thread. One that has waited for long ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::{self, Scope};
use std::time::Duration;

use parking_lot::Mutex;

use super::super::stream::Stream;
use super::{Connection, Reader};
use vellum_base::error::Result;

/// Threads that a connection may have whatever others have: one that reads and one that serves.
const OWN: usize = 2;
/// A thread that had nothing to do for so long ends.
const IDLE: Duration = Duration::from_secs(2);

/// Threads that all connections of a server share, beyond [`OWN`] for each.
#[derive(Debug)]
pub(in super::super) struct Helpers {
    free: AtomicUsize,
}

impl Helpers {
    /// So many threads.
    pub(in super::super) fn new(count: usize) -> Self {
        Helpers {
            free: AtomicUsize::new(count),
        }
    }

    fn take(&self) -> bool {
        let less = |free: usize| free.checked_sub(1);
        self.free.fetch_update(Relaxed, Relaxed, less).is_ok()
    }

    fn give(&self, count: usize) {
        self.free.fetch_add(count, Relaxed);
    }
}

/// How many threads a connection has.
pub(super) struct Threads {
    count: Mutex<usize>,
    limit: usize,
    helpers: Arc<Helpers>,
}

impl Threads {
    /// One thread, and `limit` at most.
    pub(super) fn new(limit: usize, helpers: Arc<Helpers>) -> Self {
        Threads {
            count: Mutex::new(1),
            limit,
            helpers,
        }
    }

    /// Counts one more, which `start` starts; false where there is none to be had.
    fn add(&self, start: impl FnOnce() -> bool) -> bool {
        let mut count = self.count.lock();
        if *count >= self.limit || (*count >= OWN && !self.helpers.take()) {
            return false;
        }
        let started = start();
        if started {
            *count += 1;
        } else if *count >= OWN {
            self.helpers.give(1);
        }
        started
    }

    /// Counts one less.
    fn remove(&self) {
        let mut count = self.count.lock();
        if *count > OWN {
            self.helpers.give(1);
        }
        *count -= 1;
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.helpers.give(self.count.get_mut().saturating_sub(OWN));
    }
}

/// A source of threads for a connection.
pub(super) trait Crew<'c, S> {
    /// Starts another thread on the connection; false when there is none to be had.
    fn hire(&self, connection: &'c Connection<S>) -> bool;
}

/// No other threads: everything is served by the caller.
pub(super) struct Alone;

impl<'c, S> Crew<'c, S> for Alone {
    fn hire(&self, _: &'c Connection<S>) -> bool {
        false
    }
}

/// Threads that end with a scope.
pub(super) struct Scoped<'scope, 'env>(pub(super) &'scope Scope<'scope, 'env>);

impl<'c: 'scope, 'scope, S: Stream + Sync> Crew<'c, S> for Scoped<'scope, '_> {
    fn hire(&self, connection: &'c Connection<S>) -> bool {
        let scope = self.0;
        thread::Builder::new()
            .name("nbd-helper".into())
            .spawn_scoped(scope, move || {
                connection.work(&Scoped(scope), Stays::AWhile)
            })
            .is_ok()
    }
}

/// What a thread does that has nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stays {
    /// The connection's first one waits, since it could not end anyway.
    Always,
    /// A helper ends after a while.
    AWhile,
}

/// The role of the reader, and who waits for it.
pub(super) struct Role {
    /// There while nobody has it.
    reader: Option<Box<Reader>>,
    /// Threads that wait for it.
    idle: usize,
    /// How the connection ended; nobody reads any more.
    ended: Option<Result<()>>,
}

impl Role {
    /// Of a connection that nobody reads yet.
    pub(super) fn new(reader: Reader) -> Self {
        Role {
            reader: Some(Box::new(reader)),
            idle: 0,
            ended: None,
        }
    }

    /// How the connection ended, once all its threads have.
    pub(super) fn ended(self) -> Option<Result<()>> {
        self.ended
    }
}

impl<S: Stream> Connection<S> {
    /// Waits to become the reader; `None` once the connection has ended, or this thread may.
    pub(super) fn lead(&self, stays: Stays) -> Option<Box<Reader>> {
        let mut role = self.role.lock();
        role.idle += 1;
        let mut waited = false;
        while role.reader.is_none() && role.ended.is_none() && !waited {
            match stays {
                Stays::Always => self.free.wait(&mut role),
                Stays::AWhile => waited = self.free.wait_for(&mut role, IDLE).timed_out(),
            }
        }
        role.idle -= 1;
        if role.ended.is_some() {
            return None;
        }
        let reader = role.reader.take();
        if reader.is_none() {
            self.threads.remove();
        }
        reader
    }

    /// Gives up the reader's role; false where nobody takes it over until the caller leads again.
    pub(super) fn relieve<'c>(&'c self, reader: Box<Reader>, crew: &impl Crew<'c, S>) -> bool {
        let mut role = self.role.lock();
        role.reader = Some(reader);
        let somebody = role.idle > 0;
        drop(role);
        if somebody {
            self.free.notify_one();
        }
        somebody || self.threads.add(|| crew.hire(self))
    }

    /// Nobody is to read any more.
    pub(super) fn end(&self, ended: Result<()>) {
        self.role.lock().ended = Some(ended);
        self.free.notify_all();
    }
}
