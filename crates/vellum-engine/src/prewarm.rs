//! Copying a file's blocks up ahead of traffic, so that its first writes cost no more than later ones.
//!
//! The file system says where the file lies (FIEMAP through the mount), and the server of the device
//! copies those blocks, under the locks that the container's own writes take. What moves in between
//! does no harm: a block that is copied up reads the same as before.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fiemap::{Fiemap, FiemapExtentFlags, FiemapFlags};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{SFlag, fstat};
use serde::Serialize;

use super::device::{COPY_UP, CopyUp};
use super::reach::{Access, reach};
use super::sockets::Sockets;
use super::wire::{decode, encode};
use vellum_base::block::BLOCK_SIZE;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_core::chain::CopiedUp;
use vellum_store::Store;

/// Bytes that are copied and made durable at a time: a container's own flush that comes then waits
/// for so many.
const BATCH: u64 = 4 << 20;
/// Ranges in one request, so that it fits a line.
const MAX_RANGES: usize = 4096;
/// Prewarming leaves this much of the store's disk to others.
const SPARE: u64 = 64 << 20;
const TIMEOUT: Duration = Duration::from_secs(120);

/// Extents that lie nowhere on the device, or not as plain blocks.
const NO_PLACE: FiemapExtentFlags = FiemapExtentFlags::UNKNOWN
    .union(FiemapExtentFlags::DELALLOC)
    .union(FiemapExtentFlags::ENCODED)
    .union(FiemapExtentFlags::NOT_ALIGNED);

/// What was prewarmed.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PrewarmReport {
    /// The container.
    pub name: String,
    /// Regular files that were found.
    pub files: u64,
    /// Bytes of the device that they lie on.
    pub bytes: u64,
    /// Blocks of 4096 bytes that were copied from a layer below.
    pub copied_blocks: u64,
    /// Blocks that were zero below and now have their space.
    pub zeroed_blocks: u64,
    /// Blocks that the writable layer had already.
    pub present_blocks: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Copies the blocks of files, and of all files below directories, into the container's writable
/// layer. Paths are the container's own: links in them lead nowhere outside. It may be mounted and
/// written to meanwhile; one that is not is mounted for the purpose. `progress` is told of bytes done
/// and bytes in all.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a path; [`ErrorKind::Unsupported`] for a container without ext4 or
/// one that is served over NBD; [`ErrorKind::NoSpace`] before the store's disk is full: what was
/// copied stays.
pub fn prewarm(
    store: &Store,
    name: &str,
    paths: &[PathBuf],
    progress: impl FnMut(u64, u64),
) -> Result<PrewarmReport> {
    let container = store.container(name)?;
    let begin = Instant::now();
    let mut report = reach(store, &container, Access::Change, |reached| {
        let sockets = Sockets::of_device(reached.run_dir);
        prewarm_mounted(store, reached.dir, &sockets, paths, progress)
    })?;
    report.name = name.to_owned();
    report.seconds = begin.elapsed().as_secs_f64();
    Ok(report)
}

fn prewarm_mounted(
    store: &Store,
    dir: &Path,
    sockets: &Sockets,
    paths: &[PathBuf],
    mut progress: impl FnMut(u64, u64),
) -> Result<PrewarmReport> {
    let mut found = Found::default();
    let root = Root::open(dir)?;
    for path in paths {
        root.collect(path, &mut found)?;
    }
    let mut report = PrewarmReport {
        files: found.files,
        ..PrewarmReport::default()
    };
    let ranges = found.merged();
    report.bytes = ranges.iter().map(|(_, len)| len).sum();
    let mut done = 0;
    progress(done, report.bytes);
    for batch in batches(&ranges) {
        interrupt::check()?;
        leave_space(store)?;
        let bytes: u64 = batch.iter().map(|(_, len)| len).sum();
        let args = encode(&CopyUp { ranges: batch })?;
        let (_, answer) = sockets.ask(COPY_UP, &args, TIMEOUT)?;
        let copied: CopiedUp = decode(answer)?;
        report.copied_blocks += copied.copied;
        report.zeroed_blocks += copied.zeroed;
        report.present_blocks += copied.present;
        done += bytes;
        progress(done, report.bytes);
    }
    Ok(report)
}

/// Refuses to go on when the disk under the store is nearly full.
fn leave_space(store: &Store) -> Result<()> {
    let path = store.root();
    let stat = nix::sys::statvfs::statvfs(path)
        .context(|| format!("cannot tell how much space is left at {}", path.display()))?;
    let free = stat.blocks_available() * stat.fragment_size();
    if free < SPARE + BATCH {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "only {free} bytes are left on the disk of {}: prewarming leaves {SPARE} to others",
                path.display()
            ),
        ));
    }
    Ok(())
}

/// Cuts ranges into requests.
fn batches(ranges: &[(u64, u64)]) -> Vec<Vec<(u64, u64)>> {
    let mut batches = Vec::new();
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for &(offset, len) in ranges {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let piece = (end - at).min(BATCH - bytes);
            batch.push((at, piece));
            at += piece;
            bytes += piece;
            if bytes == BATCH || batch.len() == MAX_RANGES {
                batches.push(std::mem::take(&mut batch));
                bytes = 0;
            }
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

/// Where files lie on the device.
#[derive(Debug, Default)]
struct Found {
    files: u64,
    /// First byte and length; files may share blocks.
    extents: Vec<(u64, u64)>,
}

impl Found {
    /// In order, without overlap, in whole blocks.
    fn merged(&self) -> Vec<(u64, u64)> {
        let mut ends: BTreeMap<u64, u64> = BTreeMap::new();
        for &(offset, len) in &self.extents {
            let start = offset / BLOCK_SIZE * BLOCK_SIZE;
            let end = (offset + len).next_multiple_of(BLOCK_SIZE);
            let slot = ends.entry(start).or_default();
            *slot = (*slot).max(end);
        }
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, end) in ends {
            match merged.last_mut() {
                Some((first, len)) if start <= *first + *len => {
                    *len = (*len).max(end - *first);
                }
                _ => merged.push((start, end - start)),
            }
        }
        merged
    }
}

/// The root of a mounted container, which paths do not leave.
struct Root {
    fd: OwnedFd,
}

impl Root {
    fn open(dir: &Path) -> Result<Self> {
        let file = File::open(dir).context(|| format!("cannot open {}", dir.display()))?;
        Ok(Root { fd: file.into() })
    }

    /// Opens what lies at `path`, resolved as in the container. `follow`: links are followed.
    fn get(&self, path: &Path, follow: bool) -> nix::Result<File> {
        // Without waiting for whoever might write to a FIFO.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let mut resolve = ResolveFlag::RESOLVE_IN_ROOT
            | ResolveFlag::RESOLVE_NO_MAGICLINKS
            | ResolveFlag::RESOLVE_NO_XDEV;
        if !follow {
            resolve |= ResolveFlag::RESOLVE_NO_SYMLINKS;
        }
        let how = OpenHow::new().flags(flags).resolve(resolve);
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let mut tries = 0;
        loop {
            match openat2(&self.fd, path, how) {
                // A rename on the host raced with the resolution of a "..".
                Err(Errno::EAGAIN | Errno::EINTR) if tries < 100 => tries += 1,
                other => return other.map(File::from),
            }
        }
    }

    /// Adds the file at `path`, or all files below the directory there.
    fn collect(&self, path: &Path, found: &mut Found) -> Result<()> {
        let shown = path.display();
        let file = self.get(path, true).map_err(|errno| match errno {
            Errno::EXDEV => Error::new(
                ErrorKind::Unsupported,
                format!("{shown}: another file system is mounted there"),
            ),
            errno => Error::io(format!("{shown} in the container"), errno.into()),
        })?;
        match kind(&file) {
            Some(SFlag::S_IFREG) => add_file(&file, path, found),
            Some(SFlag::S_IFDIR) => self.collect_below(file, found),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{shown}: neither a file nor a directory"),
            )),
        }
    }

    fn collect_below(&self, top: File, found: &mut Found) -> Result<()> {
        let top = Root { fd: top.into() };
        let mut waiting = vec![PathBuf::new()];
        while let Some(path) = waiting.pop() {
            interrupt::check()?;
            let Some(directory) = top.get_again(&path)? else {
                continue;
            };
            let what = || format!("cannot list {}", path.display());
            let mut entries = nix::dir::Dir::from_fd(directory.into()).context(what)?;
            for entry in entries.iter() {
                let entry = entry.context(what)?;
                let name = Path::new(OsStr::from_bytes(entry.file_name().to_bytes()));
                if name == Path::new(".") || name == Path::new("..") {
                    continue;
                }
                let kinds = [nix::dir::Type::File, nix::dir::Type::Directory];
                if entry.file_type().is_some_and(|kind| !kinds.contains(&kind)) {
                    continue;
                }
                let below = path.join(name);
                let Some(file) = top.get_again(&below)? else {
                    continue;
                };
                match kind(&file) {
                    Some(SFlag::S_IFREG) => add_file(&file, &below, found)?,
                    Some(SFlag::S_IFDIR) => waiting.push(below),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// What a listing named; `None` where it was removed meanwhile, or is a link or another file
    /// system.
    fn get_again(&self, path: &Path) -> Result<Option<File>> {
        match self.get(path, false) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EXDEV | Errno::ENXIO) => {
                Ok(None)
            }
            Err(errno) => Err(Error::io(path.display().to_string(), errno.into())),
        }
    }
}

fn kind(file: &File) -> Option<SFlag> {
    let mode = fstat(file).ok()?.st_mode;
    Some(SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()))
}

/// Adds the extents of a file. SYNC has it written out first, so that each has a place.
fn add_file(file: &File, path: &Path, found: &mut Found) -> Result<()> {
    found.files += 1;
    for extent in Fiemap::with_flags(file, FiemapFlags::SYNC) {
        let extent = extent.map_err(|error: io::Error| {
            Error::io(format!("{}: cannot be located", path.display()), error)
        })?;
        if !extent.fe_flags.intersects(NO_PLACE) {
            found.extents.push((extent.fe_physical, extent.fe_length));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_become_whole_blocks_in_order_without_overlap() {
        let found = Found {
            files: 3,
            extents: vec![
                (8192, 4096),
                (100, 50),
                (4096, 4096),
                (9000, 10),
                (65536, 1),
            ],
        };
        assert_eq!(found.merged(), [(0, 12288), (65536, 4096)]);
    }

    #[test]
    fn batches_cover_the_ranges_and_none_is_larger_than_the_bound() {
        let ranges = [(0, 10 << 20), (20 << 20, 4096), (30 << 20, 3 << 20)];
        let batches = batches(&ranges);
        let all: u64 = batches.iter().flatten().map(|(_, len)| len).sum();
        assert_eq!(all, (13 << 20) + 4096);
        for batch in &batches {
            assert!(batch.iter().map(|(_, len)| len).sum::<u64>() <= BATCH);
        }
        assert_eq!(batches[0], [(0, BATCH)]);
    }
}
