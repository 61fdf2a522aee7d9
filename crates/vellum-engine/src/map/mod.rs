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
use super::sockets::Sockets;
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
            // Before it is looked at, so that what it names stays.
            let _pin = store.pin_layers()?;
            let (top, layers) = match snapshot::find(store, name)? {
                Some(found) => (found.top()?, found.layers),
                None => {
                    let image = store
                        .image(name)
                        .map_err(|_| snapshot::nothing_called(store, name, no_container))?;
                    (image.top()?, image.layers)
                }
            };
            let open = Target::Sealed(top).open(store)?;
            let (part, runs) = all_runs(|ask| from_chain(&open, ask))?;
            return Ok(assemble(store, name, &layers, None, &part, runs));
        }
    };
    let asked = all_runs(|ask| from_server(&Sockets::new(store, container.id), ask));
    let (part, runs) = match asked {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let (container, _busy) = lock_container(store, &container)?;
            let open = Target::look_at(&container).open(store)?;
            all_runs(|ask| from_chain(&open, ask))?
        }
        other => other?,
    };
    let resolved = store.resolve(&store.container(name)?)?;
    let (sealed, top) = (&resolved.sealed, resolved.top);
    Ok(assemble(store, name, sealed, Some(top), &part, runs))
}

fn from_server(sockets: &Sockets, ask: &AskMap) -> Result<MapPart> {
    decode(sockets.ask(MAP, &encode(ask)?, TIMEOUT)?.1)
}

/// What a server has open: how many layers there are below the top, the size, and where all blocks come
/// from, as in [`BlockMap::runs`].
pub(super) fn served_runs(sockets: &Sockets) -> Result<(MapPart, Vec<(u64, i64)>)> {
    all_runs(|ask| from_server(sockets, ask))
}

fn from_chain(open: &OpenChain, ask: &AskMap) -> Result<MapPart> {
    MapPart::new(open.chain(), ask)
}

/// Asks for part after part. Blocks that change meanwhile are shown as they were or as they are.
fn all_runs(ask: impl Fn(&AskMap) -> Result<MapPart>) -> Result<(MapPart, Vec<(u64, i64)>)> {
    for _ in 0..TRIES {
        let mut at = 0;
        let mut runs = Vec::new();
        let mut part = ask(&AskMap {
            start: at,
            max: PART,
        })?;
        let depth = part.depth;
        while part.depth == depth {
            if part.runs.is_empty() {
                return Ok((part, runs));
            }
            at = append(&mut runs, at, &part)?;
            part = ask(&AskMap {
                start: at,
                max: PART,
            })?;
        }
    }
    Err(Error::new(
        ErrorKind::InUse,
        "the container's layers change all the time: try again",
    ))
}

/// Puts the runs of a part, which begins at block `at`, behind those before. Returns the block behind them.
///
/// # Errors
/// [`ErrorKind::Protocol`] for runs that the device has no room for, and for empty ones, after which we
/// would ask for the same part again for ever.
fn append(runs: &mut Vec<(u64, i64)>, mut at: u64, part: &MapPart) -> Result<u64> {
    let blocks = part.virtual_size / BLOCK_SIZE;
    for &(len, source) in &part.runs {
        let end = at.checked_add(len).filter(|end| *end <= blocks && len > 0);
        at = end.ok_or_else(|| {
            let text = format!(
                "the server's map makes no sense: {len} blocks at block {at} of {blocks} (is it of another \
                 version of Vellum?)"
            );
            Error::new(ErrorKind::Protocol, text)
        })?;
        match runs.last_mut() {
            Some(last) if last.1 == source => last.0 += len,
            _ => runs.push((len, source)),
        }
    }
    Ok(at)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks for a map that is answered with these parts, one after the other.
    fn asked(parts: &[(u64, &[(u64, i64)])]) -> Result<(MapPart, Vec<(u64, i64)>)> {
        let mut parts = parts.iter();
        let next = std::cell::RefCell::new(|| {
            let (depth, runs) = parts.next().expect("it asks no more");
            MapPart {
                depth: *depth,
                virtual_size: 8 * BLOCK_SIZE,
                runs: runs.to_vec(),
            }
        });
        all_runs(|_| Ok(next.borrow_mut()()))
    }

    #[test]
    fn runs_of_one_source_are_one_and_a_commit_meanwhile_begins_anew() {
        let (part, runs) = asked(&[
            (1, &[(4, 0)]),
            (2, &[(4, 0)]),
            (2, &[(2, 0), (1, 2)]),
            (2, &[(3, 2), (2, HOLE)]),
            (2, &[]),
        ])
        .unwrap();
        assert_eq!((part.depth, runs), (2, vec![(2, 0), (4, 2), (2, HOLE)]));
    }

    #[test]
    fn a_map_of_what_no_device_has_is_refused() {
        let parts: [&[(u64, i64)]; 4] = [
            &[(0, 0)],
            &[(9, 0)],
            &[(1, 0), (8, 1)],
            &[(1, 0), (u64::MAX, 1)],
        ];
        for runs in parts {
            let error = asked(&[(1, runs)]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol, "{runs:?}: {error}");
        }
    }
}
