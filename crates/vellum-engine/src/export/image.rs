//! Chains as container images: each block layer becomes a layer of files, what it changed.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::template;
use super::super::temporary::TemporaryMount;
use super::super::watch::Watch;
use super::subject::{State, Subject};
use uuid::Uuid;
use vellum_base::error::{Result, ResultExt};
use vellum_image::{
    Change, ChangeKind, Compression, Foreign, HistoryEntry, ImageConfig, LayerTarOptions,
    OciWriter, diff_trees_but, write_layer_tar,
};

/// What was collected of an image, in a directory of its own.
pub(crate) struct Collected {
    writer: OciWriter,
    config: ImageConfig,
    name: String,
    /// How many layers it has.
    pub layers: usize,
    /// The diff_ids of sealed layers.
    pub diff_ids: Vec<(Uuid, String)>,
}

/// Writes the layers of the subject into `spool`, compressed.
///
/// # Errors
/// Where one cannot be mounted, read or written.
pub(crate) fn collect(
    subject: &Subject<'_>,
    spool: &Path,
    compression: Compression,
    name: Option<&str>,
    watch: &dyn Watch,
) -> Result<Collected> {
    let mut writer = OciWriter::new(spool, compression)?;
    let states = subject.states();
    let (templates, states) = states.split_at(template::count(subject.store, &subject.layers));
    let mut config = subject.config.clone();
    // Layers above are those of a container, which no step of its image's history made.
    let known = config.history.iter().filter(|step| !step.empty_layer);
    let known = known.count().min(states.len());
    config.settle_history(known);
    config.created = Some(subject.created.clone());
    // Of an image that was imported as a disk the lowest layer has all files that are there.
    let nothing =
        tempfile::tempdir_in(spool).context(|| format!("writing into {}", spool.display()))?;
    let mut below = match templates.last() {
        Some(state) => Some(subject.mount(*state)?),
        None => None,
    };
    let mut layers = 0;
    let mut diff_ids = Vec::new();
    for (index, state) in states.iter().enumerate() {
        let here = subject.mount(*state)?;
        let foreign = match index + 1 == states.len() {
            true => subject.foreign(),
            false => Foreign::default(),
        };
        let lower = below.as_ref().map_or(nothing.path(), TemporaryMount::dir);
        let changes = changes(lower, here.dir(), &foreign, below.is_none())?;
        // A container that changed nothing is its image.
        if index < known || !changes.is_empty() {
            let (shown, size) = shown(subject, *state);
            let progress = watch.begin(&shown, size);
            let options = LayerTarOptions {
                dense: true,
                ..LayerTarOptions::default()
            };
            let write =
                |out: &mut dyn Write| write_layer_tar(here.dir(), &changes, out, options, progress);
            let diff_id = writer.add_layer(write)?;
            if let State::Sealed(layer) = state {
                diff_ids.push((*layer, diff_id));
            }
            watch.done();
            layers += 1;
            if index >= known {
                config.history.push(step(subject, *state)?);
            }
        }
        if let Some(below) = below.replace(here) {
            below.end()?;
        }
    }
    if let Some(below) = below {
        below.end()?;
    }
    Ok(Collected {
        writer,
        config,
        name: name.unwrap_or(&subject.name).to_owned(),
        layers,
        diff_ids,
    })
}

/// What makes two states of a file system differ, sorted by path. Of the lowest state all there is, but for
/// what every ext4 has.
fn changes(lower: &Path, upper: &Path, foreign: &Foreign, lowest: bool) -> Result<Vec<Change>> {
    let mut changes = diff_trees_but(lower, upper, foreign)?;
    if lowest {
        let kept = Path::new("/lost+found");
        let within = changes
            .iter()
            .filter(|change| change.path.starts_with(kept));
        if within.count() == 1 {
            changes.retain(|change| change.path != kept);
        }
    }
    let root = Path::new("/");
    let listed = changes.first().is_some_and(|change| change.path == root);
    // Whatever the empty directory's attributes were. Above, the root's time alone is no change, but goes
    // with others, as that of any directory does.
    if !listed && (lowest || !changes.is_empty() && has_other_time(lower, upper, foreign)?) {
        let kind = ChangeKind::Changed;
        let path = root.to_owned();
        changes.insert(0, Change { kind, path });
    }
    Ok(changes)
}

/// Whether the root has another time than below, which is not from what others made in it.
fn has_other_time(lower: &Path, upper: &Path, foreign: &Foreign) -> Result<bool> {
    let time = |root: &Path| {
        root.metadata()
            .map(|meta| (meta.mtime(), meta.mtime_nsec()))
            .context(|| format!("reading the attributes of {}", root.display()))
    };
    let now = time(upper)?;
    Ok(now != time(lower)? && foreign.times.get(Path::new("/")) != Some(&now))
}

/// A layer for people, and how many bytes there may be to read.
fn shown(subject: &Subject<'_>, state: State) -> (String, Option<u64>) {
    match state {
        State::Now => (subject.name.clone(), None),
        State::Sealed(layer) => {
            let bytes = subject.store.layer_info(layer).ok().map(|info| info.bytes);
            (layer.to_string().chars().take(12).collect(), bytes)
        }
    }
}

/// The step that made a layer of a container's own.
fn step(subject: &Subject<'_>, state: State) -> Result<HistoryEntry> {
    let (created, by) = match state {
        State::Now => (
            Some(subject.created.clone()),
            format!("vellum export {}", subject.name),
        ),
        State::Sealed(layer) => (None, subject.store.layer_info(layer)?.origin),
    };
    Ok(HistoryEntry {
        created,
        created_by: Some(by),
        ..HistoryEntry::default()
    })
}

impl Collected {
    /// Has the image's manifest say something.
    pub fn annotate(&mut self, name: &str, value: &str) {
        self.writer.annotate(name, value);
    }

    /// Writes an OCI layout into a directory that is empty. Returns the manifest's digest.
    pub fn layout(self, dir: &Path) -> Result<String> {
        self.writer.write_layout(self.config, Some(&self.name), dir)
    }

    /// Writes an OCI archive. Returns the manifest's digest.
    pub fn archive(self, output: impl Write) -> Result<String> {
        self.writer
            .write_archive(self.config, Some(&self.name), output)
    }

    /// Writes a Docker archive. Returns the manifest's digest.
    pub fn docker(self, output: impl Write) -> Result<String> {
        self.writer
            .write_docker_archive(self.config, Some(&self.name), output)
    }
}
