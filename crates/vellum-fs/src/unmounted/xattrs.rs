//! Extended attributes, as listxattr(2) and getxattr(2) show them to root.

use std::collections::BTreeMap;

use super::checksum::{crc, crc_but};
use super::inode::Inode;
use super::{FileSystem, corrupt};
use crate::fields::Fields;
use vellum_base::block::part_from;
use vellum_base::error::Result;

/// Values by full names (`user.x`, `security.capability`). Those of access control lists are in the
/// form in which ext4 keeps them, which is another than getxattr(2)'s: two are the same in both or in
/// neither.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

const MAGIC: u32 = 0xEA02_0000;
/// Bytes before the entries: of a block, and in an inode.
const BLOCK_HEAD: usize = 32;
const INODE_HEAD: usize = 4;
/// Bytes of an entry before its name.
const ENTRY: usize = 16;
/// Where a block of attributes has its checksum.
const CHECKSUM_AT: usize = 0x10;
/// The largest value that the kernel takes.
const MAX_VALUE: u32 = 64 << 10;

impl FileSystem<'_> {
    /// The extended attributes of an inode.
    ///
    /// # Errors
    /// [`vellum_base::ErrorKind::Corrupt`] where they make no sense; as [`super::Source::fill`].
    pub fn xattrs(&self, inode: &Inode) -> Result<Xattrs> {
        let mut found = Xattrs::new();
        let own = inode.own_xattrs()?;
        if Fields(own).u32(0) == Some(MAGIC) {
            let (_, own) = own.split_at(INODE_HEAD);
            // In the inode, values are counted from the first entry.
            self.read_entries(inode, own, own, &mut found)?;
        }
        if let Some(number) = inode.xattr_block() {
            let block = self.blocks(number, 1)?;
            let bad = || bad(inode, "their block makes no sense");
            if Fields(&block).u32(0) != Some(MAGIC) {
                return Err(bad());
            }
            if let Some(seed) = self.layout.seed {
                let sum = crc_but(crc(seed, &number.to_le_bytes()), &block, CHECKSUM_AT, 4);
                if Fields(&block).u32(CHECKSUM_AT) != Some(sum) {
                    return Err(bad());
                }
            }
            let (_, entries) = block.split_at(BLOCK_HEAD);
            self.read_entries(inode, entries, &block, &mut found)?;
        }
        Ok(found)
    }

    /// Reads the entries in `entries`, whose values lie in `values`.
    fn read_entries(
        &self,
        inode: &Inode,
        entries: &[u8],
        values: &[u8],
        found: &mut Xattrs,
    ) -> Result<()> {
        let cut = || bad(inode, "they are cut");
        each_entry(inode, entries, &mut |entry| {
            let Some(name) = full_name(entry.index, entry.name) else {
                return Ok(());
            };
            let value = if entry.holder != 0 {
                self.value_of(inode, entry.holder, entry.size)?
            } else {
                let end = entry.offset.checked_add(entry.size as usize);
                let value = values.get(entry.offset..end.ok_or_else(cut)?);
                value.ok_or_else(cut)?.to_vec()
            };
            // One that is in the inode hides one in the block, which there should not be.
            found.entry(name).or_insert(value);
            Ok(())
        })
    }

    /// The inodes that hold values of an inode's own attributes, or of those in its block.
    pub(super) fn holders(&self, inode: &Inode, in_block: bool) -> Result<Vec<u32>> {
        let mut holders = Vec::new();
        let mut each = |entry: Entry<'_>| {
            holders.extend(Some(entry.holder).filter(|holder| *holder != 0));
            Ok(())
        };
        if in_block {
            if let Some(number) = inode.xattr_block() {
                let block = self.blocks(number, 1)?;
                each_entry(inode, part_from(&block, BLOCK_HEAD), &mut each)?;
            }
        } else {
            let own = inode.own_xattrs()?;
            if Fields(own).u32(0) == Some(MAGIC) {
                each_entry(inode, part_from(own, INODE_HEAD), &mut each)?;
            }
        }
        Ok(holders)
    }

    /// A value that has an inode of its own.
    fn value_of(&self, inode: &Inode, holder: u32, size: u32) -> Result<Vec<u8>> {
        let value = self.inode(holder)?.filter(Inode::is_value);
        let value = value.ok_or_else(|| bad(inode, "the inode of a value is none"))?;
        if size > MAX_VALUE || value.size() != u64::from(size) {
            return Err(bad(inode, "a value of another size"));
        }
        self.content(&value)
    }
}

/// An entry as it lies there.
struct Entry<'a> {
    /// What its name begins with.
    index: u8,
    name: &'a [u8],
    /// Where its value lies.
    offset: usize,
    /// The inode that holds its value; 0 where none does.
    holder: u32,
    /// Bytes of its value.
    size: u32,
}

/// Calls `each` with all entries of a list.
fn each_entry(
    inode: &Inode,
    entries: &[u8],
    each: &mut dyn FnMut(Entry<'_>) -> Result<()>,
) -> Result<()> {
    let cut = || bad(inode, "they are cut");
    let mut rest = entries;
    // Four zero bytes end the list; in an inode that is full, its end does.
    while !matches!(Fields(rest).u32(0), Some(0) | None) {
        let fields = Fields(rest);
        let name_len = usize::from(fields.u8(0).ok_or_else(cut)?);
        let entry = Entry {
            index: fields.u8(1).ok_or_else(cut)?,
            name: rest.get(ENTRY..ENTRY + name_len).ok_or_else(cut)?,
            offset: usize::from(fields.u16(2).ok_or_else(cut)?),
            holder: fields.u32(4).ok_or_else(cut)?,
            size: fields.u32(8).ok_or_else(cut)?,
        };
        let next = (ENTRY + name_len).next_multiple_of(4);
        rest = rest.get(next..).ok_or_else(cut)?;
        each(entry)?;
    }
    Ok(())
}

/// The name that the kernel shows; `None` for one that it does not.
fn full_name(index: u8, name: &[u8]) -> Option<Vec<u8>> {
    let prefix: &[u8] = match index {
        1 => b"user.",
        2 => return Some(b"system.posix_acl_access".to_vec()),
        3 => return Some(b"system.posix_acl_default".to_vec()),
        4 => b"trusted.",
        6 => b"security.",
        _ => return None,
    };
    Some([prefix, name].concat())
}

fn bad(inode: &Inode, what: &str) -> vellum_base::Error {
    corrupt(format!(
        "the extended attributes of inode {}: {what}",
        inode.number()
    ))
}
