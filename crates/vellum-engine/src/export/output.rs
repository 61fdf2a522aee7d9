//! Where an export goes: a stream, or a file or directory that is made beside its place and takes it when
//! it is whole and durable.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

use super::{ExportOptions, Format};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::inherit::result_mode;
use vellum_base::interrupt::{Interruptible, standard_output};

/// Standard output, a pipe or such: written from the first byte to the last.
pub(crate) type Stream = Interruptible<File>;

/// Where an export goes.
pub(crate) enum Out {
    /// From the first byte to the last.
    Stream(Stream),
    File(NewFile),
    Dir(NewDir),
}

impl Out {
    /// Begins what an export with these options is in `target`.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] for what is there; [`ErrorKind::InvalidInput`] for what cannot take it.
    pub fn new(target: &Path, options: &ExportOptions) -> Result<Out> {
        if let Some(stream) = stream(target)? {
            if options.format == Format::Qcow2 {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "a qcow2 is not written from its first byte to its last, so it cannot go through a \
                     pipe: name a file, or send --format raw",
                ));
            }
            return Ok(Out::Stream(stream));
        }
        let is_tar = target.extension().is_some_and(|end| end == "tar");
        match options.layers || options.format == Format::Oci && !is_tar {
            true => NewDir::new(target).map(Out::Dir),
            false => NewFile::new(target, options.replace).map(Out::File),
        }
    }

    /// Begins a file or stream; with `replace` a file may be there.
    ///
    /// # Errors
    /// As [`Out::new`].
    pub fn file(target: &Path, replace: bool) -> Result<Out> {
        match stream(target)? {
            Some(stream) => Ok(Out::Stream(stream)),
            None => NewFile::new(target, replace).map(Out::File),
        }
    }

    /// What takes the bytes of a file or stream.
    pub fn writer(&mut self) -> Result<&mut dyn Write> {
        match self {
            Out::Stream(stream) => Ok(stream),
            Out::File(new) => Ok(&mut new.file),
            Out::Dir(_) => Err(Error::internal("a directory takes no bytes")),
        }
    }

    /// A directory on the file system that it goes to, for what does not stay.
    pub fn spool(&self) -> Option<&Path> {
        match self {
            Out::Stream(_) => None,
            Out::File(new) => Some(new.around.path()),
            Out::Dir(new) => Some(new.around.path()),
        }
    }

    /// Makes what was written durable, and gives it its name.
    pub fn finish(self) -> Result<()> {
        match self {
            Out::Stream(_) => Ok(()),
            Out::File(new) => new.finish(),
            Out::Dir(new) => new.finish(),
        }
    }
}

/// The stream that `target` means; `None` for a name that a file can have.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a terminal and for what cannot be written so.
fn stream(target: &Path) -> Result<Option<Stream>> {
    if target.as_os_str() == "-" {
        if io::stdout().is_terminal() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "standard output is a terminal: name a file, or send it to one or to a program",
            ));
        }
        let output = standard_output().context(|| "opening standard output")?;
        return Ok(Some(output));
    }
    let Ok(meta) = fs::metadata(target) else {
        return Ok(None);
    };
    let kind = meta.file_type();
    if kind.is_fifo() || kind.is_char_device() {
        let file = OpenOptions::new().write(true).open(target);
        let file = file.context(|| format!("opening {}", target.display()))?;
        return Ok(Some(Interruptible(file)));
    }
    if kind.is_file() || kind.is_dir() {
        return Ok(None);
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!(
            "{} is neither a file nor a pipe: to write a block device, send the export to a program \
             (vellum export NAME - --format raw | dd of={} bs=1M conv=fsync)",
            target.display(),
            target.display()
        ),
    ))
}

/// The directory of a path, and its name there.
fn place(path: &Path) -> Result<(PathBuf, OsString)> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("{} is no name for a new file", path.display()),
        )
    })?;
    let parent = parent
        .canonicalize()
        .context(|| format!("cannot write into {}", parent.display()))?;
    Ok((parent, name.to_owned()))
}

fn exists(path: &Path, remedy: &str) -> Error {
    Error::new(
        ErrorKind::AlreadyExists,
        format!("{} is there already: {remedy}", path.display()),
    )
}

/// The directory of what is not yet whole: beside its place, so that one who is killed leaves nothing else.
fn begin(parent: &Path, name: &OsStr) -> Result<TempDir> {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    tempfile::Builder::new()
        .prefix(&prefix)
        .tempdir_in(parent)
        .context(|| format!("cannot write into {}", parent.display()))
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .context(|| format!("syncing {}", dir.display()))
}

/// A file that is being written. Dropped before its end it is gone.
#[derive(Debug)]
pub(crate) struct NewFile {
    path: PathBuf,
    parent: PathBuf,
    file: NamedTempFile,
    replace: bool,
    /// Around the file, so that there is room for what does not stay.
    around: TempDir,
}

impl NewFile {
    /// Begins the file `path`; with `replace` it may be there, and stays as it is until the new one takes
    /// its place.
    fn new(path: &Path, replace: bool) -> Result<NewFile> {
        // Of a link, what it leads to is replaced.
        let path = match fs::canonicalize(path) {
            Ok(there) if replace && there.is_file() => there,
            Ok(there) if there.is_dir() => {
                return Err(exists(path, "it is a directory: name a file in it"));
            }
            Ok(_) => return Err(exists(path, "--force replaces it")),
            Err(_) => path.to_owned(),
        };
        let (parent, name) = place(&path)?;
        let around = begin(&parent, &name)?;
        let file = tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(result_mode()))
            .tempfile_in(around.path())
            .context(|| format!("cannot write into {}", around.path().display()))?;
        Ok(NewFile {
            path: parent.join(name),
            parent,
            file,
            replace,
            around,
        })
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        self.file.as_file()
    }

    fn finish(self) -> Result<()> {
        let NewFile {
            path,
            parent,
            file,
            replace,
            around: _around,
        } = self;
        let doing = || format!("writing {}", path.display());
        file.as_file().sync_all().context(doing)?;
        let named = match replace {
            true => file.persist(&path),
            false => file.persist_noclobber(&path),
        };
        named.map_err(|error| Error::io(doing(), error.error))?;
        sync_dir(&parent)
    }
}

/// A directory that is being filled. Dropped before its end it is gone.
#[derive(Debug)]
pub(crate) struct NewDir {
    path: PathBuf,
    parent: PathBuf,
    /// The directory, open since before anything was written into it: syncfs tells of failures since then.
    opened: File,
    /// Around the directory, so that there is room for what does not stay.
    around: TempDir,
}

impl NewDir {
    /// Begins the directory `path`, which is not there or is empty.
    fn new(path: &Path) -> Result<NewDir> {
        match fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Ok(false) => return Err(exists(path, "remove it, or name another")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(exists(path, "it is no directory"));
            }
            Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error)),
        }
        let (parent, name) = place(path)?;
        let around = begin(&parent, &name)?;
        let inner = inner(&around);
        let doing = || format!("cannot make {}", inner.display());
        fs::create_dir(&inner).context(doing)?;
        let mode = result_mode();
        // Who may read it may enter it.
        let mode = mode | (mode & 0o444) >> 2;
        fs::set_permissions(&inner, fs::Permissions::from_mode(mode)).context(doing)?;
        Ok(NewDir {
            path: parent.join(name),
            parent,
            opened: File::open(&inner).context(doing)?,
            around,
        })
    }

    /// What becomes the directory.
    pub fn inner(&self) -> PathBuf {
        inner(&self.around)
    }

    fn finish(self) -> Result<()> {
        let doing = || format!("writing {}", self.path.display());
        nix::unistd::syncfs(&self.opened).context(doing)?;
        fs::rename(self.inner(), &self.path).context(doing)?;
        sync_dir(&self.parent)
    }
}

fn inner(around: &TempDir) -> PathBuf {
    around.path().join("whole")
}
