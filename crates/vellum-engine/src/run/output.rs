//! What a command in the background writes: kept in a file of bounded size, and read from there.
//!
//! The lines are those of docker's `json-file` (docs/operations.md, "Containers in the background").

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::unistd::pipe2;
use serde::{Deserialize, Serialize};

use super::activity::{Activity, activity};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_base::moment::rfc3339_nanos;
use vellum_store::{ContainerRecord, Store};

/// A file of more bytes becomes the old one.
const MAX_FILE: u64 = 8 << 20;
/// A longer line is cut, as docker does.
const MAX_LINE: usize = 16 << 10;
/// How often it is looked whether a run has ended, and whether there are new lines.
const LOOK: Duration = Duration::from_millis(100);

/// Where a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// The command's standard output.
    Stdout,
    /// Its standard error.
    Stderr,
    /// The waiter's own standard error.
    Vellum,
}

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputLine {
    /// Its text, with the end of the line where that was not cut off.
    #[serde(rename = "log")]
    pub text: String,
    /// Where it came from.
    pub stream: Stream,
    /// When it was read, RFC 3339 with nanoseconds.
    pub time: String,
}

/// Writes the log.
struct Keeper {
    paths: [PathBuf; 2],
    file: File,
    bytes: u64,
    max: u64,
}

impl Keeper {
    fn open(paths: [PathBuf; 2], max: u64) -> Result<Keeper> {
        let [path, _] = &paths;
        let what = || format!("cannot open {}", path.display());
        let mut file = Keeper::file(path).context(what)?;
        let mut bytes = file.metadata().context(what)?.len();
        // A crash of the host may have torn the last line.
        if bytes > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1)).context(what)?;
            file.read_exact(&mut last).context(what)?;
            if last != *b"\n" {
                file.write_all(b"\n").context(what)?;
                bytes += 1;
            }
        }
        Ok(Keeper {
            paths,
            file,
            bytes,
            max,
        })
    }

    fn file(path: &PathBuf) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.create(true).read(true).append(true).mode(0o600);
        options.open(path)
    }

    fn keep(&mut self, stream: Stream, text: &[u8]) -> io::Result<()> {
        let line = OutputLine {
            text: String::from_utf8_lossy(text).into_owned(),
            stream,
            time: rfc3339_nanos(SystemTime::now()),
        };
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        if self.bytes + bytes.len() as u64 > self.max {
            let [path, old] = &self.paths;
            fs::rename(path, old)?;
            self.file = Keeper::file(path)?;
            self.bytes = 0;
        }
        self.file.write_all(&bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// A pipe that is read, and what was read of a line whose end has not come.
struct Source {
    stream: Stream,
    pipe: OwnedFd,
    begun: Vec<u8>,
}

impl Source {
    /// Reads what is there, and keeps whole lines; false once nobody writes any more, or nothing is there.
    fn read(&mut self, keeper: &mut Keeper) -> bool {
        let mut bytes = vec![0; 64 << 10];
        let read = match nix::unistd::read(&self.pipe, &mut bytes) {
            Ok(0) | Err(_) => return false,
            Ok(read) => read,
        };
        self.begun.extend(bytes.iter().take(read));
        while let Some(end) = self.line_end() {
            let rest = self.begun.split_off(end);
            // A line that finds no room is lost: nobody is kept waiting for the disk.
            let _ = keeper.keep(self.stream, &self.begun);
            self.begun = rest;
        }
        true
    }

    /// Where the first line ends, or is cut.
    fn line_end(&self) -> Option<usize> {
        let end = self.begun.iter().position(|byte| *byte == b'\n');
        match end.map(|end| end + 1) {
            Some(end) if end <= MAX_LINE => Some(end),
            None if self.begun.len() <= MAX_LINE => None,
            _ => {
                // Not within a character.
                let is_start = |at: &usize| {
                    let byte = self.begun.get(*at);
                    byte.is_none_or(|byte| byte & 0xc0 != 0x80)
                };
                let cut = (MAX_LINE - 3..=MAX_LINE).rev().find(is_start);
                Some(cut.unwrap_or(MAX_LINE))
            }
        }
    }

    fn end(mut self, keeper: &mut Keeper) {
        let _ = nix::fcntl::fcntl(&self.pipe, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
        while self.read(keeper) {}
        if !self.begun.is_empty() {
            let _ = keeper.keep(self.stream, &self.begun);
        }
    }
}

/// Takes what a command writes, and what this process has to say itself, to a container's log.
#[derive(Debug)]
pub(super) struct Output {
    /// For the command.
    pub(super) stdout: OwnedFd,
    /// For the command.
    pub(super) stderr: OwnedFd,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Output {
    /// Begins. This process' own standard error goes there too, from now on.
    pub(super) fn begin(store: &Store, container: &ContainerRecord) -> Result<Output> {
        let paths = store.runs().output_beside(container.id);
        let mut keeper = Keeper::open(paths, MAX_FILE)?;
        let what = || "the log of a command cannot be begun";
        let pipe = |stream| -> Result<(Source, OwnedFd)> {
            let (read, write) = pipe2(OFlag::O_CLOEXEC).context(what)?;
            let source = Source {
                stream,
                pipe: read,
                begun: Vec::new(),
            };
            Ok((source, write))
        };
        let (out, stdout) = pipe(Stream::Stdout)?;
        let (err, stderr) = pipe(Stream::Stderr)?;
        let (own, own_stderr) = pipe(Stream::Vellum)?;
        nix::unistd::dup2_stderr(&own_stderr).context(what)?;
        let ended = Arc::new(AtomicBool::new(false));
        let told = ended.clone();
        // Signals are for the thread that waits for the command.
        let before = SigSet::all().thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK);
        let thread = std::thread::Builder::new()
            .name("output".into())
            .spawn(move || copy(vec![out, err, own], &mut keeper, &told))
            .context(what);
        before
            .and_then(|before| before.thread_set_mask())
            .context(what)?;
        Ok(Output {
            stdout,
            stderr,
            ended,
            thread: Some(thread?),
        })
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // It ended by a fault of its own at worst, and then there are no more lines.
            let _ = thread.join();
        }
    }
}

fn copy(mut sources: Vec<Source>, keeper: &mut Keeper, ended: &AtomicBool) {
    while !ended.load(Ordering::SeqCst) {
        let poll_of = |source| PollFd::new(AsFd::as_fd(source), PollFlags::POLLIN);
        let mut fds: Vec<PollFd<'_>> = sources.iter().map(|s| poll_of(&s.pipe)).collect();
        match poll(&mut fds, PollTimeout::from(LOOK.as_millis() as u16)) {
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(_) => break,
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        for (source, _) in sources.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            source.read(keeper);
        }
    }
    for source in sources {
        source.end(keeper);
    }
}

/// Which lines of a log.
#[derive(Debug, Clone, Copy, Default)]
pub struct OutputOptions {
    /// The last so many of those that are there; all where it is `None`.
    pub last: Option<usize>,
    /// Also those that come, until the command has ended.
    pub follow: bool,
}

/// Passes on what a container's command has written in the background.
///
/// # Errors
/// [`ErrorKind::NotFound`] without such a container, and where it was never run in the background; as `show`.
pub fn logs(
    store: &Store,
    name: &str,
    options: OutputOptions,
    mut show: impl FnMut(&OutputLine) -> Result<()>,
) -> Result<()> {
    let container = store.container(name)?;
    let [path, old] = store.runs().output_beside(container.id);
    let what = || format!("cannot read {}", path.display());
    let mut file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "{name} has no log: only what runs in the background has one (`vellum run -d`, `vellum start`)"
                ),
            ));
        }
        other => BufReader::new(other.context(what)?),
    };
    let mut lines = match File::open(&old) {
        Ok(old) => whole_lines(&mut BufReader::new(old), &mut Vec::new()).context(what)?,
        Err(_) => Vec::new(),
    };
    // A line whose end has not come.
    let mut begun = Vec::new();
    lines.extend(whole_lines(&mut file, &mut begun).context(what)?);
    let skipped = options
        .last
        .map_or(0, |last| lines.len().saturating_sub(last));
    lines.iter().skip(skipped).try_for_each(&mut show)?;
    if !options.follow {
        return Ok(());
    }
    loop {
        interrupt::check()?;
        // Looked at first: what was written before it ended is read after that.
        let ended = matches!(
            activity(store, &container)?,
            Activity::Idle | Activity::Leftover
        );
        let is_new = fs::metadata(&path).is_ok_and(|now| {
            let ours = file.get_ref().metadata();
            ours.is_ok_and(|ours| ours.ino() != now.ino())
        });
        let lines = whole_lines(&mut file, &mut begun).context(what)?;
        lines.iter().try_for_each(&mut show)?;
        if is_new {
            file = BufReader::new(File::open(&path).context(what)?);
            begun.clear();
        } else if ended {
            return Ok(());
        } else if lines.is_empty() {
            std::thread::sleep(LOOK);
        }
    }
}

/// The lines that are there to the end of a file. What is none, as after a crash of the host, is passed over.
fn whole_lines(file: &mut impl BufRead, begun: &mut Vec<u8>) -> io::Result<Vec<OutputLine>> {
    let mut lines = Vec::new();
    while file.read_until(b'\n', begun)? > 0 && begun.ends_with(b"\n") {
        lines.extend(serde_json::from_slice::<OutputLine>(begun).ok());
        begun.clear();
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeper(dir: &tempfile::TempDir, max: u64) -> Keeper {
        let paths = ["log", "old"].map(|name| dir.path().join(name));
        Keeper::open(paths, max).unwrap()
    }

    fn kept(dir: &tempfile::TempDir, name: &str) -> Vec<OutputLine> {
        let mut file = BufReader::new(File::open(dir.path().join(name)).unwrap());
        whole_lines(&mut file, &mut Vec::new()).unwrap()
    }

    #[test]
    fn a_log_has_two_files_of_bounded_size_and_the_newest_lines_are_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = keeper(&dir, 1000);
        for number in 0..100 {
            let line = format!("line {number}\n");
            log.keep(Stream::Stdout, line.as_bytes()).unwrap();
        }
        for name in ["log", "old"] {
            assert!(fs::metadata(dir.path().join(name)).unwrap().len() <= 1000);
        }
        let mut lines = kept(&dir, "old");
        lines.extend(kept(&dir, "log"));
        let first = 100 - lines.len();
        assert!(lines.len() > 10, "{lines:?}");
        for (number, line) in (first..).zip(&lines) {
            assert_eq!(line.text, format!("line {number}\n"));
        }
    }

    #[test]
    fn a_torn_line_is_passed_over_and_the_next_one_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        keeper(&dir, 1000).keep(Stream::Stderr, b"one\n").unwrap();
        let path = dir.path().join("log");
        let whole = fs::metadata(&path).unwrap().len();
        keeper(&dir, 1000).keep(Stream::Stderr, b"torn\n").unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(whole + 7).unwrap();
        keeper(&dir, 1000).keep(Stream::Stderr, b"two\n").unwrap();
        let texts: Vec<String> = kept(&dir, "log").into_iter().map(|l| l.text).collect();
        assert_eq!(texts, ["one\n", "two\n"]);
    }

    #[test]
    fn a_long_line_is_cut_between_characters_and_other_bytes_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = keeper(&dir, 1 << 20);
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let source = Source {
            stream: Stream::Stdout,
            pipe: read,
            begun: Vec::new(),
        };
        let mut writer = File::from(write);
        let long = format!("x{}", "é".repeat(MAX_LINE));
        writer.write_all(long.as_bytes()).unwrap();
        writer.write_all(b"\n\xff\nno end").unwrap();
        source.end(&mut log);
        let lines = kept(&dir, "log");
        let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
        let (cut, rest) = texts.split_at(texts.len() - 2);
        assert_eq!(rest, ["\u{fffd}\n", "no end"]);
        assert_eq!(cut.concat(), format!("{long}\n"));
        assert!(cut.iter().all(|text| text.len() <= MAX_LINE));
    }
}
