//! A tree as one who works in it sees it: a file system, and what is mounted in it for him, which for us
//! lies elsewhere. Links are followed one by one, inside the tree, so that none leads out of it.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::readlinkat;
use nix::sys::stat::{FileStat, fstat};

use super::node::{join, split};
use super::rooted::{Rooted, failure, file_type, is_directory, look};
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// How many links are followed on the way, as the kernel has it.
const MAX_LINKS: usize = 40;

/// A tree that is seen from inside.
#[derive(Debug)]
pub struct View {
    /// In front of its paths in messages: `web:` for those of a container, nothing for the host's.
    label: String,
    /// The tree itself, and then what is mounted in it.
    trees: Vec<Tree>,
}

#[derive(Debug)]
struct Tree {
    /// Its place in the view, without links; empty for the first.
    at: Vec<u8>,
    /// The directory that it is, or that the file lies in.
    rooted: Rooted,
    /// The path of that on the host.
    dir: PathBuf,
    /// The name of the one file that is mounted; empty for a directory.
    file: Vec<u8>,
    /// Why nothing can be written in it.
    read_only: Option<String>,
}

/// Where a path leads.
#[derive(Debug)]
pub(super) struct Spot {
    /// The path without links, from the root of the view.
    pub path: Vec<u8>,
    /// What is there. A link only where it was not to be followed.
    pub stat: Option<FileStat>,
    /// Something is mounted below it.
    above_mount: bool,
}

impl Spot {
    /// True for a directory, and for one that is made to mount something in it when the container starts.
    pub fn is_directory(&self) -> bool {
        self.stat.as_ref().map_or(self.above_mount, is_directory)
    }
}

/// A file or directory of one of the trees.
pub(super) struct Entry {
    /// The directory above it; of the root of a tree, that itself.
    pub parent: OwnedFd,
    /// Its name there; empty for the root of a tree.
    pub name: Vec<u8>,
}

impl View {
    /// The tree at `root`, whose paths messages show behind `label`.
    ///
    /// # Errors
    /// Where `root` is no directory that can be opened.
    pub fn new(label: &str, root: &Path) -> Result<View> {
        let first = Tree {
            at: Vec::new(),
            rooted: Rooted::open(root)?,
            dir: canonical(root)?,
            file: Vec::new(),
            read_only: None,
        };
        Ok(View {
            label: label.to_owned(),
            trees: vec![first],
        })
    }

    /// All of the host's files, whatever is mounted where.
    ///
    /// # Errors
    /// Where its root cannot be opened.
    pub fn of_host() -> Result<View> {
        let mut view = View::new("", Path::new("/"))?;
        for tree in &mut view.trees {
            tree.rooted.cross_mounts();
        }
        Ok(view)
    }

    /// Nothing can be written in what is there so far, for this reason.
    pub fn forbid_writes(&mut self, why: &str) {
        for tree in &mut self.trees {
            tree.read_only = Some(why.to_owned());
        }
    }

    /// Mounts a directory or a file of the host at `at`, which has no links on the way to it.
    ///
    /// # Errors
    /// Where `source` cannot be opened.
    pub fn mount(&mut self, source: &Path, at: &Path, read_only: Option<String>) -> Result<()> {
        let source = canonical(source)?;
        let is_dir = source.is_dir();
        let dir = match (is_dir, source.parent()) {
            (false, Some(parent)) => parent.to_owned(),
            _ => source.clone(),
        };
        let file = source.file_name().filter(|_| !is_dir);
        let mut rooted = Rooted::open(&dir)?;
        rooted.cross_mounts();
        self.trees.push(Tree {
            at: path_of(at),
            rooted,
            dir,
            file: file.map_or(Vec::new(), |name| name.as_bytes().to_vec()),
            read_only,
        });
        Ok(())
    }

    /// How messages name a path.
    pub(super) fn shown(&self, path: &[u8]) -> String {
        let path = [b"/", path].concat();
        let text = String::from_utf8_lossy(&path).replace(char::is_control, "?");
        format!("{}{text}", self.label)
    }

    /// The tree that a path without links lies in, and the path in that.
    pub(super) fn tree_of<'p>(&self, path: &'p [u8]) -> (usize, &'p [u8]) {
        let mut found = (0, path);
        for (index, tree) in self.trees.iter().enumerate() {
            if let Some(rest) = below(path, &tree.at)
                && rest.len() <= found.1.len()
                // Nothing lies below a file: what does on the host is beside it.
                && (tree.file.is_empty() || rest.is_empty())
            {
                found = (index, rest);
            }
        }
        found
    }

    /// What is mounted below the directory `path`, which has no links: where, from there.
    pub(super) fn mounts_below(&self, path: &[u8]) -> Vec<Vec<u8>> {
        let inner = self.trees.iter().skip(1).map(|tree| &tree.at);
        inner
            .filter_map(|at| below(at, path).filter(|rest| !rest.is_empty()))
            .map(<[u8]>::to_vec)
            .collect()
    }

    /// A tree, to put files into.
    pub(super) fn rooted(&self, tree: usize) -> Result<Rooted> {
        self.tree(tree)?.rooted.again()
    }

    /// The directory of a tree on the host.
    pub(super) fn dir_of(&self, tree: usize) -> Result<&Path> {
        Ok(&self.tree(tree)?.dir)
    }

    /// True for a tree that is one file.
    pub(super) fn is_file(&self, tree: usize) -> Result<bool> {
        Ok(!self.tree(tree)?.file.is_empty())
    }

    /// Refuses a tree that cannot be written.
    pub(super) fn check_writable(&self, tree: usize, path: &[u8]) -> Result<()> {
        match &self.tree(tree)?.read_only {
            Some(why) => Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{}: {why}", self.shown(path)),
            )),
            None => Ok(()),
        }
    }

    fn tree(&self, index: usize) -> Result<&Tree> {
        self.trees
            .get(index)
            .ok_or_else(|| Error::internal(format!("a view has no tree {index}")))
    }

    /// Finds a path without links; `None` where the directory above it is not there.
    pub(super) fn entry(&self, path: &[u8]) -> Result<Option<Entry>> {
        let (index, rest) = self.tree_of(path);
        let tree = self.tree(index)?;
        let (above, name) = match split(rest) {
            Some(found) => found,
            None => (&b""[..], tree.file.as_slice()),
        };
        match tree.rooted.resolve(above) {
            Ok(parent) => Ok(Some(Entry {
                parent,
                name: name.to_vec(),
            })),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(errno) => Err(failure(path, "opening the directory above it", errno)),
        }
    }

    fn look(&self, path: &[u8]) -> Result<Option<FileStat>> {
        let Some(entry) = self.entry(path)? else {
            return Ok(None);
        };
        let found = match entry.name.is_empty() {
            true => fstat(&entry.parent).map(Some),
            false => look(&entry.parent, &entry.name),
        };
        found.context(|| format!("looking at {}", self.shown(path)))
    }

    fn link_target(&self, path: &[u8]) -> Result<Vec<u8>> {
        let what = || format!("reading the link {}", self.shown(path));
        let entry = self.entry(path)?;
        let entry = entry.ok_or_else(|| Error::new(ErrorKind::NotFound, what()))?;
        let target = readlinkat(&entry.parent, entry.name.as_slice()).context(what)?;
        Ok(target.as_bytes().to_vec())
    }

    /// Finds out where `path` leads. A link at its end is followed with `follow`, and where the path
    /// says that it means a directory.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where a directory on the way is missing, [`ErrorKind::InvalidInput`]
    /// where something on the way, or at the end of a path that ends with a slash, is none.
    pub(super) fn locate(&self, path: &[u8], follow: bool) -> Result<Spot> {
        let follow = follow || means_directory(path);
        let mut left = reversed(path);
        let mut at: Vec<u8> = Vec::new();
        let mut links = 0;
        while let Some(name) = left.pop() {
            if name == b".." {
                at = split(&at).map_or(Vec::new(), |(above, _)| above.to_vec());
                continue;
            }
            let here = join(&at, &name);
            let last = left.is_empty();
            let Some(stat) = self.look(&here)? else {
                if last {
                    return self.at_end(here, None, path);
                }
                // Its place is made when the container starts.
                if self.mounts_below(&here).is_empty() {
                    return Err(Error::new(
                        ErrorKind::NotFound,
                        format!("there is no directory {}", self.shown(&here)),
                    ));
                }
                at = here;
                continue;
            };
            if file_type(&stat).bits() == libc::S_IFLNK && (follow || !last) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(failure(&here, "following links", Errno::ELOOP));
                }
                let target = self.link_target(&here)?;
                if target.starts_with(b"/") {
                    at = Vec::new();
                }
                left.extend(reversed(&target));
                continue;
            }
            if last {
                return self.at_end(here, Some(stat), path);
            }
            if !is_directory(&stat) {
                return Err(self.no_directory(&here));
            }
            at = here;
        }
        let stat = self.look(&at)?;
        self.at_end(at, stat, path)
    }

    fn at_end(&self, at: Vec<u8>, stat: Option<FileStat>, path: &[u8]) -> Result<Spot> {
        let spot = Spot {
            above_mount: !self.mounts_below(&at).is_empty(),
            path: at,
            stat,
        };
        match spot.stat.is_some() && !spot.is_directory() && means_directory(path) {
            true => Err(self.no_directory(&spot.path)),
            false => Ok(spot),
        }
    }

    pub(super) fn no_directory(&self, path: &[u8]) -> Error {
        Error::new(
            ErrorKind::InvalidInput,
            format!("{} is no directory", self.shown(path)),
        )
    }
}

/// What is left of `path` below the directory `above`: nothing where it is that itself.
pub(super) fn below<'p>(path: &'p [u8], above: &[u8]) -> Option<&'p [u8]> {
    if above.is_empty() {
        return Some(path);
    }
    match path.strip_prefix(above)? {
        [] => Some(&[]),
        [b'/', rest @ ..] => Some(rest),
        _ => None,
    }
}

/// True for a path that can only be a directory's: it ends with a slash, `.` or `..`.
pub(super) fn means_directory(path: &[u8]) -> bool {
    matches!(last_name(path), b"" | b"." | b"..")
}

/// What stands behind the last slash.
pub(super) fn last_name(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or(path)
}

/// The names in a path, the last one first, without those that lead nowhere.
fn reversed(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path.split(|byte| *byte == b'/');
    names
        .filter(|name| !matches!(*name, b"" | b"."))
        .map(<[u8]>::to_vec)
        .rev()
        .collect()
}

/// A path from the root of a view.
fn path_of(path: &Path) -> Vec<u8> {
    let mut names = reversed(path.as_os_str().as_bytes());
    names.reverse();
    names.join(&b'/')
}

fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize()
        .context(|| format!("cannot open {}", path.display()))
}
