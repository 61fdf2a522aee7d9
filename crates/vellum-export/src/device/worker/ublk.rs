//! The threads of a worker whose requests come by a ublk device.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::context::{Context, Worker};
use super::{made, spawn};
use crate::fuse::transport::Ended;
use crate::shortage::Shortage;
use crate::ublk::DeviceId;
use crate::ublk::control::Control;
use crate::ublk::crew::Crew;
use crate::ublk::disk::{Mark, UblkDisk};
use crate::ublk::thread::{SpareThread, UblkThread};
use vellum_base::error::{Error, Result};

type Thread = JoinHandle<Result<Ended>>;

/// Opens the device, once the kernel has let go of a server that is dead.
///
/// # Errors
/// [`NotFound`](vellum_base::ErrorKind::NotFound) where the device was deleted.
pub(super) fn take_over(worker: &Worker, id: DeviceId, shortage: Shortage) -> Result<Arc<Crew>> {
    if worker.resume {
        Control::open()?.start_recovery(id, Mark::of(&worker.run_dir.now()))?;
    }
    Ok(Arc::new(Crew::new(id, shortage)?))
}

/// Starts the thread that fetches, and lets requests come.
pub(super) fn start(context: &Arc<Context>, crew: &Arc<Crew>) -> Result<Vec<Thread>> {
    let id = context.worker.features.ublk;
    let id = id.ok_or_else(|| Error::internal("a crew without a device"))?;
    let control = Control::open()?;
    let device = &context.opened.device;
    if !context.worker.resume {
        control.set_parameters(id, device.size(), device.is_read_only())?;
    }
    let (tell, told) = mpsc::channel();
    let thread = ublk_thread(context, crew, tell)?;
    let ready = told.recv();
    ready.map_err(|_| Error::internal("the thread of a ublk device ended before it served"))??;
    let pid = nix::unistd::getpid().as_raw();
    if context.worker.resume {
        control.end_recovery(id, pid)?;
    } else {
        control.start(id, pid)?;
        UblkDisk(id).look_often();
    }
    Ok(vec![thread])
}

fn ublk_thread(
    context: &Arc<Context>,
    crew: &Arc<Crew>,
    tell: mpsc::Sender<Result<()>>,
) -> Result<Thread> {
    let crew = Arc::clone(crew);
    spawn(context, "ublk-0".to_owned(), move |context| {
        let mut thread = made(tell, UblkThread::new(&crew, &context.worker.shared))?;
        context.server().run(&mut thread)
    })
}

/// Starts a thread for requests that wait or are large.
pub(super) fn spare_thread(
    context: &Arc<Context>,
    crew: &Arc<Crew>,
    index: usize,
) -> Result<Thread> {
    let crew = Arc::clone(crew);
    spawn(context, format!("spare-{index}"), move |context| {
        let mut thread = SpareThread::new(&crew, &context.worker.shared, index)?;
        context.server().run(&mut thread)
    })
}
