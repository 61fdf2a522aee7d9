//! What a writable layer shares with the thread that frees a journal area: its files, its map, and
//! whether it may still be written.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use super::data::DataFiles;
use super::header::{Header, check_size};
use super::live::{self, Live, LiveChange, Noted, PoisonMark};
use super::map_file::LogPlace;
use super::map_state::MapState;
use super::range_lock::RangeLock;
use super::space::{Claim, Space};
use super::stats::StatsHandle;
use vellum_base::block::{Block, BlockState, Blocks, Offset, Run, Span};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::storage::Storage;

/// The file `map` as the layer was opened.
#[derive(Debug)]
pub(super) struct MapAtOpen {
    pub(super) place: Option<LogPlace>,
    pub(super) extents: u64,
    /// As [`super::LayerOptions::map_log`].
    pub(super) log: u64,
}

/// What a layer shares with the thread that frees a journal area.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) dir: PathBuf,
    /// As it was when the layer was opened: it may have grown since.
    opened: Header,
    /// Virtual size in bytes, never more than the header on disk says.
    size: AtomicU64,
    pub(super) data: Arc<DataFiles>,
    pub(super) space: Space,
    pub(super) map: RwLock<MapState>,
    /// Where the next checkpoint adds to the file `map`; `None`: it replaces the file. Held while
    /// one is written.
    pub(super) map_place: Mutex<Option<LogPlace>>,
    /// Bytes by which the file may always grow.
    pub(super) map_log: u64,
    /// Extents of its table when that was last made, and [`MapState::changed`] as far as that has
    /// it.
    pub(super) map_extents: AtomicU64,
    pub(super) map_changed: AtomicU64,
    pub(super) stats: StatsHandle,
    /// Held by writers of blocks, and by a flush that copies blocks.
    pub(super) locks: RangeLock,
    /// Which sync failed.
    poison: OnceLock<String>,
    /// What a thread of ours left half done.
    fault: OnceLock<&'static str>,
    sealed: AtomicBool,
    /// There is a log of changes.
    has_log: AtomicBool,
    /// Of that log. Apart from the map, which a writer may hold for long while a sync fails.
    poison_mark: Mutex<Option<PoisonMark>>,
    /// The log is filling: a flush makes room.
    pub(super) flush_due: AtomicBool,
}

impl Shared {
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        dir: &Path,
        header: Header,
        (data, space): (DataFiles, Space),
        map: MapState,
        map_file: MapAtOpen,
        stats: StatsHandle,
    ) -> Self {
        Shared {
            dir: dir.to_owned(),
            data: Arc::new(data),
            space,
            has_log: AtomicBool::new(map.log().is_some()),
            flush_due: AtomicBool::new(map.log().is_some_and(Live::is_filling)),
            poison_mark: Mutex::new(map.log().map(Live::poison_mark)),
            map: RwLock::new(map),
            map_place: Mutex::new(map_file.place),
            map_log: map_file.log,
            map_extents: AtomicU64::new(map_file.extents),
            map_changed: AtomicU64::new(0),
            stats,
            locks: RangeLock::default(),
            poison: OnceLock::new(),
            fault: OnceLock::new(),
            sealed: AtomicBool::new(false),
            size: AtomicU64::new(header.virtual_size),
            opened: header,
            storage,
        }
    }

    pub(super) fn uuid(&self) -> Uuid {
        self.opened.uuid
    }

    /// Present size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// What the header on disk says now.
    pub(super) fn header(&self) -> Header {
        Header {
            virtual_size: self.size(),
            ..self.opened.clone()
        }
    }

    /// Makes the layer larger. The header decides: before it is replaced the files are as long as
    /// it will say, durably, and after that the size holds. No flush or seal may run meanwhile.
    pub(super) fn grow(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        let before = self.size();
        if size <= before {
            return Ok(());
        }
        check_size(size)?;
        let (storage, dir) = (&*self.storage, &*self.dir);
        // A file that stayed longer than the header says could not be sealed.
        let take_back = |error: Error| match self.data.cut(before) {
            Ok(()) => error,
            Err(second) => self.poison(&second),
        };
        self.data.grow(storage, dir, size).map_err(take_back)?;
        self.sync_data()?;
        let header = Header {
            virtual_size: size,
            ..self.header()
        };
        self.bind_log(false)?;
        let written =
            header
                .write(storage, dir)
                .map_err(|error| match Header::read(storage, dir) {
                    Ok(found) if found.virtual_size == before => take_back(self.fatal(error)),
                    // A crash may find it larger.
                    _ => self.poison(&error),
                });
        // Where that fails the log goes with any header, as it has since before this one was written.
        if let Err(error) = self.bind_log(true) {
            tracing::warn!(%error, "the log of changes does not name the layer's header");
        }
        written?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Has the log of changes name the layer's files as they are now; see [`Live::bind`].
    fn bind_log(&self, with_header: bool) -> Result<()> {
        match self.map.write().log_mut() {
            Some(log) => log.bind(&*self.storage, &self.dir, &self.data, with_header),
            None => Ok(()),
        }
    }

    /// Why the layer is poisoned, if it is.
    pub(super) fn poisoned(&self) -> Option<&str> {
        let fault = || self.fault.get().copied();
        self.poison.get().map(String::as_str).or_else(fault)
    }

    /// Marks the layer as one whose promises cannot be kept any more.
    pub(super) fn poison(&self, error: &Error) -> Error {
        tracing::error!(layer = %self.dir.display(), %error, "layer poisoned");
        // The first reason stays.
        let why = self.poison.get_or_init(|| error.to_string());
        if let Some(mark) = &*self.poison_mark.lock() {
            mark.set();
        }
        self.sync_failed(why)
    }

    /// Refuses every request from now on, since a thread of ours ended in the middle of its work. As
    /// a killed process does, it leaves a page cache and a log of changes that a successor can trust.
    pub(super) fn stop(&self, fault: &'static str) -> Error {
        tracing::error!(layer = %self.dir.display(), fault, "layer stopped");
        self.stopped(self.fault.get_or_init(|| fault))
    }

    fn sync_failed(&self, why: &str) -> Error {
        Error::new(
            ErrorKind::Poisoned,
            format!(
                "{}: a sync failed ({why}), so writes may be lost and the layer refuses to go on; \
                 check the host's disk, then open the layer again",
                self.dir.display()
            ),
        )
    }

    fn stopped(&self, fault: &str) -> Error {
        Error::new(
            ErrorKind::Poisoned,
            format!(
                "{}: {fault}, which is a fault of Vellum's own, so the layer refuses to go on; open \
                 it again, which loses nothing that was written, and report what the log says",
                self.dir.display()
            ),
        )
    }

    pub(super) fn check_poison(&self) -> Result<()> {
        if let Some(why) = self.poison.get() {
            return Err(self.sync_failed(why));
        }
        match self.fault.get() {
            Some(fault) => Err(self.stopped(fault)),
            None => Ok(()),
        }
    }

    /// Sees to it that there is a log of changes before anything is written: it also tells our
    /// successor that the page cache is to be trusted.
    pub(super) fn ensure_log(&self) -> Result<()> {
        if self.has_log.load(Ordering::Acquire) {
            return Ok(());
        }
        self.begin_log(&mut self.map.write())
    }

    /// As [`Shared::ensure_log`], with the map locked.
    fn begin_log(&self, map: &mut MapState) -> Result<()> {
        if map.log().is_none() {
            // Everything is durable, or there would be a log.
            let log = self.space.within(Claim::Own, 0, || {
                Live::create(&*self.storage, &self.dir, self.uuid(), &self.data, &[])
            })?;
            self.space.top_up();
            let mut mark = self.poison_mark.lock();
            let mark = mark.insert(log.poison_mark());
            if self.poison.get().is_some() {
                // A sync failed just now, and there was no log to note it in.
                mark.set();
            }
            map.set_log(Some(log));
            self.has_log.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Changes the map to the state that `what` gives, and notes it for our successor first.
    /// Returns the number of blocks that changed.
    pub(super) fn change(&self, map: &mut MapState, span: Span, what: Noted) -> Result<Blocks> {
        let there = map.index().first_run(span);
        let new = what.state().unwrap_or(there.value);
        if there == Run::new(span, new) {
            return Ok(Blocks::NONE);
        }
        self.note(map, Run::new(span, what))?;
        Ok(map.change(there, span, new))
    }

    fn note(&self, map: &mut MapState, change: LiveChange) -> Result<()> {
        // A thread that closed the layer since this request began took the log away.
        self.begin_log(map)?;
        let Some(log) = map.log_mut() else {
            return Err(Error::internal(
                "a log of changes that was just made is gone",
            ));
        };
        let noted = log.append(change);
        if log.is_filling() {
            self.flush_due.store(true, Ordering::Relaxed);
        }
        noted
    }

    /// Notes that those blocks of a range that are data are about to be made zeros, before it is done.
    pub(super) fn note_emptied(&self, span: Span) -> Result<()> {
        let map = &mut *self.map.write();
        let is_data = |run: Run<BlockState>| run.value == BlockState::Data;
        if !map.index().runs(span).any(is_data) {
            return Ok(());
        }
        self.note(map, Run::new(span, Noted::Emptied))
    }

    /// Blocks that were written, or reserved, become data. Where that cannot be noted, some may have
    /// been data before and hold the new bytes: the next flush makes them durable.
    pub(super) fn become_data(
        &self,
        map: &mut MapState,
        span: Span,
        what: Noted,
    ) -> Result<Blocks> {
        self.change(map, span, what)
            .inspect_err(|_| map.wrote_something())
    }

    /// Ends the log where everything is durable.
    pub(super) fn end_log(&self) {
        let mut map = self.map.write();
        if map.log().is_none() || !map.is_clean() {
            return;
        }
        match live::remove(&*self.storage, &self.dir) {
            Ok(()) => {
                map.set_log(None);
                *self.poison_mark.lock() = None;
                self.has_log.store(false, Ordering::Release);
            }
            // It says nothing that is not durable, so it does no harm where it stays.
            Err(error) => tracing::warn!(%error, "a log of changes is left"),
        }
    }

    pub(super) fn log_is_filling(&self) -> bool {
        self.map.read().log().is_some_and(Live::is_filling)
    }

    pub(super) fn set_sealed(&self) {
        self.sealed.store(true, Ordering::Release);
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire)
    }

    /// For a request to a layer that may have been sealed since it was opened.
    pub(super) fn check_writable(&self) -> Result<()> {
        self.check_poison()?;
        if self.is_sealed() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{}: the layer was sealed", self.dir.display()),
            ));
        }
        Ok(())
    }

    /// Reads whole blocks for a record, from `first` on. A writer of a block comes before or after,
    /// never in the middle.
    pub(super) fn copy_blocks(&self, first: Block, buf: &mut [u8]) -> Result<()> {
        let _held = self.locks.lock(Span::of_buffer(first, buf));
        self.data.read(buf, first.offset())
    }

    /// Writes a client's bytes; `grows`: they may want space. Where that fails, some of them may be
    /// there: the next flush makes whatever a client reads from then on durable.
    pub(super) fn write_data(&self, buf: &[u8], offset: Offset, grows: bool) -> Result<()> {
        self.ensure_log()?;
        self.space
            .write(offset, buf.len() as u64, grows, || {
                self.data.write(buf, offset)
            })
            .inspect_err(|_| {
                self.map.write().wrote_something();
            })
    }

    /// As [`Shared::write_data`], for a block that is zeroed in part: that gives space back, and must
    /// not fail for want of it.
    pub(super) fn write_zeroed(&self, buf: &[u8], offset: Offset) -> Result<()> {
        self.ensure_log()?;
        let write = || self.data.write(buf, offset);
        self.space
            .within(Claim::Own, buf.len() as u64, write)
            .inspect_err(|_| {
                self.map.write().wrote_something();
            })
    }
}
