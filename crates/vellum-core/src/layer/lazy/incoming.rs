//! A lazy layer as the process has it that brings its blocks: format.md, section 8.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::super::data::DataFiles;
use super::super::header::Header;
use super::super::index::Index;
use super::super::map_file::replace_map;
use super::super::recovery::load_map;
use super::super::sealed::{SEAL_FILE, seal_as_expected};
use super::super::table::{DIGEST_LEN, push_extent};
use super::have::{self, HAVE_FILE, HaveHeader, WindowSet};
use super::sums::Sums;
use vellum_base::block::{BlockState, Blocks, Run, Span, WindowPower};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::storage::{OpenMode, Storage, StorageFile};

/// What a lazy layer will hold.
#[derive(Debug, Clone, Copy)]
pub struct LazyContent<'a> {
    /// The size of the windows in which its blocks come.
    pub power: WindowPower,
    /// Its digest: format.md, section 5.
    pub digest: [u8; DIGEST_LEN],
    /// Its blocks that are data or zero, in order.
    pub extents: &'a [Run<BlockState>],
}

/// What came of [`LazyLayer::complete`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// It is a sealed layer like any other now.
    Whole,
    /// What is here has another digest than it should: nothing counts as being here any more.
    Wrong,
    /// The disk lost or changed so many windows, which do not count as being here any more.
    Damaged(usize),
}

/// A lazy layer whose blocks come. One process at a time has it.
#[derive(Debug)]
pub struct LazyLayer {
    dir: PathBuf,
    pub(super) header: Header,
    have: HaveHeader,
    pub(super) data: DataFiles,
    /// None of a layer whose blocks have no checksums until it is whole.
    pub(super) sums: Option<Sums>,
    pub(super) file: Arc<dyn StorageFile>,
    /// The windows that have data blocks.
    pub(super) with_data: WindowSet,
    pub(super) state: Mutex<State>,
    /// Held while what came is made durable.
    pub(super) syncing: Mutex<()>,
    /// It has its seal, or may have: nothing is evicted any more. Held for writing while it gets it, for reading while
    /// windows are evicted.
    pub(super) sealing: RwLock<bool>,
}

#[derive(Debug)]
pub(super) struct State {
    /// All blocks of these are in the data files.
    pub here: WindowSet,
    /// The file says so.
    pub durable: WindowSet,
    /// They came since the last sync.
    pub came: Vec<u32>,
    /// They are not here, but may take their space: they could not be evicted to the end.
    pub left: BTreeSet<u32>,
}

impl LazyLayer {
    /// Makes a lazy layer of a new, empty one, which nobody has open. It is durable then, but for its data files,
    /// which are as they were made.
    ///
    /// # Errors
    /// Where the host refuses: then it is an empty layer, or a lazy one.
    pub fn make(
        storage: &dyn Storage,
        dir: &Path,
        header: &Header,
        content: &LazyContent<'_>,
    ) -> Result<()> {
        let mut extents = Vec::new();
        content
            .extents
            .iter()
            .for_each(|run| push_extent(&mut extents, *run));
        replace_map(storage, dir, header, 0, &extents)?;
        let have = HaveHeader {
            power: content.power,
            digest: content.digest,
            checked: true,
        };
        Sums::make(storage, dir, header, content.power)?;
        let path = dir.join(HAVE_FILE);
        storage
            .write_atomic(&path, &have.encode(header))
            .context(|| format!("cannot write {}", path.display()))?;
        let lazy = Header {
            sealed: true,
            lazy: true,
            ..header.clone()
        };
        lazy.write(storage, dir)
    }

    /// Opens the lazy layer in `dir`; `None` where all of it is here and it has its seal. Where its checksums are lost as a
    /// whole, they are made anew, and nothing of it is here.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`]; the message names the file.
    pub fn open(storage: &dyn Storage, dir: &Path) -> Result<Option<Self>> {
        let header = Header::read(storage, dir)?;
        let sealed = dir.join(SEAL_FILE);
        let sealed = storage
            .exists(&sealed)
            .context(|| sealed.display().to_string())?;
        if !header.lazy || sealed {
            return Ok(None);
        }
        let (have, mut durable) = have::read(storage, dir, &header)?;
        let map = load_map(storage, dir, &header)?;
        let path = dir.join(HAVE_FILE);
        let file = storage
            .open(&path, OpenMode::Write)
            .context(|| format!("cannot open {}", path.display()))?;
        let sums = match have.checked.then(|| open_sums(storage, dir, &header)) {
            Some(Err(error))
                if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) =>
            {
                tracing::warn!("{error}: nothing of the layer counts as being here any more");
                durable = WindowSet::none(header.blocks(), have.power);
                have::write_pages(&*file, &durable).context(|| path.display().to_string())?;
                Sums::make(storage, dir, &header, have.power)?;
                storage
                    .sync_dir(dir)
                    .context(|| format!("cannot sync {}", dir.display()))?;
                Some(open_sums(storage, dir, &header)?)
            }
            other => other.transpose()?,
        };
        Ok(Some(LazyLayer {
            dir: dir.to_owned(),
            data: DataFiles::open(storage, dir, &header, OpenMode::Write)?,
            with_data: WindowSet::with_data(header.blocks(), have.power, map.iter()),
            header,
            have,
            sums,
            file,
            state: Mutex::new(State {
                here: durable.clone(),
                durable,
                came: Vec::new(),
                left: BTreeSet::new(),
            }),
            syncing: Mutex::default(),
            sealing: RwLock::default(),
        }))
    }

    /// The layer's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The digest that it has when it is whole.
    pub fn digest(&self) -> &[u8; 32] {
        &self.have.digest
    }

    /// The size of windows.
    pub fn power(&self) -> WindowPower {
        self.have.power
    }

    /// Whether all blocks of a window are here. Of one without data blocks they are.
    pub fn is_here(&self, window: u32) -> bool {
        !self.with_data.has(window) || self.state.lock().here.has(window)
    }

    /// The windows of which blocks are missing, in order.
    pub fn missing(&self) -> Vec<u32> {
        self.with_data.without(&self.state.lock().here)
    }

    /// How many windows there are with data, and how many of them are here.
    pub fn progress(&self) -> (u64, u64) {
        (self.with_data.len(), self.state.lock().here.len())
    }

    /// Puts the blocks of a window, all that it has, where they are read.
    ///
    /// # Errors
    /// Where the host refuses: the window is not here then.
    pub fn put<'a>(
        &self,
        window: u32,
        blocks: impl Iterator<Item = (Span, &'a [u8])>,
    ) -> Result<()> {
        let whole = self.power().span(window);
        for (span, bytes) in blocks {
            assert!(whole.contains(span), "blocks of another window");
            self.data.write(bytes, span.offset())?;
            if let Some(sums) = &self.sums {
                sums.put(span.start(), bytes)?;
            }
        }
        let mut state = self.state.lock();
        state.here.insert(window);
        state.came.push(window);
        Ok(())
    }

    /// Makes durable what came.
    ///
    /// # Errors
    /// Where the host refuses. What came since the last sync counts as missing again: the host may have lost it.
    pub fn sync(&self) -> Result<()> {
        let _syncing = self.syncing.lock();
        let came = std::mem::take(&mut self.state.lock().came);
        if came.is_empty() {
            return Ok(());
        }
        let sums = self.sums.as_ref();
        let synced = self.data.sync();
        let synced = synced.and_then(|_| sums.map_or(Ok(()), Sums::sync));
        let mut state = self.state.lock();
        if let Err(error) = synced {
            came.iter().for_each(|window| state.here.remove(*window));
            return Err(error);
        }
        came.iter().for_each(|window| state.durable.insert(*window));
        let pages: BTreeSet<u64> = came.iter().copied().map(have::page_of).collect();
        pages
            .into_iter()
            .try_for_each(|page| self.write_page(&state.durable, page))
    }

    pub(super) fn write_page(&self, here: &WindowSet, page: u64) -> Result<()> {
        self.file
            .write_at(&have::encode_page(here, page), have::page_offset(page))
            .context(|| self.what())
    }

    /// What could not be done.
    pub(super) fn what(&self) -> String {
        format!("cannot write {}", self.dir.join(HAVE_FILE).display())
    }

    /// Makes a layer of which nothing is missing a sealed one like any other: reads all of it, and compares its digest.
    /// `progress` is called with the number of blocks just read. Nothing is evicted meanwhile, nor once it has its seal.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where blocks are missing; where the host refuses: then it is lazy as before, or sealed.
    pub fn complete(
        &self,
        storage: &dyn Storage,
        progress: impl FnMut(Blocks),
    ) -> Result<Completion> {
        let mut sealed = self.sealing.write();
        if *sealed {
            // By another, who may have failed behind the seal.
            finish(storage, &self.dir, &self.header)?;
            return Ok(Completion::Whole);
        }
        let completed = self.complete_alone(storage, progress);
        *sealed = match &completed {
            Ok(completion) => *completion == Completion::Whole,
            // Where the host does not say, it may have one.
            Err(_) => storage.exists(&self.dir.join(SEAL_FILE)).unwrap_or(true),
        };
        completed
    }

    /// As [`LazyLayer::complete`], for whoever holds `sealing`.
    fn complete_alone(
        &self,
        storage: &dyn Storage,
        progress: impl FnMut(Blocks),
    ) -> Result<Completion> {
        self.sync()?;
        let missing = self.missing().len();
        if missing > 0 {
            let text = format!("{}: {missing} windows are missing", self.dir.display());
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        let map = load_map(storage, &self.dir, &self.header)?;
        let (header, data) = (&self.header, &self.data);
        let digest = &self.have.digest;
        let sealed = seal_as_expected(storage, &self.dir, header, data, &map, digest, progress);
        match &sealed {
            Ok(true) => {
                finish(storage, &self.dir, header)?;
                return Ok(Completion::Whole);
            }
            Ok(false) => {}
            Err(error) if error.kind() == ErrorKind::Io => {}
            Err(error) => return Err(error.clone()),
        }
        let damaged = self.damaged(&map);
        if !damaged.is_empty() {
            self.forget(&damaged)?;
            return Ok(Completion::Damaged(damaged.len()));
        }
        sealed?;
        let none = WindowSet::none(self.header.blocks(), self.power());
        self.forget(&self.with_data.without(&none))?;
        Ok(Completion::Wrong)
    }

    /// Windows that are not as they came, or cannot be read, where blocks have checksums.
    fn damaged(&self, map: &Index) -> Vec<u32> {
        let mut damaged = BTreeSet::new();
        for run in map.iter().filter(|run| run.value == BlockState::Data) {
            for block in run.span.blocks() {
                let window = self.power().window_of(block);
                if !damaged.contains(&window) && !self.is_sound(Span::of(block)) {
                    damaged.insert(window);
                }
            }
        }
        damaged.into_iter().collect()
    }

    /// Whether the host has these data blocks, of windows that are here, as they came: true of a layer whose blocks have no
    /// checksums, false of blocks that cannot be read.
    pub fn is_sound(&self, span: Span) -> bool {
        let Some(sums) = &self.sums else { return true };
        let mut bytes = vec![0; span.len().buffer_len()];
        let read = self.data.read(&mut bytes, span.offset());
        read.is_ok() && matches!(sums.first_wrong(span, &bytes), Ok(None))
    }

    /// Whether its blocks have checksums, by which damage is found.
    pub fn is_checked(&self) -> bool {
        self.sums.is_some()
    }

    /// Whether a window was put here, and not evicted to the end since: also one that was lost.
    pub fn takes_space(&self, window: u32) -> bool {
        let state = self.state.lock();
        state.here.has(window) || state.durable.has(window) || state.left.contains(&window)
    }

    /// A window is fetched again, because the disk lost or changed blocks of it. It may still be known to be here, also
    /// after a crash: the checksums of its blocks say that they are damaged.
    pub fn lost(&self, window: u32) {
        self.state.lock().here.remove(window);
    }

    /// As [`LazyLayer::sync`], and has the next reads come from the disk: one that does not keep what is written is found
    /// out by [`LazyLayer::is_sound`].
    ///
    /// # Errors
    /// As [`LazyLayer::sync`].
    pub fn sync_to_disk(&self) -> Result<()> {
        self.sync()?;
        self.data.drop_cache()
    }

    /// These windows are not here any more, durably.
    pub(super) fn forget(&self, windows: &[u32]) -> Result<()> {
        let _syncing = self.syncing.lock();
        let gone: BTreeSet<u32> = windows.iter().copied().collect();
        let pages: BTreeSet<u64> = gone.iter().copied().map(have::page_of).collect();
        let durable = {
            let mut state = self.state.lock();
            for window in &gone {
                state.here.remove(*window);
                state.durable.remove(*window);
            }
            state.came.retain(|window| !gone.contains(window));
            state.durable.clone()
        };
        // Only who holds `syncing` changes what is durable.
        for page in pages {
            self.write_page(&durable, page)?;
        }
        self.file.sync_data().context(|| self.what())
    }
}

fn open_sums(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<Sums> {
    Sums::open(storage, dir, header, OpenMode::Write)
}

/// What is left to do for a layer that was lazy and has its seal. Safe to repeat.
///
/// # Errors
/// Where the host refuses.
pub(in crate::layer) fn finish(storage: &dyn Storage, dir: &Path, header: &Header) -> Result<()> {
    let whole = Header {
        lazy: false,
        ..header.clone()
    };
    whole.write(storage, dir)?;
    super::super::sealed::remove_what_a_seal_replaces(storage, dir)
}
