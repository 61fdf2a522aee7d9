//! The threads of a worker whose requests come by io_uring.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::context::Context;
use super::run_before_clients;
use crate::fuse::ring::crew::Crew;
use crate::fuse::ring::thread::{RingThread, SpareThread};
use crate::fuse::transport::Ended;
use vellum_base::error::{Error, Result, ResultExt};

type Thread = JoinHandle<Result<Ended>>;

/// Starts the threads that have rings, and waits until the kernel has all their entries.
pub(super) fn start(context: &Arc<Context>, crew: &Arc<Crew>) -> Result<Vec<Thread>> {
    let mut threads = Vec::new();
    let (tell, told) = mpsc::channel();
    for index in 0..crew.rings() {
        threads.push(ring_thread(context, crew, index, tell.clone())?);
    }
    drop(tell);
    let ready = told.iter().collect::<Result<Vec<()>>>()?;
    if ready.len() < crew.rings() {
        return Err(Error::internal("a thread of a ring ended before it served"));
    }
    Ok(threads)
}

fn ring_thread(
    context: &Arc<Context>,
    crew: &Arc<Crew>,
    index: usize,
    tell: mpsc::Sender<Result<()>>,
) -> Result<Thread> {
    let (context, crew) = (Arc::clone(context), Arc::clone(crew));
    std::thread::Builder::new()
        .name(format!("ring-{index}"))
        .spawn(move || {
            run_before_clients();
            let made = RingThread::new(&crew, &context.worker.shared, index);
            let mut ring = match made {
                Ok(ring) => ring,
                Err(error) => {
                    let _ = tell.send(Err(error.clone()));
                    return Err(error);
                }
            };
            let _ = tell.send(Ok(()));
            drop(tell);
            let result = context.server().run(&mut ring);
            let _ = context.wake.write(1);
            result
        })
        .context(|| "a serving thread cannot be started")
}

/// Starts a thread for requests that wait.
pub(super) fn spare_thread(
    context: &Arc<Context>,
    crew: &Arc<Crew>,
    index: usize,
) -> Result<Thread> {
    let (context, crew) = (Arc::clone(context), Arc::clone(crew));
    std::thread::Builder::new()
        .name(format!("spare-{index}"))
        .spawn(move || {
            run_before_clients();
            let result = context.server().run(&mut SpareThread::new(&crew));
            let _ = context.wake.write(1);
            result
        })
        .context(|| "a serving thread cannot be started")
}
