//! Everything that is done to containers while they are in use, at once, from several processes: each command
//! does its work or says why not, and whatever is kept holds what was durable when it was made.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind as IoKind, Read, Seek};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Running, TestStore, run};
use vellum_base::error::ErrorKind;
use vellum_base::storage::{FaultStorage, FileStorage, OpKind, SeededRng};
use vellum_engine::merge::merge;
use vellum_engine::seal::How;
use vellum_engine::serve::export;
use vellum_engine::snapshot::{remove_snapshot, snapshot};
use vellum_engine::watch::Quiet;
use vellum_store::Store;

/// Another run with it does the same commands in each thread: `VELLUM_TEST_SEED=7 cargo nextest run …`.
const SEED: &str = "VELLUM_TEST_SEED";
/// Threads that run one command after the other.
const ACTORS: u64 = 4;
/// Commands of each at most, or as many as fit into this time.
const ROUNDS: u32 = 60;
const TIME: Duration = Duration::from_secs(12);
/// A command that takes longer hangs: a busy host may take long for anything.
const HANG: Duration = Duration::from_secs(120);
/// Containers with a writer, `c0` and so on; while they are renamed, `d0`.
const WRITTEN: usize = 2;

/// What a refusal says. Nothing else is one.
const REFUSALS: [&str; 11] = [
    "in use",
    " already",
    "there is no container",
    "there is no image",
    "has no snapshot",
    "is mounted at",
    "was renamed to",
    "was removed",
    "is being read",
    "is being removed",
    "served over NBD",
];
/// What none says, whatever else.
const FAULTS: [&str; 6] = [
    "fault of Vellum's own",
    "panicked",
    "damaged",
    "vellum check",
    "No such file",
    "os error 5",
];

const RECORD: usize = 512;

/// The record of that number: the number, bytes that follow from it, their checksum.
fn record(number: u64) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    let mut random = SeededRng::new(number);
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&random.bits().to_le_bytes());
    }
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    let sum = crc32fast::hash(&bytes[..RECORD - 4]);
    bytes[RECORD - 4..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// How many records from the first on are whole. Behind them is at most the one that was being written.
fn records(dir: &Path) -> Result<u64, String> {
    let bytes = fs::read(dir.join("records")).map_err(|error| error.to_string())?;
    let mut chunks = bytes.chunks(RECORD).zip(0..);
    let whole = chunks.position(|(chunk, number)| chunk != record(number));
    let whole = whole.unwrap_or(bytes.len() / RECORD);
    match bytes.len() > (whole + 1) * RECORD {
        true => Err(format!("record {whole} is damaged, and others follow")),
        false => Ok(whole as u64),
    }
}

/// What all threads know.
struct Stage {
    store: TestStore,
    /// Below here each container with a writer is mounted, whatever it is called.
    dirs: Vec<PathBuf>,
    /// Records of each that were synced.
    synced: Vec<AtomicU64>,
    /// The least number of records in what was made, by its name.
    least: Mutex<BTreeMap<String, u64>>,
    refused: AtomicU64,
    done: AtomicU64,
    stop: AtomicBool,
    faults: Mutex<Vec<String>>,
}

impl Stage {
    fn new() -> Self {
        let store = TestStore::new();
        store.small_image("base");
        let mut dirs = Vec::new();
        for number in 0..WRITTEN {
            let name = format!("c{number}");
            store.ok(&["create", "base", "--name", &name]);
            let dir = store.mount(&name);
            File::create(dir.join("records")).unwrap();
            File::open(&dir).unwrap().sync_all().unwrap();
            dirs.push(dir);
        }
        Stage {
            store,
            dirs,
            synced: (0..WRITTEN).map(|_| AtomicU64::new(0)).collect(),
            least: Mutex::default(),
            refused: AtomicU64::new(0),
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            faults: Mutex::default(),
        }
    }

    fn fault(&self, what: String) {
        self.faults.lock().unwrap().push(what);
        self.stop.store(true, Ordering::SeqCst);
    }

    fn ended(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Writes records one by one wherever the container is mounted.
    fn write(&self, number: usize) {
        let path = self.dirs[number].join("records");
        let mut next = 0;
        while !self.ended() {
            // Never made anew: what is there while nothing is mounted is the host's.
            let written = OpenOptions::new().write(true).open(&path).and_then(|file| {
                file.write_all_at(&record(next), next * RECORD as u64)?;
                file.sync_all()
            });
            match written {
                Ok(()) => {
                    next += 1;
                    self.synced[number].store(next, Ordering::SeqCst);
                }
                Err(error) if error.kind() == IoKind::NotFound => {}
                Err(error) => self.fault(format!("record {next} of c{number}: {error}")),
            }
            // So that it can be unmounted in between.
            thread::sleep(Duration::from_millis(3));
        }
    }

    /// Runs a command to its end: true where it did its work, false where it said why not.
    fn command(&self, arguments: &[&str]) -> bool {
        let mut said = tempfile::tempfile().unwrap();
        let mut command = self.store.command();
        let command = command.args(arguments).stdout(Stdio::null());
        let mut child = command.stderr(said.try_clone().unwrap()).spawn().unwrap();
        let what = format!("vellum {}", arguments.join(" "));
        let status = self.wait(&mut child, &what);
        self.judge(&what, status, &mut said)
    }

    fn wait(&self, child: &mut Child, what: &str) -> Option<ExitStatus> {
        let deadline = Instant::now() + HANG;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return Some(status);
            }
            if Instant::now() > deadline {
                self.fault(format!("{what}: hangs"));
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn judge(&self, what: &str, status: Option<ExitStatus>, said: &mut File) -> bool {
        let mut text = String::new();
        said.rewind().unwrap();
        said.read_to_string(&mut text).unwrap();
        let Some(status) = status else { return false };
        let says = |what: &&str| text.contains(*what);
        let refused = status.code() == Some(1) && REFUSALS.iter().any(says);
        if FAULTS.iter().any(says) || !(status.success() || refused) {
            self.fault(format!("{what}: {status}: {text}"));
        }
        let count = if refused { &self.refused } else { &self.done };
        count.fetch_add(1, Ordering::SeqCst);
        status.success()
    }

    /// Runs a command that makes `made` of a container's present, with all that was synced before.
    fn make(&self, container: usize, made: String, arguments: &[&str]) {
        let synced = self.synced[container].load(Ordering::SeqCst);
        if self.command(arguments) {
            let mut least = self.least.lock().unwrap();
            // Where others made something of that name too, nobody knows whose it is in the end.
            let there = least.entry(made).or_insert(synced);
            *there = synced.min(*there);
        }
    }

    /// Serves something until it has answered once.
    fn serve(&self, name: &str, socket: &Path) {
        let what = format!("vellum nbd {name}");
        let mut said = tempfile::tempfile().unwrap();
        let mut command = self.store.command();
        let command = command.args(["-q", "nbd", name, "--socket"]).arg(socket);
        let child = command.stderr(said.try_clone().unwrap()).spawn().unwrap();
        let mut server = Running(child);
        let deadline = Instant::now() + HANG;
        let listens = loop {
            match server.0.try_wait().unwrap() {
                Some(_) => break false,
                None if UnixStream::connect(socket).is_ok() => break true,
                None if Instant::now() > deadline => break false,
                None => thread::sleep(Duration::from_millis(2)),
            }
        };
        if listens {
            let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
            let size = run("nbdinfo", &["--size", &uri]);
            assert_eq!(size.trim(), (64 << 20).to_string());
            let pid = nix::unistd::Pid::from_raw(server.0.id() as i32);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        }
        let status = self.wait(&mut server.0, &what);
        self.judge(&what, status, &mut said);
    }

    /// One command after the other, as the seed says.
    fn act(&self, actor: u64, seed: u64) {
        let mut random = SeededRng::new(seed ^ (actor + 1).wrapping_mul(0x1234_5678_9abc_def1));
        let begin = Instant::now();
        for round in 0..ROUNDS {
            if self.ended() || begin.elapsed() > TIME {
                return;
            }
            self.step(&mut random, &format!("{actor}-{round}"));
        }
    }

    fn step(&self, random: &mut SeededRng, step: &str) {
        let number = random.below(WRITTEN as u64) as usize;
        let usual = random.below(6) > 0;
        let c = format!("{}{number}", if usual { "c" } else { "d" });
        let other = format!("{}{number}", if usual { "d" } else { "c" });
        let s = format!("s{}", random.below(4));
        let kept = format!("{c}@{s}");
        let fork = format!("f{}", random.below(3));
        let image = format!("i{}", random.below(2));
        let file = self.store.arg(&format!("{step}.backup"));
        let (c, s, fork, image) = (c.as_str(), s.as_str(), fork.as_str(), image.as_str());
        match random.below(100) {
            0..14 => self.make(number, format!("{number}@{s}"), &["snapshot", c, s]),
            14..22 => drop(self.command(&["rm", &kept])),
            22..25 => drop(self.command(&["snapshots", "prune", c, "--keep-last", "2"])),
            25..35 => drop(self.command(&["merge", c])),
            35..40 => self.make(number, image.to_owned(), &["commit", c, image]),
            40..43 => drop(self.command(&["rmi", image])),
            43..51 => self.make(number, fork.to_owned(), &["fork", c, fork]),
            51..55 => {
                // Of whatever moment that is.
                let fork = fork.replace('f', "g");
                self.command(&["fork", c, &fork, "--from", s]);
            }
            55..61 => {
                self.command(&["rm", "--force", fork]);
                self.command(&["rm", &fork.replace('f', "g")]);
            }
            61..66 => self.make(number, file.clone(), &["backup", c, "-o", &file]),
            66..72 => {
                self.command(&["umount", c]);
                self.command(&["mount", c]);
            }
            72..76 => {
                self.command(&["mount", fork]);
                self.command(&["umount", fork]);
            }
            76..82 => {
                self.command(&["rename", c, &other]);
                self.command(&["rename", &other, c]);
            }
            82..87 => drop(self.command(&["trim", c])),
            87..91 => drop(self.command(&["prune"])),
            served => {
                let socket = self.store.path(&format!("{step}.sock"));
                match served % 3 {
                    0 => self.serve(fork, &socket),
                    1 => self.serve(&kept, &socket),
                    _ => {
                        self.command(&["umount", c]);
                        self.serve(c, &socket);
                        self.command(&["mount", c]);
                    }
                }
            }
        }
    }

    /// After the last command: nothing runs, nothing is lost, and all that is there holds what it should.
    fn verify(&self) {
        let store = &self.store;
        let containers = store.names("ps");
        for name in &containers {
            store.ok(&["umount", name]);
        }
        store.assert_nothing_runs();
        // What a command could not remove beside others is left to prune; nothing else is found.
        let report = store.json(&["check", "--scrub"]);
        for finding in report["findings"].as_array().unwrap() {
            let fine = finding["severity"] == "note" || finding["what"] == "leftover";
            assert!(fine, "{finding:#}");
        }
        store.ok(&["prune"]);
        store.ok(&["check", "--scrub"]);
        let again = store.json(&["prune"]);
        assert_eq!(again["layers"], serde_json::json!([]));
        assert_eq!(again["leftovers"], serde_json::json!([]));
        for name in &containers {
            let written = name
                .strip_prefix(['c', 'd'])
                .and_then(|n| n.parse::<usize>().ok());
            match written {
                Some(number) => {
                    let synced = self.synced[number].load(Ordering::SeqCst);
                    self.hold(store, name, name, synced);
                    self.hold_snapshots(name, number);
                }
                None => self.hold(store, name, name, self.least(name)),
            }
        }
        for image in store.names("images") {
            if image != "base" {
                store.ok(&["create", &image, "--name", "look"]);
                self.hold(store, &image, "look", self.least(&image));
                store.ok(&["rm", "look"]);
            }
        }
        self.hold_backups();
        store.assert_nothing_runs();
    }

    fn hold_snapshots(&self, name: &str, number: usize) {
        let listed = self.store.json(&["snapshots", name]);
        for kept in listed["snapshots"].as_array().unwrap() {
            let kept = kept["name"].as_str().unwrap();
            let least = self.least(&format!("{number}@{kept}"));
            self.store.ok(&["fork", name, "look", "--from", kept]);
            self.hold(&self.store, &format!("{name}@{kept}"), "look", least);
            self.store.ok(&["rm", "look"]);
        }
    }

    fn hold_backups(&self) {
        let other = TestStore::new();
        let least = self.least.lock().unwrap().clone();
        for (file, least) in least.iter().filter(|(name, _)| name.ends_with(".backup")) {
            other.ok(&["restore", "look", file]);
            self.hold(&other, file, "look", *least);
            other.ok(&["rm", "--snapshots", "look"]);
        }
    }

    fn least(&self, name: &str) -> u64 {
        self.least.lock().unwrap().get(name).copied().unwrap_or(0)
    }

    fn hold(&self, store: &TestStore, what: &str, container: &str, least: u64) {
        let dir = store.mount(container);
        let found = records(&dir);
        store.ok(&["umount", container]);
        match found {
            Ok(found) if found >= least => {}
            found => panic!("{what}: {found:?} records of at least {least}"),
        }
    }
}

#[test]
fn all_commands_at_once_under_writers_work_or_are_refused_and_nothing_synced_is_missing() {
    let seed = std::env::var(SEED).map_or(1, |seed| seed.parse().unwrap());
    let stage = Stage::new();
    thread::scope(|scope| {
        let stage = &stage;
        for number in 0..WRITTEN {
            scope.spawn(move || stage.write(number));
        }
        let actors: Vec<_> = (0..ACTORS)
            .map(|actor| scope.spawn(move || stage.act(actor, seed)))
            .collect();
        let ended: Vec<_> = actors
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        stage.stop.store(true, Ordering::SeqCst);
        assert!(ended.iter().all(Result::is_ok), "{SEED}={seed}");
    });
    let faults = stage.faults.lock().unwrap().join("\n");
    assert!(faults.is_empty(), "{SEED}={seed}:\n{faults}");
    let (done, refused) = (&stage.done, &stage.refused);
    println!("{SEED}={seed}: {done:?} commands did their work, {refused:?} were refused");
    assert!(done.load(Ordering::SeqCst) > 10);
    stage.verify();
}

/// A store whose files can be hooked, with a container `c` of three layers above its image's, which has two
/// snapshots; and another view of the same store, as another process has it.
fn hooked() -> (TestStore, FaultStorage, Store, Arc<Store>) {
    let fixture = TestStore::new();
    fixture.small_image("base");
    fixture.ok(&["create", "base", "--name", "c"]);
    let storage = FaultStorage::new(Arc::new(FileStorage));
    let store = Store::with_storage(&fixture.root, Arc::new(storage.clone())).unwrap();
    let others = Store::with_storage(&fixture.root, Arc::new(FileStorage)).unwrap();
    for name in ["one", "two"] {
        snapshot(&others, "c", Some(name), How::Crash, None).unwrap();
    }
    (fixture, storage, store, Arc::new(others))
}

/// Has another process do something once, when the file whose path ends so is opened for the `nth` time.
fn when_opened(
    storage: &FaultStorage,
    end: &str,
    nth: u64,
    act: impl Fn() + Send + Sync + 'static,
) -> Arc<AtomicU64> {
    let opened = Arc::new(AtomicU64::new(0));
    let (end, count) = (end.to_owned(), opened.clone());
    storage.set_hook(Some(Arc::new(move |kind, path| {
        let opens = kind == OpKind::Open && path.ends_with(&end);
        if opens && count.fetch_add(1, Ordering::SeqCst) + 1 == nth {
            act();
        }
    })));
    opened
}

#[test]
fn an_nbd_server_serves_the_top_that_a_snapshot_beside_it_left_and_no_other() {
    let (_fixture, storage, store, others) = hooked();
    // As a snapshot leaves it that was cut off before it sealed anything.
    let pin = others.pin_layers().unwrap();
    let (before, _) = others.prepare_commit("c", None, &pin).unwrap();
    drop(pin);
    let header = format!("layers/{}/layer", before.top);
    let opened = when_opened(&storage, &header, 2, {
        let others = others.clone();
        move || drop(snapshot(&others, "c", Some("three"), How::Crash, None).unwrap())
    });
    let serving = export(&store, "c", false).unwrap();
    storage.set_hook(None);
    assert!(opened.load(Ordering::SeqCst) >= 2, "nobody came in between");
    let now = others.container("c").unwrap();
    assert_ne!(Some(now.top), before.next);
    let leased = others.lease_layer(now.top).unwrap_err();
    assert_eq!(leased.kind(), ErrorKind::InUse, "what is served is the top");
    drop(serving);
}

#[test]
fn layers_that_a_reader_pinned_are_found_after_a_merge_took_them_out_of_the_records() {
    let (_fixture, _, _, others) = hooked();
    snapshot(&others, "c", Some("three"), How::Crash, None).unwrap();
    let join_without = |name: &str| {
        remove_snapshot(&others, "c", name).unwrap();
        let report = merge(&others, "c", None, &Quiet).unwrap();
        assert_eq!(report.joined.len(), 1, "{report:?}");
    };
    // What the snapshot `three` lies on is not there any more; another stands for it.
    join_without("one");
    let pin = others.pin_layers().unwrap();
    let layers = others.container("c").unwrap().layers;
    join_without("two");
    assert_ne!(others.container("c").unwrap().layers, layers);
    assert_eq!(others.ancestry(layers.last().copied()).unwrap(), layers);
    drop(pin);
}

#[test]
fn an_nbd_server_of_a_snapshot_that_is_removed_meanwhile_works_or_says_so() {
    let (_fixture, storage, store, others) = hooked();
    for nth in 1..5 {
        let name = format!("s{nth}");
        snapshot(&others, "c", Some(&name), How::Crash, None).unwrap();
        when_opened(&storage, "containers/c.json", nth, {
            let (others, name) = (others.clone(), name.clone());
            move || drop(remove_snapshot(&others, "c", &name).unwrap())
        });
        match export(&store, &format!("c@{name}"), false) {
            Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{nth}: {error}"),
            Ok(serving) => drop(serving),
        }
        storage.set_hook(None);
    }
}

#[test]
fn an_nbd_server_opens_the_layers_that_a_merge_beside_it_joins() {
    let (_fixture, storage, store, others) = hooked();
    let uppermost = *others.container("c").unwrap().layers.last().unwrap();
    let header = format!("layers/{uppermost}/layer");
    for name in ["one", "two"] {
        remove_snapshot(&others, "c", name).unwrap();
    }
    let opened = when_opened(&storage, &header, 1, {
        let others = others.clone();
        move || {
            let report = merge(&others, "c", None, &Quiet).unwrap();
            assert_eq!(report.joined.len(), 1, "{report:?}");
        }
    });
    let serving = export(&store, "c", false).unwrap();
    storage.set_hook(None);
    assert!(opened.load(Ordering::SeqCst) > 0, "nobody came in between");
    drop(serving);
}
