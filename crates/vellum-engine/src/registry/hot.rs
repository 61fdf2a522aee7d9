//! The hot pack of an artifact that is pushed: docs/registry.md, "Hot pack, version 1".

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use sha2::{Digest, Sha256};
use vellum_base::block::{BlockState, Run, WindowPower};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::unmounted::Piece;
use vellum_registry::Upload;
use vellum_registry::artifact::{Chunk, HotFrame, HotPack, MAX_HOT_FRAMES};

use super::super::trace::Trace;
use super::layout::Layout;
use super::metadata;

/// Whether an artifact is to have a hot pack.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hot<'a> {
    /// Of what a trace touched, where there is one, and of the file system's metadata.
    Pack(Option<&'a Trace>),
    /// None.
    No,
}

/// A layer whose blobs lie in the layout.
pub(super) struct Written {
    /// As registries write it.
    pub digest: String,
    pub power: WindowPower,
    /// Its blocks that are data or zero, in order.
    pub extents: Vec<Run<BlockState>>,
    pub chunks: Vec<Chunk>,
    /// Its data blob, unless it has none.
    pub data: Option<PathBuf>,
}

impl Written {
    /// The chunk of a window, unless the layer has no data there.
    pub fn chunk(&self, window: u32) -> Option<&Chunk> {
        let found = self
            .chunks
            .binary_search_by_key(&window, |chunk| chunk.window);
        self.chunks.get(found.ok()?)
    }
}

/// A window of a layer: the layer's number from the bottom, and the window's.
pub(super) type Of = (usize, u32);

/// Writes the pack of what a trace touched of these layers, from the bottom up, and of the file system's metadata
/// behind that; `None` where there is neither.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a trace of other layers; where a file cannot be read or written.
pub(super) fn write(
    trace: Option<&Trace>,
    pieces: &[Piece],
    layers: &[Written],
    layout: &Layout,
) -> Result<Option<Upload>> {
    let mut windows = match trace {
        Some(trace) => touched(trace, layers)?,
        None => Vec::new(),
    };
    let seen: HashSet<Of> = windows.iter().copied().collect();
    let metadata = metadata::windows(pieces, layers).into_iter();
    windows.extend(metadata.filter(|window| !seen.contains(window)));
    windows.truncate(MAX_HOT_FRAMES);
    if windows.is_empty() {
        return Ok(None);
    }
    copy(&windows, layers, layout).map(Some)
}

/// The windows that a trace touched, in its order.
fn touched(trace: &Trace, layers: &[Written]) -> Result<Vec<Of>> {
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    for (number, layer) in layers.iter().enumerate() {
        numbers.entry(&layer.digest).or_insert(number);
    }
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for (digest, range) in trace.touched() {
        let Some((&number, layer)) = numbers
            .get(digest)
            .and_then(|number| Some((number, layers.get(*number)?)))
        else {
            continue;
        };
        let window = range >> (layer.power.get() - WindowPower::LEAST.get());
        if layer.chunk(window).is_some() && seen.insert((number, window)) {
            found.push((number, window));
        }
    }
    if found.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "the trace has nothing of the image's layers: record one of this image (`vellum trace`)",
        ));
    }
    Ok(found)
}

/// Writes the pack: each frame is copied from its layer's data blob, where it lies at its chunk's offset.
fn copy(windows: &[Of], layers: &[Written], layout: &Layout) -> Result<Upload> {
    let open = |layer: &Written| {
        let path = layer.data.as_ref();
        path.map(|path| File::open(path).context(|| format!("cannot read {}", path.display())))
            .transpose()
    };
    let files: Vec<Option<File>> = layers.iter().map(open).collect::<Result<_>>()?;
    let frame = |(number, window): &Of| {
        let layer = layers.get(*number);
        let chunk = layer.and_then(|layer| layer.chunk(*window));
        let chunk = chunk.ok_or_else(|| Error::internal("a hot window without a chunk"))?;
        let frame = HotFrame {
            layer: *number as u32,
            window: *window,
            len: chunk.len,
        };
        Ok((frame, chunk.offset))
    };
    let found: Vec<(HotFrame, u64)> = windows.iter().map(frame).collect::<Result<_>>()?;
    let pack = HotPack {
        layers: layers.len() as u32,
        frames: found.iter().map(|(frame, _)| *frame).collect(),
    };
    let (path, file) = layout.unnamed()?;
    let mut out = BufWriter::new(file);
    let mut hasher = Sha256::new();
    let mut len = 0;
    let mut add = |bytes: &[u8]| {
        hasher.update(bytes);
        len += bytes.len() as u64;
        out.write_all(bytes).context(|| "writing a hot pack")
    };
    add(&pack.encode())?;
    let mut stored = Vec::new();
    for (frame, offset) in &found {
        let file = files.get(frame.layer as usize).and_then(Option::as_ref);
        let file = file.ok_or_else(|| Error::internal("a chunk of a layer without data"))?;
        stored.resize(frame.len as usize, 0);
        file.read_exact_at(&mut stored, *offset)
            .context(|| "reading the data of a layer")?;
        add(&stored)?;
    }
    out.flush().context(|| "writing a hot pack")?;
    layout.name(&path, hasher.finalize().into(), len)
}
