//! Requests that are set apart from those that the reader serves on the spot.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::super::exec::{Buffer, Outcome, Patience};
use super::super::memory::Share;
use super::super::protocol::{Command, Request};
use super::super::stream::Stream;
use super::Connection;
use crate::pace::Class;
use vellum_base::error::Result;

/// Threads of a connection that never wait for room on the host's disk.
const SERVING_ALWAYS: usize = 2;

/// A request that may be served while others are read.
pub(super) struct Job<'c> {
    pub(super) command: Command,
    pub(super) request: Request,
    pub(super) class: Class,
    pub(super) payload: Buffer,
    pub(super) share: Share<'c>,
    /// Found the host's disk full before.
    pub(super) wants_room: bool,
}

/// What came of a [`Job`].
pub(super) enum Served<'c> {
    /// It was answered.
    Done,
    /// It wants room on the host's disk.
    WantsRoom(Job<'c>),
}

impl<S: Stream> Connection<S> {
    /// Serves a request that was set apart, on a thread that does not read: it may wait for room, where
    /// another was `relieved` to read meanwhile.
    pub(super) fn run_patiently(
        &self,
        job: Job<'_>,
        relieved: bool,
        small: &mut Buffer,
    ) -> Result<()> {
        let served = if job.wants_room {
            Served::WantsRoom(job)
        } else {
            self.run(job, small)?
        };
        if let Served::WantsRoom(job) = served {
            self.wait_for_room(job, relieved, small)?;
        }
        self.flush_ahead();
        Ok(())
    }

    fn wait_for_room<'c>(
        &self,
        mut job: Job<'c>,
        relieved: bool,
        small: &mut Buffer,
    ) -> Result<Served<'c>> {
        job.wants_room = true;
        let bytes = job.payload.len();
        let held = self.held.fetch_add(1, Relaxed) + 1 + SERVING_ALWAYS;
        let held_bytes = self.held_bytes.fetch_add(bytes, Relaxed) + bytes;
        // Others have to get a thread and memory meanwhile.
        let few = held <= self.limits.threads && held_bytes <= self.limits.bytes_in_flight / 2;
        let patience = if relieved && few {
            Patience::Wait(&self.ends)
        } else {
            Patience::Refuse
        };
        let served = self.serve_job(job, patience, small);
        self.held.fetch_sub(1, Relaxed);
        self.held_bytes.fetch_sub(bytes, Relaxed);
        served
    }

    /// Serves a request that was set apart and sends its reply. Gives it back where it wants room on
    /// the host's disk.
    pub(super) fn run<'c>(&self, job: Job<'c>, small: &mut Buffer) -> Result<Served<'c>> {
        self.serve_job(job, self.first_patience(), small)
    }

    /// What to do with a request at first that finds the host's disk full.
    pub(super) fn first_patience(&self) -> Patience<'static> {
        if self.limits.threads > SERVING_ALWAYS {
            Patience::Return
        } else {
            Patience::Refuse
        }
    }

    fn serve_job<'c>(
        &self,
        job: Job<'c>,
        patience: Patience<'_>,
        small: &mut Buffer,
    ) -> Result<Served<'c>> {
        let mut long = match job.command {
            Command::Read => Some(self.budget.memory().buffer(job.share.cost())),
            _ => None,
        };
        let out = long.as_mut().unwrap_or(small);
        out.truncate(0);
        let began = Instant::now();
        let mut took = None;
        let done = self.session.execute(
            job.command,
            &job.request,
            job.payload.filled(),
            patience,
            out,
            &mut |out| {
                took.get_or_insert_with(|| began.elapsed());
                self.send(out)
            },
        );
        if matches!(done, Ok(Outcome::WantsRoom)) {
            return Ok(Served::WantsRoom(job));
        }
        // How long the client takes to receive says nothing about the device, nor a full disk.
        if !job.wants_room {
            self.pace
                .record(job.class, took.unwrap_or_else(|| began.elapsed()));
        }
        let expected = self.session.expects_flush(job.command, &job.request);
        self.expectation.learn_aside(expected);
        let sent = done.and_then(|_| self.send(out));
        let memory = self.budget.memory();
        if let Some(buffer) = long {
            memory.keep(buffer);
        }
        memory.keep(job.payload);
        sent.map(|()| Served::Done)
    }
}
