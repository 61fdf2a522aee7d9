//! Containers in the background: `run -d`, `start`, `stop`, `wait`, `logs`, and the exit status that `ps` shows.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::run_support::{RUNTIMES, Store};

fn with_each(test: impl Fn(&Store)) {
    for runtime in RUNTIMES {
        let store = Store::new(runtime, |_: &Path| {});
        test(&store);
        store.wait_until(|| store.waiters().is_empty());
        store.assert_nothing_runs();
    }
}

/// Says something on both streams, and ends when it is asked to, or after a while.
const TALK: &str = "trap 'echo bye; exit 7' TERM; echo one; echo two >&2; \
                    n=0; while [ $n -lt 2000 ]; do sleep 0.05; n=$((n+1)); done";

#[test]
fn a_command_in_the_background_runs_on_is_read_stopped_and_started_again() {
    with_each(|store| {
        let started = store.must(&["run", "-d", "--name", "c", "box", "sh", "-c", TALK]);
        assert_eq!(started, "c\n");
        assert!(store.status("c").starts_with("running (pid "));
        store.wait_until(|| store.vellum(&["logs", "c"]).err == "two\n");
        assert_eq!(store.must(&["logs", "c"]), "one\n");
        assert!(store.must(&["logs", "-t", "c"]).starts_with("20"));
        // It is entered, and to start it again changes nothing.
        assert_eq!(store.must(&["exec", "c", "echo", "inside"]), "inside\n");
        assert_eq!(store.must(&["start", "c"]), "c\n");

        let waiting = store
            .command(&["wait", "c"])
            .stdout(std::process::Stdio::piped())
            .spawn();
        let follows = store
            .command(&["logs", "-f", "c"])
            .stdout(std::process::Stdio::piped())
            .spawn();
        assert_eq!(store.must(&["stop", "c"]), "c\n");
        assert_eq!(store.status("c"), "exited (7)");
        let out = |child: std::io::Result<std::process::Child>| {
            let output = child.unwrap().wait_with_output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(out(waiting), "7\n");
        assert_eq!(out(follows), "one\nbye\n");
        assert_eq!(store.must(&["wait", "c"]), "7\n");
        // Stopped already is fine.
        assert_eq!(store.must(&["stop", "c"]), "c\n");

        store.must(&["start", "c"]);
        store.wait_until(|| store.must(&["logs", "c"]) == "one\nbye\none\n");
        // The two streams are two pipes: which line came last is not sure.
        let last = store.vellum(&["logs", "-n", "1", "c"]);
        assert_eq!((last.out + &last.err).lines().count(), 1);
        store.must(&["kill", "-s", "TERM", "c"]);
        assert_eq!(store.must(&["wait", "c"]), "7\n");
        store.must(&["rm", "c"]);
        let left = fs::read_dir(store.path("store/run")).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert!(
            !left
                .iter()
                .any(|name| name.to_string_lossy().contains(".log")),
            "{left:?}"
        );
    });
}

#[test]
fn what_does_not_end_when_it_is_asked_is_killed_after_a_while() {
    with_each(|store| {
        let deaf = "trap '' TERM; while true; do sleep 0.05; done";
        store.must(&["run", "-d", "--name", "c", "box", "sh", "-c", deaf]);
        store.must(&["stop", "-t", "1", "c"]);
        assert_eq!(store.status("c"), "exited (137)");
        let said = store.vellum(&["kill", "c"]);
        assert!(said.err.contains("nothing runs in c"), "{said:?}");
        store.must(&["rm", "c"]);
    });
}

#[test]
fn a_command_that_cannot_be_started_in_the_background_says_why_and_leaves_no_container() {
    with_each(|store| {
        for (command, status, why) in [
            ("nope", 127, "in no directory of the container's PATH"),
            ("/plain", 126, "no x"),
        ] {
            let said = store.vellum(&["run", "-d", "box", command]);
            assert_eq!(said.status, status, "{said:?}");
            assert!(
                said.err.contains(why) && said.err.lines().count() == 1,
                "{said:?}"
            );
        }
        let said = store.vellum(&["run", "-d", "box"]);
        assert_eq!(said.status, 125);
        assert!(said.err.contains("names no command"), "{said:?}");
        let said = store.vellum(&["run", "-dit", "box", "sh"]);
        assert!(said.err.contains("sleep infinity"), "{said:?}");
        assert_eq!(store.must(&["ps", "--json"]).trim(), "[]");
        // One that was made before stays, with the reason.
        store.must(&["create", "--name", "c", "box", "nope"]);
        let said = store.vellum(&["start", "c"]);
        assert_eq!(said.status, 1);
        assert!(
            said.err.contains("c: \"nope\" is in no directory"),
            "{said:?}"
        );
        assert_eq!(store.status("c"), "exited (127)");
        store.must(&["rm", "c"]);
    });
}

#[test]
fn the_exit_status_stays_with_the_container_and_goes_with_rm() {
    with_each(|store| {
        store.must(&[
            "create",
            "--name",
            "c",
            "box",
            "sh",
            "-c",
            "echo ran; exit 5",
        ]);
        assert_eq!(store.status("c"), "created");
        let said = store.vellum(&["wait", "c"]);
        assert!(said.err.contains("never run"), "{said:?}");
        let said = store.vellum(&["start", "-a", "c"]);
        assert_eq!((said.status, &*said.out), (5, "ran\n"));
        assert_eq!(store.status("c"), "exited (5)");
        // Another command is not the container's own.
        store.must(&["exec", "c", "echo", "x"]);
        assert_eq!(store.status("c"), "exited (5)");
        assert_eq!(store.must(&["ps", "-q", "--filter", "exited=5"]), "c\n");
        store.must(&["rm", "c"]);
        // As docker: who waits has the status, though the container goes.
        store.must(&[
            "run",
            "-d",
            "--rm",
            "--name",
            "r",
            "box",
            "sh",
            "-c",
            "sleep 4; exit 3",
        ]);
        assert_eq!(store.must(&["wait", "r"]), "3\n");
        store.wait_until(|| store.must(&["ps", "--json"]).trim() == "[]");
    });
}

#[test]
fn a_command_whose_waiter_was_killed_runs_on_and_is_stopped_and_nobody_knows_its_status() {
    with_each(|store| {
        let quiet = "trap 'exit 7' TERM; while true; do sleep 0.05; done";
        store.must(&["run", "-d", "--name", "c", "box", "sh", "-c", quiet]);
        let waiters = store.waiters();
        assert_eq!(waiters.len(), 1, "{waiters:?}");
        kill(Pid::from_raw(waiters[0]), Signal::SIGKILL).unwrap();
        store.wait_until(|| store.status("c").contains("nobody waits for it"));
        assert_eq!(store.must(&["exec", "c", "echo", "inside"]), "inside\n");
        let said = store.vellum(&["rm", "c"]);
        assert!(said.err.contains("vellum stop c"), "{said:?}");
        store.must(&["stop", "c"]);
        assert_eq!(store.status("c"), "exited (unknown)");
        let said = store.vellum(&["wait", "c"]);
        assert_eq!(said.status, 1);
        assert!(said.err.contains("nobody saw how"), "{said:?}");
        // And it can be started again.
        store.must(&["start", "c"]);
        store.must(&["rm", "--force", "c"]);
    });
}

#[test]
fn after_the_host_went_down_nothing_runs_and_the_container_starts_again() {
    with_each(|store| {
        store.must(&["run", "-d", "--name", "c", "box", "sh", "-c", TALK]);
        store.wait_until(|| !store.must(&["logs", "c"]).is_empty());
        // All processes at once, and what they said is of another boot.
        let row: serde_json::Value = serde_json::from_str(&store.must(&["ps", "--json"])).unwrap();
        let init = row[0]["pid"].as_i64().unwrap() as i32;
        let waiter = store.waiters()[0];
        kill(Pid::from_raw(waiter), Signal::SIGKILL).unwrap();
        kill(Pid::from_raw(init), Signal::SIGKILL).unwrap();
        store.wait_until(|| store.status("c").starts_with("left by a killed command"));
        store.must(&["prune"]);
        store.must(&["start", "c"]);
        store.wait_until(|| store.must(&["logs", "c"]) == "one\none\n");
        store.must(&["rm", "--force", "c"]);
    });
}

#[test]
fn the_command_comes_after_the_image_with_its_own_options_as_with_docker() {
    with_each(|store| {
        let out = store.must(&[
            "run",
            "--rm",
            "-i",
            "box",
            "sh",
            "-c",
            "echo $0 $#",
            "-x",
            "--rm",
        ]);
        assert_eq!(out, "-x 1\n");
        // Options of Vellum's may follow the image, and `--` ends them.
        let out = store.must(&["run", "box", "--rm", "--hostname", "h", "hostname"]);
        assert_eq!(out, "h\n");
        let out = store.must(&[
            "run",
            "--rm",
            "--entrypoint",
            "echo",
            "box",
            "--",
            "-x",
            "y",
        ]);
        assert_eq!(out, "-x y\n");
        for (option, says) in [
            (&["-p", "80:80"][..], "--network host"),
            (&["--restart", "always"], "systemd"),
            (&["--privileged"], "--cap-add ALL"),
            (&["--network", "bridge"], "makes no networks"),
        ] {
            let said = store.vellum(&[&["run"], option, &["box", "id"]].concat());
            assert!(said.status != 0 && said.err.contains(says), "{said:?}");
        }
        assert_eq!(store.must(&["ps", "--json"]).trim(), "[]");
    });
}

#[test]
fn an_image_that_is_committed_has_the_containers_command() {
    with_each(|store| {
        store.must(&["run", "--name", "c", "box", "sh", "-c", "echo again"]);
        store.must(&["commit", "c", "image"]);
        assert_eq!(store.must(&["run", "--rm", "image"]), "again\n");
        store.must(&["rm", "c"]);
    });
}
