//! The names of a simulated disk: what is there now, what is certain, and what lies between.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Component, Path};

use super::Survival;
use super::image::SimContent;
use crate::storage::rng::SeededRng;

/// A file or directory, whatever its name.
pub(super) type NodeId = u64;

/// The root directory.
const ROOT: NodeId = 0;

/// A name in a directory.
type Key = (NodeId, String);

/// The names in a directory.
type Names = BTreeMap<String, NodeId>;

#[derive(Debug, Clone)]
enum Node {
    File(SimContent),
    Dir { live: Names, durable: Names },
}

impl Node {
    fn dir() -> Self {
        Node::Dir {
            live: BTreeMap::new(),
            durable: BTreeMap::new(),
        }
    }
}

/// One atomic change of names: each gets a node or loses the one it had.
#[derive(Debug, Clone)]
struct NameChange(Vec<(Key, Option<NodeId>)>);

/// Everything on a simulated disk.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    nodes: BTreeMap<NodeId, Node>,
    next: NodeId,
    pending: Vec<NameChange>,
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Tree {
    pub(super) fn new() -> Self {
        Tree {
            nodes: [(ROOT, Node::dir())].into(),
            next: ROOT + 1,
            pending: Vec::new(),
        }
    }

    fn entries(&self, dir: NodeId) -> io::Result<&Names> {
        match self.nodes.get(&dir) {
            Some(Node::Dir { live, .. }) => Ok(live),
            _ => Err(errno(libc::ENOTDIR)),
        }
    }

    /// The node at `path`.
    pub(super) fn find(&self, path: &Path) -> io::Result<NodeId> {
        let mut node = ROOT;
        for part in path.components() {
            match part {
                Component::Normal(name) => {
                    let name = name.to_str().ok_or(errno(libc::EINVAL))?;
                    node = *self.entries(node)?.get(name).ok_or(errno(libc::ENOENT))?;
                }
                Component::RootDir | Component::CurDir => {}
                _ => return Err(errno(libc::EINVAL)),
            }
        }
        Ok(node)
    }

    /// Bytes that the files take that have a name.
    pub(super) fn allocated(&self) -> u64 {
        let named = self.nodes.values().filter_map(|node| match node {
            Node::Dir { live, .. } => Some(live.values()),
            Node::File(_) => None,
        });
        let files = named.flatten().filter_map(|node| self.file(*node).ok());
        files.map(|file| file.live.allocated()).sum()
    }

    /// The directory of `path` and the name in it.
    fn key(&self, path: &Path) -> io::Result<Key> {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or(errno(libc::EINVAL))?;
        let dir = self.find(path.parent().unwrap_or(Path::new("/")))?;
        self.entries(dir)?;
        Ok((dir, name.to_owned()))
    }

    pub(super) fn is_dir(&self, node: NodeId) -> bool {
        matches!(self.nodes.get(&node), Some(Node::Dir { .. }))
    }

    pub(super) fn file(&self, node: NodeId) -> io::Result<&SimContent> {
        match self.nodes.get(&node) {
            Some(Node::File(content)) => Ok(content),
            _ => Err(errno(libc::EISDIR)),
        }
    }

    pub(super) fn file_mut(&mut self, node: NodeId) -> io::Result<&mut SimContent> {
        match self.nodes.get_mut(&node) {
            Some(Node::File(content)) => Ok(content),
            _ => Err(errno(libc::EISDIR)),
        }
    }

    /// The names of a directory: as they are now, and as they are certain to be.
    #[expect(
        clippy::panic,
        reason = "a name is changed where a directory was found"
    )]
    fn dir_mut(&mut self, dir: NodeId) -> (&mut Names, &mut Names) {
        match self.nodes.get_mut(&dir) {
            Some(Node::Dir { live, durable }) => (live, durable),
            _ => panic!("node {dir} is no directory"),
        }
    }

    fn rename_names(&mut self, change: NameChange) {
        for ((dir, name), node) in &change.0 {
            set(self.dir_mut(*dir).0, name, *node);
        }
        self.pending.push(change);
    }

    fn add(&mut self, key: Key, node: Node) -> NodeId {
        let id = self.next;
        self.next += 1;
        self.nodes.insert(id, node);
        self.rename_names(NameChange(vec![(key, Some(id))]));
        id
    }

    pub(super) fn create_file(&mut self, path: &Path) -> io::Result<NodeId> {
        let key = self.key(path)?;
        Ok(self.add(key, Node::File(SimContent::default())))
    }

    pub(super) fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        let key = self.key(path)?;
        if self.entries(key.0)?.contains_key(&key.1) {
            return Err(errno(libc::EEXIST));
        }
        self.add(key, Node::dir());
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = self.find(from)?;
        let (from, to) = (self.key(from)?, self.key(to)?);
        if let Some(&old) = self.entries(to.0)?.get(&to.1)
            && self.is_dir(old)
            && !self.entries(old)?.is_empty()
        {
            return Err(errno(libc::ENOTEMPTY));
        }
        if from != to {
            self.rename_names(NameChange(vec![(from, None), (to, Some(node))]));
        }
        Ok(())
    }

    pub(super) fn remove_file(&mut self, path: &Path) -> io::Result<()> {
        if self.is_dir(self.find(path)?) {
            return Err(errno(libc::EISDIR));
        }
        let key = self.key(path)?;
        self.rename_names(NameChange(vec![(key, None)]));
        Ok(())
    }

    pub(super) fn remove_tree(&mut self, path: &Path) -> io::Result<()> {
        let node = match self.find(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        if self.is_dir(node) {
            let names: Vec<String> = self.entries(node)?.keys().cloned().collect();
            for name in names {
                self.remove_tree(&path.join(name))?;
            }
        }
        let key = self.key(path)?;
        self.rename_names(NameChange(vec![(key, None)]));
        Ok(())
    }

    /// Name and whether it is a directory, sorted.
    pub(super) fn list(&self, path: &Path) -> io::Result<Vec<(String, bool)>> {
        let entries = self.entries(self.find(path)?)?;
        Ok(entries
            .iter()
            .map(|(name, node)| (name.clone(), self.is_dir(*node)))
            .collect())
    }

    /// Makes the names of a directory certain, and with each change all that it stands on.
    pub(super) fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        let dir = self.find(path)?;
        self.entries(dir)?;
        let mut needed: BTreeSet<Key> = BTreeSet::new();
        let mut kept = Vec::new();
        let mut certain = Vec::new();
        for change in std::mem::take(&mut self.pending).into_iter().rev() {
            let touches = change
                .0
                .iter()
                .any(|(key, _)| key.0 == dir || needed.contains(key));
            if touches {
                needed.extend(change.0.iter().map(|(key, _)| key.clone()));
                certain.push(change);
            } else {
                kept.push(change);
            }
        }
        kept.reverse();
        self.pending = kept;
        for change in certain.into_iter().rev() {
            self.make_certain(&change);
        }
        Ok(())
    }

    fn make_certain(&mut self, change: &NameChange) {
        for ((dir, name), node) in &change.0 {
            set(self.dir_mut(*dir).1, name, *node);
        }
    }

    /// The disk after a power cut. A change of a name survives only if every older change of that
    /// name did; apart from that, any subset may. What is called `kept` survives whole.
    pub(super) fn cut(&self, rng: &mut SeededRng, kept: Option<&str>) -> Tree {
        let survival = Survival::pick(rng);
        let mut tree = Tree {
            nodes: self.nodes.clone(),
            next: self.next,
            pending: Vec::new(),
        };
        let mut lost: BTreeSet<&Key> = BTreeSet::new();
        for change in &self.pending {
            let stands = change.0.iter().all(|(key, _)| !lost.contains(key));
            if stands && survival.whole(rng) {
                tree.make_certain(change);
            } else {
                lost.extend(change.0.iter().map(|(key, _)| key));
            }
        }
        let mut keep: BTreeSet<NodeId> = BTreeSet::new();
        if let Some(kept) = kept {
            for node in self.nodes.values() {
                if let Node::Dir { live, .. } = node {
                    keep.extend(live.get(kept).copied());
                }
            }
            for (id, node) in &mut tree.nodes {
                if let (Node::Dir { durable, .. }, Some(Node::Dir { live, .. })) =
                    (node, self.nodes.get(id))
                    && let Some(file) = live.get(kept)
                {
                    durable.insert(kept.to_owned(), *file);
                }
            }
        }
        for (id, node) in &mut tree.nodes {
            match node {
                Node::File(content) if keep.contains(id) => *content = content.kept(),
                Node::Dir { live, durable } => live.clone_from(durable),
                Node::File(content) => {
                    let survival = Survival::pick(rng);
                    *content = content.cut(survival, rng);
                }
            }
        }
        tree
    }
}

fn set(entries: &mut Names, name: &str, node: Option<NodeId>) {
    match node {
        Some(node) => {
            entries.insert(name.to_owned(), node);
        }
        None => {
            entries.remove(name);
        }
    }
}
