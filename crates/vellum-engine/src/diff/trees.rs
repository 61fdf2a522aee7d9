//! The trees of two states of a file system, read from their blocks.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

use parking_lot::Mutex;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_fs::unmounted::{Changed, Contents, Entry, FileSystem, Inode, ROOT, differences};
use vellum_image::{Attributes, Directory, Trees};

/// How often a directory may be entered: once to compare it, and once for each directory above it that may
/// have been made as a place for a mount. Where it is more, directories lie in each other.
const MAX_VISITS: u32 = 256;

/// How often each directory was entered, by its inode.
type Visits = Mutex<HashMap<u32, u32>>;

/// Both states.
pub(super) struct BlockTrees<'a> {
    older: Side<'a>,
    newer: Side<'a>,
    changed: &'a Changed,
}

/// One of the states.
struct Side<'a> {
    files: &'a FileSystem<'a>,
    visits: Visits,
}

impl<'a> BlockTrees<'a> {
    /// Two states, and what may differ between them.
    pub fn new(older: &'a FileSystem<'a>, newer: &'a FileSystem<'a>, changed: &'a Changed) -> Self {
        let side = |files| Side {
            files,
            visits: Visits::default(),
        };
        BlockTrees {
            older: side(older),
            newer: side(newer),
            changed,
        }
    }

    /// Makes sure that every directory in which something may differ was looked at: all hang together.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where one was not: it does not lie where it says.
    pub fn check_all_seen(&self) -> Result<()> {
        let seen = self.newer.visits.lock();
        match self
            .changed
            .directories()
            .find(|inode| !seen.contains_key(inode))
        {
            None => Ok(()),
            Some(inode) => Err(corrupt(format!(
                "the directory {inode} was not reached from the root"
            ))),
        }
    }
}

fn corrupt(what: String) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("the ext4 makes no sense: {what}"),
    )
}

/// A directory of one of the states.
pub(super) struct Folder<'a> {
    side: &'a Side<'a>,
    inode: Inode,
    path: Vec<u8>,
    depth: usize,
    /// Sorted by name.
    entries: Vec<Entry>,
}

impl<'a> Folder<'a> {
    fn open(side: &'a Side<'a>, inode: Inode, path: Vec<u8>, depth: usize) -> Result<Self> {
        let mut visits = side.visits.lock();
        let count = visits.entry(inode.number()).or_insert(0);
        *count += 1;
        if *count > MAX_VISITS {
            return Err(corrupt(format!(
                "the directory {} lies in many places",
                inode.number()
            )));
        }
        drop(visits);
        Ok(Folder {
            entries: side.files.list(&inode)?,
            side,
            inode,
            path,
            depth,
        })
    }

    fn root(side: &'a Side<'a>) -> Result<Self> {
        let root = used(side.files, ROOT)?;
        Folder::open(side, root, Vec::new(), 0)
    }

    fn number(&self, name: &[u8]) -> Option<u32> {
        let found = self
            .entries
            .binary_search_by(|entry| entry.name.as_slice().cmp(name));
        let entry = found.ok().and_then(|index| self.entries.get(index));
        entry.map(|entry| entry.inode)
    }

    /// The inode of `name`, or its own for an empty name.
    fn find(&self, name: &[u8]) -> Result<Inode> {
        if name.is_empty() {
            return Ok(self.inode.clone());
        }
        let number = self.number(name).ok_or_else(|| {
            Error::internal("a name is looked for in a directory that does not have it")
        })?;
        used(self.side.files, number)
    }
}

/// An inode that has a name.
fn used(files: &FileSystem<'_>, number: u32) -> Result<Inode> {
    files
        .inode(number)?
        .ok_or_else(|| corrupt(format!("inode {number} has a name and is not in use")))
}

fn attributes(inode: &Inode) -> Attributes {
    let (uid, gid) = inode.owner();
    Attributes {
        inode: inode.number().into(),
        mode: inode.mode(),
        uid,
        gid,
        device: inode.device(),
        size: inode.size(),
        mtime: inode.mtime(),
        ctime: inode.ctime(),
    }
}

impl Directory for Folder<'_> {
    fn path(&self) -> &[u8] {
        &self.path
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn names(&self) -> Result<Vec<Vec<u8>>> {
        Ok(self
            .entries
            .iter()
            .map(|entry| entry.name.clone())
            .collect())
    }

    fn attributes(&self) -> Result<Attributes> {
        Ok(attributes(&self.inode))
    }

    fn look(&self, name: &[u8]) -> Result<Option<Attributes>> {
        let number = self.number(name);
        let inode = number
            .map(|number| used(self.side.files, number))
            .transpose()?;
        Ok(inode.as_ref().map(attributes))
    }

    fn xattrs(&self, name: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        self.side.files.xattrs(&self.find(name)?)
    }

    fn link_target(&self, name: &[u8]) -> Result<Vec<u8>> {
        self.side.files.link_target(&self.find(name)?)
    }

    fn descend(&self, name: &[u8], walk: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let mut path = self.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        walk(&Folder::open(
            self.side,
            self.find(name)?,
            path,
            self.depth + 1,
        )?)
    }
}

impl<'a> Trees for &'a BlockTrees<'a> {
    type Older = Folder<'a>;
    type Newer = Folder<'a>;

    fn roots(&self) -> Result<(Folder<'a>, Folder<'a>)> {
        Ok((Folder::root(&self.older)?, Folder::root(&self.newer)?))
    }

    fn may_differ(&self, older: &Folder<'a>, newer: &Folder<'a>, name: &[u8]) -> Result<bool> {
        let (before, now) = (older.number(name), newer.number(name));
        Ok(before != now
            || now.is_none_or(|inode| {
                self.changed.has_inode(inode) || self.changed.has_directory(inode)
            }))
    }

    fn compare_contents(
        &self,
        older: Option<&Folder<'a>>,
        newer: &Folder<'a>,
        name: &[u8],
        each: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<()> {
        let older = older
            .map(|older| Contents::new(older.side.files, &older.find(name)?))
            .transpose()?;
        let newer = Contents::new(newer.side.files, &newer.find(name)?)?;
        let same = |first, count| self.changed.same_blocks(first, count);
        differences(older.as_ref(), &newer, &same, each)
    }
}
