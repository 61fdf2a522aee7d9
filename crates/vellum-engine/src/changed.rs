//! The blocks in which a state may differ from an older one, by where both have them from: for comparisons,
//! backups, and whoever else copies only what changed. docs/backup.md, "Changed blocks".

use std::ops::Range;

use serde::Serialize;
use uuid::Uuid;

use super::device::{HOLE, OpenChain, Target, ZERO};
use super::diff::top_of;
use super::lock_container;
use super::map::served_runs;
use super::mount_point::mounted;
use super::seal::sync_file_system;
use super::sockets::Sockets;
use super::teardown::take_over;
use vellum_base::block::{BLOCK_SIZE, Block, BlockState, Blocks, Run, Span, push_run};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::chain::{Chain, Source};
use vellum_store::{ContainerRecord, Store};

/// Version of [`Changed`] as JSON: fields may be added, others only change with this number.
pub const CHANGED_SCHEMA: u32 = 1;
/// Runs of blocks that are asked for at a time.
const RUNS: usize = 1 << 16;

/// What changed in a container since one of its snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// [`CHANGED_SCHEMA`].
    pub schema: u32,
    /// The container, or a snapshot (C@NAME).
    pub name: String,
    /// The snapshot since which.
    pub since: String,
    /// Its id.
    pub since_id: Uuid,
    /// Bytes of the layers.
    pub virtual_size: u64,
    /// Bytes in a block.
    pub block_size: u64,
    /// Bytes in all ranges.
    pub changed_bytes: u64,
    /// In order.
    pub ranges: Vec<ChangedRange>,
}

/// Bytes that may be others than before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ChangedRange {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// What is there now.
    pub kind: ChangedKind,
}

/// What is there now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangedKind {
    /// What some layer holds.
    Data,
    /// Zeros.
    Zero,
}

/// An older state, with which chains are compared that have layers in common with it.
#[derive(Debug, Clone, Default)]
pub struct Older {
    /// Those of the chain that was opened, which the sources are numbered by: a record may name others by
    /// now, into which they were joined.
    layers: Vec<Uuid>,
    runs: Vec<Run<Source>>,
}

impl Older {
    /// A sealed state. The [default](Older::default) is the state in which everything is zero.
    pub fn of(chain: &Chain) -> Self {
        Older {
            layers: chain.base().uuids(),
            runs: runs_of(chain),
        }
    }

    /// How many of these layers, from the bottom up, it has too.
    pub(super) fn shared(&self, layers: &[Uuid]) -> usize {
        let both = self.layers.iter().zip(layers);
        both.take_while(|(old, new)| old == new).count()
    }

    /// The blocks of a chain that may be others than in this state:
    /// [`BlockState::Data`], or [`BlockState::Zero`] where they are zero now. In order; what is left out is the
    /// same in both. The chain may be written meanwhile: what is written before the call is in the list.
    pub fn changed_in(&self, chain: &Chain) -> Vec<Run<BlockState>> {
        self.changed_at(&runs_of(chain), &chain.base().uuids())
    }

    /// As [`Older::changed_in`], of a part of the runs of a chain that has these layers open.
    pub(super) fn changed_at(
        &self,
        newer: &[Run<Source>],
        layers: &[Uuid],
    ) -> Vec<Run<BlockState>> {
        let Some(first) = newer.first() else {
            return Vec::new();
        };
        let before = self.runs.partition_point(|run| run.end() <= first.start());
        let (_, older) = self.runs.split_at(before);
        differing(older, newer, self.shared(layers))
    }
}

/// The ranges of bytes in which a container, as its server has it now or as it lies on disk, or a snapshot
/// (`C@NAME`) may differ from the container's snapshot `since`.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a name; [`ErrorKind::InUse`] while somebody else has the container;
/// [`ErrorKind::Unsupported`] where its server has other layers open than the store knows.
pub fn changed(store: &Store, name: &str, since: &str) -> Result<Changed> {
    let (owner, later) = match name.split_once('@') {
        Some((owner, later)) => (owner, Some(later)),
        None => (name, None),
    };
    let _busy = match later {
        Some(_) => None,
        None => Some(lock_container(store, &store.container(owner)?)?),
    };
    // Before the record is read, so that the layers which it names stay.
    let _pin = store.pin_layers()?;
    let container = store.as_settled(store.container(owner)?)?;
    let base = container.snapshot(since)?;
    let open = open_snapshot(store, &container, base.id)?;
    let older = Older::of(open.chain());
    let (disk, (runs, whole)) = match later {
        Some(later) => {
            let later = container.snapshot(later)?;
            let newer = open_snapshot(store, &container, later.id)?;
            let newer = newer.chain();
            (&later.disk, (older.changed_in(newer), newer.whole_size()))
        }
        None => (&container.disk, changed_now(store, &container, &older)?),
    };
    let shown = disk.shown_of(whole);
    let ranges: Vec<ChangedRange> = runs.iter().map(|run| range(run, shown)).collect();
    Ok(Changed {
        schema: CHANGED_SCHEMA,
        name: name.to_owned(),
        since: since.to_owned(),
        since_id: base.id,
        virtual_size: whole,
        block_size: BLOCK_SIZE,
        changed_bytes: ranges.iter().map(|range| range.length).sum(),
        ranges,
    })
}

/// Opens a snapshot of a container. The caller holds the pin.
///
/// # Errors
/// Where it is not there, or a layer of it cannot be opened.
pub(super) fn open_snapshot(
    store: &Store,
    container: &ContainerRecord,
    id: Uuid,
) -> Result<OpenChain> {
    let layers = container.snapshot_layers(id)?;
    Target::Sealed(top_of(&layers)?).open(store)
}

/// What changed in a container until now, of which the caller has the lock, and the bytes that its layers
/// have.
fn changed_now(
    store: &Store,
    container: &ContainerRecord,
    older: &Older,
) -> Result<(Vec<Run<BlockState>>, u64)> {
    take_over(store, container)?;
    // What was written before the question is in the answer.
    if let Some(mount) = mounted(store, container)?
        && !mount.given_up
    {
        sync_file_system(&mount.dir)?;
    }
    let asked = served_sources(&Sockets::new(store, container.id), container.layers.len());
    match asked {
        Ok((whole, runs)) => Ok((older.changed_at(&runs, &container.layers), whole)),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let open = Target::look_at(container).open(store)?;
            let chain = open.chain();
            Ok((older.changed_in(chain), chain.whole_size()))
        }
        Err(error) => Err(error.context(format!("the container {}", container.name))),
    }
}

/// A run as bytes of a device that shows so many. The last block may be shown in part.
fn range(run: &Run<BlockState>, shown: u64) -> ChangedRange {
    let offset = run.start().offset().get();
    ChangedRange {
        offset,
        length: run.end().offset().get().min(shown) - offset,
        kind: match run.value {
            BlockState::Data => ChangedKind::Data,
            _ => ChangedKind::Zero,
        },
    }
}

/// Where all blocks of a chain come from.
fn runs_of(chain: &Chain) -> Vec<Run<Source>> {
    let mut runs: Vec<Run<Source>> = Vec::new();
    loop {
        let start = runs.last().map_or(Block::FIRST, Run::end);
        let more = chain.sources(start, RUNS);
        if more.is_empty() {
            return runs;
        }
        runs.extend(more);
    }
}

/// What a server has open: the size, and where all blocks come from.
///
/// # Errors
/// [`ErrorKind::NotFound`] where nobody serves; [`ErrorKind::Unsupported`] where it has another number of
/// layers open than `layers`, by which those of its map are known; [`ErrorKind::Protocol`] for a map that makes
/// no sense.
pub(super) fn served_sources(sockets: &Sockets, layers: usize) -> Result<(u64, Vec<Run<Source>>)> {
    let (map, runs) = served_runs(sockets)?;
    if usize::try_from(map.depth) != Ok(layers) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "its server has other layers open than the store says, until it is started anew",
        ));
    }
    Ok((map.virtual_size, sources(runs, map.depth)?))
}

/// The bytes of such runs, without what they hold.
pub(super) fn bytes_of(runs: &[Run<BlockState>]) -> Vec<Range<u64>> {
    let mut bytes: Vec<Range<u64>> = Vec::new();
    for run in runs {
        let range = run.start().offset().get()..run.end().offset().get();
        match bytes.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => bytes.push(range),
        }
    }
    bytes
}

/// The blocks in which a newer state may differ from an older one, in order, by where both have them from, and
/// whether they are zero in the newer. The first `shared` layers of both are the same.
fn differing(older: &[Run<Source>], newer: &[Run<Source>], shared: usize) -> Vec<Run<BlockState>> {
    let is_zero = |source: Source| matches!(source, Source::Hole | Source::Zero);
    let same = |old, new| match (old, new) {
        (Source::Sealed(old), Source::Sealed(new)) => old == new && (new as usize) < shared,
        (old, new) => is_zero(old) && is_zero(new),
    };
    let mut differing = Vec::new();
    let mut olds = older.iter().peekable();
    for new in newer {
        let mut at = new.start();
        while at < new.end() {
            while olds.next_if(|old| old.end() <= at).is_some() {}
            // Behind the end of the older state there were zeros.
            let (old, end) = match olds.peek() {
                Some(old) => (old.value, old.end().min(new.end())),
                None => (Source::Hole, new.end()),
            };
            if !same(old, new.value) {
                let state = match is_zero(new.value) {
                    true => BlockState::Zero,
                    false => BlockState::Data,
                };
                push_run(&mut differing, Run::new(Span::between(at, end), state));
            }
            at = end;
        }
    }
    differing
}

/// The runs of a map as what they stand for. The number of layers below the top stands for the top.
fn sources(runs: Vec<(u64, i64)>, layers: u64) -> Result<Vec<Run<Source>>> {
    let strange = || {
        Error::new(
            ErrorKind::Protocol,
            "a server's map of its blocks makes no sense",
        )
    };
    let mut at = Block::FIRST;
    let mut sources = Vec::with_capacity(runs.len());
    for (len, number) in runs {
        let source = match number {
            HOLE => Source::Hole,
            ZERO => Source::Zero,
            number if u64::try_from(number) == Ok(layers) => Source::Top,
            number => Source::Sealed(u32::try_from(number).map_err(|_| strange())?),
        };
        let span = Span::checked(at, Blocks::new(len)).ok_or_else(strange)?;
        at = span.end();
        sources.push(Run::new(span, source));
    }
    // Their bytes have numbers, too.
    if at.get() > u64::MAX / BLOCK_SIZE {
        return Err(strange());
    }
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(list: &[(u64, Source)]) -> Vec<Run<Source>> {
        let mut at = Block::FIRST;
        let run = |&(len, source)| {
            let span = Span::new(at, Blocks::new(len));
            at = span.end();
            Run::new(span, source)
        };
        list.iter().map(run).collect()
    }

    #[test]
    fn states_differ_in_the_blocks_of_layers_that_they_do_not_share_and_where_data_became_zeros() {
        use Source::{Hole, Sealed, Top, Zero};
        let older = runs(&[(4, Sealed(0)), (4, Sealed(1)), (2, Hole), (2, Zero)]);
        let newer = runs(&[
            (2, Sealed(0)),
            (3, Top),
            (1, Zero),
            (2, Sealed(1)),
            (3, Zero),
            (1, Sealed(2)),
            (2, Hole),
            (1, Top),
        ]);
        use BlockState::{Data, Zero as Zeros};
        let run = |blocks: Range<u64>, state| {
            let span = Span::between(Block::new(blocks.start), Block::new(blocks.end));
            Run::new(span, state)
        };
        let found = differing(&older, &newer, 2);
        let expected = [
            run(2..5, Data),
            run(5..6, Zeros),
            run(11..12, Data),
            run(14..15, Data),
        ];
        assert_eq!(found, expected);
        let blocks = |range: Range<u64>| range.start * 4096..range.end * 4096;
        assert_eq!(bytes_of(&found), [2..6, 11..12, 14..15].map(blocks));
        assert_eq!(differing(&older, &older, 2), []);
        // The second layer is another: the older state went on from the same first one.
        assert_eq!(differing(&older, &older, 1), [run(4..8, Data)]);
        // Without an older state all that is not zero differs.
        let all = Older::default().changed_at(&newer, &[]);
        assert_eq!(bytes_of(&all), [0..5, 6..8, 11..12, 14..15].map(blocks));
    }
}
