//! What is fuzzed: every parser of bytes that somebody else may have written, and what must hold
//! whatever the bytes are.
//!
//! One place for two users: the binaries of `tools/fuzz/fuzz_targets`, which libFuzzer drives, and
//! the ordinary tests in `tests/smoke.rs`, which replay the corpora. For every target and input:
//! no panic, no overflow, an end within seconds, and no more memory than [`Target::memory`] says.
//! What else each asserts stands at its function.

// An assertion that fails is what a target is for.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod archive;
mod backup;
mod control;
mod disk;
mod ext4;
mod fixup;
mod input;
mod layer;
pub mod mutate;
mod nbd;
mod registry;
mod store;
mod text;
mod vhost;

use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// A name and bytes: an entry of a corpus.
pub type Seed = (String, Vec<u8>);

/// Something that takes bytes which nobody vouches for.
pub struct Target {
    /// Also the name of its binary and of its corpus' directory.
    pub name: &'static str,
    /// The longest input that makes sense, in bytes.
    pub max_len: usize,
    /// Memory that an input may make us take, in bytes.
    pub memory: usize,
    /// And for each byte of the input that much more.
    pub memory_per_byte: usize,
    run: fn(&[u8]),
    seeds: fn() -> Vec<Seed>,
}

const MIB: usize = 1 << 20;

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "layer_header",
        max_len: 1024,
        memory: MIB,
        memory_per_byte: 16,
        run: layer::header,
        seeds: layer::header_seeds,
    },
    Target {
        name: "layer_map",
        max_len: 16 << 10,
        memory: LAYER_MEMORY,
        memory_per_byte: LAYER_MEMORY_PER_BYTE,
        run: layer::map,
        seeds: layer::map_seeds,
    },
    Target {
        name: "layer_seal",
        max_len: 16 << 10,
        memory: LAYER_MEMORY,
        memory_per_byte: LAYER_MEMORY_PER_BYTE,
        run: layer::seal,
        seeds: layer::seal_seeds,
    },
    Target {
        name: "layer_journal",
        max_len: 32 << 10,
        memory: LAYER_MEMORY,
        memory_per_byte: LAYER_MEMORY_PER_BYTE,
        run: layer::journal,
        seeds: layer::journal_seeds,
    },
    Target {
        name: "layer_live",
        max_len: 4 << 10,
        memory: LAYER_MEMORY,
        memory_per_byte: LAYER_MEMORY_PER_BYTE,
        run: layer::live,
        seeds: layer::live_seeds,
    },
    Target {
        name: "layer_have",
        max_len: 16 << 10,
        memory: LAYER_MEMORY,
        memory_per_byte: LAYER_MEMORY_PER_BYTE,
        run: layer::have,
        seeds: layer::have_seeds,
    },
    Target {
        name: "layer_open",
        max_len: 32 << 10,
        memory: LAYER_MEMORY,
        memory_per_byte: LAYER_MEMORY_PER_BYTE,
        run: layer::open,
        seeds: layer::open_seeds,
    },
    Target {
        name: "store_records",
        max_len: 16 << 10,
        memory: 16 * MIB,
        memory_per_byte: 256,
        run: store::records,
        seeds: store::records_seeds,
    },
    Target {
        name: "nbd_session",
        max_len: 64 << 10,
        // The longest payload of a request, and of a reply.
        memory: 2 * (32 << 20) + 8 * MIB,
        memory_per_byte: 4096,
        run: nbd::session,
        seeds: nbd::session_seeds,
    },
    Target {
        name: "vhost_queue",
        max_len: 16 << 10,
        // The disk, and a piece of a request.
        memory: 8 * MIB,
        memory_per_byte: 256,
        run: vhost::queue,
        seeds: vhost::queue_seeds,
    },
    Target {
        name: "image_tar",
        max_len: 32 << 10,
        memory: 48 * MIB,
        memory_per_byte: 256,
        run: archive::tar,
        seeds: archive::tar_seeds,
    },
    Target {
        name: "image_archive",
        max_len: 32 << 10,
        // Of a zstd frame's window, the format's own advice is 128 MiB at most.
        memory: 192 * MIB,
        memory_per_byte: 256,
        run: archive::archive,
        seeds: archive::archive_seeds,
    },
    Target {
        name: "image_qcow2",
        max_len: 16 << 10,
        memory: 64 * MIB,
        memory_per_byte: 256,
        run: disk::qcow2,
        seeds: disk::qcow2_seeds,
    },
    Target {
        name: "filter",
        max_len: 512,
        // What a regular expression may become.
        memory: 64 * MIB,
        memory_per_byte: 1024,
        run: text::filter,
        seeds: text::filter_seeds,
    },
    Target {
        name: "config",
        max_len: 4096,
        memory: 4 * MIB,
        memory_per_byte: 1024,
        run: text::config,
        seeds: text::config_seeds,
    },
    Target {
        name: "superblock",
        max_len: 2048,
        memory: MIB,
        memory_per_byte: 16,
        run: text::superblock,
        seeds: text::superblock_seeds,
    },
    Target {
        name: "ext4",
        max_len: 4096,
        // Both states, and what is made of them.
        memory: 32 * MIB,
        memory_per_byte: 256,
        run: ext4::ext4,
        seeds: ext4::ext4_seeds,
    },
    Target {
        name: "control",
        max_len: 16 << 10,
        memory: 4 * MIB,
        memory_per_byte: 256,
        run: control::control,
        seeds: control::control_seeds,
    },
    Target {
        name: "authority",
        max_len: 8 << 10,
        memory: 4 * MIB,
        memory_per_byte: 64,
        run: control::authority,
        seeds: control::authority_seeds,
    },
    Target {
        name: "registry_table",
        max_len: 16 << 10,
        memory: MIB,
        memory_per_byte: 256,
        run: registry::table,
        seeds: registry::table_seeds,
    },
    Target {
        name: "registry_hot",
        max_len: 16 << 10,
        memory: MIB,
        memory_per_byte: 64,
        run: registry::hot,
        seeds: registry::hot_seeds,
    },
    Target {
        name: "backup",
        max_len: 8 << 10,
        // A description, a chunk as it is stored and as it is read, and what zstd works with.
        memory: 16 * MIB,
        memory_per_byte: 16,
        run: backup::backup,
        seeds: backup::backup_seeds,
    },
];

/// A layer's map: 16 bytes for each 2 GiB of virtual size, of which there may be 64 TiB, twice
/// while they grow, in the layer and in its chain, before and after it was closed.
const LAYER_MEMORY: usize = 64 * MIB;
/// 24 bytes of a map or 16 of a journal may begin two nodes of the index, 12 KiB each; and a chain
/// has an index of its own.
const LAYER_MEMORY_PER_BYTE: usize = 4096;

impl Target {
    /// The target of that name.
    pub fn named(name: &str) -> &'static Target {
        let found = TARGETS.iter().find(|target| target.name == name);
        found.expect("no target of that name")
    }

    /// The entries that its corpus begins with: the same each time.
    pub fn seeds(&self) -> Vec<Seed> {
        (self.seeds)()
    }

    /// Feeds it `input`.
    ///
    /// # Panics
    /// Where something does not hold.
    pub fn check(&self, input: &[u8]) {
        let input = &input[..input.len().min(self.max_len)];
        MEMORY.reset_peak_usage();
        let before = MEMORY.current_usage();
        (self.run)(input);
        let used = MEMORY.peak_usage().saturating_sub(before);
        let allowed = self.memory + self.memory_per_byte * input.len();
        assert!(
            used <= allowed,
            "{}: {} bytes of input made us take {used} bytes of memory, {allowed} are allowed",
            self.name,
            input.len()
        );
    }
}

/// What a binary of `tools/fuzz/fuzz_targets` does with an input.
pub fn fuzz(name: &str, input: &[u8]) {
    Target::named(name).check(input);
}
