//! Which layer each block of a container or image comes from, and pictures of that.

mod block_map;
mod canvas;
mod grid;
mod palette;
mod picture;

pub use block_map::{BlockMap, MAP_SCHEMA, MappedLayer};
pub use grid::{Cell, Grid, Layout};
pub use palette::{Entry, Palette, Rgb};
pub use picture::{png, svg};

use std::time::Duration;

use uuid::Uuid;

use super::device::{AskMap, HOLE, MAP, MapPart, OpenChain, Target, ZERO};
use super::lock_container;
use super::snapshot;
use super::stats::Sockets;
use super::wire::{decode, encode};
use vellum_base::block::BLOCK_SIZE;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_store::Store;

/// Runs that are asked for at a time.
const PART: usize = 16 << 10;
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often a commit may put a layer more below the container while its map is read.
const TRIES: usize = 3;

/// The map of a container, as its server has it now or, where nobody serves it, as it lies on
/// disk; or of a snapshot or an image.
///
/// # Errors
/// [`ErrorKind::NotFound`] for the name; [`ErrorKind::InUse`] while somebody else has the container.
pub fn map(store: &Store, name: &str) -> Result<BlockMap> {
    let container = match store.container(name) {
        Ok(container) => container,
        Err(no_container) => {
            let (top, layers) = match snapshot::find(store, name)? {
                Some((_, top)) => (top, store.ancestry(Some(top))?),
                None => {
                    let image = store.image(name).map_err(|_| no_container)?;
                    (image.top()?, image.layers)
                }
            };
            let open = Target::Sealed(top).open(store)?;
            let (part, runs) = all_runs(|ask| from_chain(&open, ask))?;
            return Ok(assemble(store, name, &layers, None, &part, runs));
        }
    };
    let sockets = Sockets::new(store, container.id);
    let asked = all_runs(|ask| {
        let args = encode(ask)?;
        decode(sockets.ask(MAP, &args, TIMEOUT)?.1)
    });
    let (part, runs) = match asked {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let _busy = lock_container(store, &container)?;
            let open = Target::Look(name.to_owned()).open(store)?;
            all_runs(|ask| from_chain(&open, ask))?
        }
        other => other?,
    };
    let resolved = store.resolve(&store.container(name)?)?;
    let (sealed, top) = (&resolved.sealed, resolved.top);
    Ok(assemble(store, name, sealed, Some(top), &part, runs))
}

fn from_chain(open: &OpenChain, ask: &AskMap) -> Result<MapPart> {
    MapPart::new(open.chain(), ask)
}

/// Asks for part after part. Blocks that change meanwhile are shown as they were or as they are.
fn all_runs(ask: impl Fn(&AskMap) -> Result<MapPart>) -> Result<(MapPart, Vec<(u64, i64)>)> {
    for _ in 0..TRIES {
        let mut first = ask(&AskMap {
            start: 0,
            max: PART,
        })?;
        let mut answered = std::mem::take(&mut first.runs);
        let mut runs: Vec<(u64, i64)> = Vec::new();
        let mut at = 0;
        while !answered.is_empty() {
            for (len, source) in answered {
                at += len;
                match runs.last_mut() {
                    Some(last) if last.1 == source => last.0 += len,
                    _ => runs.push((len, source)),
                }
            }
            let part = ask(&AskMap {
                start: at,
                max: PART,
            })?;
            if part.depth != first.depth {
                break;
            }
            if part.runs.is_empty() {
                return Ok((first, runs));
            }
            answered = part.runs;
        }
    }
    Err(Error::new(
        ErrorKind::InUse,
        "the container's layers change all the time: try again",
    ))
}

fn assemble(
    store: &Store,
    name: &str,
    sealed: &[Uuid],
    top: Option<Uuid>,
    part: &MapPart,
    runs: Vec<(u64, i64)>,
) -> BlockMap {
    let shown = |source: i64| -> u64 {
        let of_it = runs.iter().filter(|(_, of)| *of == source);
        of_it.map(|(len, _)| len).sum()
    };
    let layers = sealed.iter().map(|layer| (*layer, false));
    let layers = layers.chain(top.map(|top| (top, true)));
    let layers = layers
        .enumerate()
        .map(|(number, (uuid, top))| MappedLayer {
            number,
            uuid,
            top,
            origin: store
                .layer_info(uuid)
                .map_or(String::new(), |info| info.origin),
            shown_blocks: shown(number as i64),
        })
        .collect();
    BlockMap {
        schema: MAP_SCHEMA,
        name: name.to_owned(),
        virtual_size: part.virtual_size,
        block_size: BLOCK_SIZE,
        layers,
        hole_blocks: shown(HOLE),
        zero_blocks: shown(ZERO),
        runs,
    }
}
