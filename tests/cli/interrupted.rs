//! Commands that are interrupted (Ctrl-C, SIGTERM, SIGHUP) or killed at any moment: the first undo
//! what they half did, the others are in the way of nobody who comes after them.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Running, SIZE, TestStore, wait_until};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::unistd::Pid;
use vellum_base::storage::{FileStorage, LockMode, Storage};

/// A command in the background that takes signals whatever the shell that runs the tests ignores.
pub fn start(store: &TestStore, arguments: &[&str]) -> Child {
    let mut command = store.command();
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    take_signals(&mut command);
    command.spawn().unwrap()
}

fn take_signals(command: &mut Command) {
    let default = || {
        for number in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            // SAFETY: the default action runs no code of ours.
            unsafe { signal(number, SigHandler::SigDfl) }?;
        }
        Ok(())
    };
    // SAFETY: signal(2) may be called between fork and exec.
    unsafe { command.pre_exec(default) };
}

pub fn send(child: &Child, signal: Signal) {
    // It is ours and not reaped yet.
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// True once a command takes signals as a wish to end.
pub fn listens(child: &Child) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = u64::from_str_radix(caught.unwrap().trim(), 16).unwrap();
    caught & (1 << (Signal::SIGTERM as u32 - 1)) != 0
}

/// Its end, which comes within seconds where the host is not busy.
pub fn end(mut child: Child, when: &str) -> Output {
    let deadline = Instant::now() + Duration::from_secs(60);
    drop(child.stdin.take());
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "it goes on: {when}");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

/// An image with a directory of files, a container of it, and a source to import.
fn prepared() -> TestStore {
    let store = TestStore::new();
    let source = store.path("source");
    fs::create_dir_all(source.join("etc")).unwrap();
    for number in 0..300u32 {
        let body = number.to_le_bytes().repeat(5_000);
        fs::write(source.join(format!("etc/{number}")), body).unwrap();
    }
    store.ok(&["import", "base", &store.arg("source"), "--size", SIZE]);
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    for number in 0..300u32 {
        fs::write(dir.join(format!("etc/{number}")), "other\n").unwrap();
    }
    store.ok(&["umount", "c"]);
    store
}

/// What a command makes is made by it once more, whatever became of it before.
fn forget(store: &TestStore, command: &str) {
    store.output(&["umount", "c"]);
    match command {
        "import" => drop(store.output(&["rmi", "again"])),
        "commit" => drop(store.output(&["rmi", "snap"])),
        "create" => drop(store.output(&["rm", "new"])),
        "export" => {
            let out = store.path("out");
            let _ = fs::remove_dir_all(&out).or_else(|_| fs::remove_file(&out));
        }
        _ => {}
    }
}

const COMMANDS: [&[&str]; 13] = [
    &["import", "again", "SOURCE", "--size", SIZE],
    &["diff", "c"],
    &["diff", "c", "--walk"],
    &["commit", "c", "snap"],
    &["prewarm", "c", "/etc"],
    &["mount", "c"],
    &["create", "base", "--name", "new"],
    &["cp", "SOURCE", "c:/copy"],
    &["cp", "c:/etc", "COPY"],
    &["trim", "c"],
    &["export", "c", "OUT", "--format", "oci"],
    &["export", "c", "OUT", "--format", "qcow2"],
    &["export", "c", "OUT", "--format", "tar"],
];

/// Calls `each` with every command and moments all over the time that it takes.
fn at_moments(store: &TestStore, rounds: u32, mut each: impl FnMut(&[&str], Duration, u32)) {
    let (source, copy, out) = (store.arg("source"), store.arg("copy"), store.arg("out"));
    for command in COMMANDS {
        let arguments: Vec<&str> = command
            .iter()
            .map(|word| match *word {
                "SOURCE" => &source,
                "COPY" => &copy,
                "OUT" => &out,
                other => other,
            })
            .collect();
        let begin = Instant::now();
        store.ok(&arguments);
        let whole = begin.elapsed();
        forget(store, command[0]);
        for round in 0..rounds {
            each(&arguments, whole * round / rounds, round);
            forget(store, command[0]);
        }
    }
}

#[test]
fn an_interrupted_command_leaves_no_mount_no_process_and_nothing_half_made() {
    let store = prepared();
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    at_moments(&store, 6, |arguments, moment, round| {
        let signal = signals[round as usize % 3];
        let child = start(&store, arguments);
        std::thread::sleep(moment);
        send(&child, signal);
        let when = format!("{arguments:?} after {moment:?}, {signal}");
        let output = end(child, &when);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.code() {
            // It was done.
            Some(0) if arguments[0] == "mount" => drop(store.ok(&["umount", "c"])),
            Some(0) => {}
            Some(code) => {
                assert_eq!(code, 128 + signal as i32, "{when}: {said}");
                assert!(said.contains(signal.as_str()), "{when}: {said}");
            }
            // It came before the first of our instructions.
            None => {}
        }
        println!("{when}: {said}");
        store.assert_nothing_runs();
        let staging = fs::read_dir(store.root.join("staging")).unwrap().count();
        assert_eq!(staging, 0, "{when}: {said}");
        // An export is there in whole or not at all.
        for entry in fs::read_dir(store.dir.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let done = output.status.success() && name == "out";
            assert!(
                done || ["store", "source", "copy"].contains(&&*name),
                "{when}: {name}"
            );
        }
    });
    store.ok(&["check", "--scrub"]);
}

#[test]
fn what_a_killed_command_left_is_taken_over_by_the_next_one() {
    let store = prepared();
    at_moments(&store, 6, |arguments, moment, round| {
        let mut child = start(&store, arguments);
        std::thread::sleep(moment);
        child.kill().unwrap();
        child.wait().unwrap();
        let when = format!("{arguments:?} killed after {moment:?}");
        // What is left by then is no complaint.
        let output = store.output(&["check"]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{when}: {said}");
        if arguments[0] == "mount" && store.ok(&["ps"]).contains("mounted at") {
            store.ok(&["umount", "c"]);
            return;
        }
        match round % 3 {
            0 => drop(store.ok(&["diff", "c"])),
            1 => drop(store.ok(&["umount", "c"])),
            _ => drop(store.mount("c")),
        }
        store.ok(&["umount", "c"]);
        store.assert_nothing_runs();
    });
    store.ok(&["rm", "c"]);
    store.ok(&["prune"]);
    store.ok(&["check", "--scrub"]);
}

#[test]
fn one_that_waits_for_input_or_for_another_command_is_woken() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);

    let mut import = start(&store, &["import", "piped", "-", "--from", "base"]);
    let mut input = import.stdin.take().unwrap();
    // It reads on, and nothing comes.
    input.write_all(b"etc/").unwrap();
    wait_until("it listens", || listens(&import));
    send(&import, Signal::SIGINT);
    let output = end(import, "import of a pipe that says nothing");
    drop(input);
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    store.assert_nothing_runs();

    // Another command works on the container; whoever waits for it learns which.
    let id = store.json(&["ps"])[0]["id"].as_str().unwrap().to_owned();
    let lock = store.root.join("run").join(format!("{id}.lock"));
    let held = FileStorage.lock(&lock, LockMode::Exclusive, false).unwrap();
    assert!(held.is_some());
    let mut waiting = start(&store, &["mount", "c"]);
    let mut said = String::new();
    let stderr = waiting.stderr.as_mut().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stderr), &mut said).unwrap();
    assert!(said.contains("waiting for another process"), "{said}");
    assert!(said.contains(&std::process::id().to_string()), "{said}");
    send(&waiting, Signal::SIGTERM);
    let output = end(waiting, "a mount that waits");
    assert_eq!(output.status.code(), Some(143), "{output:?}");
    drop(held);
    store.ok(&["rm", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn a_signal_that_was_ignored_stays_ignored_and_one_sent_twice_at_once_is_one() {
    let store = TestStore::new();
    store.small_image("base");
    let begin = |name: &str, ignored: bool| {
        let mut command = store.command();
        command
            .args(["import", name, "-", "--from", "base"])
            .stdin(Stdio::piped())
            .stderr(Stdio::null());
        take_signals(&mut command);
        let ignore = move || {
            if ignored {
                // SAFETY: ignoring runs no code of ours.
                unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) }?;
            }
            Ok(())
        };
        // SAFETY: signal(2) may be called between fork and exec.
        unsafe { command.pre_exec(ignore) };
        let child = Running(command.spawn().unwrap());
        wait_until("it listens", || listens(&child.0));
        child
    };
    let mut nohup = begin("one", true);
    send(&nohup.0, Signal::SIGHUP);
    std::thread::sleep(Duration::from_millis(500));
    assert!(nohup.0.try_wait().unwrap().is_none(), "as nohup wants it");
    let empty = [0; 1024];
    nohup.0.stdin.take().unwrap().write_all(&empty).unwrap();
    assert!(nohup.0.wait().unwrap().success());

    // As timeout(1) does: to the process and to its group.
    let mut stubborn = begin("two", false);
    send(&stubborn.0, Signal::SIGINT);
    send(&stubborn.0, Signal::SIGINT);
    let status = stubborn.0.wait().unwrap();
    assert_eq!(
        status.code(),
        Some(130),
        "twice at once is once: {status:?}"
    );
    store.assert_nothing_runs();
}
