//! Backups into files, which are whole or called `FILE.partial`, and go on where they were interrupted.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use tempfile::TempPath;

use super::description::Description;
use super::{BackupOptions, BackupReport, State, Wish};
use crate::progress::BlocksWatch;
use vellum_backup::{Header, Reader, Resume, Totals, Writer};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::inherit::result_mode;
use vellum_base::interrupt;
use vellum_store::Store;

/// As [`backup_to`](super::backup_to), to a file that is not there yet. It has its name once it is whole and
/// durable. An interrupted backup to the same file goes on.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] for the file, and for an interrupted backup of something else;
/// [`ErrorKind::InUse`] while another process writes it; as [`backup_to`](super::backup_to).
pub fn backup_to_file(
    store: &Store,
    name: &str,
    options: &BackupOptions<'_>,
    path: &Path,
    watch: &dyn BlocksWatch,
) -> Result<BackupReport> {
    let wish = Wish::new(store, name, options)?;
    let partial = Partial::open(path)?;
    let written = partial.write(&wish, watch);
    if written.is_err() {
        partial.remove_empty();
    }
    let report = written?;
    crash_point::here("backup: file complete");
    partial.finish(path)?;
    Ok(report)
}

/// A backup that is being written: nobody else writes it.
struct Partial {
    path: PathBuf,
    file: Flock<File>,
}

/// What is there of a backup that was interrupted.
struct Begun {
    header: Header,
    /// Where it goes on; of a whole one what it holds.
    state: Result<Totals, Resume>,
}

impl Partial {
    fn open(target: &Path) -> Result<Self> {
        let name = target.file_name().ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("{} is no name for a file", target.display()),
            )
        })?;
        let mut partial = name.to_owned();
        partial.push(".partial");
        let path = target.with_file_name(partial);
        let what = || format!("cannot write {}", path.display());
        check_free(target)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(result_mode())
            .open(&path)
            .context(what)?;
        let file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
                |(_, errno)| match errno {
                    nix::errno::Errno::EWOULDBLOCK => Error::new(
                        ErrorKind::InUse,
                        format!("another process writes {}: wait for it", path.display()),
                    ),
                    other => Error::io(what(), other.into()),
                },
            )?;
        // Whoever had it may have given it its name, or taken it away, meanwhile.
        let ours = file.metadata().context(what)?;
        let same = fs::metadata(&path).is_ok_and(|named| named.ino() == ours.ino());
        check_free(target)?;
        if !same {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("another process wrote {}: try again", path.display()),
            ));
        }
        Ok(Partial { path, file })
    }

    fn write(&self, wish: &Wish<'_>, watch: &dyn BlocksWatch) -> Result<BackupReport> {
        let what = || format!("cannot write {}", self.path.display());
        let Some(Begun {
            header,
            state: begun,
        }) = self.begun()?
        else {
            let state = wish.state(None)?;
            let header = state.header()?;
            self.file.set_len(0).context(what)?;
            (&*self.file).rewind().context(what)?;
            let writer = Writer::new(&*self.file, &header, &state.description()?)?;
            return self.fill(&state, &header, writer, 0, watch);
        };
        let state = wish
            .state(Some(&header))
            .map_err(|error| self.not_this(error))?;
        let resume = match begun {
            Ok(totals) => {
                let len = self.file.metadata().context(what)?.len();
                return Ok(state.report(&header, &totals, len, len));
            }
            Err(resume) => resume,
        };
        let len = resume.len;
        self.file.set_len(len).context(what)?;
        (&*self.file).seek(SeekFrom::Start(len)).context(what)?;
        let writer = Writer::resume(&*self.file, resume)?;
        self.fill(&state, &header, writer, len, watch)
    }

    fn fill(
        &self,
        state: &State,
        header: &Header,
        mut writer: Writer<&File>,
        resumed: u64,
        watch: &dyn BlocksWatch,
    ) -> Result<BackupReport> {
        let written = state
            .write(&mut writer, watch)
            .and_then(|()| writer.finish());
        let (totals, file) = written.map_err(|error| {
            error.context(format!(
                "{} has what is done: the same command goes on there",
                self.path.display()
            ))
        })?;
        let len = file.metadata();
        let len = len.context(|| format!("cannot look at {}", self.path.display()))?;
        Ok(state.report(header, &totals, resumed, len.len()))
    }

    /// Reads what is there; `None` where the file is empty, or a backup that was cut off before its first chunk:
    /// nothing of value is lost then.
    ///
    /// # Errors
    /// Where it is something else, and so nothing of ours to write over.
    fn begun(&self) -> Result<Option<Begun>> {
        let what = || format!("cannot read {}", self.path.display());
        let mut input = &*self.file;
        input.rewind().context(what)?;
        // A power cut, or a kill, before anything was there.
        if vellum_backup::ends_before_chunks(input).context(what)? {
            return Ok(None);
        }
        input.rewind().context(what)?;
        let reader = Reader::new(BufReader::with_capacity(1 << 20, input));
        let mut reader = reader.context(|| {
            format!(
                "cannot go on with {}, which is left as it is (remove it, or give another name)",
                self.path.display()
            )
        })?;
        let header = reader.header().clone();
        let state = loop {
            interrupt::check()?;
            match reader.chunk() {
                Ok(Some(_)) => {}
                Ok(None) => break Ok(reader.totals()),
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    tracing::debug!("goes on after {:?}: {error}", reader.totals());
                    break Err(reader.into_resume());
                }
                Err(error) => return Err(error.context(what())),
            }
        };
        Ok(Some(Begun { header, state }))
    }

    /// Says what lies there, where it is not what is wanted.
    fn not_this(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::AlreadyExists {
            return error;
        }
        let _ = (&*self.file).rewind();
        let of = Reader::new(&*self.file).ok();
        let of = of.and_then(|reader| Description::decode(reader.description()).ok());
        let of = of.map_or("something".into(), |description| match &description.since {
            Some(since) => format!("{} since {since}", description.moment()),
            None => format!("all of {}", description.moment()),
        });
        error.context(format!(
            "{} is an interrupted backup of {of}: finish it with the command that began it, or remove it",
            self.path.display()
        ))
    }

    /// Removes the file where nothing was written: no command goes on with that.
    fn remove_empty(&self) {
        if self.file.metadata().is_ok_and(|file| file.len() == 0) {
            // One that cannot be removed is overwritten.
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Makes it durable, and gives it its name.
    fn finish(&self, target: &Path) -> Result<()> {
        let what = || format!("cannot write {}", target.display());
        self.file.sync_all().context(what)?;
        name_new(&self.path, target).map_err(|error| {
            let partial = self.path.display();
            match error.kind() {
                // It came while the backup was written.
                io::ErrorKind::AlreadyExists => taken(
                    target,
                    &format!("move it away and give the same command again: the backup is whole in {partial}"),
                ),
                _ => Error::io(
                    format!(
                        "the backup is whole in {partial}, but cannot be renamed to {}: rename it (`mv -n`)",
                        target.display()
                    ),
                    error,
                ),
            }
        })?;
        let dir = target.parent().filter(|dir| !dir.as_os_str().is_empty());
        File::open(dir.unwrap_or(Path::new(".")))
            .and_then(|dir| dir.sync_all())
            .context(what)
    }
}

/// Gives a file a name that nothing has, in one step; where the file system has no such rename, by one more link
/// to it.
fn name_new(file: &Path, name: &Path) -> io::Result<()> {
    TempPath::try_from_path(file)?
        .persist_noclobber(name)
        .map_err(|failed| match failed.path.keep() {
            Ok(_) => failed.error,
            Err(kept) => kept.error,
        })
}

fn taken(target: &Path, remedy: &str) -> Error {
    let text = format!("there is a file {} already: {remedy}", target.display());
    Error::new(ErrorKind::AlreadyExists, text)
}

/// A backup never takes the place of a file.
fn check_free(target: &Path) -> Result<()> {
    let there = match fs::symlink_metadata(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            let what = format!("cannot look for {}", target.display());
            return Err(Error::io(what, error));
        }
        Ok(there) => there,
    };
    if there.is_file() {
        return Err(taken(target, "remove it, or give another name"));
    }
    let name = target.display();
    Err(Error::new(
        ErrorKind::AlreadyExists,
        match target.is_dir() {
            true => format!("{name} is a directory: name a file in it"),
            false => format!(
                "{name} is no place for a file: give another name, or write to it with `-o - > {name}`"
            ),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_to_a_name_meanwhile_stays_and_so_does_what_was_to_have_it() {
        let dir = tempfile::tempdir().unwrap();
        let [partial, target] = ["x.vb.partial", "x.vb"].map(|name| dir.path().join(name));
        fs::write(&partial, "backup").unwrap();
        fs::write(&target, "mine").unwrap();
        let refused = name_new(&partial, &target).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&target).unwrap(), "mine");
        assert_eq!(fs::read_to_string(&partial).unwrap(), "backup");
        fs::remove_file(&target).unwrap();
        name_new(&partial, &target).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "backup");
        assert!(!partial.exists());
    }
}
