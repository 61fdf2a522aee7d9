//! What changed in a file system, written in the one way that its files determine.
//!
//! Where the kernel puts files depends on its version, on how many CPUs there are, on which of them a program
//! ran and on when memory was written out; and it notes times and random numbers. [`lay_out`] takes the
//! state that it left, and the state before, and writes the same files once more: numbers of inodes,
//! places of blocks, directories, trees of extents, attributes and bitmaps follow from the older state's
//! bytes and the newer state's files alone. docs/images.md, "The same bytes everywhere", says how.

mod attributes;
mod bits;
mod changes;
mod directory;
mod extents;
mod file;
mod form;
mod hash;
mod release;
mod shared;
mod space;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;

use super::changed::Ranges;
use super::{FileSystem, unknown};
use changes::{Changes, Kept};
use directory::Name;
use form::{Form, INODE};
use hash::Hasher;
use shared::Shared;
use space::Space;
use vellum_base::block::{BLOCK_LEN, BLOCK_SIZE, part_mut};
use vellum_base::error::Result;
use vellum_base::interrupt;

/// Inodes in a block.
const PER_BLOCK: u32 = (BLOCK_LEN / INODE) as u32;

/// Blocks in files of a directory from which on they begin on a border of their own: 512 KiB.
const LARGE: u64 = 128;

/// Where blocks are written to.
pub trait Sink {
    /// Takes the bytes of whole blocks from `first` on.
    ///
    /// # Errors
    /// Those of the storage.
    fn put(&mut self, first: u64, bytes: &[u8]) -> Result<()>;
}

/// What files hold that a file system names, and does not hold itself.
pub trait Apart {
    /// The blocks of the new file with that number that hold data: ascending, apart from each other. `None` of a file
    /// whose content is in the file system.
    fn blocks(&self, inode: u32) -> Option<Vec<Range<u64>>>;

    /// Fills `buf` with the content of that file from that block of it on.
    ///
    /// # Errors
    /// Those of where it is.
    fn fill(&self, inode: u32, buf: &mut [u8], block: u64) -> Result<()>;
}

/// Writes what `newer` has, and `older` has not, over the blocks of `older`, of which the bytes in
/// `differing` may differ in `newer` and all others do not. A block that is not written is as in `older`.
/// Equal blocks of `older` and equal files in `newer` give equal blocks, whether their contents are in `newer` or
/// `apart`.
///
/// # Errors
/// [`vellum_base::ErrorKind::Unsupported`] where the file system has another form than [`crate::ext4::make`]
/// gives it, or holds something that is not known here; [`vellum_base::ErrorKind::NoSpace`] where its blocks
/// lie so that its files need more in this order; [`vellum_base::ErrorKind::Corrupt`]; as
/// [`super::Source::fill`], [`Apart::fill`] and [`Sink::put`].
pub fn lay_out(
    older: &FileSystem<'_>,
    newer: &FileSystem<'_>,
    differing: &[Range<u64>],
    apart: &dyn Apart,
    sink: &mut dyn Sink,
) -> Result<()> {
    let form = Form::of(older, newer)?;
    let differing = Ranges::of_bytes(differing, newer.block_size());
    let changes = Changes::find(older, newer, &differing)?;
    let seed = older.layout.seed;
    let seed = seed.ok_or_else(|| unknown("its metadata has no checksums"))?;
    let mut laying = Laying {
        older,
        newer,
        apart,
        seed,
        // A state is a second older than the next one, so that a file that changes has another time.
        time: form.written() + 1,
        hasher: form.hasher(),
        space: Space::new(older, &form, seed),
        numbers: HashMap::new(),
        order: Vec::new(),
        aligned: HashSet::new(),
        inodes: BTreeMap::new(),
        shared: Shared::default(),
        buffer: Vec::new(),
        sink,
    };
    laying.release(&changes)?;
    laying.number(&changes)?;
    for (number, kept) in &changes.kept {
        interrupt::check()?;
        laying.keep(*number, kept)?;
    }
    // Directories hold numbers, which are others where a file is added: they lie apart from contents.
    let order = std::mem::take(&mut laying.order);
    let is_directory = |before: &u32| {
        let fresh = changes.fresh.get(before);
        fresh.is_some_and(|fresh| fresh.listing.is_some())
    };
    let (directories, others): (Vec<u32>, Vec<u32>) = order.into_iter().partition(is_directory);
    for before in directories.into_iter().chain(others) {
        interrupt::check()?;
        laying.make(before, &changes)?;
    }
    laying.finish()
}

/// A file system that is being laid out.
struct Laying<'a> {
    older: &'a FileSystem<'a>,
    newer: &'a FileSystem<'a>,
    apart: &'a dyn Apart,
    /// With what checksums of metadata begin.
    seed: u32,
    /// What new and changed files have as the time of that, in seconds since 1970.
    time: u64,
    hasher: Hasher,
    space: Space<'a>,
    /// Numbers of new inodes, by those that they have in the newer state.
    numbers: HashMap<u32, u32>,
    /// New inodes by their numbers in the newer state, in the order in which they get theirs.
    order: Vec<u32>,
    /// Those of them that are the first file of a large directory.
    aligned: HashSet<u32>,
    /// Bytes of changed inodes.
    inodes: BTreeMap<u32, Vec<u8>>,
    shared: Shared,
    /// Content on its way.
    buffer: Vec<u8>,
    sink: &'a mut dyn Sink,
}

impl Laying<'_> {
    /// Gives new inodes their numbers: directory by directory, in each by name.
    fn number(&mut self, changes: &Changes) -> Result<()> {
        let kept = changes.kept.values();
        let listed = kept.filter_map(|kept| kept.listing.as_ref());
        let mut waiting: VecDeque<_> = listed.collect();
        while let Some(listing) = waiting.pop_front() {
            interrupt::check()?;
            let (mut blocks, mut first) = (0, None);
            for name in &listing.names {
                let fresh = changes.fresh.get(&name.inode);
                let Some(fresh) = fresh.filter(|_| !self.numbers.contains_key(&name.inode)) else {
                    continue;
                };
                if fresh.inode.is_file() {
                    blocks += fresh.inode.size().div_ceil(BLOCK_SIZE);
                    first = first.or(Some(name.inode));
                }
                let number = self.space.take_inode(fresh.inode.is_directory())?;
                self.numbers.insert(name.inode, number);
                self.order.push(name.inode);
                waiting.extend(&fresh.listing);
            }
            if blocks >= LARGE {
                self.aligned.extend(first);
            }
        }
        if self.order.len() != changes.fresh.len() {
            return Err(unknown("a file has no name"));
        }
        Ok(())
    }

    /// The number of what has this number in the newer state.
    fn number_of(&self, before: u32) -> u32 {
        self.numbers.get(&before).copied().unwrap_or(before)
    }

    /// Names with their inodes' numbers.
    fn renumbered(&self, names: &[Name]) -> Vec<Name> {
        let renumbered = names.iter().map(|name| Name {
            inode: self.number_of(name.inode),
            ..name.clone()
        });
        renumbered.collect()
    }

    /// Writes what all inodes share, and the inodes, bitmaps and superblock.
    fn finish(mut self) -> Result<()> {
        self.write_shared()?;
        let mut blocks: BTreeMap<u64, Vec<(usize, Vec<u8>)>> = BTreeMap::new();
        for (number, raw) in std::mem::take(&mut self.inodes) {
            let (group, slot) = self.space.place_of(number);
            let table = self.older.group(group)?.inode_table;
            let block = blocks.entry(table + u64::from(slot / PER_BLOCK));
            block
                .or_default()
                .push(((slot % PER_BLOCK) as usize * INODE, raw));
        }
        for (number, inodes) in blocks {
            let mut block = self.older.blocks(number, 1)?;
            for (at, raw) in inodes {
                part_mut(&mut block, at, INODE).copy_from_slice(&raw);
            }
            self.sink.put(number, &block)?;
        }
        self.space.write(self.time, self.sink)
    }

    fn keep(&mut self, number: u32, kept: &Kept) -> Result<()> {
        let seed = file::seed(self.seed, number, &kept.old);
        let content = match (&kept.listing, kept.same_content) {
            (_, true) => file::Content::kept(self.older, &kept.old)?,
            (Some(listing), false) => self.directory(number, listing, seed)?,
            (None, false) => self.content(&kept.new, seed, None)?,
        };
        let attributes = match kept.same_attributes {
            true => file::Attached::kept(self.older, &kept.old)?,
            false => self.attach(&kept.new)?,
        };
        self.put_inode(number, Some(&kept.old), &kept.new, &content, &attributes);
        Ok(())
    }

    fn make(&mut self, before: u32, changes: &Changes) -> Result<()> {
        let Some(fresh) = changes.fresh.get(&before) else {
            return Ok(());
        };
        if self.aligned.contains(&before) {
            self.space.align();
        }
        let number = self.number_of(before);
        let seed = file::fresh_seed(self.seed, number);
        let content = match &fresh.listing {
            Some(listing) => self.directory(number, listing, seed)?,
            None => {
                // Of the number of another kind of file a regular one may have had, which is gone.
                let is_file = fresh.inode.is_file();
                let apart = is_file.then(|| self.apart.blocks(before)).flatten();
                self.content(&fresh.inode, seed, apart)?
            }
        };
        let attributes = self.attach(&fresh.inode)?;
        self.put_inode(number, None, &fresh.inode, &content, &attributes);
        Ok(())
    }
}
