//! Which inodes are new, gone, or the same file with something else.

use std::collections::BTreeMap;

use super::super::changed::{Ranges, changed_inodes};
use super::super::inode::{Inode, MAP_LEN, OLD_SIZE};
use super::super::{FileSystem, ROOT, corrupt, unknown};
use super::attributes::EXTRA_SIZE;
use super::directory::Name;
use super::form::INODE;
use crate::fields::u16_at;
use vellum_base::block::part;
use vellum_base::error::Result;

/// Where an inode has its map.
pub(super) const MAP_AT: usize = 0x28;
const GENERATION: usize = 0x64;
const MADE_AT: usize = 0x90;

/// What a directory holds, by the numbers of the newer state.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Listing {
    pub parent: u32,
    /// Sorted.
    pub names: Vec<Name>,
}

/// A file of both states that changed.
pub(super) struct Kept {
    pub old: Inode,
    pub new: Inode,
    /// Of a directory: what it holds.
    pub listing: Option<Listing>,
    /// Its blocks stay as they are.
    pub same_content: bool,
    /// So do its attributes.
    pub same_attributes: bool,
}

/// A file that only the newer state has.
pub(super) struct Fresh {
    pub inode: Inode,
    pub listing: Option<Listing>,
}

/// What changed.
#[derive(Default)]
pub(super) struct Changes {
    pub kept: BTreeMap<u32, Kept>,
    /// By their numbers in the newer state.
    pub fresh: BTreeMap<u32, Fresh>,
    pub gone: BTreeMap<u32, Inode>,
}

impl Changes {
    /// Finds what changed, of which all lies in `differing`.
    pub fn find(
        older: &FileSystem<'_>,
        newer: &FileSystem<'_>,
        differing: &Ranges,
    ) -> Result<Changes> {
        let mut changes = Changes::default();
        let mut both = BTreeMap::new();
        for group in 0..newer.groups.len() {
            changed_inodes(older, newer, group, differing, &mut |number, old, new| {
                if number < newer.layout.first_inode && number != ROOT {
                    return Err(unknown(format!("the reserved inode {number} changed")));
                }
                // Values of attributes come and go with their attributes.
                let old = old.filter(|inode| !inode.is_value());
                let new = new.filter(|inode| !inode.is_value());
                if let (Some(old), Some(new)) = (&old, &new)
                    && is_same(old, new)
                {
                    both.insert(number, (old.clone(), new.clone()));
                    return Ok(());
                }
                if let Some(old) = old {
                    changes.gone.insert(number, old);
                }
                if let Some(inode) = new {
                    let listing = listing(newer, &inode)?;
                    check_form(&inode)?;
                    changes.fresh.insert(number, Fresh { inode, listing });
                }
                Ok(())
            })?;
        }
        for (number, (old, new)) in both {
            let kept = changes.kept(older, newer, old, new, differing)?;
            changes.kept.insert(number, kept);
        }
        Ok(changes)
    }

    fn kept(
        &self,
        older: &FileSystem<'_>,
        newer: &FileSystem<'_>,
        old: Inode,
        new: Inode,
        differing: &Ranges,
    ) -> Result<Kept> {
        check_form(&old)?;
        check_form(&new)?;
        let listing = listing(newer, &new)?;
        let same_content = match &listing {
            Some(listing) => {
                let mut inodes = listing.names.iter().map(|name| name.inode);
                // The same number may be that of another file now.
                let fresh = |inode: u32| self.fresh.contains_key(&inode);
                !fresh(listing.parent)
                    && !inodes.any(fresh)
                    && self::listing(older, &old)?.as_ref() == Some(listing)
            }
            None => {
                let blocks = newer.blocks_of(&new)?;
                let content = blocks.content.iter();
                let mut ranges = content
                    .map(|extent| extent.physical..extent.physical + extent.len)
                    .chain(blocks.tree.iter().map(|block| *block..*block + 1));
                part(old.raw(), MAP_AT, MAP_LEN) == part(new.raw(), MAP_AT, MAP_LEN)
                    && !ranges.any(|range| differing.meets(&range))
            }
        };
        Ok(Kept {
            same_attributes: older.xattrs(&old)? == newer.xattrs(&new)?,
            old,
            new,
            listing,
            same_content,
        })
    }
}

/// Whether an inode is that of the same file in both states. The kernel gives each new one a random
/// generation and the time at which it was made.
fn is_same(old: &Inode, new: &Inode) -> bool {
    let identity = |inode: &Inode| {
        let made_at = inode.raw().get(MADE_AT..MADE_AT + 8).map(<[u8]>::to_vec);
        (part(inode.raw(), GENERATION, 4).to_vec(), made_at)
    };
    old.mode() & libc::S_IFMT == new.mode() & libc::S_IFMT && identity(old) == identity(new)
}

fn check_form(inode: &Inode) -> Result<()> {
    let raw = inode.raw();
    if raw.len() == INODE && usize::from(u16_at(raw, OLD_SIZE)) == EXTRA_SIZE {
        return Ok(());
    }
    Err(unknown(format!(
        "inode {} has other fields than the driver's have",
        inode.number()
    )))
}

/// What a directory holds; `None` of anything else.
fn listing(files: &FileSystem<'_>, inode: &Inode) -> Result<Option<Listing>> {
    if !inode.is_directory() {
        return Ok(None);
    }
    let (mut parent, mut names) = (None, Vec::new());
    files.each_entry(inode, &mut |name, inode, file_type| match name {
        b"." => {}
        b".." => parent = Some(inode),
        _ => names.push(Name {
            name: name.to_vec(),
            inode,
            file_type,
        }),
    })?;
    names.sort_unstable();
    let number = inode.number();
    let parent = parent
        .ok_or_else(|| corrupt(format!("the directory {number} does not say where it lies")))?;
    Ok(Some(Listing { parent, names }))
}
