//! When what a flush would have to do is begun before the flush comes: once one is likely to come next,
//! nothing is in flight, and whoever reads waits for the client.
//!
//! The reader and the threads that serve aside each do their part and then look whether all is so: the
//! last of them finds it, and one alone begins.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::super::protocol::Command;
use super::super::stream::Stream;
use super::Connection;

#[derive(Debug, Default)]
pub(super) struct Expectation {
    /// What was written last is likely to be flushed next, and nothing was done ahead of that yet.
    flush: AtomicBool,
    /// All that the client sent was served or set apart, and the reader waits for more.
    reader_waits: AtomicBool,
}

impl Expectation {
    /// Keeps what [`Session::expects_flush`](super::Session::expects_flush) said of a request that the
    /// reader served.
    pub(super) fn learn(&self, expected: Option<bool>) {
        if let Some(expected) = expected {
            self.flush.store(expected, SeqCst);
        }
    }

    /// A request is to be served aside: what was said of those before it is over.
    pub(super) fn set_apart(&self, command: Command) {
        if matches!(command, Command::Write | Command::Flush) {
            self.flush.store(false, SeqCst);
        }
    }

    /// Keeps what was said of a request that was served aside; while it is still in flight, so that
    /// whoever finds nothing in flight knows it. A flush or a durable write is none of what came after
    /// it was set apart.
    pub(super) fn learn_aside(&self, expected: Option<bool>) {
        if expected == Some(true) {
            self.flush.store(true, SeqCst);
        }
    }

    /// The client sent something.
    pub(super) fn reader_is_busy(&self) {
        self.reader_waits.store(false, SeqCst);
    }
}

impl<S: Stream> Connection<S> {
    /// The reader has nothing left that the client sent.
    pub(super) fn reader_waits(&self) {
        // In this order: see `learn_aside`. Most readers need not ask the stream.
        let may_come = !self.budget.is_idle() || self.expectation.flush.load(SeqCst);
        let waits = may_come && !self.stream.has_input();
        self.expectation.reader_waits.store(waits, SeqCst);
        self.flush_ahead();
    }

    /// Begins what the next flush would have to do, where this is the moment for it.
    pub(super) fn flush_ahead(&self) {
        let expectation = &self.expectation;
        if expectation.flush.load(SeqCst)
            && expectation.reader_waits.load(SeqCst)
            && self.budget.is_idle()
            && expectation.flush.swap(false, SeqCst)
        {
            self.session.flush_ahead();
        }
    }
}
