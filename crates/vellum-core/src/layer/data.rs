//! The blocks themselves: sparse segment files. format.md, section 2.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::header::{Header, SEGMENT_SHIFT};
use vellum_base::block::{BLOCK_SIZE, MAX_VIRTUAL_SIZE, Offset, Span, in_memory, part, part_mut};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{FileId, OpenMode, Storage, StorageFile, Unsynced};

/// Bytes of a segment.
const SEGMENT_LEN: u64 = BLOCK_SIZE << SEGMENT_SHIFT;
/// Segments of the largest layer.
pub(super) const MAX_SEGMENTS: usize = in_memory(MAX_VIRTUAL_SIZE / SEGMENT_LEN);

/// Bytes of one segment.
struct Piece<'a> {
    segment: &'a Segment,
    /// The first of them in the segment.
    within: u64,
    /// The first of them in what the caller asked for.
    at: usize,
    len: u64,
}

impl Piece<'_> {
    /// Says what failed.
    fn context<T>(&self, what: &str, result: std::io::Result<T>) -> Result<T> {
        let Piece {
            segment,
            within,
            len,
            ..
        } = self;
        result.context(|| {
            format!(
                "{what} {len} bytes at {within} of {}",
                segment.path.display()
            )
        })
    }
}

/// The data files of one layer, addressed by bytes and blocks of the layer.
#[derive(Debug)]
pub(super) struct DataFiles {
    /// Filled from the front; a layer that grows gets more.
    segments: [OnceLock<Segment>; MAX_SEGMENTS],
    /// A thread is telling the host to begin.
    writing_back: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Segment {
    path: PathBuf,
    file: Arc<dyn StorageFile>,
    /// Something was written or punched since the last sync. Set once that is done: were it set
    /// before, a sync that runs in between would clear it and leave the bytes out.
    dirty: AtomicBool,
    /// A sync of what `dirty` said is under way, or failed: nothing of it is known to be durable.
    in_sync: AtomicBool,
    /// Held while syncing, so that whoever finds the segment clean knows that it is. Why a sync
    /// failed, once one has: the kernel tells only one caller, and then forgets the bytes.
    syncing: Mutex<Option<String>>,
}

impl Segment {
    fn new(path: PathBuf, file: Arc<dyn StorageFile>, dirty: bool) -> Self {
        Segment {
            path,
            file,
            dirty: AtomicBool::new(dirty),
            in_sync: AtomicBool::new(false),
            syncing: Mutex::default(),
        }
    }

    /// Runs `work`, which changes bytes; what is left of a failed change wants a sync too.
    fn change(&self, work: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        let result = work();
        self.dirty.store(true, Ordering::Release);
        result
    }

    /// Makes what was changed durable; false where nothing was.
    fn sync(&self) -> Result<bool> {
        let mut failed = self.syncing.lock();
        if let Some(why) = &*failed {
            return Err(Error::new(ErrorKind::Io, why.clone()));
        }
        if !self.dirty.load(Ordering::Acquire) {
            return Ok(false);
        }
        // In this order, so that whoever finds the segment clean finds the sync.
        self.in_sync.store(true, Ordering::Release);
        self.dirty.swap(false, Ordering::AcqRel);
        // Asked first, so that whoever asks beside it does so by a descriptor that was there before the
        // sync was told of a failure.
        let synced = self.file.check_written_back();
        synced
            .and_then(|()| self.file.sync_data())
            .context(|| format!("syncing {}", self.path.display()))
            .inspect_err(|error| *failed = Some(error.to_string()))?;
        self.in_sync.store(false, Ordering::Release);
        Ok(true)
    }

    /// See [`DataFiles::check_written_back`].
    fn check_written_back(&self) -> Result<()> {
        if !self.dirty.load(Ordering::Acquire) && !self.in_sync.load(Ordering::Acquire) {
            return Ok(());
        }
        let checked = self.file.check_written_back();
        checked.context(|| format!("writing {} back", self.path.display()))
    }
}

/// The name of segment `k`.
pub(super) fn segment_name(segment: u64) -> String {
    match segment {
        0 => "data".into(),
        _ => format!("data.{segment}"),
    }
}

/// (segment, length) of each segment that a layer of `virtual_size` bytes has.
pub(super) fn layout(virtual_size: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..virtual_size.div_ceil(SEGMENT_LEN)).map(move |segment| {
        (
            segment,
            (virtual_size - segment * SEGMENT_LEN).min(SEGMENT_LEN),
        )
    })
}

impl DataFiles {
    /// Makes the segments of a new layer: all hole, and not durable yet, nor are their names.
    pub(super) fn create(
        storage: &dyn Storage,
        dir: &Path,
        virtual_size: u64,
    ) -> Result<Vec<Unsynced>> {
        let make = |(segment, len)| {
            let path = dir.join(segment_name(segment));
            let make = || -> std::io::Result<Unsynced> {
                let file = storage.open(&path, OpenMode::CreateNew)?;
                file.set_len(len)?;
                Ok(Unsynced::File(file))
            };
            make().context(|| format!("cannot make {} of {len} bytes (sparse)", path.display()))
        };
        layout(virtual_size).map(make).collect()
    }

    /// Opens the segments and checks their lengths. One that is longer than a layer that is not
    /// sealed was left by a growth that was cut off: whoever may write cuts it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where a segment is missing or has another length.
    pub(super) fn open(
        storage: &dyn Storage,
        dir: &Path,
        header: &Header,
        mode: OpenMode,
    ) -> Result<Self> {
        let data = DataFiles {
            segments: Default::default(),
            writing_back: Arc::default(),
        };
        for ((segment, expected), slot) in layout(header.virtual_size).zip(&data.segments) {
            let path = dir.join(segment_name(segment));
            let file = storage
                .open(&path, mode)
                .context(|| format!("cannot open {}", path.display()))?;
            let len = file
                .len()
                .context(|| format!("cannot read {}", path.display()))?;
            if len < expected || len > expected && header.sealed {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("{}: {len} bytes where {expected} belong", path.display()),
                ));
            }
            if len > expected && mode != OpenMode::Read {
                file.set_len(expected)
                    .context(|| format!("cannot cut {} to {expected} bytes", path.display()))?;
            }
            // Another process may have written here and died before it synced.
            let new = Segment::new(path, file, mode != OpenMode::Read);
            assert!(slot.set(new).is_ok(), "a segment that was open before");
        }
        Ok(data)
    }

    /// The segments that there are.
    fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().map_while(OnceLock::get)
    }

    /// Makes the files long enough for a layer of `to` bytes: with holes, and durable at the next
    /// [`DataFiles::sync`]. Each step may be cut off and made again.
    ///
    /// # Errors
    /// Where the host refuses; call [`DataFiles::cut`] then.
    pub(super) fn grow(&self, storage: &dyn Storage, dir: &Path, to: u64) -> Result<()> {
        let mut made = false;
        for ((segment, len), slot) in layout(to).zip(&self.segments) {
            let path = dir.join(segment_name(segment));
            let what = || format!("cannot make {} {len} bytes long (sparse)", path.display());
            if let Some(there) = slot.get() {
                if there.file.len().context(what)? < len {
                    there.change(|| there.file.set_len(len)).context(what)?;
                }
                continue;
            }
            let make = || -> std::io::Result<Arc<dyn StorageFile>> {
                // One that a growth before left is of no use to anybody.
                let file = storage.open(&path, OpenMode::Create)?;
                file.set_len(0)?;
                file.set_len(len)?;
                Ok(file)
            };
            let file = make().context(what)?;
            let new = Segment::new(path, file, true);
            assert!(slot.set(new).is_ok(), "two growths at once");
            made = true;
        }
        if made {
            storage
                .sync_dir(dir)
                .context(|| format!("cannot sync {}", dir.display()))?;
        }
        Ok(())
    }

    /// Takes a growth back that did not come to its end. A whole segment too many stays until the
    /// next growth: nothing looks at it.
    ///
    /// # Errors
    /// Where the host refuses.
    pub(super) fn cut(&self, to: u64) -> Result<()> {
        for ((_, len), segment) in layout(to).zip(self.segments()) {
            segment
                .change(|| segment.file.set_len(len))
                .context(|| format!("cannot cut {} to {len} bytes", segment.path.display()))?;
        }
        Ok(())
    }

    /// Has the next reads come from the disk, after a process before met a sync that failed: what
    /// it could not write may still be in memory, where it looks as if it were durable.
    pub(super) fn drop_cache(&self) -> Result<()> {
        for segment in self.segments() {
            // What is not written yet stays in memory otherwise.
            segment.sync()?;
            segment
                .file
                .drop_cache()
                .context(|| format!("cannot read {} afresh", segment.path.display()))?;
        }
        Ok(())
    }

    /// Calls `each` with the pieces of `len` bytes from `offset` on.
    #[inline]
    fn split(
        &self,
        offset: Offset,
        len: u64,
        mut each: impl FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut done = 0;
        while done < len {
            let byte = (offset + done).get();
            let within = byte % SEGMENT_LEN;
            let piece = (SEGMENT_LEN - within).min(len - done);
            let segment = self
                .segments
                .get(in_memory(byte / SEGMENT_LEN))
                .and_then(OnceLock::get)
                .ok_or_else(|| {
                    Error::new(
                        ErrorKind::OutOfRange,
                        format!("offset {byte} is past the last segment"),
                    )
                })?;
            each(Piece {
                segment,
                within,
                at: in_memory(done),
                len: piece,
            })?;
            done += piece;
        }
        Ok(())
    }

    /// Fills `buf` from `offset`.
    pub(super) fn read(&self, buf: &mut [u8], offset: Offset) -> Result<()> {
        self.split(offset, buf.len() as u64, |piece| {
            let bytes = part_mut(buf, piece.at, in_memory(piece.len));
            let read = piece.segment.file.read_at(bytes, piece.within);
            piece.context("reading", read)
        })
    }

    /// Writes `buf` at `offset`, buffered.
    pub(super) fn write(&self, buf: &[u8], offset: Offset) -> Result<()> {
        self.split(offset, buf.len() as u64, |piece| {
            let (segment, bytes) = (piece.segment, part(buf, piece.at, in_memory(piece.len)));
            let written = segment.change(|| segment.file.write_at(bytes, piece.within));
            piece.context("writing", written)
        })
    }

    /// Gives the space of the blocks back; they read as zeros in the file.
    pub(super) fn punch(&self, span: Span) -> Result<()> {
        self.split(span.offset(), span.bytes(), |piece| {
            let segment = piece.segment;
            let punched = segment.change(|| segment.file.punch_hole(piece.within, piece.len));
            piece.context("punching", punched)
        })
    }

    /// Makes the blocks zeros that take space, so that later writes there need none.
    pub(super) fn allocate_zeroed(&self, span: Span) -> Result<()> {
        self.punch(span)?;
        self.split(span.offset(), span.bytes(), |piece| {
            let segment = piece.segment;
            let reserved = segment.change(|| segment.file.allocate(piece.within, piece.len));
            piece.context("reserving", reserved)
        })
    }

    /// Has the blocks take their space on the host, without a change of what they hold.
    pub(super) fn preallocate(&self, span: Span) -> Result<()> {
        self.split(span.offset(), span.bytes(), |piece| {
            let taken = piece.segment.file.allocate(piece.within, piece.len);
            piece.context("preallocating", taken)
        })
    }

    /// Gives the space of blocks back that hold nothing: no sync needs to know.
    pub(super) fn release(&self, span: Span) -> Result<()> {
        self.split(span.offset(), span.bytes(), |piece| {
            let punched = piece.segment.file.punch_hole(piece.within, piece.len);
            piece.context("punching", punched)
        })
    }

    /// Calls `each` with the blocks that take space on the host, in order.
    pub(super) fn visit_allocated(&self, mut each: impl FnMut(Span)) -> Result<()> {
        for (first, segment) in (0..).step_by(in_memory(SEGMENT_LEN)).zip(self.segments()) {
            let mut visit = |range: std::ops::Range<u64>| {
                let start = Offset::new(first + range.start).block();
                let end = Offset::new(first + range.end.min(SEGMENT_LEN)).block_from();
                if start < end {
                    each(Span::between(start, end));
                }
            };
            let what = || format!("looking what {} takes", segment.path.display());
            segment.file.visit_allocated(&mut visit).context(what)?;
        }
        Ok(())
    }

    /// Makes everything written so far durable; returns how many syncs that took. Fails for ever
    /// once a sync has failed.
    pub(super) fn sync(&self) -> Result<u64> {
        let mut syncs = 0;
        for segment in self.segments() {
            syncs += u64::from(segment.sync()?);
        }
        Ok(syncs)
    }

    /// Lets go of the memory of what is durable.
    pub(super) fn let_go(&self) {
        for segment in self.segments() {
            // A hint: where the host refuses, it decides itself what to keep.
            let _ = segment.file.drop_cache();
        }
    }

    /// Fails where the host could not write back what is not durable yet. Does not wait for a sync that
    /// is under way.
    pub(super) fn check_written_back(&self) -> Result<()> {
        self.segments().try_for_each(Segment::check_written_back)
    }

    /// Has the host begin to write what was written so far to its disk, in a thread of its own: a
    /// sync later waits for less, and the disk works while requests are still coming. A hint, and
    /// none while an older one is being taken.
    pub(super) fn start_writing_back(&self) {
        if self.writing_back.swap(true, Ordering::AcqRel) {
            return;
        }
        let dirty = self
            .segments()
            .filter(|segment| segment.dirty.load(Ordering::Acquire));
        let files: Vec<_> = dirty.map(|segment| segment.file.clone()).collect();
        let done = self.writing_back.clone();
        let started = std::thread::Builder::new()
            .name("vellum-write-back".into())
            .spawn(move || {
                for file in files {
                    file.start_writing_back();
                }
                done.store(false, Ordering::Release);
            });
        if started.is_err() {
            self.writing_back.store(false, Ordering::Release);
        }
    }

    /// Which files they are.
    pub(super) fn ids(&self) -> Result<Vec<FileId>> {
        self.segments()
            .map(|segment| {
                segment
                    .file
                    .id()
                    .context(|| format!("cannot stat {}", segment.path.display()))
            })
            .collect()
    }

    /// True where the host knows of a hole in the blocks: see [`StorageFile::has_hole`].
    pub(super) fn has_hole(&self, span: Span) -> Result<bool> {
        let mut found = false;
        self.split(span.offset(), span.bytes(), |piece| {
            let file = &piece.segment.file;
            let hole = file.has_hole(piece.within, piece.len);
            found |= piece.context("looking for holes in", hole)?;
            Ok(())
        })?;
        Ok(found)
    }

    /// Bytes that the files take on the host.
    pub(super) fn allocated(&self) -> Result<u64> {
        self.segments().try_fold(0, |sum, segment| {
            let bytes = segment
                .file
                .allocated()
                .context(|| format!("cannot stat {}", segment.path.display()))?;
            Ok(sum + bytes)
        })
    }

    /// A hint that the blocks will be read soon.
    pub(super) fn prefetch(&self, span: Span) -> Result<()> {
        self.split(span.offset(), span.bytes(), |piece| {
            piece.segment.file.prefetch(piece.within, piece.len);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vellum_base::storage::{Fault, FaultPlan, FaultStorage, OpKind, SimStorage};

    /// The kernel reports a failed sync once. A second sync, of another thread, must not find
    /// everything clean.
    #[test]
    fn a_sync_after_a_failed_one_fails_too() {
        let storage = FaultStorage::new(Arc::new(SimStorage::new()));
        let dir = Path::new("/");
        DataFiles::create(&storage, dir, 1 << 20).unwrap();
        let header = Header::new(None, 1 << 20).unwrap();
        let data = DataFiles::open(&storage, dir, &header, OpenMode::Write).unwrap();
        data.write(&[1; 4096], Offset::default()).unwrap();
        storage.fail(FaultPlan {
            kinds: vec![OpKind::SyncData],
            nth: 1,
            fault: Fault::LostSync(libc::EIO),
            lasting: false,
        });
        for _ in 0..3 {
            let error = data.sync().unwrap_err();
            assert!(error.to_string().contains("syncing /data"), "{error}");
        }
        // What it did not make durable is still asked for.
        storage.fail(FaultPlan {
            kinds: vec![OpKind::CheckWrittenBack],
            nth: 1,
            fault: Fault::Errno(libc::EIO),
            lasting: false,
        });
        let error = data.check_written_back().unwrap_err();
        assert!(error.to_string().contains("writing /data back"), "{error}");
    }
}
