//! The journal of an open layer: its two areas, where the next record goes, how much of what was
//! written is durable, and the checkpoint that takes the place of it all. The flush that leads has it
//! alone. [`record`] has the bytes (format.md, section 3.2); docs/durability.md argues the order of
//! the steps.

mod area;
mod record;
mod unsaved;

use std::sync::Arc;
use std::thread::JoinHandle;

use self::area::Area;
pub(super) use self::area::{AREA_FILES, has_journal, load_area, remove_journal};
use self::record::{ALIGN, AlignedBuf, RecordPlace, encode_record};
pub(super) use self::record::{
    AreaRecords, Record, RecordBody, check_record, payload_to_replay, read_area,
};
use self::unsaved::Unsaved;
use super::options::LayerOptions;
use super::shared::Shared;
use super::space::Claim;
use super::table::MapExtent;
use vellum_base::error::{Error, ErrorKind, Result};

/// How much longer an area is than the one before it, while they fill.
const GROWTH: u64 = 4;

/// Whether the disk is known to hold what the journal says it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is.
    Sound,
    /// Something failed half-way, and what the disk holds of it is not known: a record, a checkpoint
    /// or an area that was not freed. No record may be written until a checkpoint contains it all.
    Unknown,
}

/// When a record becomes durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// As it is written. Only where all records before it are durable: its write says nothing of
    /// theirs.
    Durable,
    /// With the next sync of the journal.
    Ahead,
}

/// Whether a record has a place.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// It has.
    Found,
    /// The host or the journal has none: a checkpoint takes the record's place.
    NeedsCheckpoint,
}

/// What the plan of a flush is made from: where a journal stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JournalStatus {
    pub(super) standing: Standing,
    /// Bytes of the area that is written to, if there is one.
    pub(super) area: Option<u64>,
    /// Where in it the next record goes.
    pub(super) position: u64,
    /// The generation has a record.
    pub(super) has_records: bool,
    /// Some records are not durable yet.
    pub(super) has_unsynced: bool,
    /// Some blocks are durable in the journal alone.
    pub(super) carries: bool,
    /// Bytes of the longest area that is made.
    pub(super) longest: u64,
    /// Full areas are freed in a thread of its own.
    pub(super) background: bool,
}

/// One of the two areas.
#[derive(Debug)]
struct Half {
    name: &'static str,
    /// `None`: there is no file, or what there is is no area.
    area: Option<Area>,
    /// Some record in it carries blocks that no barrier has retired.
    carries: bool,
}

impl Half {
    fn new(name: &'static str) -> Self {
        Half {
            name,
            area: None,
            carries: false,
        }
    }

    fn len(&self) -> u64 {
        self.area.as_ref().map_or(0, Area::len)
    }
}

/// The journal of a layer that is open.
#[derive(Debug)]
pub(super) struct Journal {
    shared: Arc<Shared>,
    options: LayerOptions,
    /// The area that is written to.
    current: Half,
    /// Free, or about to be.
    other: Half,
    /// The generation being written.
    generation: u64,
    /// Records of it.
    sequence: u64,
    /// So many of them are durable: fewer than `sequence` where some were written ahead.
    durable: u64,
    /// Records of the generation before.
    records_before: u64,
    /// Where in the current area the next record goes.
    position: u64,
    /// Bytes of blocks in records that no barrier has retired.
    carried: u64,
    standing: Standing,
    /// Frees the other area, or makes a larger one in its place.
    retiring: Option<JoinHandle<Result<Option<Area>>>>,
    /// The generation in which the other area was made ahead, or found to have no space.
    prepared: u64,
    buf: AlignedBuf,
    unsaved: Unsaved,
}

impl Drop for Journal {
    /// The next process to open the layer must not meet a thread that still writes to it.
    fn drop(&mut self) {
        // Its outcome does not matter any more: what it would have freed is still in the journal.
        let _ = self.finish_retiring();
    }
}

impl Journal {
    /// A journal without areas behind a checkpoint that contains generation `covered`.
    pub(super) fn new(shared: Arc<Shared>, options: LayerOptions, covered: u64) -> Self {
        let [first, second] = AREA_FILES;
        Journal {
            shared,
            options,
            current: Half::new(first),
            other: Half::new(second),
            generation: covered + 1,
            sequence: 0,
            durable: 0,
            records_before: 0,
            position: 0,
            carried: 0,
            standing: Standing::Sound,
            retiring: None,
            prepared: 0,
            buf: AlignedBuf::default(),
            unsaved: Unsaved::default(),
        }
    }

    /// Where the journal stands.
    pub(super) fn status(&self) -> JournalStatus {
        JournalStatus {
            standing: self.standing,
            area: self.current.area.as_ref().map(Area::len),
            position: self.position,
            has_records: self.sequence > 0,
            has_unsynced: self.has_unsynced(),
            carries: self.carries(),
            longest: self.options.journal_max,
            background: self.options.background,
        }
    }

    /// Bytes of blocks that are durable in the journal alone.
    pub(super) fn carried(&self) -> u64 {
        self.carried
    }

    /// Some records were written ahead, and no sync has made them durable.
    fn has_unsynced(&self) -> bool {
        self.durable < self.sequence
    }

    fn carries(&self) -> bool {
        self.current.carries || self.other.carries
    }

    /// Whether the disk may hold an area.
    pub(super) fn has_areas(&self) -> bool {
        self.current.area.is_some() || self.other.area.is_some()
    }

    /// Whether the last checkpoint contains everything, so that the areas may go.
    pub(super) fn is_contained(&self) -> bool {
        self.standing == Standing::Sound && self.sequence == 0
    }

    /// Checks what holds between any two operations.
    ///
    /// # Panics
    /// Where it does not: a fault of ours.
    pub(super) fn assert_sound(&self) {
        assert!(self.durable <= self.sequence, "durable before it is there");
        assert_eq!(self.sequence == 0, self.position == 0, "records elsewhere");
        assert!(
            self.position <= self.current.len(),
            "records past their area's end"
        );
        assert!(self.position.is_multiple_of(ALIGN as u64));
        assert_eq!(self.carried > 0, self.carries(), "carried, and in no area");
        assert!(
            !self.current.carries || self.sequence > 0,
            "blocks without a record"
        );
        assert!(
            !self.other.carries || self.retiring.is_some() || self.standing == Standing::Unknown,
            "an area that holds blocks, and is not about to be freed"
        );
        assert!(self.prepared <= self.generation);
        assert_ne!(self.current.name, self.other.name);
    }

    /// At the end of each operation that changes something.
    fn debug_assert_sound(&self) {
        if cfg!(debug_assertions) {
            self.assert_sound();
        }
    }

    /// Writes a record behind the others, where there is room for it. Blocks are read from the data
    /// files, each as it is between two of its writers.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`]: the record may be there all the same, whole or torn, so the standing is
    /// unknown. Any other failure to write poisons.
    pub(super) fn append(&mut self, body: &RecordBody, when: When) -> Result<()> {
        assert_eq!(self.standing, Standing::Sound, "a record behind a failure");
        assert!(
            when == When::Ahead || !self.has_unsynced(),
            "a durable record behind one that is not"
        );
        let place = RecordPlace {
            generation: self.generation,
            sequence: self.sequence,
            records_before: self.records_before,
            durable: self.durable,
        };
        let shared = self.shared.clone();
        let mut buf = std::mem::take(&mut self.buf);
        let encoded = encode_record(&mut buf, shared.uuid(), place, body, |first, bytes| {
            shared.copy_blocks(first, bytes)
        });
        let read_back = encoded.and_then(|()| match body.blocks.is_empty() {
            true => Ok(()),
            false => shared.check_read_back(),
        });
        let written = read_back.and_then(|()| self.write(&buf, when));
        shared.stats.journal_writes.add(1);
        shared.stats.journal_bytes.add(buf.as_slice().len() as u64);
        self.buf = buf;
        written?;
        // The blocks were read from a file whose sync may have failed meanwhile.
        shared.check_poison()?;
        self.position += body.encoded_len() as u64;
        self.sequence += 1;
        self.unsaved.add(&body.changes);
        if when == When::Durable {
            self.durable = self.sequence;
        }
        if body.barrier {
            self.retire_blocks();
        }
        self.carried += body.carried().bytes();
        self.current.carries |= !body.blocks.is_empty();
        self.debug_assert_sound();
        Ok(())
    }

    fn write(&mut self, record: &AlignedBuf, when: When) -> Result<()> {
        let written = match (&self.current.area, when) {
            (Some(area), When::Durable) => area.write(record, self.position),
            (Some(area), When::Ahead) => area.write_unsynced(record, self.position),
            (None, _) => Err(Error::internal("a record was written before its area")),
        };
        written.map_err(|error| {
            // It may be there all the same, whole or torn.
            self.standing = Standing::Unknown;
            self.shared.fatal(error)
        })
    }

    /// No block is in the journal alone any more: a sync of the data files has them all, and a record
    /// or a checkpoint says so.
    fn retire_blocks(&mut self) {
        self.current.carries = false;
        self.other.carries = false;
        self.carried = 0;
    }

    /// Makes the records durable that were written ahead.
    ///
    /// # Errors
    /// Any failure poisons, as that of every sync.
    pub(super) fn sync(&mut self) -> Result<()> {
        if !self.has_unsynced() {
            return Ok(());
        }
        if let Some(area) = &self.current.area {
            area.sync().map_err(|error| self.shared.poison(&error))?;
        } else {
            assert_eq!(self.sequence, 0, "records without an area");
        }
        self.shared.stats.journal_syncs.add(1);
        self.durable = self.sequence;
        // From now on a checkpoint may, and one of this generation must, contain their changes.
        self.shared.map.write().ahead_is_durable();
        self.debug_assert_sound();
        Ok(())
    }

    /// Makes the first area before a flush wants it. Where there is no space it is left to that flush.
    ///
    /// # Errors
    /// Any failure but want of space poisons.
    pub(super) fn prepare(&mut self) -> Result<()> {
        if self.current.area.is_some() || self.standing == Standing::Unknown {
            return Ok(());
        }
        self.make_area(0).map(drop)
    }

    /// Makes the area that the generation's first record of `len` bytes goes to, or a longer one in
    /// its place.
    ///
    /// # Errors
    /// As [`Journal::prepare`].
    pub(super) fn make_area(&mut self, len: u64) -> Result<Room> {
        // One with a record must not be left by the way: the next would not follow what the
        // checkpoint contains.
        assert_eq!(self.sequence, 0, "records in an area that is to be made");
        let least = match &self.current.area {
            None => self.options.journal_start,
            Some(area) => self.next_len(area.len()),
        };
        let wanted = self.area_for(len, least);
        let room = create_area(&self.shared, &mut self.current, wanted);
        self.debug_assert_sound();
        room
    }

    /// Goes on in the other area, once that is free, and has this one freed in the background. Makes
    /// all records durable first.
    ///
    /// # Errors
    /// Any failure but want of space poisons.
    pub(super) fn switch(&mut self, len: u64) -> Result<Room> {
        assert!(self.sequence > 0, "a generation without a record is left");
        if self.finish_retiring().is_err() {
            return Ok(Room::NeedsCheckpoint);
        }
        let wanted = self.area_for(len, self.next_len(self.current.len()));
        if self.other.len() < len
            && create_area(&self.shared, &mut self.other, wanted)? == Room::NeedsCheckpoint
        {
            return Ok(Room::NeedsCheckpoint);
        }
        // A checkpoint is about to contain them, and the next generation to say how many they are.
        self.sync()?;
        let shared = self.shared.clone();
        let full = self.generation;
        let changes = self.unsaved.take();
        let Ok(retiring) = spawn(move || shared.retire(full, changes).map(|()| None)) else {
            // What changed went with the thread.
            self.shared.forget_map_place();
            return Ok(Room::NeedsCheckpoint);
        };
        self.retiring = Some(retiring);
        std::mem::swap(&mut self.current, &mut self.other);
        self.begin_generation(self.sequence);
        self.debug_assert_sound();
        Ok(Room::Found)
    }

    /// The length of the area that follows one of `area_len`: a journal that fills is too small
    /// for its load.
    fn next_len(&self, area_len: u64) -> u64 {
        (area_len * GROWTH).min(self.options.journal_max)
    }

    /// The length of an area of at least `least` bytes that a record of `len` bytes, which is no
    /// longer than an area can be, fits into.
    fn area_for(&self, len: u64, least: u64) -> u64 {
        assert!(len <= self.options.journal_max, "a record without an area");
        least
            .max(len.next_power_of_two())
            .min(self.options.journal_max)
    }

    /// Makes the other area, or a larger one in its place, before it is wanted, so that no flush
    /// has to wait for that.
    pub(super) fn prepare_other_area(&mut self) {
        let area_len = self.current.len();
        if !self.options.background || self.position < area_len / 2 {
            return;
        }
        if let Some(retiring) = &self.retiring {
            if !retiring.is_finished() {
                return;
            }
            // A failure makes the standing unknown, and the next flush deals with it.
            let _ = self.finish_retiring();
        }
        let wanted = self.next_len(area_len);
        if self.standing == Standing::Unknown
            || self.other.len() >= wanted
            // On a full disk not again for each flush.
            || self.prepared == self.generation
        {
            return;
        }
        self.prepared = self.generation;
        // Its file is cut first, so it is no area any more.
        self.other.area = None;
        let (shared, name) = (self.shared.clone(), self.other.name);
        self.retiring = spawn(move || new_area(&shared, name, wanted)).ok();
        self.debug_assert_sound();
    }

    /// Waits until the area that is not written to is free.
    ///
    /// # Errors
    /// Where it is not: the standing is unknown then.
    pub(super) fn finish_retiring(&mut self) -> Result<()> {
        let Some(retiring) = self.retiring.take() else {
            return Ok(());
        };
        if !retiring.is_finished() {
            self.shared.stats.journal_waits.add(1);
        }
        let panicked = |_| Err(Error::internal("the thread that frees areas panicked"));
        let outcome = retiring.join().unwrap_or_else(panicked);
        match outcome {
            Ok(made) => {
                self.other.carries = false;
                if !self.carries() {
                    self.carried = 0;
                }
                if made.is_some() {
                    self.other.area = made;
                }
                self.debug_assert_sound();
                Ok(())
            }
            Err(error) => {
                self.standing = Standing::Unknown;
                self.shared.forget_map_place();
                Err(error)
            }
        }
    }

    /// Syncs everything and writes a checkpoint that contains it, the changes that a flush has frozen
    /// included: these are `newest`. Takes the place of a record, and mends an unknown standing.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`]: the standing is unknown, and the checkpoint may be tried again. Any
    /// other failure poisons.
    pub(super) fn checkpoint(&mut self, newest: &[MapExtent]) -> Result<()> {
        // Two must not write the map at once, and an older one not come last. Where it failed this
        // one does its work too.
        let _ = self.finish_retiring();
        // Should it fail, its name may be durable all the same, and then everything of this
        // generation counts as contained in it: nothing may be added.
        self.standing = Standing::Unknown;
        self.shared.sync_data()?;
        let mut changes = self.unsaved.take();
        if self.durable == 0 {
            // Should what is added to the map be torn, the journal could not tell.
            changes = None;
        }
        if let Some(changes) = &mut changes {
            changes.extend_from_slice(newest);
        }
        self.shared.checkpoint(self.generation, true, changes)?;
        self.shared.map.write().ahead_is_durable();
        self.restart_after_checkpoint();
        self.debug_assert_sound();
        Ok(())
    }

    /// A checkpoint contains everything so far: both areas are free.
    fn restart_after_checkpoint(&mut self) {
        self.begin_generation(0);
        self.retire_blocks();
        self.standing = Standing::Sound;
    }

    /// The next record is the first of a generation that follows one of `records_before` records.
    fn begin_generation(&mut self, records_before: u64) {
        self.generation += 1;
        self.sequence = 0;
        self.durable = 0;
        self.records_before = records_before;
        self.position = 0;
    }

    /// Removes the areas, where a checkpoint contains what is in them.
    ///
    /// # Errors
    /// Where the host refuses.
    pub(super) fn remove(&mut self) -> Result<()> {
        assert!(self.is_contained(), "records that no checkpoint contains");
        self.current.area = None;
        self.other.area = None;
        self.debug_assert_sound();
        let shared = &self.shared;
        let remove = || remove_journal(&*shared.storage, &shared.dir);
        shared.space.within(Claim::Own, 0, remove)
    }
}

/// Makes an area in the place of `half`'s.
fn create_area(shared: &Shared, half: &mut Half, len: u64) -> Result<Room> {
    // An older file of the name is cut first, so it is no area any more.
    half.area = None;
    half.area = new_area(shared, half.name, len)?;
    Ok(match half.area {
        Some(_) => Room::Found,
        None => Room::NeedsCheckpoint,
    })
}

/// Makes an area; `None` where there is no space for it. There may be for a checkpoint.
fn new_area(shared: &Shared, name: &'static str, len: u64) -> Result<Option<Area>> {
    match Area::create(&*shared.storage, &shared.dir, name, len) {
        Ok(area) => Ok(Some(area)),
        Err(error) if error.kind() == ErrorKind::NoSpace => Ok(None),
        Err(error) => Err(shared.poison(&error)),
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
