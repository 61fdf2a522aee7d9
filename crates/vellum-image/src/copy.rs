//! Copies a directory tree with everything that belongs to it.

use std::path::Path;

use super::Progress;
use super::aside::Aside;
use super::content::Content;
use super::install::{ApplyStats, Installer};
use super::walk::{FileContent, NoContent, walk};
use vellum_base::error::ResultExt;
use vellum_base::interrupt;
use vellum_base::{Error, ErrorKind, Result};

/// Copies the tree at `source` over the tree at `target`: names, content with its holes,
/// owners, modes, times, extended attributes, hard links, devices, fifos and sockets.
///
/// Links are copied, never followed. `progress` hears how many bytes of data were read since
/// it was last called. What lies at `target` already is merged as [`apply_layer`] does.
///
/// # Errors
///
/// `InvalidInput` when the two are the same directory or `target` lies in `source`,
/// `Permission` without the right to read a file or set an owner, `NoSpace`. The message names
/// the file.
///
/// [`apply_layer`]: super::apply_layer
pub fn copy_tree(
    source: &Path,
    target: &Path,
    progress: Option<Progress<'_>>,
) -> Result<ApplyStats> {
    copy(source, target, None, progress)
}

/// As [`copy_tree`], but for what new files hold, which goes to `aside`.
///
/// # Errors
/// As [`copy_tree`].
pub fn copy_tree_aside(
    source: &Path,
    target: &Path,
    aside: &mut Aside,
    progress: Option<Progress<'_>>,
) -> Result<ApplyStats> {
    copy(source, target, Some(aside), progress)
}

fn copy(
    source: &Path,
    target: &Path,
    aside: Option<&mut Aside>,
    mut progress: Option<Progress<'_>>,
) -> Result<ApplyStats> {
    let real = |path: &Path| {
        path.canonicalize()
            .context(|| format!("finding the directory {path:?}"))
    };
    if real(target)?.starts_with(real(source)?) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("{target:?} lies in {source:?}: a tree cannot be copied into itself"),
        ));
    }
    let mut tree = Installer::new(target, true, aside)?;
    walk(source, &mut |node, file| {
        interrupt::check()?;
        match &file {
            Some(file) => {
                let content = FileContent::new(file, &node.kind);
                let mut content = Counted {
                    content,
                    progress: &mut progress,
                };
                tree.install(&node, &mut content)
            }
            None => tree.install(&node, &mut NoContent),
        }
    })?;
    tree.stats.end_marker = true;
    tree.finish()
}

/// Content that is counted, and read until a signal asks for the end.
pub(super) struct Counted<'a, 'p, C> {
    pub content: C,
    pub progress: &'a mut Option<Progress<'p>>,
}

impl<C: Content> Content for Counted<'_, '_, C> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        interrupt::check()?;
        let count = self.content.read(into)?;
        if let Some(progress) = self.progress {
            progress(count as u64);
        }
        Ok(count)
    }
}
