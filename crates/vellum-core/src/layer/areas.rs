//! The journal's two areas: where the next record goes, and how an area is made, left and freed.

use std::thread::JoinHandle;

use super::journal::{AlignedBuf, Area};
use super::table::MapExtent;
use super::writable::WritableLayer;
use vellum_base::error::{Error, ErrorKind, Result};

/// How much longer an area is than the one before it, while they fill.
const GROWTH: u64 = 4;

/// More changes than these (2 MiB) are not kept for the next checkpoint, which then replaces the map:
/// 512 MiB were written with them at least.
const MOST_UNSAVED: usize = 128 << 10;
/// So many are made room for at once: doubling would take up to twice what is needed.
const ROOM: usize = 16 << 10;

/// Map changes in records that no checkpoint contains yet, in order.
#[derive(Debug, Default)]
pub(super) struct Unsaved {
    changes: Vec<MapExtent>,
    too_many: bool,
}

impl Unsaved {
    /// A record holds these.
    pub(super) fn add(&mut self, changes: &[MapExtent]) {
        self.too_many |= self.changes.len() + changes.len() > MOST_UNSAVED;
        if self.too_many {
            self.changes = Vec::new();
        } else {
            if self.changes.capacity() - self.changes.len() < changes.len() {
                self.changes.reserve_exact(changes.len().max(ROOM));
            }
            self.changes.extend_from_slice(changes);
        }
    }

    /// Those so far, for a checkpoint; `None` where they were too many to be kept.
    pub(super) fn take(&mut self) -> Option<Vec<MapExtent>> {
        let taken = std::mem::take(self);
        (!taken.too_many).then_some(taken.changes)
    }
}

/// Where the journal stands. Only the flush that leads touches it.
#[derive(Debug)]
pub(super) struct Journal {
    pub(super) areas: [Option<Area>; 2],
    pub(super) current: usize,
    /// The generation being written.
    pub(super) generation: u64,
    pub(super) sequence: u64,
    /// Records of this generation that are durable: fewer than `sequence` where some were written
    /// ahead.
    pub(super) durable: u64,
    pub(super) records_before: u64,
    /// Where the next record goes.
    pub(super) position: u64,
    /// By area: some record there carries blocks that no barrier has retired.
    pub(super) live: [bool; 2],
    /// Bytes of blocks in records that no barrier has retired.
    pub(super) carried: u64,
    /// Something failed half-way, and what the disk holds of it is unknown: a record that may be
    /// there, a checkpoint that may be, an area that was not freed. Nothing may be written to the
    /// journal until a checkpoint contains it all.
    pub(super) must_checkpoint: bool,
    /// Frees the other area, or makes a larger one in its place.
    pub(super) retiring: Option<JoinHandle<Result<Option<Area>>>>,
    /// The generation in which the other area was made ahead, or found to have no space.
    pub(super) prepared: u64,
    pub(super) buf: AlignedBuf,
    pub(super) unsaved: Unsaved,
}

impl Journal {
    /// A journal without areas behind a checkpoint that contains `covered`.
    pub(super) fn new(covered: u64) -> Self {
        Journal {
            areas: [None, None],
            current: 0,
            generation: covered + 1,
            sequence: 0,
            durable: 0,
            records_before: 0,
            position: 0,
            live: [false; 2],
            carried: 0,
            must_checkpoint: false,
            retiring: None,
            prepared: 0,
            buf: AlignedBuf::default(),
            unsaved: Unsaved::default(),
        }
    }

    pub(super) fn has_live_blocks(&self) -> bool {
        self.live != [false; 2]
    }

    pub(super) fn area(&self) -> Option<&Area> {
        self.areas.get(self.current)?.as_ref()
    }

    pub(super) fn set_area(&mut self, which: usize, area: Option<Area>) {
        if let Some(slot) = self.areas.get_mut(which) {
            *slot = area;
        }
    }

    pub(super) fn area_len(&self, which: usize) -> u64 {
        let area = self.areas.get(which).and_then(Option::as_ref);
        area.map_or(0, Area::len)
    }

    pub(super) fn set_live(&mut self, which: usize, live: bool) {
        if let Some(slot) = self.live.get_mut(which) {
            *slot = live;
        }
    }

    /// The next record is the first of a generation that follows one of `records_before` records.
    fn begin_generation(&mut self, records_before: u64) {
        self.generation += 1;
        self.sequence = 0;
        self.durable = 0;
        self.records_before = records_before;
        self.position = 0;
    }

    /// A checkpoint contains everything so far: both areas are free.
    pub(super) fn begin_after_checkpoint(&mut self) {
        self.begin_generation(0);
        self.live = [false; 2];
        self.carried = 0;
        self.must_checkpoint = false;
    }
}

/// Whether a record has a place in the journal.
pub(super) enum Room {
    Fits,
    /// The journal is full or too small: a checkpoint takes the record's place.
    NeedsCheckpoint,
}

impl WritableLayer {
    /// Finds a place for a record of `len` bytes.
    pub(super) fn make_room(&self, journal: &mut Journal, len: u64) -> Result<Room> {
        if len > self.options.journal_max || journal.must_checkpoint {
            return Ok(Room::NeedsCheckpoint);
        }
        let Some(area_len) = journal.area().map(Area::len) else {
            let wanted = self.area_for(len, self.options.journal_start);
            return self.create_area(journal, journal.current, wanted);
        };
        if journal.position + len <= area_len {
            return Ok(Room::Fits);
        }
        if journal.sequence == 0 {
            // A generation without a record must not be left: the next would not follow what the
            // checkpoint contains.
            let wanted = self.area_for(len, self.next_len(area_len));
            return self.create_area(journal, journal.current, wanted);
        }
        if !self.options.background || self.wait_for_retirement(journal).is_err() {
            return Ok(Room::NeedsCheckpoint);
        }
        self.switch_area(journal, area_len, len)
    }

    /// Makes an area. Where there is no space for it there may be for a checkpoint.
    pub(super) fn create_area(
        &self,
        journal: &mut Journal,
        which: usize,
        len: u64,
    ) -> Result<Room> {
        // An older file of the name is cut first, so it is no area any more.
        journal.set_area(which, None);
        let area = self.shared.make_area(which, len)?;
        let room = if area.is_some() {
            Room::Fits
        } else {
            Room::NeedsCheckpoint
        };
        journal.set_area(which, area);
        Ok(room)
    }

    /// The length of the area that follows one of `area_len`: a journal that fills is too small
    /// for its load.
    fn next_len(&self, area_len: u64) -> u64 {
        (area_len * GROWTH).min(self.options.journal_max)
    }

    /// The length of an area of at least `least` bytes that a record of `len` bytes, which is no
    /// longer than an area can be, fits into.
    fn area_for(&self, len: u64, least: u64) -> u64 {
        least
            .max(len.next_power_of_two())
            .min(self.options.journal_max)
    }

    /// Makes the other area, or a larger one in its place, before it is wanted, so that no flush
    /// has to wait for that.
    pub(super) fn prepare_other_area(&self, journal: &mut Journal) {
        let Some(area_len) = journal.area().map(Area::len) else {
            return;
        };
        if !self.options.background || journal.position < area_len / 2 {
            return;
        }
        if let Some(retiring) = &journal.retiring {
            if !retiring.is_finished() {
                return;
            }
            // A failure is noted there, and the next flush deals with it.
            let _ = self.wait_for_retirement(journal);
        }
        let other = 1 - journal.current;
        let wanted = self.next_len(area_len);
        if journal.must_checkpoint
            || journal.area_len(other) >= wanted
            // On a full disk not again for each flush.
            || journal.prepared == journal.generation
        {
            return;
        }
        journal.prepared = journal.generation;
        // Its file is cut first, so it is no area any more.
        journal.set_area(other, None);
        let shared = self.shared.clone();
        journal.retiring = spawn(move || shared.make_area(other, wanted)).ok();
    }

    /// Goes on in the other area, which is free, and has this one freed in the background.
    fn switch_area(&self, journal: &mut Journal, area_len: u64, len: u64) -> Result<Room> {
        let other = 1 - journal.current;
        let wanted = self.area_for(len, self.next_len(area_len));
        if journal.area_len(other) < len
            && let Room::NeedsCheckpoint = self.create_area(journal, other, wanted)?
        {
            return Ok(Room::NeedsCheckpoint);
        }
        // A checkpoint is about to contain them, and the next generation to say how many they are.
        self.sync_journal(journal)?;
        let shared = self.shared.clone();
        let full = journal.generation;
        let changes = journal.unsaved.take();
        let Ok(retiring) = spawn(move || shared.retire(full, changes).map(|()| None)) else {
            // What changed went with the thread.
            self.shared.forget_map_place();
            return Ok(Room::NeedsCheckpoint);
        };
        journal.retiring = Some(retiring);
        journal.current = other;
        journal.begin_generation(journal.sequence);
        Ok(Room::Fits)
    }

    /// Waits until the area that is not written to is free.
    pub(super) fn wait_for_retirement(&self, journal: &mut Journal) -> Result<()> {
        let Some(retiring) = journal.retiring.take() else {
            return Ok(());
        };
        if !retiring.is_finished() {
            self.shared.stats.journal_waits.add(1);
        }
        let outcome = retiring.join().unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Io,
                "the checkpoint thread ended unexpectedly",
            ))
        });
        match outcome {
            Ok(made) => {
                let other = 1 - journal.current;
                journal.set_live(other, false);
                if !journal.has_live_blocks() {
                    journal.carried = 0;
                }
                if made.is_some() {
                    journal.set_area(other, made);
                }
                Ok(())
            }
            Err(error) => {
                journal.must_checkpoint = true;
                self.shared.forget_map_place();
                Err(error)
            }
        }
    }
}

/// Starts a thread that works for the journal.
fn spawn(
    work: impl FnOnce() -> Result<Option<Area>> + Send + 'static,
) -> std::io::Result<JoinHandle<Result<Option<Area>>>> {
    std::thread::Builder::new()
        .name("vellum-journal".into())
        .spawn(work)
}
