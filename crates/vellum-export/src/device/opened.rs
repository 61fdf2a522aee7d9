//! What a worker serves, and with what it is opened: the part of whoever calls [`super::supervise`].

use std::sync::Arc;

use vellum_base::block::BlockDevice;
use vellum_fs::run_dir::RunDir;

use super::control::ControlHandler;

/// Memory that the workers of one device share, one after the other: what a killed one left there
/// its successor finds. All zero at first.
#[derive(Debug, Clone, Copy)]
pub struct Memory<'a> {
    /// To be mapped; a memfd, never shortened.
    pub file: &'a std::fs::File,
    /// First byte, a multiple of the page size.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

/// Opens the device in a worker, which is told where the device's run directory is now: it may have
/// been moved since the device was attached.
pub type Open<'a> = &'a dyn Fn(Memory<'_>, &RunDir) -> vellum_base::Result<Opened>;

/// What a worker serves: the device, and the commands it takes beside the built-in ones.
pub struct Opened {
    /// The block device; its lock must keep a second process from opening it.
    pub device: Arc<dyn BlockDevice>,
    /// Further commands of the control socket.
    pub control: Arc<dyn ControlHandler>,
}
