//! `vellum verify-durability` against stacks that keep what they acknowledge, and against some
//! that do not: servers are killed with SIGKILL while it writes.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::common::{Running, TestStore, VELLUM, wait_until};
use serde_json::Value;

const BLOCK: u64 = 4096;

fn vellum(arguments: &[&str]) -> Output {
    Command::new(VELLUM)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn arg(path: &Path) -> String {
    path.display().to_string()
}

/// Checks a target; returns the exit status and the report.
fn check(target: &str, log: &str) -> (Option<i32>, Value, String) {
    let output = vellum(&["--json", "verify-durability", "check", target, "--log", log]);
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", stderr(&output)));
    (output.status.code(), report, stderr(&output))
}

fn count(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap()
}

/// A directory with a file that was written to for a moment, and the log of that.
struct Written {
    dir: tempfile::TempDir,
    file: PathBuf,
    log: String,
}

impl Written {
    fn new(more: &[&str]) -> Written {
        let dir = tempfile::tempdir().unwrap();
        let log = arg(&dir.path().join("log"));
        let target = arg(dir.path());
        let mut arguments = vec!["verify-durability", "write", &target, "--log", &log];
        arguments.extend(["--seconds", "1", "--size", "2M"]);
        arguments.extend(more);
        let output = vellum(&arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        Written {
            file: dir.path().join("vellum-durability"),
            dir,
            log,
        }
    }

    fn check(&self) -> (Option<i32>, Value, String) {
        check(&arg(self.dir.path()), &self.log)
    }

    /// The number of a block that was acknowledged.
    fn acknowledged_block(&self) -> u64 {
        let log = fs::read_to_string(&self.log).unwrap();
        let ack = log.lines().find(|line| line.contains(" ack ")).unwrap();
        let first = ack.split(' ').nth(3).unwrap();
        first.split_once(':').unwrap().0.parse().unwrap()
    }

    fn block(&self, number: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        let file = fs::File::open(&self.file).unwrap();
        file.read_exact_at(&mut bytes, number * BLOCK).unwrap();
        bytes
    }

    fn set_block(&self, number: u64, bytes: &[u8]) {
        let file = fs::OpenOptions::new().write(true).open(&self.file).unwrap();
        file.write_all_at(bytes, number * BLOCK).unwrap();
    }
}

#[test]
fn a_file_holds_all_that_was_acknowledged() {
    let written = Written::new(&["--threads", "3"]);
    let (status, report, _) = written.check();
    assert_eq!(status, Some(0), "{report}");
    assert!(count(&report, "acknowledged_writes") > 0);
    assert_eq!(
        count(&report, "intact"),
        count(&report, "acknowledged_blocks")
    );
    assert_eq!(report["ended"], true);
}

#[test]
fn blocks_smaller_and_larger_than_a_page_are_written_and_found() {
    for block in ["512", "65536"] {
        let written = Written::new(&["--block", block]);
        let (status, report, _) = written.check();
        assert_eq!(status, Some(0), "{report}");
        assert_eq!(
            count(&report, "intact"),
            count(&report, "acknowledged_blocks")
        );
    }
}

#[test]
fn a_block_that_is_missing_damaged_torn_or_elsewhere_is_reported_by_its_kind() {
    let written = Written::new(&[]);
    let block = written.acknowledged_block();
    let good = written.block(block);
    let lost = |bytes: &[u8]| {
        written.set_block(block, bytes);
        let (status, report, message) = written.check();
        assert_eq!(status, Some(1));
        assert!(
            message.contains("says that data is durable before it is"),
            "{message}"
        );
        assert_eq!(count(&report, "lost"), 1, "{report}");
        assert_eq!(report["losses"][0]["block"].as_u64(), Some(block));
        report["losses"][0]["kind"].as_str().unwrap().to_owned()
    };
    assert_eq!(lost(&[0; BLOCK as usize]), "missing");
    let mut damaged = good.clone();
    damaged[1000] ^= 1;
    assert_eq!(lost(&damaged), "damaged");
    let torn = [&good[..512], &[0; BLOCK as usize - 512]].concat();
    assert_eq!(lost(&torn), "torn");
    let other = (0..512)
        .find(|&other| other != block && written.block(other)[..8] == good[..8])
        .unwrap();
    assert_eq!(lost(&written.block(other)), "foreign");
    written.set_block(block, &good);
    assert_eq!(written.check().0, Some(0));
}

#[test]
fn an_older_copy_of_the_file_is_stale_and_a_shorter_or_missing_one_lacks_blocks() {
    let written = Written::new(&[]);
    let all = fs::read(&written.file).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&written.file)
        .unwrap()
        .set_len(BLOCK)
        .unwrap();
    let (status, report, _) = written.check();
    assert_eq!(status, Some(1));
    assert!(count(&report, "missing") > 1, "{report}");
    fs::remove_file(&written.file).unwrap();
    let (status, report, message) = written.check();
    assert_eq!(status, Some(1));
    // More often it is a mount that is missing than all of a stack's writes.
    assert!(message.contains("mount what is tested"), "{message}");
    assert!(!message.contains("before it is"), "{message}");
    assert_eq!(
        count(&report, "missing"),
        count(&report, "acknowledged_blocks")
    );
    fs::write(&written.file, &all).unwrap();
    // A version that the log does not know yet was acknowledged after the copy.
    let block = written.acknowledged_block();
    let run = report["run"].as_str().unwrap();
    let text = format!("ack {run} {block}:99999999");
    let line = format!(
        "vellum-durability {text} #{:08x}\n",
        crc32fast::hash(text.as_bytes())
    );
    let log = fs::read_to_string(&written.log).unwrap();
    fs::write(&written.log, log + &line).unwrap();
    let (status, report, _) = written.check();
    assert_eq!(status, Some(1));
    assert_eq!(count(&report, "stale"), 1, "{report}");
}

#[test]
fn a_log_through_pipes_among_other_lines_serves_as_well_as_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let target = arg(dir.path());
    let output = vellum(&[
        "verify-durability",
        "write",
        &target,
        "--log",
        "-",
        "--seconds",
        "1",
        "--size",
        "1M",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let console = dir.path().join("console");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.lines()
            .all(|line| line.starts_with("vellum-durability "))
    );
    let noisy = format!("[  0.0] Linux\n{}", text.replace('\n', "\r\n"));
    fs::write(&console, noisy).unwrap();
    let output = Command::new(VELLUM)
        .args(["verify-durability", "check", &target, "--log", "-"])
        .stdin(fs::File::open(&console).unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn nothing_is_destroyed_without_a_word_and_no_log_is_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("precious");
    fs::write(&file, "data").unwrap();
    let log = arg(&dir.path().join("log"));
    let write = |target: &str, more: &[&str]| {
        let mut arguments = vec!["verify-durability", "write", target, "--log", &log];
        arguments.extend(["--seconds", "1", "--size", "1M"]);
        arguments.extend(more);
        vellum(&arguments)
    };
    let refused = write(&arg(&file), &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("--overwrite"),
        "{}",
        stderr(&refused)
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "data");
    assert!(write(&arg(&file), &["--overwrite"]).status.success());
    let again = write(&arg(&file), &["--overwrite"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(
        stderr(&again).contains("name another file"),
        "{}",
        stderr(&again)
    );
    let odd = write(&arg(&file), &["--overwrite", "--block", "1000"]);
    assert!(stderr(&odd).contains("power of two"), "{}", stderr(&odd));
}

/// A server on a unix socket that is killed with SIGKILL.
struct Server {
    process: Running,
    uri: String,
}

impl Server {
    /// Starts a command that listens on `socket`.
    fn start(command: &mut Command, socket: &Path, export: &str) -> Server {
        // One that was killed leaves its socket.
        let _ = fs::remove_file(socket);
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}: apt-get install nbdkit"));
        let process = Running(process);
        wait_until("the server listens", || UnixStream::connect(socket).is_ok());
        Server {
            process,
            uri: format!("nbd+unix:///{export}?socket={}", socket.display()),
        }
    }

    fn kill(mut self) {
        // SIGKILL.
        self.process.0.kill().unwrap();
        self.process.0.wait().unwrap();
    }
}

fn nbdkit(socket: &Path, arguments: &[&str]) -> Server {
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-U"]).arg(socket).args(arguments);
    Server::start(&mut command, socket, "")
}

fn start_writing(uri: &str, log: &str) -> Child {
    Command::new(VELLUM)
        .args(["verify-durability", "write", uri, "--log", log])
        .args(["--overwrite", "--size", "8M"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Lets a server be written to, and kills it.
fn write_and_kill(server: Server, log: &str) {
    let writer = start_writing(&server.uri, log);
    wait_until("a hundred acknowledgements are logged", || {
        let log = fs::read_to_string(log).unwrap_or_default();
        log.lines().count() > 100
    });
    server.kill();
    let output = writer.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = stderr(&output);
    assert!(
        message.contains("the target failed after it acknowledged"),
        "{message}"
    );
}

/// (exit status, report) of a check after `start` was written to, killed, and started again.
fn kill_and_check(log: &Path, start: impl Fn() -> Server) -> (Option<i32>, Value) {
    let log = arg(log);
    write_and_kill(start(), &log);
    let server = start();
    let (status, report, _) = check(&server.uri, &log);
    assert!(count(&report, "acknowledged_writes") >= 100, "{report}");
    assert_eq!(report["ended"], false);
    (status, report)
}

#[test]
fn a_killed_vellum_nbd_has_all_that_it_acknowledged() {
    let store = TestStore::new();
    let image = store.path("disk.img");
    fs::write(&image, vec![7; 4 << 20]).unwrap();
    store.ok(&[
        "import",
        "raw",
        &arg(&image),
        "--size",
        "32M",
        "--format",
        "raw",
    ]);
    store.ok(&["create", "raw", "--name", "web"]);
    let socket = store.path("s");
    let start = || {
        let mut command = store.command();
        command.args(["-q", "nbd", "web", "--socket"]).arg(&socket);
        Server::start(&mut command, &socket, "web")
    };
    for round in 0..3 {
        let log = store.path(&format!("log{round}"));
        let (status, report) = kill_and_check(&log, start);
        assert_eq!(status, Some(0), "{report}");
        assert_eq!(count(&report, "lost"), 0, "{report}");
    }
    store.ok(&["check", "--scrub"]);
}

#[test]
fn a_killed_server_without_a_cache_has_all_that_it_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    fs::File::create(&file).unwrap().set_len(16 << 20).unwrap();
    let start = || nbdkit(&dir.path().join("s"), &["file", &arg(&file)]);
    let (status, report) = kill_and_check(&dir.path().join("log"), start);
    assert_eq!(status, Some(0), "{report}");
}

#[test]
fn a_server_that_swallows_flush_is_found_out_when_it_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    let file_arg = arg(&file);
    let swallowing: [&[&str]; 2] = [
        // Answers FLUSH at once and writes back never.
        &["--filter=cache", "file", &file_arg, "cache=unsafe"],
        // An overlay that is gone with the process.
        &["--filter=cow", "file", &file_arg],
    ];
    for (number, arguments) in swallowing.into_iter().enumerate() {
        fs::File::create(&file).unwrap().set_len(16 << 20).unwrap();
        let socket = dir.path().join("s");
        let log = dir.path().join(format!("log{number}"));
        let (status, report) = kill_and_check(&log, || nbdkit(&socket, arguments));
        assert_eq!(status, Some(1), "{arguments:?}: {report}");
        assert_eq!(
            count(&report, "missing"),
            count(&report, "acknowledged_blocks"),
            "{report}"
        );
    }
}

#[test]
fn a_server_without_flush_or_without_the_export_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |uri: &str| {
        let log = arg(&dir.path().join("log"));
        let output = vellum(&[
            "verify-durability",
            "write",
            uri,
            "--log",
            &log,
            "--overwrite",
        ]);
        assert_eq!(output.status.code(), Some(1));
        assert!(!Path::new(&log).exists());
        stderr(&output)
    };
    let server = nbdkit(
        &dir.path().join("s"),
        &[
            "eval",
            "get_size=echo 1M",
            "pwrite=cat >/dev/null",
            "can_write=true",
        ],
    );
    let message = write(&server.uri);
    assert!(message.contains("offers no FLUSH"), "{message}");
    let message = write("nbd+unix:///x?socket=/nonexistent");
    assert!(message.contains("cannot connect"), "{message}");
}
