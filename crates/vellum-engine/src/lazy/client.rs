//! How everybody but the fetcher waits for blocks of lazy layers.

use std::fs::OpenOptions;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::Value;
use uuid::Uuid;

use super::fetcher::FETCHER_COMMAND;
use super::stall::Stall;
use super::{
    BACKGROUND, COMPLETE, Complete, Damaged, HEAL, Remote, STATUS, TRAFFIC, WANT, Waiting, Want,
};
use crate::wire::encode;
use vellum_base::block::Span;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_base::interrupt;
use vellum_core::layer::Fetch;
use vellum_export::device::control;
use vellum_fs::run_dir::{DirSocket, RunRoot};
use vellum_registry::Traffic;
use vellum_store::Store;

/// The longest that one call waits for its answer: the fetcher gives up before.
const LONGEST_CALL: Duration = Duration::from_secs(1 << 30);
/// How long it is waited for that a new fetcher listens, before another one is started: the one before may be about
/// to end, and hold its lock.
const START: Duration = Duration::from_secs(1);
/// For how much longer than a read waits for a registry somebody is looked for who fetches.
const GRACE: Duration = Duration::from_secs(10);
/// How often it is looked whether it does.
const PAUSE: Duration = Duration::from_millis(10);
/// How long the fetcher may take to say who waits.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Asks the fetcher of a layer's store, and starts one where there is none.
#[derive(Debug, Clone, Copy, Default)]
pub struct FetcherClient;

impl Fetch for FetcherClient {
    fn fetch(&self, dir: &Path, windows: Range<u32>) -> Result<()> {
        let (root, layer) = place(dir)?;
        ask(root, WANT, &encode(&Want { layer, windows })?)
            .map(drop)
            .map_err(|error| Error::new(ErrorKind::Absent, error.to_string()))
    }

    fn heal(&self, dir: &Path, blocks: Span) -> Result<bool> {
        // Of a layer that came from nowhere nobody is asked.
        if !Remote::is_known(dir) {
            return Ok(false);
        }
        let (root, layer) = place(dir)?;
        let damaged = Damaged {
            layer,
            first: blocks.start().get(),
            count: blocks.len().get(),
        };
        let answer = ask(root, HEAL, &encode(&damaged)?)?;
        Ok(answer == Value::Bool(true))
    }
}

/// The root of a layer's store, and its name there.
fn place(dir: &Path) -> Result<(&Path, Uuid)> {
    let unusual = || Error::internal(format!("{}: no layer of a store", dir.display()));
    let root = dir.parent().and_then(Path::parent).ok_or_else(unusual)?;
    let layer = dir.file_name().and_then(|name| name.to_str());
    let layer = layer.and_then(|name| Uuid::parse_str(name).ok());
    Ok((root, layer.ok_or_else(unusual)?))
}

/// Has the fetcher look for what is to be brought although nobody waits for it.
///
/// # Errors
/// Where none can be started.
pub(crate) fn ask_for_the_background(root: &Path) -> Result<()> {
    ask(root, BACKGROUND, &Value::Null).map(drop)
}

/// Has the fetcher make a layer of which all is here a sealed one like any other.
///
/// # Errors
/// As [`vellum_core::layer::LazyLayer::complete`].
pub(super) fn ask_to_complete(root: &Path, layer: Uuid) -> Result<()> {
    ask(root, COMPLETE, &encode(&Complete { layer })?).map(drop)
}

/// Who waits for blocks, of all layers of a store. Nobody, where there is no fetcher.
///
/// # Errors
/// Where it does not answer.
pub fn waiting(runs: &RunRoot) -> Result<Vec<Waiting>> {
    Ok(said(runs, STATUS)?.unwrap_or_else(Vec::new))
}

/// How many parts of blobs the fetcher of a store has asked registries for since it began; `None` where there is none.
///
/// # Errors
/// Where it does not answer.
pub fn traffic(runs: &RunRoot) -> Result<Option<Traffic>> {
    said(runs, TRAFFIC)
}

/// What the fetcher says of itself, if there is one.
fn said<T: DeserializeOwned>(runs: &RunRoot, verb: &str) -> Result<Option<T>> {
    let answer = control::call_at(&runs.fetcher(), verb, Value::Null, STATUS_TIMEOUT);
    let answer = match answer {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    serde_json::from_value(answer).map(Some).map_err(|error| {
        let what = format!("what the fetcher says of its {verb}");
        Error::with_source(ErrorKind::Protocol, what, error)
    })
}

/// Whether somebody waits for blocks of one of these layers.
pub(crate) fn waits_for_any(store: &Store, layers: &[Uuid]) -> bool {
    let ours = |one: &Waiting| one.requests > 0 && layers.contains(&one.layer);
    waiting(&store.runs()).is_ok_and(|waiting| waiting.iter().any(ours))
}

/// Why a chain of these layers cannot be mounted, with what the registry said where blocks did not come.
pub fn explain(store: &Store, layers: &[Uuid], what: String, error: Error) -> Error {
    match said_last(store, layers) {
        Some(why) => Error::new(ErrorKind::Absent, format!("{what}: {error}: {why}")),
        None => error.context(what),
    }
}

/// Why blocks of one of these layers did not come, where the last attempt failed.
fn said_last(store: &Store, layers: &[Uuid]) -> Option<String> {
    let waiting = match waiting(&store.runs()) {
        Ok(waiting) => waiting,
        Err(error) => {
            tracing::warn!("what a registry said is not known: {error}");
            return None;
        }
    };
    let mut ours = waiting
        .into_iter()
        .filter(|one| layers.contains(&one.layer));
    ours.find_map(|one| one.error)
}

/// Asks the fetcher, however often it dies meanwhile.
fn ask(root: &Path, verb: &str, args: &Value) -> Result<Value> {
    let socket = RunRoot::of_store(root).fetcher();
    let deadline = Stall::of_environment().deadline();
    loop {
        let answer = control::call_at(&socket, verb, args.clone(), LONGEST_CALL);
        let Err(error) = answer else {
            return answer;
        };
        // What it answers itself is of other kinds.
        let gone = matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::Io | ErrorKind::Protocol
        );
        if !gone {
            return Err(error);
        }
        interrupt::check()?;
        start(root, &socket)?;
        if deadline.is_some_and(|deadline| Instant::now() >= deadline + GRACE) {
            return Err(error);
        }
    }
}

/// Starts a fetcher, where there is none, and waits for a while until one listens.
fn start(root: &Path, socket: &DirSocket) -> Result<()> {
    let log = RunRoot::of_store(root).fetcher_log();
    let what = || {
        format!(
            "the fetcher of lazy layers cannot be started ({} says more)",
            log.display()
        )
    };
    let mut said = OpenOptions::new();
    let said = said
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log)
        .context(what)?;
    let status = Command::new("/proc/self/exe")
        .arg0("@vellum-fetcher")
        .arg("--root")
        .arg(root)
        .arg(FETCHER_COMMAND)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said)
        .current_dir("/")
        .status()
        .context(what)?;
    if !status.success() {
        let text = format!("{}: {status}", what());
        return Err(Error::new(ErrorKind::Command, text));
    }
    let deadline = Instant::now() + START;
    while Instant::now() < deadline {
        let answer = control::call_at(socket, STATUS, Value::Null, STATUS_TIMEOUT);
        if answer.is_ok() {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
