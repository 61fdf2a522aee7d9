//! Two states of an ext4, compared by their blocks: bytes of one of them are others than the kernel wrote.
//! `fixtures/make` made them.

use std::io;
use std::ops::Range;
use std::sync::LazyLock;

use vellum_base::block::{in_memory, part, part_mut};
use vellum_base::{Error, ErrorKind, Result};
use vellum_engine::diff::diff_devices;
use vellum_fs::unmounted::Source;
use vellum_image::Comparison;

use crate::Seed;
use crate::input::{put_piece, take_piece, with_mode};

const OLDER: &[u8] = include_bytes!("../fixtures/ext4-older.zst");
const NEWER: &[u8] = include_bytes!("../fixtures/ext4-newer.zst");

/// Bytes that are compared and damaged together.
const BLOCK: usize = 1024;
/// Choices: damage the older state; take all blocks as changed.
const DAMAGE_OLDER: u8 = 1;
const ALL: u8 = 2;

struct States {
    older: Vec<u8>,
    newer: Vec<u8>,
    /// Blocks of the newer state that say something.
    used: Vec<usize>,
}

static STATES: LazyLock<States> = LazyLock::new(|| {
    let decode = |bytes| zstd::decode_all(io::Cursor::new(bytes)).unwrap();
    let (older, newer) = (decode(OLDER), decode(NEWER));
    let blocks = newer.chunks(BLOCK).enumerate();
    let used = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != block[0]));
    let used = used.map(|(number, _)| number).collect();
    States { older, newer, used }
});

struct Image(Vec<u8>);

impl Source for Image {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn fill(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.bytes()) {
            return Err(Error::new(ErrorKind::OutOfRange, "beyond the end"));
        }
        buf.copy_from_slice(part(&self.0, in_memory(offset), buf.len()));
        Ok(())
    }
}

/// A byte of choices, then pieces: a place (two bytes, among the blocks that are used) and what lies
/// there. Whatever it is, they are compared, or an error says that they cannot be.
pub fn ext4(input: &[u8]) {
    let (choice, mut rest) = input.split_first().unwrap_or((&0, &[]));
    let (mut older, mut newer) = (STATES.older.clone(), STATES.newer.clone());
    let damaged = match choice & DAMAGE_OLDER {
        0 => &mut newer,
        _ => &mut older,
    };
    while let Some([low, high, bytes @ ..]) = take_piece(&mut rest) {
        let place = usize::from(u16::from_le_bytes([*low, *high]));
        let block = STATES.used[place / BLOCK % STATES.used.len()];
        let at = block * BLOCK + place % BLOCK;
        let len = bytes.len().min(damaged.len() - at);
        part_mut(damaged, at, len).copy_from_slice(part(bytes, 0, len));
    }
    let blocks = STATES.older.chunks(BLOCK).zip(STATES.newer.chunks(BLOCK));
    let differ = blocks.map(|(old, new)| old != new || choice & ALL != 0);
    let differing: Vec<Range<u64>> = (0u64..)
        .zip(differ)
        .filter(|(_, differs)| *differs)
        .map(|(block, _)| block * BLOCK as u64..(block + 1) * BLOCK as u64)
        .collect();
    let (older, newer) = (Image(older), Image(newer));
    let comparison = Comparison {
        contents: true,
        ..Comparison::default()
    };
    if let Err(error) = diff_devices(&older, &newer, &differing, &comparison) {
        assert!(
            matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported),
            "{error:?}"
        );
    }
}

pub fn ext4_seeds() -> Vec<Seed> {
    let seed = |choice: u8, places: &[(u16, &[u8])]| {
        let mut pieces = Vec::new();
        for (place, bytes) in places {
            put_piece(&mut pieces, &[&place.to_le_bytes()[..], bytes].concat());
        }
        with_mode(choice, &pieces)
    };
    // In the superblock, which is the first block that is used.
    let (feature, first) = ((0x60, &[0u8, 0x40, 0, 0][..]), (0x54, &[200u8, 0][..]));
    let mut seeds = vec![
        ("nothing".into(), seed(0, &[])),
        ("feature".into(), seed(0, &[feature])),
        ("reserved".into(), seed(DAMAGE_OLDER, &[first])),
    ];
    // What is there already, in places that a change of the input damages then.
    let used = STATES.used.iter().zip(0u16..);
    let places: Vec<(u16, &[u8])> = used
        .flat_map(|(block, number)| {
            let bytes = STATES.newer[block * BLOCK..][..BLOCK].chunks(8);
            let bytes = (number * BLOCK as u16..).step_by(8).zip(bytes);
            bytes.filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0))
        })
        .collect();
    let quarter = places.len().div_ceil(4);
    for (number, places) in places.chunks(quarter).enumerate() {
        let some: Vec<_> = places
            .iter()
            .step_by(quarter.div_ceil(300))
            .copied()
            .collect();
        seeds.push((
            format!("as-it-is-{number}"),
            seed(ALL * (number as u8 & 1), &some),
        ));
    }
    seeds
}
