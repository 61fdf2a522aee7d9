//! The threads of a worker whose requests come by io_uring.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::context::Context;
use super::{made, spawn};
use crate::fuse::ring::crew::Crew;
use crate::fuse::ring::thread::{RingThread, SpareThread};
use crate::fuse::transport::Ended;
use vellum_base::error::{Error, Result};

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
    let crew = Arc::clone(crew);
    spawn(context, format!("ring-{index}"), move |context| {
        let ring = RingThread::new(&crew, &context.worker.shared, index);
        let mut ring = made(tell, ring)?;
        context.server().run(&mut ring)
    })
}

/// Starts a thread for requests that wait.
pub(super) fn spare_thread(
    context: &Arc<Context>,
    crew: &Arc<Crew>,
    index: usize,
) -> Result<Thread> {
    let crew = Arc::clone(crew);
    spawn(context, format!("spare-{index}"), move |context| {
        context.server().run(&mut SpareThread::new(&crew))
    })
}
