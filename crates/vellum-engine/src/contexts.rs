//! What NBD clients may ask of an export's blocks beside where there is data: by names of QEMU's, which
//! backup programs know. docs/operations.md, "What changed, over NBD".

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::changed::{Older, open_snapshot};
use super::device::OpenChain;
use vellum_base::block::{Offset, Run};
use vellum_base::error::Result;
use vellum_core::chain::{Chain, Source};
use vellum_export::nbd::MetaContext;
use vellum_store::{ContainerRecord, Store};

/// In which layer a block is found: 0 in none, 1 in the uppermost, and so on downwards.
const DEPTH: &str = "qemu:allocation-depth";
/// Whether a block may differ from what it was at the snapshot of that name: bit 0.
const DIRTY: &str = "qemu:dirty-bitmap:";
const IS_DIRTY: u32 = 1;

/// So many snapshots' states are kept in memory for the next question; those asked for last.
const KEPT: usize = 16;

/// The contexts of a chain: its depth, and what changed since each snapshot of the container that it is of.
pub(super) fn contexts(
    store: &Store,
    chain: &Arc<OpenChain>,
    of: Option<&ContainerRecord>,
) -> Vec<Arc<dyn MetaContext>> {
    let mut contexts: Vec<Arc<dyn MetaContext>> = vec![Arc::new(Depth(chain.clone()))];
    let Some(container) = of else {
        return contexts;
    };
    let states = Arc::new(States {
        store: store.clone(),
        container: container.clone(),
        layers: chain.chain().base().uuids(),
        kept: Mutex::default(),
    });
    for snapshot in &container.snapshots {
        contexts.push(Arc::new(Dirty {
            name: format!("{DIRTY}{}", snapshot.name),
            snapshot: snapshot.id,
            states: states.clone(),
            chain: chain.clone(),
        }));
    }
    contexts
}

/// The sources of the blocks of a range, in at most `max` runs.
fn sources(chain: &Chain, offset: u64, len: u64, max: usize) -> Vec<Run<Source>> {
    let end = Offset::new(offset + len).block_from();
    chain.sources_of(Offset::new(offset).block(), end, max)
}

/// Runs of whole blocks as bytes from `offset`, which lies in the first of them.
fn from_offset<T>(offset: u64, runs: &[Run<T>], status: impl Fn(&T) -> u32) -> Vec<(u64, u32)> {
    let mut at = offset;
    let mut statuses = Vec::with_capacity(runs.len());
    for run in runs {
        let end = run.end().offset().get();
        statuses.push((end - at, status(&run.value)));
        at = end;
    }
    statuses
}

struct Depth(Arc<OpenChain>);

impl MetaContext for Depth {
    fn name(&self) -> &str {
        DEPTH
    }

    fn statuses(&self, offset: u64, len: u64, max: usize) -> Result<Vec<(u64, u32)>> {
        let chain = self.0.chain();
        let sealed = chain.base().depth() as u32;
        let top = u32::from(chain.top().is_some());
        let depth = |source: &Source| match *source {
            Source::Hole => 0,
            // Whose zeros they are the chain does not keep: none has to be looked for below.
            Source::Top | Source::Zero => 1,
            Source::Sealed(number) => top + sealed - number,
        };
        Ok(from_offset(
            offset,
            &sources(chain, offset, len, max),
            depth,
        ))
    }
}

/// The states of a container's snapshots, as far as somebody asked for them: what they have their blocks from,
/// without their files.
struct States {
    store: Store,
    container: ContainerRecord,
    /// Those of the chain that is compared with them: a server of clients is told of no others.
    layers: Vec<Uuid>,
    kept: Mutex<VecDeque<(Uuid, Arc<Older>)>>,
}

impl States {
    fn of(&self, snapshot: Uuid) -> Result<Arc<Older>> {
        let mut kept = self.kept.lock();
        let place = kept.iter().position(|(id, _)| *id == snapshot);
        let state = match place.and_then(|place| kept.remove(place)) {
            Some((_, state)) => state,
            None => Arc::new(self.open(snapshot)?),
        };
        kept.push_front((snapshot, state.clone()));
        kept.truncate(KEPT);
        Ok(state)
    }

    /// Layers may have been joined, and snapshots removed, since the server was started.
    fn open(&self, snapshot: Uuid) -> Result<Older> {
        let _pin = self.store.pin_layers()?;
        let container = self.store.container_by_now(&self.container)?;
        let open = open_snapshot(&self.store, &container, snapshot)?;
        Ok(Older::of(open.chain()))
    }
}

struct Dirty {
    name: String,
    snapshot: Uuid,
    states: Arc<States>,
    chain: Arc<OpenChain>,
}

impl MetaContext for Dirty {
    fn name(&self) -> &str {
        &self.name
    }

    fn statuses(&self, offset: u64, len: u64, max: usize) -> Result<Vec<(u64, u32)>> {
        let older = self.states.of(self.snapshot);
        let older = older.map_err(|error| error.context(&self.name))?;
        let newer = sources(self.chain.chain(), offset, len, max);
        let end = newer.last().map_or(offset, |run| run.end().offset().get());
        let mut statuses = Vec::new();
        let mut at = offset;
        for run in older.changed_at(&newer, &self.states.layers) {
            let start = run.start().offset().get().max(offset);
            if at < start {
                statuses.push((start - at, 0));
            }
            at = run.end().offset().get();
            statuses.push((at - start, IS_DIRTY));
        }
        if at < end {
            statuses.push((end - at, 0));
        }
        statuses.truncate(max);
        Ok(statuses)
    }
}
