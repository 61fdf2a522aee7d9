//! Writes down what a device's server reads of sealed layers, for as long as somebody wants to know: a file beside the run
//! directory of its container asks for it.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use uuid::Uuid;
use vellum_base::block::{Block, Span, WindowPower};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_core::chain::Touches;

/// A layer, and the number of one of its ranges of so many bytes ([`WindowPower::LEAST`]).
pub(super) type Touched = (Uuid, u32);

/// What was touched, each once, in the order of first touch: a line each, so that the successor of a server that died goes
/// on with it.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    seen: HashSet<Touched>,
    /// What could not be written is told once.
    failed: bool,
}

impl Recorder {
    /// Opens the file at `path`; `None` where nobody asks for it.
    ///
    /// # Errors
    /// Where it cannot be opened, or is not what a recorder wrote.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let opened = OpenOptions::new().append(true).read(true).open(path);
        let file = match opened {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.context(|| format!("cannot open {}", path.display()))?,
        };
        Ok(Some(Recorder {
            path: path.to_owned(),
            state: Mutex::new(State {
                file,
                seen: read(path)?.into_iter().collect(),
                failed: false,
            }),
        }))
    }
}

impl Touches for Recorder {
    fn touched(&self, layer: Uuid, blocks: Span) {
        if blocks.is_empty() {
            return;
        }
        let power = WindowPower::LEAST;
        let mut state = self.state.lock();
        let mut lines = String::new();
        // The first block behind them may be one that no range has.
        let last = Block::new(blocks.end().get() - 1);
        for range in power.window_of(blocks.start())..=power.window_of(last) {
            if state.seen.insert((layer, range)) {
                lines += &format!("{layer} {range}\n");
            }
        }
        if lines.is_empty() {
            return;
        }
        let written = state.file.write_all(lines.as_bytes());
        if let Err(error) = written
            && !std::mem::replace(&mut state.failed, true)
        {
            tracing::warn!("{}: the trace is not whole: {error}", self.path.display());
        }
    }
}

/// A file that asks a device's server to record, for as long as this lives.
#[derive(Debug)]
pub(super) struct Request {
    path: PathBuf,
}

impl Request {
    /// Makes the file.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn new(path: PathBuf) -> Result<Self> {
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .mode(0o600)
            .open(&path);
        file.context(|| format!("cannot make {}", path.display()))?;
        Ok(Request { path })
    }

    /// What was touched until now.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn touched(&self) -> Result<Vec<Touched>> {
        read(&self.path)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("{}: {error}", self.path.display());
        }
    }
}

fn read(path: &Path) -> Result<Vec<Touched>> {
    let text =
        std::fs::read_to_string(path).context(|| format!("cannot read {}", path.display()))?;
    // Of a server that was killed while it wrote, the last line is not whole.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let parse = |line: &str| {
        let (layer, range) = line.split_once(' ')?;
        Some((Uuid::parse_str(layer).ok()?, range.parse().ok()?))
    };
    let lines = whole.lines().map(|line| {
        parse(line).ok_or_else(|| {
            let text = format!("{}: {line:?} is no line of a trace", path.display());
            Error::new(ErrorKind::Corrupt, text)
        })
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vellum_base::block::Blocks;

    #[test]
    fn each_range_is_written_once_in_the_order_of_first_touch_also_by_a_successor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        assert!(Recorder::open(&path).unwrap().is_none());
        let request = Request::new(path.clone()).unwrap();
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let touch = |recorder: &Recorder, layer, start, len| {
            recorder.touched(layer, Span::new(Block::new(start), Blocks::new(len)));
        };
        let first = Recorder::open(&path).unwrap().unwrap();
        touch(&first, a, 31, 2);
        touch(&first, b, 0, 1);
        touch(&first, a, 16, 1);
        touch(&first, a, 0, 0);
        let second = Recorder::open(&path).unwrap().unwrap();
        touch(&second, b, 15, 1);
        touch(&second, a, 0, 16);
        let expected = [(a, 1), (a, 2), (b, 0), (a, 0)];
        assert_eq!(request.touched().unwrap(), expected);
        let mut torn = OpenOptions::new().append(true).open(&path).unwrap();
        torn.write_all(b"00000000-0000").unwrap();
        assert_eq!(request.touched().unwrap(), expected);
        drop(request);
        assert!(!path.exists());
    }
}
