//! Each layer by itself: header, map or checksums, journal, lengths, parent, counts, blocks.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use uuid::Uuid;

use super::repair::mark_sound;
use super::{Check, Finding, Remedy, Severity};
use crate::lazy::{FetcherClient, REMOTE_FILES, Remote};
use crate::progress::BlocksWatch;
use vellum_base::block::{Block, Blocks, Span};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_core::layer::{
    self, Fetch, Header, ScrubReport, SealedLayer, check_layer, fail_on_damage,
};
use vellum_store::Store;

/// Files that the store keeps beside those of a layer, and beside [`REMOTE_FILES`].
const STORE_FILES: [&str; 3] = ["info.json", "lease", "readers"];

/// What is known of a layer after it was looked at.
#[derive(Debug, Default)]
pub(super) struct LayerState {
    /// `None` where it cannot be read.
    pub(super) header: Option<Header>,
    /// Why a chain with it cannot be opened.
    pub(super) broken: Option<String>,
    /// Some of its blocks cannot be read.
    pub(super) corrupt: Option<String>,
}

/// The layers that were looked at.
pub(super) type LayerStates = HashMap<Uuid, LayerState>;

impl Check<'_> {
    /// Looks at every layer.
    pub(super) fn layers(
        &mut self,
        layers: &[Uuid],
        watch: &dyn BlocksWatch,
    ) -> Result<LayerStates> {
        let idle = self.store.try_collection_lock()?.is_some();
        let mut states = LayerStates::new();
        let mut sealed = Vec::new();
        for &layer in layers {
            self.report.layers += 1;
            let (state, opened) = self.layer(layer, idle);
            states.insert(layer, state);
            // Hundreds of layers need not be open at once otherwise.
            sealed.extend(opened.filter(|_| self.scrub));
        }
        if self.scrub {
            self.scrub(&sealed, &mut states, watch);
        }
        Ok(states)
    }

    fn layer(&mut self, layer: Uuid, idle: bool) -> (LayerState, Option<SealedLayer>) {
        let mut state = LayerState::default();
        let dir = self.store.layer_dir(layer);
        let mut opened = None;
        let looked = read_header(self.store, layer, &dir).and_then(|header| {
            let sealed = header.sealed;
            state.header = Some(header);
            // The map and journal of one that is written change as we read.
            if sealed || !self.store.is_leased(&dir) {
                self.files(layer, &dir, sealed, idle)?;
            }
            if sealed {
                opened = Some(SealedLayer::open(&**self.store.storage(), &dir)?);
            }
            Ok(())
        });
        if let Err(error) = looked {
            let problem = error.to_string();
            self.broken_layer(layer, &dir, &problem);
            state.broken = Some(problem);
            return (state, None);
        }
        if let Some(sealed) = &opened {
            self.count(layer, &dir, sealed, idle);
        }
        (state, opened)
    }

    /// Looks at every file of a layer; the first damage is the answer.
    fn files(&mut self, layer: Uuid, dir: &Path, sealed: bool, idle: bool) -> Result<()> {
        let storage = &**self.store.storage();
        let found = check_layer(storage, dir, self.scrub && !sealed);
        if !sealed && self.store.is_leased(dir) {
            // Somebody began to write it meanwhile, so what was found means nothing.
            return Ok(());
        }
        fail_on_damage(&found)?;
        for finding in found {
            let name = finding.file.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| STORE_FILES.contains(&name) || REMOTE_FILES.contains(&name))
            {
                continue;
            }
            let remedy = finding
                .repair
                .map(|_| Remedy::Layer(layer))
                .filter(|_| sealed);
            // Checksums are made after sealing, when nobody waits, by a server or by prune. A layer that was
            // counted and does not hold that any more has lost them.
            let had_no_time = match finding.repair {
                Some(layer::Repair::MakeSeal) => self
                    .store
                    .layer_info(layer)
                    .is_ok_and(|info| info.bytes == 0 || self.holds(dir, info.bytes)),
                Some(layer::Repair::Remove) => true,
                None => false,
            };
            let severity = match finding.severity {
                layer::Severity::Note => Severity::Note,
                _ if !idle || had_no_time => Severity::Note,
                _ => Severity::Warning,
            };
            self.find(Finding::new(
                severity,
                format!("layer {layer}"),
                finding.file,
                finding.what,
                finding.why,
                remedy,
            ));
        }
        Ok(())
    }

    /// Whether a sealed layer holds so many bytes.
    fn holds(&self, dir: &Path, bytes: u64) -> bool {
        SealedLayer::open(&**self.store.storage(), dir)
            .is_ok_and(|sealed| sealed.data_blocks().bytes() == bytes)
    }

    /// Compares what is said of a sealed layer with what it holds.
    fn count(&mut self, layer: Uuid, dir: &Path, sealed: &SealedLayer, idle: bool) {
        let what = format!("layer {layer}");
        let info = match self.store.layer_info(layer) {
            Ok(info) => info,
            Err(error) => {
                self.find(Finding::new(
                    Severity::Warning,
                    &what,
                    dir.join("info.json"),
                    error.to_string(),
                    "it holds what is known of the layer's origin; the data is not touched",
                    Some(Remedy::Count(layer)),
                ));
                return;
            }
        };
        let bytes = sealed.data_blocks().bytes();
        if info.bytes != bytes {
            let severity = if info.bytes == 0 || !idle {
                Severity::Note
            } else {
                Severity::Warning
            };
            self.find(Finding::new(
                severity,
                &what,
                dir.join("info.json"),
                format!("says {} bytes; the layer holds {bytes}", info.bytes),
                "sizes are shown wrong; `vellum prune` counts again",
                Some(Remedy::Count(layer)),
            ));
        }
    }

    /// True where an image, a container or a snapshot would miss the layer. One that is in
    /// quarantine does not.
    fn is_needed(&self, layer: Uuid) -> bool {
        let images = self.records.images.iter();
        let containers = self.records.containers.iter();
        let snapshots = self.records.snapshots.iter();
        images.flat_map(|image| &image.layers).any(|l| *l == layer)
            || snapshots
                .flat_map(|s| s.layers.iter().chain([&s.base]))
                .any(|l| *l == layer)
            || containers
                .flat_map(|c| c.named_layers())
                .any(|l| *l == layer)
    }

    fn broken_layer(&mut self, layer: Uuid, dir: &Path, problem: &str) {
        if !self.is_needed(layer) {
            self.find(Finding::new(
                Severity::Note,
                format!("layer {layer}"),
                dir,
                problem,
                "no image, container or snapshot outside of quarantine needs it",
                None,
            ));
            return;
        }
        self.find(Finding::new(
            Severity::Error,
            format!("layer {layer}"),
            dir,
            problem,
            "put its files back from a backup; otherwise import the image again, which makes new \
             layers, once --repair has put what is on this one in quarantine",
            self.store
                .layer_info(layer)
                .is_ok()
                .then(|| Remedy::MarkDamaged(layer, problem.to_owned())),
        ));
    }

    /// Reads every block of sealed layers.
    fn scrub(&mut self, sealed: &[SealedLayer], states: &mut LayerStates, watch: &dyn BlocksWatch) {
        let blocks: Blocks = sealed.iter().map(SealedLayer::data_blocks).sum();
        watch.begin(blocks.get());
        let found = read_all(sealed, watch);
        watch.end();
        // In the order of the layers, however long each took.
        for (opened, found) in sealed.iter().zip(found) {
            let layer = opened.header().uuid;
            let mut damaged = Vec::new();
            let problem = match found {
                Ok(report) => {
                    self.report.blocks += report.blocks.get();
                    damaged = report.corrupt;
                    damaged.first().map(|first| {
                        format!(
                            "{} of {} blocks do not match their checksums, the first is {first}",
                            damaged.len(),
                            report.blocks
                        )
                    })
                }
                Err(error) => Some(error.to_string()),
            };
            let info = self.store.layer_info(layer).ok();
            if let Some(problem) = &problem
                && !damaged.is_empty()
                && Remote::is_known(opened.dir())
                && self.is_needed(layer)
            {
                self.healable(opened, &damaged, problem);
                continue;
            }
            // Whatever stands on it says so too.
            if let (Some(problem), Some(state)) = (&problem, states.get_mut(&layer)) {
                state.corrupt = Some(problem.clone());
            }
            match problem {
                Some(problem) if !self.is_needed(layer) => {
                    self.broken_layer(layer, opened.dir(), &problem);
                }
                Some(problem) => {
                    self.find(Finding::new(
                        Severity::Error,
                        format!("layer {layer}"),
                        opened.dir().join("data"),
                        &problem,
                        "reads of these blocks fail with EIO, all others are right: save what you \
                         need from its containers, and import the image again",
                        info.map(|_| Remedy::MarkDamaged(layer, problem.clone())),
                    ));
                }
                None if info.as_ref().is_some_and(|info| info.damaged.is_some()) => {
                    self.find(Finding::new(
                        Severity::Note,
                        format!("layer {layer}"),
                        opened.dir(),
                        "marked as damaged, but every block of it is right",
                        "--repair takes the mark away",
                        Some(Remedy::MarkSound(layer)),
                    ));
                }
                None => {}
            }
        }
    }

    /// Tells of damaged blocks that can be fetched again, and does so where it is to repair: now, since nothing that
    /// stands on the layer is in trouble then.
    fn healable(&mut self, opened: &SealedLayer, damaged: &[Block], problem: &str) {
        let layer = opened.header().uuid;
        let mut finding = Finding::new(
            Severity::Error,
            format!("layer {layer}"),
            opened.dir().join("data"),
            problem,
            "--repair fetches them again from where the layer was pulled or pushed, as does whoever reads them",
            None,
        );
        finding.repairable = true;
        if self.repair {
            match heal(self.store, opened, damaged) {
                Ok(()) => finding.repaired = Some("fetched again: all of it is right".into()),
                Err(error) => {
                    finding.advice = format!(
                        "they could not be fetched again ({error}): try once more, or remove what \
                         uses the layer and pull it anew"
                    );
                }
            }
        }
        self.find(finding);
    }
}

/// Has blocks of a layer brought again, and looks whether all of it is right then.
fn heal(store: &Store, opened: &SealedLayer, damaged: &[Block]) -> Result<()> {
    for block in damaged {
        if !FetcherClient.heal(opened.dir(), Span::of(*block))? {
            return Err(Error::new(ErrorKind::NotFound, "nobody has them"));
        }
    }
    if let Some(block) = opened.scrub(|_| {})?.corrupt.first() {
        let text = format!("the block {block} is damaged too");
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    mark_sound(store, opened.header().uuid)
}

/// Reads layers side by side, as many at once as there are processors: each takes a few megabytes.
fn read_all(sealed: &[SealedLayer], watch: &dyn BlocksWatch) -> Vec<Result<ScrubReport>> {
    let next = AtomicUsize::new(0);
    let read = || {
        let mut mine = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(layer) = sealed.get(at) else {
                return mine;
            };
            mine.push((at, layer.scrub(|blocks| watch.read(blocks.get()))));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let others = threads.min(sealed.len()).saturating_sub(1);
    let mut all = std::thread::scope(|scope| {
        let spawned: Vec<_> = (0..others)
            // Where there is no thread the others read more.
            .filter_map(|_| std::thread::Builder::new().spawn_scoped(scope, read).ok())
            .collect();
        let mut all = read();
        for thread in spawned {
            match thread.join() {
                Ok(mine) => all.extend(mine),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    all.sort_unstable_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, found)| found).collect()
}

fn read_header(store: &Store, layer: Uuid, dir: &Path) -> Result<Header> {
    let header = Header::read(&**store.storage(), dir).map_err(|error| {
        if dir.exists() {
            error
        } else {
            Error::new(
                ErrorKind::NotFound,
                format!("{}: the layer is not there", dir.display()),
            )
        }
    })?;
    if header.uuid != layer {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "{}: the header is of the layer {}",
                dir.display(),
                header.uuid
            ),
        ));
    }
    Ok(header)
}
