//! Applies a file-system layer, a tar stream, to a tree.

use std::io::Read;
use std::path::Path;

use super::aside::Aside;
use super::content::Content;
use super::install::{ApplyStats, Installer};
use super::members::Members;
use super::node::{Kind, join, split};
use vellum_base::{Error, ErrorKind, Result};

/// In front of the name of a file that a layer deletes.
///
/// See "Whiteouts" in the layer chapter of the OCI image specification.
pub(super) const WHITEOUT: &[u8] = b".wh.";

/// The name that says that nothing of the earlier layers shows in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// In front of AUFS's own bookkeeping, which is no part of the image.
const AUFS: &[u8] = b".wh..wh.";

/// How [`apply_layer`] treats what it finds.
#[derive(Debug, Clone)]
pub struct ApplyOptions {
    /// Whether `.wh.` names delete. False for the tar of a whole root file system, in which
    /// such a name is a name like any other. Default: true.
    pub whiteouts: bool,
    /// Whether device nodes may be made; without it a layer that has one fails with
    /// [`ErrorKind::Permission`]. Default: true.
    pub devices: bool,
    /// How many members are accepted. Default: 16 million.
    pub max_members: u64,
}

impl Default for ApplyOptions {
    fn default() -> Self {
        ApplyOptions {
            whiteouts: true,
            devices: true,
            max_members: 16 << 20,
        }
    }
}

impl ApplyOptions {
    /// For the layer of an image: whiteouts are obeyed.
    pub fn layer() -> Self {
        Self::default()
    }

    /// For the tar of a whole root file system: every name is taken as it is.
    pub fn rootfs() -> Self {
        ApplyOptions {
            whiteouts: false,
            ..Self::default()
        }
    }
}

/// The content of the member that was read last.
pub(super) struct MemberContent<'a, R>(pub &'a mut Members<R>);

impl<R: Read> Content for MemberContent<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        self.0.read_content(into)
    }
}

/// Unpacks the uncompressed tar stream `reader` over the tree at `target`.
///
/// The result is what an overlay of the layer over the tree would show: a directory over a
/// directory merges, everything else replaces, whiteouts and opaque markers delete what earlier
/// layers left (never what this layer brings, in whatever order they come). Owners (numeric),
/// modes, times to the nanosecond, extended attributes, hard links, devices and holes are kept.
/// A directory that is changed but not listed keeps its times.
///
/// Nothing outside `target` is written, linked to or removed, whatever the archive says, and
/// memory stays bounded. `reader` is read to its end, so that one that verifies a digest gets
/// to see all. On an error the tree holds what was unpacked so far.
///
/// # Errors
///
/// `Corrupt` for a damaged or cut-off archive, `InvalidInput` for names that point outside or
/// are too long, `Permission` without the right to set an owner or make a device,
/// `NoSpace` when the tree is full. The message names the member.
pub fn apply_layer(reader: impl Read, target: &Path, options: &ApplyOptions) -> Result<ApplyStats> {
    apply(
        reader,
        Installer::new(target, options.devices, None)?,
        options,
    )
}

/// As [`apply_layer`], but for what new files hold, which goes to `aside`: in the tree they have their sizes and no
/// content. Memory grows with the number of files, and of the pieces of sparse ones.
///
/// # Errors
/// As [`apply_layer`].
pub fn apply_layer_aside(
    reader: impl Read,
    target: &Path,
    aside: &mut Aside,
    options: &ApplyOptions,
) -> Result<ApplyStats> {
    apply(
        reader,
        Installer::new(target, options.devices, Some(aside))?,
        options,
    )
}

fn apply(reader: impl Read, mut tree: Installer<'_>, options: &ApplyOptions) -> Result<ApplyStats> {
    let mut members = Members::new(reader);
    let mut count = 0u64;
    while let Some(member) = members.next()? {
        count += 1;
        if count > options.max_members {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("the archive has more than {} members", options.max_members),
            ));
        }
        let node = &member.node;
        if options.whiteouts {
            match whiteout(&node.path) {
                Whiteout::None => {}
                Whiteout::Ignore => continue,
                Whiteout::Remove(path) => {
                    tree.whiteout(&path)?;
                    continue;
                }
                Whiteout::Opaque(path) => {
                    tree.opaque(path)?;
                    continue;
                }
                Whiteout::Bad => {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        format!("archive member {}: whiteout of no file", node.shown()),
                    ));
                }
            }
        }
        if node.path.is_empty() && node.kind != Kind::Directory {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "the archive has a member that would replace the root of the tree",
            ));
        }
        tree.install(node, &mut MemberContent(&mut members))?;
    }
    members.drain()?;
    tree.stats.end_marker = members.end_marker();
    tree.finish()
}

enum Whiteout<'a> {
    None,
    Ignore,
    Remove(Vec<u8>),
    Opaque(&'a [u8]),
    Bad,
}

fn whiteout(path: &[u8]) -> Whiteout<'_> {
    let Some((above, name)) = split(path) else {
        return Whiteout::None;
    };
    if name == OPAQUE {
        return Whiteout::Opaque(above);
    }
    if path
        .split(|byte| *byte == b'/')
        .any(|component| component.starts_with(AUFS))
    {
        return Whiteout::Ignore;
    }
    match name.strip_prefix(WHITEOUT) {
        None => Whiteout::None,
        Some(b"" | b"." | b"..") => Whiteout::Bad,
        Some(hidden) => Whiteout::Remove(join(above, hidden)),
    }
}
