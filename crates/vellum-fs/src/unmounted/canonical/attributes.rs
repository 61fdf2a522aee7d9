//! Extended attributes as ext4 keeps them: in the inode as far as they fit, then in a block, and large ones
//! in inodes of their own.
//!
//! Source: the kernel's Documentation/filesystems/ext4/attributes.rst, and fs/ext4/xattr.c for the hashes.

use super::super::checksum::{crc, crc_but};
use super::super::inode::OLD_SIZE;
use super::super::xattrs::Xattrs;
use super::super::{corrupt, unknown};
use super::form::INODE;
use crate::fields::{put_u16, put_u32, u32_at};
use vellum_base::block::{BLOCK_LEN, part, part_mut};
use vellum_base::error::Result;

const MAGIC: u32 = 0xEA02_0000;
/// Bytes of the inode's fields beyond those of the first ext2.
pub(super) const EXTRA_SIZE: usize = 32;
/// Where attributes begin in an inode.
pub(super) const IN_INODE_AT: usize = OLD_SIZE + EXTRA_SIZE;
/// Bytes before the entries: in an inode, and of a block.
const INODE_HEAD: usize = 4;
const BLOCK_HEAD: usize = 32;
/// Bytes of an entry before its name, and of the end of a list.
const ENTRY: usize = 16;
const END: usize = 4;
/// Where a block has the number of inodes that share it, its hash and its checksum.
const REFERENCES_AT: usize = 0x4;
const HASH_AT: usize = 0xC;
const CHECKSUM_AT: usize = 0x10;
/// How many inodes may share a block.
pub(super) const MAX_REFERENCES: u32 = 1024;
/// Longer values get inodes of their own: the first of these with which the rest fits.
const LIMITS: [usize; 5] = [usize::MAX, 2048, 512, 128, 0];

/// The attributes of a file, ready to be written.
#[derive(Debug)]
pub(super) struct Attributes<'a> {
    /// Those in the inode.
    own: Vec<Attribute<'a>>,
    /// Those in the block.
    shared: Vec<Attribute<'a>>,
}

#[derive(Debug)]
pub(super) struct Attribute<'a> {
    index: u8,
    name: &'a [u8],
    value: &'a [u8],
    /// The value has an inode of its own.
    apart: bool,
}

impl Attribute<'_> {
    fn entry_len(&self) -> usize {
        (ENTRY + self.name.len()).next_multiple_of(4)
    }

    fn len(&self) -> usize {
        let value = if self.apart { 0 } else { self.value.len() };
        self.entry_len() + value.next_multiple_of(4)
    }
}

/// Says where each attribute goes.
///
/// # Errors
/// [`vellum_base::ErrorKind::Unsupported`] where there are too many.
pub(super) fn arrange(xattrs: &Xattrs) -> Result<Attributes<'_>> {
    for limit in LIMITS {
        let mut sorted = Vec::new();
        for (name, value) in xattrs {
            let (index, name) = short_name(name)?;
            let apart = value.len() > limit;
            sorted.push(Attribute {
                index,
                name,
                value,
                apart,
            });
        }
        sorted.sort_by_key(|one| (one.index, one.name.len(), one.name));
        let mut rooms = [
            INODE - IN_INODE_AT - INODE_HEAD - END,
            BLOCK_LEN - BLOCK_HEAD - END,
        ];
        let mut lists = [Vec::new(), Vec::new()];
        let mut fits = true;
        for attribute in sorted {
            let mut places = rooms.iter_mut().zip(&mut lists);
            match places.find(|(room, _)| attribute.len() <= **room) {
                Some((room, list)) => {
                    *room -= attribute.len();
                    list.push(attribute);
                }
                None => fits = false,
            }
        }
        if fits {
            let [own, shared] = lists;
            return Ok(Attributes { own, shared });
        }
    }
    Err(unknown("a file has too many extended attributes"))
}

impl<'a> Attributes<'a> {
    /// The values that have inodes of their own: those of the inode's attributes, or of the block's.
    pub fn apart(&self, in_block: bool) -> Vec<&'a [u8]> {
        let list = if in_block { &self.shared } else { &self.own };
        let apart = list.iter().filter(|one| one.apart);
        apart.map(|one| one.value).collect()
    }

    /// The bytes of an inode from [`IN_INODE_AT`] on. `holders` are the inodes of the values that have
    /// some, in their order; `seed` is the file system's.
    pub fn in_inode(&self, holders: &[u32], seed: u32) -> [u8; INODE - IN_INODE_AT] {
        let mut bytes = [0; INODE - IN_INODE_AT];
        if !self.own.is_empty() {
            put_u32(&mut bytes, 0, MAGIC);
            // Values are counted from the first entry.
            let list = part_mut(&mut bytes, INODE_HEAD, INODE - IN_INODE_AT - INODE_HEAD);
            fill(list, 0, &self.own, holders, seed, false);
        }
        bytes
    }

    /// The block, which no inode has yet; `None` where none is needed.
    pub fn block(&self, holders: &[u32], seed: u32) -> Option<[u8; BLOCK_LEN]> {
        if self.shared.is_empty() {
            return None;
        }
        let mut block = [0; BLOCK_LEN];
        put_u32(&mut block, 0, MAGIC);
        put_u32(&mut block, 8, 1);
        fill(&mut block, BLOCK_HEAD, &self.shared, holders, seed, true);
        Some(block)
    }
}

/// Puts entries from `at` on, and their values behind each other up to the end.
fn fill(
    bytes: &mut [u8],
    at: usize,
    list: &[Attribute<'_>],
    holders: &[u32],
    seed: u32,
    hashed: bool,
) {
    let mut holders = holders.iter();
    let (mut at, mut end) = (at, bytes.len());
    let mut all = 0u32;
    let mut known = true;
    for one in list {
        let mut hash = 0;
        part_mut(bytes, at, 2).copy_from_slice(&[one.name.len() as u8, one.index]);
        put_u32(bytes, at + 8, one.value.len() as u32);
        part_mut(bytes, at + ENTRY, one.name.len()).copy_from_slice(one.name);
        if one.apart {
            let holder = holders.next();
            assert!(holder.is_some(), "each value apart has an inode");
            put_u32(bytes, at + 4, holder.map_or(0, |holder| *holder));
            hash = entry_hash(one.name, &value_hash(seed, one.value).to_le_bytes());
        } else {
            let len = one.value.len().next_multiple_of(4);
            end -= len;
            part_mut(bytes, end, one.value.len()).copy_from_slice(one.value);
            if len > 0 {
                put_u16(bytes, at + 2, end as u16);
            }
            if hashed {
                hash = entry_hash(one.name, part(bytes, end, len));
            }
        }
        put_u32(bytes, at + 12, hash);
        known &= hash != 0;
        all = all.rotate_left(16) ^ hash;
        at += one.entry_len();
    }
    if hashed {
        // One whose hash is 0 keeps the kernel from sharing the block.
        put_u32(bytes, HASH_AT, if known { all } else { 0 });
    }
}

/// The hash of a value that has an inode of its own, as that inode has it.
pub(super) fn value_hash(seed: u32, value: &[u8]) -> u32 {
    crc(seed, value)
}

fn entry_hash(name: &[u8], value: &[u8]) -> u32 {
    let of_name = name
        .iter()
        .fold(0u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte));
    let words = value.chunks_exact(4).map(|word| u32_at(word, 0));
    words.fold(of_name, |hash, word| hash.rotate_left(16) ^ word)
}

/// How many inodes share a block of attributes.
pub(super) fn references(block: &[u8]) -> u32 {
    u32_at(block, REFERENCES_AT)
}

/// Has a block at `number` say that so many inodes share it, with its checksum.
pub(super) fn set_references(block: &mut [u8], number: u64, references: u32, seed: u32) {
    put_u32(block, REFERENCES_AT, references);
    let sum = crc_but(crc(seed, &number.to_le_bytes()), block, CHECKSUM_AT, 4);
    put_u32(block, CHECKSUM_AT, sum);
}

/// The number that stands for how a name begins, and the rest of it.
fn short_name(name: &[u8]) -> Result<(u8, &[u8])> {
    let lists: [(&[u8], u8); 2] = [
        (b"system.posix_acl_access", 2),
        (b"system.posix_acl_default", 3),
    ];
    let begins: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    if let Some((_, index)) = lists.iter().find(|(list, _)| *list == name) {
        return Ok((*index, b""));
    }
    let found = begins.iter().find_map(|(begin, index)| {
        let rest = name.strip_prefix(*begin)?;
        Some((*index, rest))
    });
    found.ok_or_else(|| corrupt("an extended attribute has a name that none has"))
}
