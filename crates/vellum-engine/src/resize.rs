//! A container becomes larger, and its file system with it.

use serde::Serialize;

use super::device::{GROW, Grow, Target};
use super::grow::{GROW_TIMEOUT, grow_file_system, grow_mounted};
use super::lock_container;
use super::mount_point::{Mounted, Rights, UNMOUNT_TIMEOUT, mounted, unmount_device};
use super::run::{Activity, activity};
use super::serving::served_live;
use super::teardown::{refuse_halted, take_over};
use super::temporary::TemporaryMount;
use super::wire::encode;
use vellum_base::block::BLOCK_SIZE;
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_core::layer::check_size;
use vellum_export::device::control;
use vellum_export::local_disk::{self, LocalDisk};
use vellum_fs::ext4;
use vellum_fs::mountinfo::MountInfo;
use vellum_fs::run_dir::DirSocket;
use vellum_store::{ContainerRecord, Store};

/// What a container had, and has.
#[derive(Debug, Clone, Serialize)]
pub struct Resized {
    /// The container.
    pub name: String,
    /// Bytes that it had.
    pub before: u64,
    /// Bytes that it has.
    pub size: u64,
}

/// Makes a container `size` bytes large, rounded up to whole blocks where that is not what it has, and its
/// ext4 as large as that, mounted and in use or not, unless it is the disk of a virtual machine. The header of
/// its layer decides (of a disk that ended within its last block, and gets all of that, its record): from there
/// on the file system follows, now, or at the next call or mount.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for less than it has; [`ErrorKind::Unsupported`] for a file system that
/// cannot grow; [`ErrorKind::InUse`] while it is served over NBD, and where this process may not grow
/// a file system that is in use: nothing is changed then.
pub fn resize(store: &Store, name: &str, size: u64) -> Result<Resized> {
    let (container, _busy) = lock_container(store, &store.container(name)?)?;
    refuse_halted(&store.run_dir(&container), name)?;
    take_over(store, &container)?;
    let served = served_live(store, &container)?;
    let container = store.settle(name)?;
    let size = match size == container.disk.shown() {
        true => size,
        false => size.next_multiple_of(BLOCK_SIZE),
    };
    check(&container, size)?;
    interrupt::check()?;
    // From here on it comes to its end: half of it is what the next command would do.
    let _held = interrupt::hold();
    match (mounted(store, &container)?, served) {
        (Some(there), _) => {
            let grown = grow_in_use(store, &container, &there, size);
            // Also where the file system could not follow.
            store.settle(name)?;
            grown.map_err(|error| error.context(format!("{name}: cannot be made larger")))?;
        }
        (None, Some(socket)) => grow_served(store, &container, &socket, size)?,
        (None, None) => grow_unused(store, &container, size)?,
    }
    Ok(Resized {
        name: name.to_owned(),
        before: container.disk.shown(),
        size,
    })
}

/// Refuses what cannot be, before anything is changed.
fn check(container: &ContainerRecord, size: u64) -> Result<()> {
    let (name, now) = (&container.name, container.disk.shown());
    if size == now {
        return Ok(());
    }
    if size < now {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "the container {name} has {now} bytes and cannot be made smaller: files may lie in what \
                 would be cut off, and moving them would copy them into its layer. A smaller one is \
                 made of its files: `vellum mount {name} DIR`, `vellum import NEW DIR --size SIZE`"
            ),
        ));
    }
    check_size(size)?;
    let fixed = container.disk.fs.as_ref().and_then(|fs| fs.fixed.as_ref());
    match fixed {
        Some(why) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("the container {name} cannot be made larger than its {now} bytes, since {why}"),
        )),
        None => Ok(()),
    }
}

/// Grows a container that is mounted, under whoever uses it.
fn grow_in_use(
    store: &Store,
    container: &ContainerRecord,
    there: &Mounted,
    size: u64,
) -> Result<()> {
    let run_dir = store.run_dir(container);
    let device = local_disk::at(&there.device)?;
    if !ext4::may_grow_mounted()? {
        refuse_users(store, container, there, device)?;
    }
    let mount = MountInfo::at(&there.dir)?.ok_or_else(|| {
        let dir = there.dir.display();
        Error::new(
            ErrorKind::InUse,
            format!("{dir}: another program unmounted it meanwhile: try again"),
        )
    })?;
    let options = Rights::of(&mount).options(container.atime.unwrap_or_default());
    let _held = device.hold()?;
    let note = || show_last_block(store, container, size);
    let unmount = || unmount_device(&run_dir, false);
    grow_mounted(&run_dir, device, &there.dir, size, options, note, unmount)
}

/// Notes that a disk which ended within its last block gets all of that: no layer says so.
fn show_last_block(store: &Store, container: &ContainerRecord, size: u64) -> Result<()> {
    let disk = &container.disk;
    match disk.device_size.is_some() && size == disk.virtual_size {
        true => store.show_last_block(&container.name),
        false => Ok(()),
    }
}

/// Refuses a container that cannot be unmounted for a moment, although nobody keeps the mount itself busy:
/// its processes have a copy of that, and other mounts of it would not come back.
fn refuse_users(
    store: &Store,
    container: &ContainerRecord,
    there: &Mounted,
    device: LocalDisk,
) -> Result<()> {
    let name = &container.name;
    let refuse = |why: String| {
        let needs = "growing a file system in use needs CAP_SYS_RESOURCE, which this process lacks";
        Err(Error::new(ErrorKind::InUse, format!("{needs}: {why}")))
    };
    if activity(store, container)? != Activity::Idle {
        return refuse(format!(
            "end what runs in {name} (`vellum ps`), or grow it as a process that has that"
        ));
    }
    let number = device.major_minor();
    let mounts = MountInfo::read()?;
    let also = |mount: &&MountInfo| Some(mount.major_minor) == number && mount.target != there.dir;
    match mounts.iter().find(also) {
        Some(mount) => refuse(format!(
            "{name} is also mounted at {}: unmount that first",
            mount.target.display()
        )),
        None => Ok(()),
    }
}

/// Grows the disk of a virtual machine, which is told. Its guest grows what is on it.
fn grow_served(
    store: &Store,
    container: &ContainerRecord,
    socket: &DirSocket,
    size: u64,
) -> Result<()> {
    show_last_block(store, container, size)?;
    control::call_at(socket, GROW, encode(&Grow { size })?, GROW_TIMEOUT)?;
    crash_point::here("resize: layer grown");
    store.settle(&container.name).map(drop)
}

/// Grows a container that nobody uses: its layer, and then the file system in a mount for the purpose.
fn grow_unused(store: &Store, container: &ContainerRecord, size: u64) -> Result<()> {
    show_last_block(store, container, size)?;
    if size > container.disk.virtual_size {
        let open = Target::of(container).open(store)?;
        open.chain().grow(size)?;
        open.close()?;
        drop(open);
        crash_point::here("resize: layer grown");
    }
    let container = store.settle(&container.name)?;
    crash_point::here("resize: record in place");
    if container.disk.fs.is_none() {
        return Ok(());
    }
    let _pin = store.pin_layers()?;
    let mount = TemporaryMount::new(store, &Target::of(&container))?;
    let device = mount.device()?;
    let held = device.hold()?;
    let options = ext4::MountOptions::default();
    let grown = grow_file_system(&device.path(), mount.dir(), size, options, || {
        ext4::unmount(mount.dir(), UNMOUNT_TIMEOUT)
    });
    drop(held);
    let ended = mount.end();
    grown.and(ended).map_err(|error| {
        error.context(format!(
            "{} is larger, and its file system not yet",
            container.name
        ))
    })
}
