//! Whether a killed server of a ring is replaced without loss on this kernel: tried once a boot, before
//! the first device is served so.
//!
//! The takeover rests on what kernels do and nowhere promise: the order in which a dying process lets go of
//! its entries. So it is not believed, but seen.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::attach::{AttachSpec, start};
use super::detach::{DetachOptions, detach};
use super::process::boot_id;
use super::state::{RunState, Status};
use super::transport::TransportChoice;
use crate::fuse::ring::host;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::mountinfo::shows_devices;
use vellum_fs::run_dir::RunDir;

/// Where the result is kept: it is about this boot.
const DIR: &str = "/run/vellum";
const RESULT: &str = "ring-self-test.json";
/// Workers that are killed.
const KILLS: usize = 3;
/// Clients that write and read meanwhile, each in a part of its own.
const CLIENTS: u64 = 3;
const PART: u64 = 1 << 20;
const PIECE: usize = 16 << 10;
/// All of it takes a fraction of a second.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How the self-test of a boot came out.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Outcome {
    boot_id: String,
    version: String,
    error: Option<String>,
}

impl Outcome {
    fn read(path: &Path) -> Option<Outcome> {
        let outcome: Outcome = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let boot = boot_id().is_ok_and(|boot| boot == outcome.boot_id);
        (boot && outcome.version == env!("CARGO_PKG_VERSION")).then_some(outcome)
    }

    fn into_result(self) -> Result<()> {
        let Some(error) = self.error else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("the self-test of FUSE over io_uring failed in this boot: {error}"),
        ))
    }
}

/// How this boot's self-test came out, if it has been run.
pub fn known() -> Option<Result<()>> {
    Outcome::read(&Path::new(DIR).join(RESULT)).map(Outcome::into_result)
}

/// What a device is served by: what was asked for, unless that is to be found out.
pub(super) fn settle(spec: &AttachSpec) -> TransportChoice {
    if spec.transport != TransportChoice::Auto {
        return spec.transport;
    }
    if shows_new_devices() && TransportChoice::Ublk.ublk_control().is_ok() {
        return TransportChoice::Ublk;
    }
    if host::check().is_err() {
        return TransportChoice::Classic;
    }
    match passed(&spec.program) {
        Ok(()) => TransportChoice::Auto,
        Err(error) => {
            tracing::warn!("{error}: the device is served by /dev/fuse");
            TransportChoice::Classic
        }
    }
}

/// True where a device that the kernel makes is to be seen in /dev, and pids are those that it knows: not in
/// most containers.
fn shows_new_devices() -> bool {
    // include/uapi/linux/nsfs.h: PID_NS_INIT_INO.
    const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
    let pids = fs::metadata("/proc/self/ns/pid").map(|namespace| namespace.ino());
    matches!(pids, Ok(FIRST_PID_NAMESPACE)) && shows_devices()
}

/// Runs the self-test with the servers of `program`, unless it was run in this boot.
fn passed(program: &Path) -> Result<()> {
    let what = || format!("{DIR}: the self-test of FUSE over io_uring");
    let dir = Path::new(DIR);
    let mut builder = fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .context(what)?;
    let lock = File::create(dir.join("ring-self-test.lock")).context(what)?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| Error::io(what(), errno.into()))?;
    let path = dir.join(RESULT);
    if let Some(outcome) = Outcome::read(&path) {
        return outcome.into_result();
    }
    let result = run(program, &dir.join("ring-self-test"));
    let outcome = Outcome {
        boot_id: boot_id()?,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        error: result.err().map(|error| error.to_string()),
    };
    let bytes = serde_json::to_vec(&outcome)
        .map_err(|error| Error::internal(format!("{}: {error}", what())))?;
    let unfinished = path.with_extension("tmp");
    fs::write(&unfinished, bytes).context(what)?;
    fs::rename(&unfinished, &path).context(what)?;
    outcome.into_result()
}

/// Serves a scratch file by a ring, and kills its worker while clients check what they read.
fn run(program: &Path, dir: &Path) -> Result<()> {
    let what = || dir.display().to_string();
    let run_dir = RunDir::at(dir.join("device"));
    let end = || {
        let options = DetachOptions {
            force: true,
            ..DetachOptions::default()
        };
        detach(&run_dir, &options)
    };
    // What one that was killed left.
    end()?;
    fs::create_dir_all(run_dir.path()).context(what)?;
    let backing = dir.join("backing");
    let file = File::create(&backing).context(what)?;
    file.set_len(CLIENTS * PART).context(what)?;
    let spec = AttachSpec {
        program: program.to_owned(),
        transport: TransportChoice::Ring,
        timeout: TIMEOUT,
        ..AttachSpec::new(vec![
            "device-supervisor".into(),
            "--file".into(),
            backing.into(),
        ])
    };
    let result = start(&run_dir, &spec).and_then(|_| kill_under_load(&run_dir));
    // Aborts the session: no client waits for ever.
    let ended = end();
    let _ = fs::remove_dir_all(dir);
    result.and(ended)
}

fn kill_under_load(run_dir: &RunDir) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    let finish = Arc::new(AtomicBool::new(false));
    let clients: Vec<JoinHandle<Result<()>>> = (0..CLIENTS)
        .map(|client| {
            let (path, finish) = (run_dir.dev(), Arc::clone(&finish));
            std::thread::spawn(move || write_and_read(&path, client, &finish))
        })
        .collect();
    let late = || {
        Error::new(
            ErrorKind::Timeout,
            format!("it did not end within {TIMEOUT:?}"),
        )
    };
    let mut before = None;
    for kill in 0..=KILLS {
        let worker = loop {
            let state = RunState::read(run_dir)?;
            let serving = state.filter(|state| state.status == Status::Serving);
            let worker = serving.and_then(|state| state.worker);
            if let Some(worker) = worker.filter(|worker| Some(*worker) != before) {
                break worker;
            }
            if Instant::now() > deadline {
                return Err(late());
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        std::thread::sleep(Duration::from_millis(20));
        if kill < KILLS
            && let Some(process) = worker.open()?
        {
            process.signal(Signal::SIGKILL);
        }
        before = Some(worker);
    }
    finish.store(true, Ordering::Release);
    for client in clients {
        while !client.is_finished() {
            if Instant::now() > deadline {
                return Err(late());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        match client.join() {
            Ok(result) => result?,
            Err(_) => return Err(Error::internal("a client panicked")),
        }
    }
    Ok(())
}

/// Writes a part of the file round after round and checks what it reads of the round before.
fn write_and_read(path: &PathBuf, client: u64, finish: &AtomicBool) -> Result<()> {
    let what = || "a request of a client failed";
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .context(what)?;
    let mut read = vec![0; PIECE];
    let mut round = 0u8;
    while !finish.load(Ordering::Acquire) {
        let next = round.wrapping_add(1);
        for at in (client * PART..(client + 1) * PART).step_by(PIECE) {
            file.read_exact_at(&mut read, at).context(what)?;
            if read.iter().any(|byte| *byte != round) {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    "a client read what it had not written",
                ));
            }
            file.write_all_at(&vec![next; PIECE], at).context(what)?;
        }
        file.sync_data().context(what)?;
        round = next;
    }
    Ok(())
}
