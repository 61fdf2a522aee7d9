//! The hot pack of an artifact: docs/registry.md, "Hot pack, version 1".

use std::collections::HashSet;

use super::MAX_LAYERS;
use super::bytes::{corrupt, put};
use super::table::MAX_GROWTH;
use vellum_base::block::{WindowPower, part, part_from, u32_at, u64_at};
use vellum_base::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 8] = b"VELLUMHP";
const VERSION: u32 = 1;
const LIST_CRC_AT: usize = 120;
const CRC_AT: usize = 124;
const ENTRY_LEN: usize = 16;

/// Length of a hot pack's header in bytes.
pub const HOT_HEADER_LEN: usize = 128;
/// The most frames of a hot pack.
pub const MAX_HOT_FRAMES: usize = 1 << 20;

/// A frame of a hot pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HotFrame {
    /// Of which layer of the artifact, counted from the bottom.
    pub layer: u32,
    /// Which window of it, in the windows of its table.
    pub window: u32,
    /// Length of the stored bytes.
    pub len: u32,
}

/// What is in a hot pack: frames in the order in which a start touches them. The bytes of the frames follow this list
/// in the blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotPack {
    /// Layers of the artifact.
    pub layers: u32,
    /// In the order of first touch; none twice.
    pub frames: Vec<HotFrame>,
}

impl HotPack {
    /// Header and list, as the format has them. Asserts that it is what [`HotPack::decode`] takes.
    pub fn encode(&self) -> Vec<u8> {
        assert!(
            self.frames.len() <= MAX_HOT_FRAMES,
            "more frames than a hot pack has"
        );
        let mut bytes = vec![0; HOT_HEADER_LEN];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 32, &self.layers.to_le_bytes());
        put(&mut bytes, 36, &(self.frames.len() as u32).to_le_bytes());
        put(&mut bytes, 40, &self.stored_len().to_le_bytes());
        for frame in &self.frames {
            for field in [frame.layer, frame.window, frame.len, 0] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        let list = crc32fast::hash(part_from(&bytes, HOT_HEADER_LEN));
        put(&mut bytes, LIST_CRC_AT, &list.to_le_bytes());
        let header = crc32fast::hash(part(&bytes, 0, CRC_AT));
        put(&mut bytes, CRC_AT, &header.to_le_bytes());
        bytes
    }

    /// Length of header and list of a pack of `len` bytes in all, of its first [`HOT_HEADER_LEN`] bytes: at most 16 MiB
    /// and a little.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for another kind of blob, version or feature; [`ErrorKind::Corrupt`] for what
    /// contradicts itself.
    pub fn front_len(header: &[u8], len: u64) -> Result<usize> {
        if header.len() < HOT_HEADER_LEN || !header.starts_with(MAGIC) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "not a hot pack that `vellum push` wrote (wrong magic)",
            ));
        }
        let version = u32_at(header, 8);
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the hot pack is of version {version}; this build reads version {VERSION}"),
            ));
        }
        if crc32fast::hash(part(header, 0, CRC_AT)) != u32_at(header, CRC_AT) {
            return Err(corrupt("the header of the hot pack does not match its CRC"));
        }
        let unknown = u64_at(header, 16);
        if unknown != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "incompatible features {unknown:#x} of the hot pack are unknown to this build"
                ),
            ));
        }
        let count = u32_at(header, 36) as usize;
        let front = HOT_HEADER_LEN + count.min(MAX_HOT_FRAMES) * ENTRY_LEN;
        let stored = u64_at(header, 40);
        if count > MAX_HOT_FRAMES || (front as u64).checked_add(stored) != Some(len) {
            return Err(corrupt(format!(
                "a hot pack of {len} bytes with {count} frames of {stored} bytes"
            )));
        }
        Ok(front)
    }

    /// Reads header and list, which anybody may have written, of a pack of `len` bytes in all. It takes memory in
    /// proportion to `front`.
    ///
    /// # Errors
    /// As [`HotPack::front_len`].
    pub fn decode(front: &[u8], len: u64) -> Result<Self> {
        let need = HotPack::front_len(front, len)?;
        if front.len() != need {
            return Err(corrupt(format!(
                "{} bytes of a hot pack's list, not {need}",
                front.len()
            )));
        }
        let list = part_from(front, HOT_HEADER_LEN);
        if crc32fast::hash(list) != u32_at(front, LIST_CRC_AT) {
            return Err(corrupt("the list of the hot pack does not match its CRC"));
        }
        let pack = HotPack {
            layers: u32_at(front, 32),
            frames: list.chunks_exact(ENTRY_LEN).map(decode_frame).collect(),
        };
        pack.check()?;
        if pack.stored_len() != u64_at(front, 40) {
            return Err(corrupt(format!(
                "the frames of the hot pack have {} bytes together, not {}",
                pack.stored_len(),
                u64_at(front, 40)
            )));
        }
        Ok(pack)
    }

    /// The frames, each with the offset of its bytes in the pack.
    pub fn placed(&self) -> impl Iterator<Item = (u64, HotFrame)> {
        let mut at = (HOT_HEADER_LEN + self.frames.len() * ENTRY_LEN) as u64;
        self.frames.iter().map(move |frame| {
            let offset = at;
            at += u64::from(frame.len);
            (offset, *frame)
        })
    }

    /// Bytes of all frames.
    fn stored_len(&self) -> u64 {
        self.frames.iter().map(|frame| u64::from(frame.len)).sum()
    }

    fn check(&self) -> Result<()> {
        let layers = self.layers as usize;
        if layers == 0 || layers > MAX_LAYERS {
            return Err(corrupt(format!("a hot pack of {layers} layers")));
        }
        let most = WindowPower::MOST.blocks().buffer_len() + MAX_GROWTH;
        let mut seen = HashSet::new();
        for frame in &self.frames {
            let HotFrame { layer, window, len } = *frame;
            let fits = layer < self.layers && len != 0 && len as usize <= most;
            if !fits || !seen.insert((layer, window)) {
                return Err(corrupt(format!(
                    "a hot pack's frame of {len} bytes for the window {window} of the layer {layer} does not fit"
                )));
            }
        }
        Ok(())
    }
}

fn decode_frame(bytes: &[u8]) -> HotFrame {
    HotFrame {
        layer: u32_at(bytes, 0),
        window: u32_at(bytes, 4),
        len: u32_at(bytes, 8),
    }
}
