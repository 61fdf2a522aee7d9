//! The files of an image, in a directory or inside a tar that is read in place.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use super::layer::{Hasher, parse_digest};
use super::members::Members;
use super::node::{Kind, join, normalise, shown, split, to_path};
use super::read_failure;
use super::slice::Slice;
use vellum_base::error::ResultExt;
use vellum_base::{Error, ErrorKind, Result};

/// The longest JSON document that is read, in bytes; registries take 4 MiB.
const MAX_JSON: u64 = 8 << 20;

/// The most members that the outer tar of an image may have.
const MAX_MEMBERS: usize = 1 << 20;

/// The most bytes that their names, and what links among them name, may have together.
const MAX_NAMES: usize = 128 << 20;

/// How many links inside an archive are followed from one name.
const MAX_LINKS: usize = 8;

/// Where a member of an archive is.
#[derive(Debug, Clone)]
enum Place {
    At { offset: u64, size: u64 },
    Link(Vec<u8>),
}

/// A tar file with an index of what is where in it.
#[derive(Debug)]
pub(super) struct Archive {
    file: Arc<File>,
    places: HashMap<Vec<u8>, Place>,
}

impl Archive {
    /// Reads the headers of the uncompressed tar in `file`, skipping over content.
    pub fn index(file: File) -> Result<Archive> {
        let length = file
            .metadata()
            .context(|| "reading the archive's size")?
            .len();
        let file = Arc::new(file);
        let mut members = Members::new(Slice::new(file.clone(), 0, length));
        let mut places = HashMap::new();
        let mut names = 0;
        let mut crowded = false;
        while let Some(member) = members.next()? {
            let path = member.node.path;
            if crowded {
                // Too many files for an image: then they are files for their own sake.
                refuse_description(&path)?;
                members.seek_past_content();
                continue;
            }
            let place = match member.node.kind {
                Kind::File {
                    size,
                    extents: None,
                } => {
                    if size > length - member.offset {
                        return Err(Error::new(
                            ErrorKind::Corrupt,
                            format!("the archive is cut off inside {}", shown(&path)),
                        ));
                    }
                    Some(Place::At {
                        offset: member.offset,
                        size,
                    })
                }
                Kind::HardLink(target) => Some(Place::Link(target)),
                Kind::Symlink(target) => resolve_link(&path, &target).map(Place::Link),
                _ => None,
            };
            if let Some(place) = place {
                names += path.len();
                if let Place::Link(target) = &place {
                    names += target.len();
                }
                places.insert(path, place);
            }
            if places.len() > MAX_MEMBERS || names > MAX_NAMES {
                for path in places.keys() {
                    refuse_description(path)?;
                }
                places.clear();
                crowded = true;
            }
            members.seek_past_content();
        }
        Ok(Archive { file, places })
    }

    /// Whether it has a file of this name.
    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name.as_bytes())
    }

    /// The tar itself.
    pub fn into_file(self) -> Arc<File> {
        self.file
    }

    /// The tar itself, which goes on being read here.
    pub fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// At which byte the content of a file begins, and how many it has.
    pub fn find(&self, name: &[u8]) -> Option<(u64, u64)> {
        let mut name = name.to_vec();
        for _ in 0..MAX_LINKS {
            match self.places.get(&name)? {
                Place::At { offset, size } => return Some((*offset, *size)),
                Place::Link(target) => name = target.clone(),
            }
        }
        None
    }
}

/// Refuses the name of a file that describes an image, in an archive with too many files for one.
fn refuse_description(path: &[u8]) -> Result<()> {
    let names = ["manifest.json", "oci-layout", "repositories"];
    if names.iter().all(|name| name.as_bytes() != path) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!(
            "the archive has a {} and more than {MAX_MEMBERS} members, or names of more than \
             {MAX_NAMES} bytes: no image has so many. For its files give --format tar",
            shown(path)
        ),
    ))
}

/// Where a symbolic link at `path` leads inside the archive; older Docker archives have
/// `../ID/layer.tar` for a layer that comes twice.
fn resolve_link(path: &[u8], target: &[u8]) -> Option<Vec<u8>> {
    let mut here = split(path)?.0.to_vec();
    for component in target.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => here = split(&here)?.0.to_vec(),
            name => here = join(&here, name),
        }
    }
    Some(here)
}

/// The files of an image.
#[derive(Debug)]
pub(super) enum Blobs {
    Directory(PathBuf),
    Archive(Archive),
}

impl Blobs {
    /// Whether there is a file of this name.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Blobs::Directory(root) => root.join(name).is_file(),
            Blobs::Archive(archive) => archive.has(name),
        }
    }

    /// The names of files that lie in no directory.
    pub fn top_names(&self) -> Vec<&[u8]> {
        let Blobs::Archive(archive) = self else {
            return Vec::new();
        };
        let names = archive.places.keys().map(Vec::as_slice);
        names.filter(|name| !name.contains(&b'/')).collect()
    }

    /// The directories at the top that have a file `name` in them.
    pub fn names_below(&self, name: &str) -> Vec<String> {
        let Blobs::Archive(archive) = self else {
            return Vec::new();
        };
        let paths = archive.places.keys();
        let above = paths.filter_map(|path| match split(path)? {
            (above, file) if file == name.as_bytes() && !above.contains(&b'/') => {
                std::str::from_utf8(above)
                    .ok()
                    .filter(|above| !above.is_empty())
            }
            _ => None,
        });
        above.map(str::to_owned).collect()
    }

    /// Opens the file `name` and says how long it is; `NotFound` when there is none.
    pub fn open(&self, name: &str) -> Result<(Slice, u64)> {
        let path = normalise(name.as_bytes()).map_err(|why| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("file name {name:?} refused: {why}"),
            )
        })?;
        match self {
            Blobs::Directory(root) => {
                let path = root.join(to_path(&path));
                let file = File::open(&path).context(|| format!("opening {path:?}"))?;
                let meta = file
                    .metadata()
                    .context(|| format!("reading the size of {path:?}"))?;
                if !meta.is_file() {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        format!("{path:?} is not a regular file"),
                    ));
                }
                Ok((Slice::new(Arc::new(file), 0, meta.len()), meta.len()))
            }
            Blobs::Archive(archive) => {
                let (offset, size) = archive.find(&path).ok_or_else(|| {
                    Error::new(
                        ErrorKind::NotFound,
                        format!("the archive has no file {name:?}"),
                    )
                })?;
                let slice = Slice::new(archive.file.clone(), offset, offset + size);
                Ok((slice, size))
            }
        }
    }

    /// Reads the file `name` whole: a JSON document.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (input, size) = self.open(name)?;
        if size > MAX_JSON {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{name:?} has {size} bytes; a description may have {MAX_JSON}"),
            ));
        }
        let mut data = Vec::new();
        input
            .take(MAX_JSON)
            .read_to_end(&mut data)
            .map_err(|error| read_failure(&format!("reading {name:?}"), error))?;
        Ok(data)
    }

    /// Reads the blob `digest` of an OCI layout whole and checks it.
    pub fn read_blob(&self, digest: &str) -> Result<Vec<u8>> {
        let data = self
            .read(&blob_name(digest)?)
            .context(|| format!("the blob {digest}"))?;
        let mut hasher = Hasher::like(digest)?;
        hasher.update(&data);
        let actual = hasher.finish();
        if actual != digest {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("the blob {digest} is in truth {actual}: the image is damaged"),
            ));
        }
        Ok(data)
    }
}

/// Where an OCI layout keeps the blob `digest`: `blobs/sha256/…`.
///
/// # Errors
///
/// `Corrupt` for what is not a SHA-256 or SHA-512 digest.
pub fn blob_name(digest: &str) -> Result<String> {
    let (algorithm, digits) = parse_digest(digest)?;
    Ok(format!("blobs/{algorithm}/{digits}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_inside_an_archive_resolve_and_never_leave_it() {
        assert_eq!(
            resolve_link(b"one/layer.tar", b"../two/layer.tar").unwrap(),
            b"two/layer.tar"
        );
        assert_eq!(resolve_link(b"layer.tar", b"../x"), None);
    }
}
