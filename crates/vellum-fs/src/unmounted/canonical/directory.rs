//! The blocks of a directory: one with its names sorted, or leaves below a hash tree.
//!
//! Source: the kernel's Documentation/filesystems/ext4/directory.rst; how full leaves are is as e2fsck -D
//! leaves them.

use super::super::checksum::crc;
use super::super::unknown;
use super::hash::Hasher;
use crate::fields::{put_u16, put_u32};
use vellum_base::block::{BLOCK_LEN, part, part_mut};
use vellum_base::error::Result;

/// Bytes of an entry before its name.
const HEAD: usize = 8;
/// Bytes of the entry at the end of a block of names that holds the checksum, and its type.
const TAIL: usize = 12;
const TAIL_TYPE: u8 = 0xDE;
/// Bytes of the entries `.` and `..`.
const DOT: usize = 12;
/// What is put into a leaf of the hash tree, so that names to come do not split it at once.
const LEAF_FILL: usize = (BLOCK_LEN - TAIL) / 5 * 4;
/// Entries of the root of a hash tree and of the nodes below it, each of 8 bytes, of which the last is the
/// checksum.
const NODE_ENTRY: usize = 8;
const ROOT_AT: usize = 2 * DOT + 8;
const ROOT_ROOM: usize = (BLOCK_LEN - ROOT_AT) / NODE_ENTRY - 1;
const NODE_ROOM: usize = (BLOCK_LEN - HEAD) / NODE_ENTRY - 1;
/// The hash tree hashes by half MD4.
const HALF_MD4: u8 = 1;
/// The type of a directory in an entry.
const DIRECTORY_TYPE: u8 = 2;

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub name: Vec<u8>,
    pub inode: u32,
    pub file_type: u8,
}

impl Name {
    fn len(&self) -> usize {
        (HEAD + self.name.len()).next_multiple_of(4)
    }
}

/// The blocks of a directory, and whether they are a hash tree.
pub(super) struct Made {
    pub blocks: Vec<[u8; BLOCK_LEN]>,
    pub indexed: bool,
}

/// Makes the blocks of the directory `own` in `parent` with these names, sorted by their bytes; `seed`
/// begins their checksums.
///
/// # Errors
/// [`vellum_base::ErrorKind::Unsupported`] where there are too many.
pub(super) fn make(
    own: u32,
    parent: u32,
    names: &[Name],
    hasher: &Hasher,
    seed: u32,
) -> Result<Made> {
    let dot = |name: &[u8], inode| Name {
        name: name.to_vec(),
        inode,
        file_type: DIRECTORY_TYPE,
    };
    let dots = [dot(b".", own), dot(b"..", parent)];
    let total: usize = names.iter().map(Name::len).sum();
    if 2 * DOT + total <= BLOCK_LEN - TAIL {
        let all: Vec<&Name> = dots.iter().chain(names).collect();
        return Ok(Made {
            blocks: vec![leaf(&all, seed)],
            indexed: false,
        });
    }
    let leaves = split(names, hasher);
    let levels = usize::from(leaves.len() > ROOT_ROOM);
    let nodes = if levels == 0 {
        0
    } else {
        leaves.len().div_ceil(NODE_ROOM)
    };
    if nodes > ROOT_ROOM {
        return Err(unknown("a directory has too many names"));
    }
    // The root, then the nodes below it, then the leaves.
    let hashes = leaves.iter().map(|leaf| leaf.hash);
    let below: Vec<(u32, u32)> = hashes.zip(1 + nodes as u32..).collect();
    let mut blocks = vec![[0; BLOCK_LEN]];
    let mut above = Vec::new();
    if levels > 0 {
        for (entries, block) in below.chunks(NODE_ROOM).zip(1..) {
            above.push((entries.first().map_or(0, |entry| entry.0), block));
            blocks.push(node(entries, seed));
        }
    }
    let root = root(
        &dots,
        if levels > 0 { &above } else { &below },
        levels as u8,
        seed,
    );
    if let Some(first) = blocks.first_mut() {
        *first = root;
    }
    blocks.extend(leaves.iter().map(|each| leaf(&each.names, seed)));
    Ok(Made {
        blocks,
        indexed: true,
    })
}

/// What goes into a leaf of a hash tree.
struct Leaf<'a> {
    /// The lowest hash in it; 1 more where names of the same hash are in the leaf before.
    hash: u32,
    names: Vec<&'a Name>,
}

fn split<'a>(names: &'a [Name], hasher: &Hasher) -> Vec<Leaf<'a>> {
    let mut hashed: Vec<_> = names
        .iter()
        .map(|name| (hasher.hash(&name.name), name))
        .collect();
    hashed.sort_unstable();
    let mut leaves: Vec<Leaf<'a>> = Vec::new();
    let (mut room, mut last) = (0, 0);
    for ((hash, _), name) in hashed {
        match leaves.last_mut() {
            Some(leaf) if name.len() <= room => leaf.names.push(name),
            before => {
                let goes_on = before.is_some() && hash == last;
                // What comes before the first leaf's names is looked for in it too.
                let lowest = if leaves.is_empty() { 0 } else { hash };
                room = LEAF_FILL;
                leaves.push(Leaf {
                    hash: lowest | u32::from(goes_on),
                    names: vec![name],
                });
            }
        }
        room -= name.len();
        last = hash;
    }
    leaves
}

/// Puts an entry of `len` bytes at `at`.
fn put(block: &mut [u8], at: usize, len: usize, name: &Name) {
    put_u32(block, at, name.inode);
    put_u16(block, at + 4, len as u16);
    let kind = [name.name.len() as u8, name.file_type];
    part_mut(block, at + 6, 2).copy_from_slice(&kind);
    part_mut(block, at + HEAD, name.name.len()).copy_from_slice(&name.name);
}

/// A block of names.
fn leaf(names: &[&Name], seed: u32) -> [u8; BLOCK_LEN] {
    let mut block = [0; BLOCK_LEN];
    let end = BLOCK_LEN - TAIL;
    let mut at = 0;
    for (index, name) in names.iter().enumerate() {
        // The last one has all that is left.
        let len = if index + 1 == names.len() {
            end - at
        } else {
            name.len()
        };
        put(&mut block, at, len, name);
        at += len;
    }
    put_u16(&mut block, end + 4, TAIL as u16);
    part_mut(&mut block, end + 7, 1).fill(TAIL_TYPE);
    let sum = crc(seed, part(&block, 0, end));
    put_u32(&mut block, end + 8, sum);
    block
}

fn root(dots: &[Name; 2], entries: &[(u32, u32)], levels: u8, seed: u32) -> [u8; BLOCK_LEN] {
    let mut block = [0; BLOCK_LEN];
    let [own, parent] = dots;
    put(&mut block, 0, DOT, own);
    put(&mut block, DOT, BLOCK_LEN - DOT, parent);
    let info = [HALF_MD4, 8, levels, 0];
    part_mut(&mut block, 2 * DOT + 4, 4).copy_from_slice(&info);
    put_entries(&mut block, ROOT_AT, ROOT_ROOM, entries, seed);
    block
}

fn node(entries: &[(u32, u32)], seed: u32) -> [u8; BLOCK_LEN] {
    let mut block = [0; BLOCK_LEN];
    put_u16(&mut block, 4, BLOCK_LEN as u16);
    put_entries(&mut block, HEAD, NODE_ROOM, entries, seed);
    block
}

/// Puts hashes and blocks of the directory into a node, whose first hash makes place for their number.
fn put_entries(block: &mut [u8], at: usize, room: usize, entries: &[(u32, u32)], seed: u32) {
    for (index, (hash, child)) in entries.iter().enumerate() {
        put_u32(block, at + NODE_ENTRY * index, *hash);
        put_u32(block, at + NODE_ENTRY * index + 4, *child);
    }
    put_u16(block, at, room as u16);
    put_u16(block, at + 2, entries.len() as u16);
    let covered = part(block, 0, at + NODE_ENTRY * entries.len());
    // The tail counts with its checksum as zero.
    let sum = crc(crc(seed, covered), &[0; NODE_ENTRY]);
    put_u32(block, at + NODE_ENTRY * room + 4, sum);
}
