//! The memory of the machine, as the client hands it over.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};

use super::chain::Memory;
use vellum_base::error::{Error as OwnError, ErrorKind, ResultExt};

/// Regions at most: as many as Linux has for its own virtual machines.
pub(super) const MAX_REGIONS: usize = 509;

/// A region under the addresses of the guest and of the client.
#[derive(Clone)]
struct Region {
    mapped: Arc<GuestRegionMmap>,
    guest: u64,
    client: u64,
    len: u64,
}

/// All regions.
pub(super) struct Regions {
    regions: Vec<Region>,
    memory: GuestMemoryAtomic<Memory>,
}

impl Default for Regions {
    fn default() -> Self {
        Regions {
            regions: Vec::new(),
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
        }
    }
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(std::io::Error::other(error))
}

/// Refuses to map what a file does not have, which would end the process when it is touched.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] then; as fstat(2).
pub(super) fn check_file(file: &File, offset: u64, len: u64) -> Result<(), OwnError> {
    let has = file.metadata().context(|| "a client's memory")?.len();
    match offset.checked_add(len) {
        Some(end) if end <= has => Ok(()),
        _ => Err(OwnError::new(
            ErrorKind::InvalidInput,
            format!("{len} bytes at {offset} of a file of {has} bytes are no memory"),
        )),
    }
}

impl Region {
    fn map(told: &VhostUserMemoryRegion, file: File) -> Result<Region, Error> {
        check_file(&file, told.mmap_offset, told.memory_size).map_err(refused)?;
        let mapped =
            GuestRegionMmap::new(told.mmap_region(file)?, GuestAddress(told.guest_phys_addr));
        Ok(Region {
            mapped: Arc::new(mapped.ok_or(Error::InvalidParam)?),
            guest: told.guest_phys_addr,
            client: told.user_addr,
            len: told.memory_size,
        })
    }
}

impl Regions {
    /// The guest's memory, now and as it becomes.
    pub(super) fn memory(&self) -> GuestMemoryAtomic<Memory> {
        self.memory.clone()
    }

    /// Goes on with these regions alone.
    ///
    /// # Errors
    /// Where they cannot be mapped, or overlap; the regions are as before.
    pub(super) fn replace(
        &mut self,
        told: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<(), Error> {
        let pairs = told.iter().zip(files);
        let regions: Result<Vec<Region>, Error> =
            pairs.map(|(told, file)| Region::map(told, file)).collect();
        self.set(regions?)
    }

    /// Takes one more region.
    ///
    /// # Errors
    /// As [`Regions::replace`]; where there are too many.
    pub(super) fn add(&mut self, told: &VhostUserMemoryRegion, file: File) -> Result<(), Error> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(Error::InvalidParam);
        }
        let region = Region::map(told, file)?;
        let mut regions = self.regions.clone();
        regions.push(region);
        self.set(regions)
    }

    /// Gives a region up.
    ///
    /// # Errors
    /// Where there is none like it.
    pub(super) fn remove(&mut self, told: &VhostUserMemoryRegion) -> Result<(), Error> {
        let same = |region: &Region| {
            (region.guest, region.client, region.len)
                == (told.guest_phys_addr, told.user_addr, told.memory_size)
        };
        let place = self
            .regions
            .iter()
            .position(same)
            .ok_or(Error::InvalidParam)?;
        let mut regions = self.regions.clone();
        regions.remove(place);
        self.set(regions)
    }

    fn set(&mut self, regions: Vec<Region>) -> Result<(), Error> {
        let mut regions = regions;
        regions.sort_by_key(|region| region.guest);
        let mapped: Vec<_> = regions
            .iter()
            .map(|region| Arc::clone(&region.mapped))
            .collect();
        let memory = match mapped.is_empty() {
            true => GuestMemoryMmap::new(),
            false => GuestMemoryMmap::from_arc_regions(mapped).map_err(refused)?,
        };
        self.regions = regions;
        // Poisoned by nobody: a panic ends the process.
        if let Ok(guard) = self.memory.lock() {
            guard.replace(memory);
        }
        Ok(())
    }

    /// The guest's address of what the client has at an address of its own.
    pub(super) fn guest_address(&self, client: u64) -> Option<u64> {
        self.regions
            .iter()
            .find(|region| client >= region.client && client - region.client < region.len)
            .map(|region| region.guest + (client - region.client))
    }
}
