//! The log of what a target acknowledged: lines of text, each with its own checksum, so that it can
//! go to a file on another disk or through a serial console, among other output.
//!
//! ```text
//! vellum-durability start RUN BLOCKS BLOCK-SIZE #CRC
//! vellum-durability ack RUN BLOCK:SEQUENCE… #CRC
//! vellum-durability end RUN #CRC
//! ```

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use uuid::Uuid;

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

const MARK: &str = "vellum-durability ";
/// A longer line is none of ours.
const MAX_LINE: u64 = 64 << 10;
/// More blocks than any run has are a mistake.
const MAX_BLOCKS: u64 = 1 << 34;

/// Where the log is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Log {
    /// A file, on another disk than the target.
    File(PathBuf),
    /// Standard output when writing, standard input when checking.
    Standard,
}

impl std::str::FromStr for Log {
    type Err = std::convert::Infallible;

    /// `-` is [`Log::Standard`].
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "-" => Log::Standard,
            path => Log::File(path.into()),
        })
    }
}

/// The region that a run writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    /// Number of blocks, from the start of the target.
    pub(super) blocks: u64,
    /// Bytes of each.
    pub(super) block: u64,
}

/// The log of a run that is going on.
#[derive(Debug)]
pub(super) struct LogWriter {
    run: Uuid,
    out: Mutex<Out>,
}

#[derive(Debug)]
enum Out {
    File(File),
    Standard,
}

impl LogWriter {
    /// Begins a log; a file must not be there yet.
    pub(super) fn start(log: &Log, run: Uuid, region: Region) -> Result<Self> {
        let out = match log {
            Log::Standard => Out::Standard,
            Log::File(path) => Out::File(create(path)?),
        };
        let writer = LogWriter {
            run,
            out: Mutex::new(out),
        };
        writer.line(&format!("start {run} {} {}", region.blocks, region.block))?;
        Ok(writer)
    }

    /// Notes versions of blocks that the target made durable; durable itself on return.
    pub(super) fn acknowledged(&self, versions: &[(u64, u64)]) -> Result<()> {
        let mut text = format!("ack {}", self.run);
        for (block, sequence) in versions {
            text.push_str(&format!(" {block}:{sequence}"));
        }
        self.line(&text)
    }

    /// Notes that the run ended by itself.
    pub(super) fn end(&self) -> Result<()> {
        self.line(&format!("end {}", self.run))
    }

    fn line(&self, text: &str) -> Result<()> {
        let crc = crc32fast::hash(text.as_bytes());
        let line = format!("{MARK}{text} #{crc:08x}\n");
        let mut out = self.out.lock();
        let written = match &mut *out {
            Out::File(file) => file
                .write_all(line.as_bytes())
                .and_then(|()| sync_if_it_can(file)),
            Out::Standard => {
                let mut stdout = io::stdout().lock();
                stdout
                    .write_all(line.as_bytes())
                    .and_then(|()| stdout.flush())
            }
        };
        written.context(|| "cannot write the log of what was acknowledged")
    }
}

/// Pipes and terminals cannot be synced.
fn sync_if_it_can(file: &File) -> io::Result<()> {
    match file.sync_data() {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTSUP)) => Ok(()),
        other => other,
    }
}

fn create(path: &Path) -> Result<File> {
    let what = || format!("cannot make the log {}", path.display());
    if path.exists() && path.metadata().context(what)?.is_file() {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            format!(
                "{}: the log is there already; each run wants its own, so name another file",
                path.display()
            ),
        ));
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .context(what)?;
    // Its name must survive too.
    let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    if let Ok(dir) = File::open(parent.unwrap_or(Path::new("."))) {
        dir.sync_all().context(what)?;
    }
    Ok(file)
}

/// What a log says of its last run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Acknowledged {
    pub(super) run: Uuid,
    pub(super) region: Region,
    /// The last version of each block that was acknowledged.
    pub(super) versions: HashMap<u64, u64>,
    /// Writes that were acknowledged.
    pub(super) writes: u64,
    /// The run came to its end.
    pub(super) ended: bool,
    /// Lines of ours that cannot be read.
    pub(super) damaged_lines: u64,
}

impl Acknowledged {
    /// Reads a log.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where no run is in it.
    pub(super) fn read(log: &Log) -> Result<Self> {
        match log {
            Log::Standard => Self::parse(io::stdin().lock(), "standard input"),
            Log::File(path) => {
                let file = File::open(path)
                    .context(|| format!("cannot open the log {}", path.display()))?;
                Self::parse(BufReader::new(file), &path.display().to_string())
            }
        }
    }

    fn parse(mut input: impl BufRead, name: &str) -> Result<Self> {
        let mut found: Option<Acknowledged> = None;
        let mut damaged = 0;
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = input
                .by_ref()
                .take(MAX_LINE)
                .read_until(b'\n', &mut line)
                .context(|| format!("cannot read the log {name}"))?;
            if read == 0 {
                break;
            }
            let text = String::from_utf8_lossy(&line);
            // A console may have written something else in front.
            let Some((_, text)) = text.rsplit_once(MARK) else {
                continue;
            };
            if checked(text.trim_end())
                .and_then(|text| accept(&mut found, text))
                .is_none()
            {
                damaged += 1;
            }
        }
        let mut found = found.ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{name}: no run of `vellum verify-durability write` is in it: give the file \
                     that --log named then"
                ),
            )
        })?;
        found.damaged_lines = damaged;
        Ok(found)
    }
}

/// The text of a line whose checksum fits.
fn checked(line: &str) -> Option<&str> {
    let (text, crc) = line.rsplit_once(" #")?;
    let crc = u32::from_str_radix(crc, 16).ok()?;
    (crc32fast::hash(text.as_bytes()) == crc).then_some(text)
}

/// Takes in one line; `None` where it makes no sense.
fn accept(found: &mut Option<Acknowledged>, text: &str) -> Option<()> {
    let mut words = text.split(' ');
    let kind = words.next()?;
    let run: Uuid = words.next()?.parse().ok()?;
    if kind == "start" {
        let region = Region {
            blocks: words.next()?.parse().ok()?,
            block: words.next()?.parse().ok()?,
        };
        let sane = region.blocks <= MAX_BLOCKS && super::block::is_block_size(region.block);
        *found = sane.then(|| Acknowledged {
            run,
            region,
            versions: HashMap::new(),
            writes: 0,
            ended: false,
            damaged_lines: 0,
        });
        return sane.then_some(());
    }
    // Of a run before, whose end came late.
    let found = found.as_mut().filter(|found| found.run == run)?;
    match kind {
        "end" => found.ended = true,
        "ack" => {
            for word in words {
                let (block, sequence) = word.split_once(':')?;
                let (block, sequence): (u64, u64) = (block.parse().ok()?, sequence.parse().ok()?);
                if block >= found.region.blocks {
                    return None;
                }
                let last = found.versions.entry(block).or_default();
                *last = sequence.max(*last);
                found.writes += 1;
            }
        }
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Acknowledged> {
        Acknowledged::parse(text.as_bytes(), "log")
    }

    fn line(text: &str) -> String {
        format!("{MARK}{text} #{:08x}", crc32fast::hash(text.as_bytes()))
    }

    #[test]
    fn a_log_is_read_from_among_a_console_s_other_lines_up_to_where_it_was_cut() {
        let run = Uuid::from_u128(9);
        let log = [
            "[    0.1] Linux".into(),
            line(&format!("start {run} 100 4096")) + "\r",
            line(&format!("ack {run} 3:1 4:2")),
            format!("[    3.0] tty: {}", line(&format!("ack {run} 3:5"))),
            line(&format!("ack {run} 200:6")),
            line(&format!("ack {run} 4:7 9:8")).replace("9:8", "9:9"),
            line(&format!("ack {run} 5:10"))[..60].to_owned(),
        ]
        .join("\n");
        let found = parse(&log).unwrap();
        assert_eq!(found.versions, HashMap::from([(3, 5), (4, 2)]));
        assert_eq!((found.writes, found.damaged_lines), (3, 3));
        assert!(!found.ended);
    }

    #[test]
    fn the_last_run_of_a_log_counts() {
        let (old, new) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let log = [
            line(&format!("start {old} 100 4096")),
            line(&format!("ack {old} 3:1")),
            line(&format!("start {new} 50 8192")),
            line(&format!("ack {new} 7:1")),
            line(&format!("end {new}")),
        ]
        .join("\n");
        let found = parse(&log).unwrap();
        assert_eq!(found.run, new);
        assert_eq!(found.versions, HashMap::from([(7, 1)]));
        assert!(found.ended);
    }

    #[test]
    fn what_is_no_log_is_refused() {
        assert_eq!(parse("").unwrap_err().kind(), ErrorKind::Corrupt);
        let absurd = line(&format!("start {} 100 4095", Uuid::nil()));
        assert_eq!(parse(&absurd).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
