//! The vhost-user protocol: what a client says of its queues and memory.

use std::fs::File;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as VhostError, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::GuestAddressSpace;

use super::Disk;
use super::config::{self, MAX_QUEUE_SIZE, feature};
use super::inflight::Region;
use super::memory::{MAX_REGIONS, Regions};
use super::queue::{Parts, RunningQueue};
use super::ring::{Place, Ring};
use vellum_base::block::Durability;

/// Where the rings of a queue are, under the client's addresses.
#[derive(Debug, Clone, Copy)]
struct Rings {
    descriptors: u64,
    available: u64,
    used: u64,
}

/// What a client said of a queue.
#[derive(Default)]
struct Queue {
    size: u16,
    rings: Option<Rings>,
    /// The next entry of the available ring.
    next_available: u16,
    kick: Option<File>,
    call: Option<File>,
    broken: Option<File>,
    enabled: bool,
    running: Option<RunningQueue>,
}

impl Queue {
    /// Stops, and keeps what is needed to go on.
    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            self.next_available = running.stop();
        }
    }
}

/// One client's device. All queues stop when it is dropped.
pub(super) struct Handler {
    disk: Arc<Disk>,
    features: u64,
    regions: Regions,
    inflight: Option<Region>,
    queues: Vec<Queue>,
    /// The first queue is served, and the client was not told since to look at the disk's size.
    untold: bool,
}

/// What is no part of a disk.
fn unsupported<T>() -> Result<T> {
    Err(VhostError::InvalidOperation("a disk has nothing like it"))
}

fn failed(error: vellum_base::Error) -> VhostError {
    VhostError::ReqHandlerError(std::io::Error::other(error))
}

fn duplicate(file: Option<&File>) -> Result<Option<File>> {
    file.map(File::try_clone)
        .transpose()
        .map_err(VhostError::ReqHandlerError)
}

impl Handler {
    /// A disk with so many queues.
    pub(super) fn new(disk: Arc<Disk>, queues: u16) -> Handler {
        Handler {
            disk,
            features: 0,
            regions: Regions::default(),
            inflight: None,
            queues: std::iter::repeat_with(Queue::default)
                .take(queues.into())
                .collect(),
            untold: false,
        }
    }

    /// Whether it is time to tell the client to look at the configuration; true once each time.
    pub(super) fn take_untold(&mut self) -> bool {
        std::mem::take(&mut self.untold)
    }

    /// Stops all queues.
    pub(super) fn stop(&mut self) {
        for queue in &mut self.queues {
            queue.stop();
        }
    }

    fn queue(&mut self, index: u32) -> Result<&mut Queue> {
        let queue = self.queues.get_mut(index as usize);
        queue.ok_or(VhostError::InvalidParam)
    }

    /// Serves a queue, if all is there that it needs.
    fn start(&mut self, index: u32) -> Result<()> {
        let always = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let durability = match self.features & feature::FLUSH {
            // A driver that will not flush counts on every write.
            0 => Durability::Durable,
            _ => Durability::Buffered,
        };
        let queue = self.queue(index)?;
        let (Some(rings), Some(kick)) = (queue.rings, duplicate(queue.kick.as_ref())?) else {
            return Ok(());
        };
        if queue.running.is_some() || queue.size == 0 || !(queue.enabled || always) {
            return Ok(());
        }
        let (call, broken) = (
            duplicate(queue.call.as_ref())?,
            duplicate(queue.broken.as_ref())?,
        );
        let (size, next_available) = (queue.size, queue.next_available);
        let guest = |client| self.regions.guest_address(client);
        let place = Place {
            size,
            descriptors: guest(rings.descriptors).ok_or(VhostError::InvalidParam)?,
            available: guest(rings.available).ok_or(VhostError::InvalidParam)?,
            used: guest(rings.used).ok_or(VhostError::InvalidParam)?,
            next_available,
            event_idx,
        };
        let region = self.inflight.as_ref();
        let inflight = region
            .map(|region| region.queue(index as u16, size))
            .transpose()
            .map_err(failed)?;
        let memory = self.regions.memory();
        let parts = Parts {
            index: index as u16,
            disk: Arc::clone(&self.disk),
            memory: memory.clone(),
            kick,
            broken,
            durability,
            leaves: inflight.is_some(),
        };
        let ring = Ring::new(place, &memory.memory(), inflight, call).map_err(failed)?;
        let running = RunningQueue::start(parts, ring).map_err(failed)?;
        self.queue(index)?.running = Some(running);
        // Not earlier: QEMU 7.2 would ask for the configuration while it waits for another answer, and take one
        // for the other. From here on it waits for none.
        self.untold |= index == 0;
        Ok(())
    }

    /// As [`Handler::start`], of which a guest is no client's fault.
    fn try_start(&mut self, index: u32) {
        if let Err(error) = self.start(index) {
            tracing::warn!(disk = %self.disk.serial, queue = index, "a queue cannot be served: {error}");
        }
    }

    fn reset(&mut self) {
        self.stop();
        self.features = 0;
        for queue in &mut self.queues {
            *queue = Queue::default();
        }
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(&self.disk))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !config::features(&self.disk) != 0 {
            return Err(VhostError::InvalidParam);
        }
        self.features = features;
        for index in 0..self.queues.len() as u32 {
            self.try_start(index);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        told: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.regions.replace(told, files).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| VhostError::InvalidParam)?;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(VhostError::InvalidParam);
        }
        self.queue(index)?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.queue(index)?.rings = Some(Rings {
            descriptors,
            available,
            used,
        });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.queue(index)?.next_available =
            u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = self.queue(index)?;
        queue.stop();
        queue.kick = None;
        Ok(VhostUserVringState::new(index, queue.next_available.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let queue = self.queue(index.into())?;
        queue.stop();
        queue.kick = fd;
        self.try_start(index.into());
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let queue = self.queue(index.into())?;
        queue.call = fd;
        if let Some(running) = &queue.running {
            running.set_call(duplicate(queue.call.as_ref())?);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.queue(index.into())?.broken = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(config::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        match features & !config::protocol_features().bits() {
            0 => Ok(()),
            _ => Err(VhostError::InvalidParam),
        }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let queue = self.queue(index)?;
        queue.enabled = enable;
        match enable {
            true => self.try_start(index),
            false => queue.stop(),
        }
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let space = config::space(&self.disk, self.queues.len() as u16);
        let (offset, size) = (offset as usize, size as usize);
        let end = offset.checked_add(size).ok_or(VhostError::InvalidParam)?;
        let part = space.get(offset..end);
        part.map(<[u8]>::to_vec).ok_or(VhostError::InvalidParam)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        unsupported()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Region::create(wanted.num_queues, wanted.queue_size).map_err(failed)
    }

    fn set_inflight_fd(&mut self, told: &VhostUserInflight, file: File) -> Result<()> {
        self.inflight = Some(Region::open(told, file).map_err(failed)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        told: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.regions.add(told, file).map(|()| None)
    }

    fn remove_mem_region(&mut self, told: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.regions.remove(told)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        unsupported()
    }
}
