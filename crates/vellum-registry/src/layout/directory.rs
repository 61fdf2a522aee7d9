//! An OCI layout in a directory. docs/object-stores.md, "A directory".

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::inherit::result_mode;

/// Those who push share the lock on it.
const FILL_LOCK: &str = ".vellum-push.lock";
/// Whoever changes the index has the lock on it.
const CHANGE_LOCK: &str = ".vellum-index.lock";
/// What the names of files that are not whole begin with.
const UNFINISHED: &str = ".vellum-unfinished-";

/// The directory of a layout, which need not be there.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
}

/// A directory that somebody puts something into, held so that nobody takes his unfinished files for left behind.
#[derive(Debug)]
pub(crate) struct Filling {
    path: PathBuf,
    _lock: File,
}

impl Directory {
    pub fn new(path: PathBuf) -> Self {
        Directory { path }
    }

    /// Opens one of its files; `None` where there is none.
    ///
    /// # Errors
    /// Where it cannot be read, or is no plain file.
    pub fn open(&self, name: &str) -> Result<Option<(File, u64)>> {
        let path = self.path.join(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.context(|| format!("cannot read {}", path.display()))?,
        };
        let meta = file.metadata();
        let meta = meta.context(|| format!("cannot read {}", path.display()))?;
        if !meta.is_file() {
            let text = format!("{} is no plain file", path.display());
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        Ok(Some((file, meta.len())))
    }

    /// Makes the directory where it is not there, and removes what others were killed over.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn fill(&self) -> Result<Filling> {
        let doing = || format!("cannot write into {}", self.path.display());
        for dir in ["blobs/sha256", "blobs", ""] {
            let dir = self.path.join(dir);
            fs::create_dir_all(&dir).context(doing)?;
            File::open(dir)
                .and_then(|dir| dir.sync_all())
                .context(doing)?;
        }
        let lock = self.lock_file(FILL_LOCK)?;
        if lock.try_lock().is_ok() {
            // Nobody else is at it.
            remove_unfinished(&self.path).context(doing)?;
        }
        lock.lock_shared().context(doing)?;
        Ok(Filling {
            path: self.path.clone(),
            _lock: lock,
        })
    }

    /// A plain file that is open for writing: what network file systems lock for all hosts.
    fn lock_file(&self, name: &str) -> Result<File> {
        let path = self.path.join(name);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        file.context(|| format!("cannot open {}", path.display()))
    }
}

fn remove_unfinished(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

impl Filling {
    /// A file that is nobody's until it gets its name.
    fn unfinished(&self) -> Result<NamedTempFile> {
        tempfile::Builder::new()
            .prefix(UNFINISHED)
            .permissions(fs::Permissions::from_mode(result_mode()))
            .tempfile_in(&self.path)
            .context(|| format!("cannot write into {}", self.path.display()))
    }

    /// Makes a file durable, and then gives it its name, in the place of what has it.
    fn finish(&self, file: NamedTempFile, name: &str) -> Result<()> {
        let path = self.path.join(name);
        let doing = || format!("cannot write {}", path.display());
        file.as_file().sync_all().context(doing)?;
        file.persist(&path)
            .map_err(|error| Error::io(doing(), error.error))?;
        let dir = path.parent().unwrap_or(&self.path);
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .context(|| format!("cannot make {} durable", dir.display()))
    }

    /// Puts bytes there.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.unfinished()?;
        file.write_all(bytes)
            .context(|| format!("cannot write into {}", self.path.display()))?;
        self.finish(file, name)
    }

    /// Puts a file there; `moved` hears how many bytes were copied, and may end it.
    ///
    /// # Errors
    /// Where the host refuses; those of `moved`.
    pub fn put_file(
        &self,
        name: &str,
        from: &Path,
        mut moved: impl FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        const PIECE: usize = 1 << 20;
        let reading = || format!("cannot read {}", from.display());
        let input = File::open(from).context(reading)?;
        let mut file = self.unfinished()?;
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        loop {
            let count = input.read_at(&mut piece, at).context(reading)?;
            let (there, _) = piece.split_at(count);
            if there.is_empty() {
                break;
            }
            file.write_all(there)
                .context(|| format!("cannot write into {}", self.path.display()))?;
            at += count as u64;
            moved(count as u64)?;
        }
        self.finish(file, name)
    }

    /// Changes a file that others may be changing too; `change` gets what it holds, and says what it is to hold, or
    /// `None` where it stays.
    ///
    /// # Errors
    /// Where the host refuses; those of `change`.
    pub fn change(
        &self,
        name: &str,
        most: u64,
        change: impl FnOnce(Option<Vec<u8>>) -> Result<Option<Vec<u8>>>,
    ) -> Result<()> {
        let directory = Directory::new(self.path.clone());
        let held = directory.lock_file(CHANGE_LOCK)?;
        held.lock()
            .context(|| format!("cannot lock {CHANGE_LOCK} in {}", self.path.display()))?;
        let there = directory.open(name)?;
        let there = there.map(|(file, len)| read_all(&file, len, most, name));
        match change(there.transpose()?)? {
            Some(bytes) => self.put(name, &bytes),
            None => Ok(()),
        }
    }
}

/// All of a file, which is a document.
pub(super) fn read_all(file: &File, len: u64, most: u64, name: &str) -> Result<Vec<u8>> {
    read_part(file, 0, len, most, name)
}

/// A part of a file, which is a document.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for one that is too long.
pub(super) fn read_part(file: &File, at: u64, len: u64, most: u64, name: &str) -> Result<Vec<u8>> {
    if len > most {
        let text = format!("{name} has {len} bytes; at most {most} are read");
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, at)
        .context(|| format!("cannot read {name}"))?;
    Ok(bytes)
}
