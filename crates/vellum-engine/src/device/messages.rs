//! What a device server is asked over its control socket, and what it answers.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use vellum_base::block::Block;
use vellum_base::error::Result;
use vellum_core::chain::{Chain, ChainStatsSnapshot, Source};
use vellum_core::layer::{LayerStatsSnapshot, SpaceStatus};

/// Asks a device server to seal its top layer and go on in another: [`SealTop`].
pub const SEAL_TOP: &str = "seal-top";
/// Tells a device server that [`SEAL_TOP`] with the same arguments comes next: it opens the layer
/// and makes durable what there is, so that less is left to do then.
pub const PREPARE_SEAL: &str = "prepare-seal";
/// Asks a device server to seal its top layer for good; the answer is [`Sealed`].
pub const SEAL: &str = "seal";
/// Asks a device server for its counters: [`DeviceStats`].
pub const STATS: &str = "stats";
/// Asks a device server where its blocks come from: [`AskMap`], answered by [`MapPart`].
pub const MAP: &str = "map";
/// Asks a device server to copy blocks up: [`CopyUp`], answered by [`CopiedUp`](vellum_core::chain::CopiedUp).
pub const COPY_UP: &str = "copy-up";
/// Asks a device server to go on with other sealed layers of the same content: [`ReplaceSealed`].
pub const REPLACE_SEALED: &str = "replace-sealed";
/// Asks a device server to make its device larger: [`Grow`]. One that is as large is fine.
pub const GROW: &str = "grow";

/// Tells a server how much of the host's disk its writers leave free: [`KeepFree`].
pub const KEEP_FREE: &str = "keep-free";
/// Gives back the space that the top layer took ahead of first touches.
pub const GIVE_BACK: &str = "give-back";

/// Runs in one answer about the map, so that it fits a line of the control socket.
const MAX_RUNS: usize = 16 << 10;

/// Arguments of [`SEAL_TOP`].
#[derive(Debug, Serialize, Deserialize)]
pub struct SealTop {
    /// The empty layer to go on in.
    pub next: Uuid,
}

/// Arguments of [`REPLACE_SEALED`].
#[derive(Debug, Serialize, Deserialize)]
pub struct ReplaceSealed {
    /// From the bottom up.
    pub layers: Vec<Uuid>,
}

/// Answer of [`SEAL_TOP`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedTop {
    /// For how many microseconds requests waited, at most.
    pub waited_us: u64,
}

/// Answer of [`SEAL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// Data blocks in the sealed layer.
    pub blocks: u64,
}

/// Arguments of [`COPY_UP`].
#[derive(Debug, Serialize, Deserialize)]
pub struct CopyUp {
    /// (first byte, length in bytes) of each range.
    pub ranges: Vec<(u64, u64)>,
}

/// Arguments of [`GROW`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Grow {
    /// Bytes that the device shall have.
    pub size: u64,
}

/// Arguments of [`KEEP_FREE`].
#[derive(Debug, Serialize, Deserialize)]
pub struct KeepFree {
    /// Bytes that stay available; 0 for none.
    pub bytes: u64,
}

/// Arguments of [`MAP`].
#[derive(Debug, Serialize, Deserialize)]
pub struct AskMap {
    /// First block.
    pub start: u64,
    /// How many runs at most.
    pub max: usize,
}

/// Stands for a hole among the numbers of layers.
pub const HOLE: i64 = -1;
/// Stands for zero among the numbers of layers.
pub const ZERO: i64 = -2;

/// Answer of [`MAP`]: the runs from where it was asked for on.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct MapPart {
    /// Layers below the top.
    pub depth: u64,
    /// Size of the device in bytes.
    pub virtual_size: u64,
    /// (blocks, source): [`HOLE`], [`ZERO`], else a layer's number from the bottom; the top
    /// has the number `depth`. Without gaps.
    pub runs: Vec<(u64, i64)>,
}

impl MapPart {
    /// A part of a chain's map.
    ///
    /// # Errors
    /// As [`Chain::sources`].
    pub(crate) fn new(chain: &Chain, ask: &AskMap) -> Result<Self> {
        let depth = chain.base().depth() as u64;
        let runs = chain.sources(Block::new(ask.start), ask.max.min(MAX_RUNS));
        let runs = runs.into_iter().map(|run| {
            let code = match run.value {
                Source::Hole => HOLE,
                Source::Zero => ZERO,
                Source::Sealed(number) => i64::from(number),
                Source::Top => depth as i64,
            };
            (run.len().get(), code)
        });
        Ok(MapPart {
            depth,
            virtual_size: chain.whole_size(),
            runs: runs.collect(),
        })
    }
}

/// Counters of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Data blocks in the top layer.
    pub top_blocks: u64,
    /// Layers below the top.
    pub depth: u64,
    /// Its size in bytes.
    #[serde(default)]
    pub virtual_size: u64,
    /// How its top layer stands with the host's space.
    #[serde(default)]
    pub space: SpaceStatus,
    /// Requests and copy-ups.
    pub chain: ChainStatsSnapshot,
    /// Flushes and the journal.
    pub layer: LayerStatsSnapshot,
}
