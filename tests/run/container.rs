//! `vellum run` and `vellum exec` with crun and with runc: what a command gets, and what is left.

use crate::run_support;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::run_support::{RUNTIMES, Running, Store};
use nix::sys::signal::Signal;

fn with_each(more: impl Fn(&Path), test: impl Fn(&Store)) {
    for runtime in RUNTIMES {
        let store = Store::new(runtime, &more);
        test(&store);
        store.assert_nothing_runs();
    }
}

/// What is no program, the status that it ends with, and a part of the reason.
const NO_PROGRAMS: [(&str, i32, &str); 6] = [
    ("nope", 127, "in no directory of the container's PATH"),
    ("/nosuch", 127, "is not in the container"),
    ("/crlf", 127, "/bin/sh\\r"),
    ("/lost", 127, "its interpreter"),
    ("/elf", 126, "damaged"),
    ("/plain", 126, "no x"),
];

fn no_programs(tree: &Path) {
    for (name, content) in [
        ("crlf", &b"#!/bin/sh\r\necho x\r\n"[..]),
        ("lost", b"#!/no/such\n"),
        ("elf", b"\x7fELF\x02\x01\x01\0garbage"),
    ] {
        fs::write(tree.join(name), content).unwrap();
        fs::set_permissions(tree.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn the_exit_status_is_the_commands_or_says_why_there_is_none() {
    with_each(no_programs, |store| {
        let status = |command: &[&str]| {
            let mut arguments = vec!["run", "box", "--rm", "--"];
            arguments.extend(command);
            store.vellum(&arguments).status
        };
        assert_eq!(status(&["sh", "-c", "exit 7"]), 7);
        assert_eq!(status(&["no-such-program"]), 127);
        assert_eq!(status(&["/no/such/program"]), 127);
        assert_eq!(status(&["/plain"]), 126);
        assert_eq!(status(&["/etc"]), 126);
        for (program, status, why) in NO_PROGRAMS {
            let said = store.vellum(&["run", "box", "--rm", "--", program]);
            assert_eq!(said.status, status, "{program}: {said:?}");
            let lines: Vec<&str> = said.err.lines().collect();
            assert_eq!(lines.len(), 1, "one sentence: {said:?}");
            assert!(
                lines[0].starts_with("vellum: \"") && lines[0].contains(why),
                "{said:?}"
            );
        }
        let said = store.vellum(&["run", "box", "--rm"]);
        assert_eq!(said.status, 125);
        assert!(said.err.contains("names no command"), "{said:?}");
        // Nothing was left of those that did not start, and --rm removed the others.
        assert_eq!(store.must(&["ps", "--json"]).trim(), "[]");
    });
}

#[test]
fn what_the_runtime_needs_to_mount_on_is_no_change_and_goes_with_the_run() {
    with_each(
        |_| {},
        |store| {
            let changes = |name: &str| store.must(&["diff", name]);
            let volume = ["-v", "data:/mnt/deep/data"];
            store.must(
                &[
                    &["run", "box", "--name", "c"],
                    &volume[..],
                    &["--", "test", "-d", "/proc/1"],
                ]
                .concat(),
            );
            assert_eq!(changes("c"), "");
            // Also while something runs, and what it does is its own.
            let running = store.start("r", &volume);
            assert_eq!(changes("r"), "");
            store.must(&["exec", "r", "--", "sh", "-c", "echo x > /etc/mine"]);
            assert_eq!(changes("r"), "C /etc\nA /etc/mine\n");
            running.signal(Signal::SIGTERM);
            running.wait();
            assert_eq!(changes("r"), "C /etc\nA /etc/mine\n");
            // Nothing of it is in an image made of the container.
            store.must(&["commit", "r", "image"]);
            store.must(&["create", "image", "--name", "i"]);
            let dir = store.must(&["mount", "i"]);
            let names = |path: &str| -> Vec<String> {
                let entries = fs::read_dir(Path::new(dir.trim()).join(path)).unwrap();
                let names = entries.map(|entry| entry.unwrap().file_name());
                let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
                names.sort();
                names
            };
            assert_eq!(names(""), ["bin", "data", "etc", "plain", "tmp"]);
            assert_eq!(names("etc"), ["group", "mine", "passwd"]);
            store.must(&["umount", "i"]);
            // One that is killed leaves them behind, noted.
            let mut running = store.start("k", &volume);
            running.child.kill().unwrap();
            running.child.wait().unwrap();
            assert_eq!(changes("k"), "");
            store.must(&["umount", "--force", "k"]);
            assert_eq!(changes("k"), "");
        },
    );
}

#[test]
fn exec_in_a_container_that_does_not_run_has_the_user_and_directory_that_it_is_told_and_notes_neither()
 {
    with_each(
        |_| {},
        |store| {
            store.must(&["create", "box", "--name", "x"]);
            let told = ["exec", "-u", "7:logs", "-w", "/etc", "x", "--", "sh", "-c"];
            let out = store.must(&[&told[..], &["id -u; id -g; pwd"]].concat());
            assert_eq!(out, "7\n40\n/etc\n");
            let out = store.must(&["exec", "x", "--", "sh", "-c", "id -u; pwd"]);
            assert_eq!(out, "0\n/\n");
        },
    );
}

#[test]
fn environment_directory_user_and_host_name_are_what_was_asked_for() {
    with_each(
        |_| {},
        |store| {
            let env = store.shell(&["-e", "A=b c", "-e", "VELLUM_RUNTIME"], "env");
            let has = |line: &str| env.lines().any(|l| l == line);
            assert!(has("A=b c"), "{env}");
            assert!(has(&format!("VELLUM_RUNTIME={}", store.runtime)), "{env}");
            assert!(
                has("HOME=/root") && env.contains("PATH=/usr/local/sbin"),
                "{env}"
            );
            let out = store.shell(&["-w", "/made/here"], "pwd");
            assert_eq!(out, "/made/here\n");
            let out = store.shell(&["-u", "web"], "id -u; id -g; id -G; echo $HOME");
            assert_eq!(out, "33\n34\n34 40\n/srv\n");
            let out = store.shell(&["-u", "7:logs"], "id -u; id -g");
            assert_eq!(out, "7\n40\n");
            let out = store.shell(&["--hostname", "here"], "hostname; cat /etc/hostname");
            assert_eq!(out, "here\nhere\n");
            let said = store.vellum(&["run", "box", "--rm", "-u", "nobody", "--", "id"]);
            assert_eq!(said.status, 125);
            assert!(said.err.contains("no user \"nobody\""), "{said:?}");
            let out = store.must(&[
                "run",
                "box",
                "--rm",
                "--entrypoint",
                "echo",
                "--",
                "one",
                "two",
            ]);
            assert_eq!(out, "one two\n");
        },
    );
}

#[test]
fn the_command_is_pid_1_in_namespaces_of_its_own_without_power_over_the_host() {
    with_each(
        |_| {},
        |store| {
            assert_eq!(store.shell(&[], "echo $$"), "1\n");
            let script = "for n in pid ipc uts mnt net; do readlink /proc/self/ns/$n; done";
            let inside = store.shell(&["--network", "none"], script);
            for (line, name) in inside.lines().zip(["pid", "ipc", "uts", "mnt", "net"]) {
                let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
                assert_ne!(Path::new(line), ours, "{name}");
            }
            let net = fs::read_link("/proc/self/ns/net").unwrap();
            let inside = store.shell(&[], "readlink /proc/self/ns/net");
            assert_ne!(
                Path::new(inside.trim()),
                net,
                "not the host's unless asked for"
            );
            let inside = store.shell(&["--network", "host"], "readlink /proc/self/ns/net");
            assert_eq!(Path::new(inside.trim()), net);
            let out = store.shell(
                &[],
                "! mount -t tmpfs none /tmp 2>/dev/null; ! hostname other 2>/dev/null; \
                 ! echo 1 2>/dev/null > /proc/sys/kernel/panic; \
                 mknod /tmp/disk b 7 0; ! cat /tmp/disk 2>/dev/null; grep CapEff /proc/self/status",
            );
            // Docker's fourteen.
            assert!(out.contains("00000000a80425fb"), "{out}");
        },
    );
}

#[test]
fn writes_land_in_the_containers_layer_and_two_containers_share_an_image() {
    with_each(
        |_| {},
        |store| {
            let one = store.start("one", &[]);
            let two = store.start("two", &[]);
            for name in ["one", "two"] {
                let script = format!("echo {name} > /written; cat /written");
                let out = store.must(&["exec", name, "--", "sh", "-c", &script]);
                assert_eq!(out, format!("{name}\n"));
            }
            one.signal(Signal::SIGTERM);
            assert_eq!(one.wait(), Some(42), "the trap's exit status");
            two.signal(Signal::SIGTERM);
            assert_eq!(two.wait(), Some(42));
            // Stopped containers keep what was written, and run further commands.
            for name in ["one", "two"] {
                assert_eq!(store.status(name), "exited (42)");
                let out = store.must(&["exec", name, "--", "cat", "/written"]);
                assert_eq!(out, format!("{name}\n"));
            }
            let said = store.vellum(&["run", "box", "--rm", "--", "cat", "/written"]);
            assert_eq!(said.status, 1, "the image has no such file: {said:?}");
            let diff = store.must(&["diff", "one"]);
            assert!(diff.contains("A /written"), "{diff}");
            let again = store.vellum(&["run", "box", "--name", "one", "--", "id"]);
            assert_eq!(again.status, 125);
            assert!(again.err.contains("a container one already"), "{again:?}");
        },
    );
}

#[test]
fn a_running_container_is_entered_and_not_taken_away() {
    with_each(no_programs, |store| {
        let running = store.start("c", &["-e", "KEPT=yes"]);
        let out = store.must(&[
            "exec",
            "-e",
            "MORE=1",
            "-w",
            "/tmp",
            "-u",
            "web",
            "c",
            "--",
            "sh",
            "-c",
            "echo $KEPT $MORE; pwd; id -u; ps",
        ]);
        assert!(out.starts_with("yes 1\n/tmp\n33\n"), "{out}");
        assert!(out.contains("trap"), "it sees the others: {out}");
        for status in [9, 255] {
            let exit = format!("exit {status}");
            let ended = store.vellum(&["exec", "c", "--", "sh", "-c", &exit]);
            assert_eq!((ended.status, ended.err), (status, String::new()));
        }
        for (program, status, why) in NO_PROGRAMS {
            let said = store.vellum(&["exec", "c", "--", program]);
            assert_eq!(said.status, status, "{program}: {said:?}");
            assert!(said.err.contains(why), "{said:?}");
        }
        for refused in [["umount", "c"], ["rm", "c"]] {
            let said = store.vellum(&refused);
            assert_eq!(said.status, 1, "{refused:?}");
            assert!(said.err.contains("c is running (pid"), "{said:?}");
        }
        store.must(&["rm", "--force", "c"]);
        assert_eq!(running.wait(), Some(137));
        assert_eq!(store.must(&["ps", "--json"]).trim(), "[]");
    });
}

/// The directories of that name in the host's cgroup hierarchies.
fn cgroups(name: &str) -> Vec<PathBuf> {
    let base = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(base).unwrap();
    hierarchies
        .map(|entry| entry.unwrap().path().join(name))
        .chain([base.join(name)])
        .filter(|dir| dir.is_dir())
        .collect()
}

#[test]
fn what_runs_is_not_taken_away_because_nobody_waits_for_it() {
    with_each(
        |_| {},
        |store| {
            for clean_up in ["umount", "rm"] {
                let running = store.start("c", &[]);
                let rows = store.must(&["ps", "--json"]);
                let rows: serde_json::Value = serde_json::from_str(&rows).unwrap();
                let pid = rows[0]["pid"].to_string();
                let group = format!("vellum-{}", rows[0]["id"].as_str().unwrap());
                assert!(!cgroups(&group).is_empty(), "it has a cgroup of its own");
                running.signal(Signal::SIGKILL);
                assert_eq!(running.wait(), None);
                assert!(store.status("c").contains("nobody waits"));
                for refused in ["umount", "rm"] {
                    let said = store.vellum(&[refused, "c"]);
                    assert_eq!(said.status, 1, "{said:?}");
                    for word in [&pid, "sh -c trap", "since 2", "nobody waits", "--force"] {
                        assert!(said.err.contains(word), "{word}: {said:?}");
                    }
                }
                // Neither does what collects leftovers touch it, nor is it out of reach.
                store.must(&["prune"]);
                store.must(&["check", "--repair"]);
                assert_eq!(store.must(&["exec", "c", "--", "echo", "x"]), "x\n");
                // Also where the runtime left no word of its first process.
                let id = group.trim_start_matches("vellum-");
                fs::remove_file(store.path("store/run").join(id).join("oci/pid")).unwrap();
                let said = store.vellum(&["rm", "c"]);
                assert!(said.err.contains("is running (pid"), "{said:?}");
                store.must(&[clean_up, "--force", "c"]);
                store.assert_nothing_runs();
                assert_eq!(cgroups(&group), Vec::<PathBuf>::new());
                if clean_up == "umount" {
                    assert_eq!(store.must(&["exec", "c", "--", "echo", "x"]), "x\n");
                    store.must(&["rm", "c"]);
                }
            }
        },
    );
}

#[test]
fn what_a_command_killed_at_any_moment_leaves_is_cleaned_up_by_the_next() {
    with_each(
        |_| {},
        |store| {
            store.must(&["create", "box", "--name", "c"]);
            for moment in (0..160).step_by(10) {
                // It ends by itself, a little after the command that waits for it was killed.
                let command = [
                    "exec",
                    "c",
                    "--",
                    "sh",
                    "-c",
                    "echo x > /written; sleep 0.1",
                ];
                let mut child = store.command(&command).spawn().unwrap();
                std::thread::sleep(std::time::Duration::from_millis(moment));
                child.kill().unwrap();
                child.wait().unwrap();
                match moment / 10 % 3 {
                    // It may have joined what ended just then, and been ended with it.
                    0 => {
                        let said = store.vellum(&["exec", "c", "--", "echo", "y"]);
                        assert!([0, 137].contains(&said.status), "{said:?}");
                    }
                    1 => store.wait_until(|| store.vellum(&["umount", "c"]).status == 0),
                    _ => drop(store.must(&["diff", "c"])),
                }
                store.wait_until(|| store.vellum(&["umount", "c"]).status == 0);
                store.assert_nothing_runs();
            }
            store.must(&["rm", "c"]);
        },
    );
}

#[test]
fn a_run_that_is_interrupted_at_any_moment_leaves_no_container() {
    with_each(
        |_| {},
        |store| {
            for moment in (0..200).step_by(12) {
                let signal = [Signal::SIGTERM, Signal::SIGINT][moment / 12 % 2];
                let script = "trap 'exit 9' TERM INT; i=0; while [ $i -lt 60 ]; do sleep 0.05; i=$((i+1)); done";
                let command = [
                    "run", "box", "--rm", "--name", "c", "--", "sh", "-c", script,
                ];
                let mut child = store.command(&command);
                run_support::take_signals(&mut child);
                let running = run_support::Running {
                    child: child.spawn().unwrap(),
                };
                std::thread::sleep(std::time::Duration::from_millis(moment as u64));
                running.signal(signal);
                running.wait();
                assert_eq!(store.must(&["ps", "--json"]).trim(), "[]", "{moment} ms");
                store.assert_nothing_runs();
            }
        },
    );
}

#[test]
fn volumes_of_each_kind_outlive_their_containers() {
    with_each(
        |_| {},
        |store| {
            let absolute = store.path("made/by/us");
            let volume = format!("{}:/abs", absolute.display());
            fs::create_dir(store.path("rel")).unwrap();
            fs::write(store.path("rel/in"), "in\n").unwrap();
            let options = ["-v", "vol:/data", "-v", &volume, "-v", "./rel:/rel:ro"];
            let mut arguments = vec!["run", "box", "--name", "c"];
            arguments.extend(options);
            arguments.extend([
                "--", "sh", "-ec",
                "cat /data/seed /rel/in; echo a > /abs/a; echo d > /data/d; ! touch /rel/x 2>/dev/null",
            ]);
            assert_eq!(store.must(&arguments), "seed\nin\n");
            assert_eq!(fs::read_to_string(absolute.join("a")).unwrap(), "a\n");
            assert!(!store.path("rel/x").exists());
            // It has them each time it runs.
            let out = store.must(&["exec", "c", "--", "cat", "/abs/a", "/data/d"]);
            assert_eq!(out, "a\nd\n");
            let said = store.vellum(&["volume", "rm", "vol"]);
            assert_eq!(said.status, 1);
            assert!(said.err.contains("in use by container c"), "{said:?}");
            store.must(&["rm", "c"]);
            let out = store.shell(&["-v", "vol:/other"], "ls -ld /other; cat /other/d");
            assert!(out.starts_with("drwxr-x--x"), "mode of the image's: {out}");
            // Where the image has nothing, anybody may look in.
            let new = store.shell(
                &["-v", "new:/new/place", "-u", "web"],
                "ls -ld /new/place/.",
            );
            assert!(new.starts_with("drwxr-xr-x"), "{new}");
            store.must(&["volume", "rm", "new"]);
            assert!(out.ends_with("d\n"), "{out}");
            store.must(&["volume", "rm", "vol"]);
            assert_eq!(store.must(&["volume", "ls"]), "");
        },
    );
}

#[test]
fn a_link_in_the_image_does_not_lead_a_volume_out_of_it() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("host"), "host\n").unwrap();
    with_each(
        |tree| {
            symlink(outside.path(), tree.join("link")).unwrap();
            symlink("../run/dns/stub", tree.join("etc/resolv.conf")).unwrap();
        },
        |store| {
            let script = "echo x > /link/new; cat /link/new; test ! -e /link/host";
            let out = store.shell(&["-v", "vol:/link"], script);
            assert_eq!(out, "x\n");
            let volume = store.path("store/volumes/vol");
            assert!(volume.join("new").exists());
            // Neither did the volume get the host's file, nor the host the volume's.
            assert!(!volume.join("host").exists());
            assert!(!outside.path().join("new").exists());
        },
    );
}

/// Copies a program with the libraries that it needs.
fn install(program: &str, tree: &Path) {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && !text.is_empty(),
        "{program} is missing: apt-get install sqlite3 tar coreutils"
    );
    let libraries = text
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(str::to_owned);
    for file in libraries.chain([program.to_owned()]) {
        let target = tree.join(file.trim_start_matches('/'));
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(&file, &target).unwrap();
    }
}

#[test]
fn real_programs_work_on_the_containers_disk() {
    let more = |tree: &Path| {
        for program in ["/usr/bin/sqlite3", "/usr/bin/sha256sum", "/usr/bin/tar"] {
            install(program, tree);
        }
    };
    with_each(more, |store| {
        let out = store.shell(
            &[],
            "mkdir() { busybox mkdir -p $1; }; mkdir /work; cd /work
             sqlite3 db 'pragma journal_mode=wal; create table t(a); \
               with recursive n(i) as (select 1 union all select i+1 from n where i<20000) \
               insert into t select i from n;' >/dev/null
             sqlite3 db 'pragma integrity_check; select sum(a) from t;'
             sha256sum db > sums; tar -cf all.tar db sums; mkdir out; tar -xf all.tar -C out
             cd out; sha256sum -c sums",
        );
        assert_eq!(out, "ok\n200010000\ndb: OK\n");
    });
}

#[test]
fn without_a_runtime_the_error_names_the_package() {
    let store = Store::new("crun", |_| {});
    let output = store
        .command(&["run", "box", "--", "id"])
        .env("VELLUM_RUNTIME", "no-such-runtime")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(err.contains("no OCI runtime no-such-runtime"), "{err}");
    assert_eq!(store.must(&["ps", "--json"]).trim(), "[]");
}

/// A runtime that is another one's, but for `exec`: that is `script`, with the container's state in
/// `$root` and its name in `$id`.
fn runtime_whose_exec_is(store: &Store, script: &str) -> PathBuf {
    let path = store.path("runtime");
    let text = format!(
        "#!/bin/sh\nroot=$2\nfor id; do :; done\ncase \" $* \" in *\" exec \"*) {script};; esac\nexec {} \"$@\"\n",
        store.runtime
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_command_runs_alone_where_a_runtime_fails_without_a_word_because_what_it_joined_has_ended() {
    let mut store = Store::new("runc", |_| {});
    let ends = "runc --root \"$root\" kill \"$id\" KILL; exit 255";
    let runtime = runtime_whose_exec_is(&store, ends);
    store.runtime = runtime.to_str().unwrap().to_owned().leak();
    let running = store.start("c", &[]);
    assert_eq!(store.must(&["exec", "c", "--", "echo", "y"]), "y\n");
    assert_eq!(running.wait(), Some(137));
    store.assert_nothing_runs();
}

#[test]
fn a_runtime_that_fails_without_a_word_is_named_and_what_runs_goes_on() {
    let mut store = Store::new("runc", |_| {});
    let runtime = runtime_whose_exec_is(&store, "exit 255");
    store.runtime = runtime.to_str().unwrap().to_owned().leak();
    let running = store.start("c", &[]);
    let said = store.vellum(&["exec", "c", "--", "echo", "y"]);
    assert_eq!(said.status, 125, "{said:?}");
    let why = format!("could not be started: {}", runtime.display());
    assert!(said.err.contains(&why), "{said:?}");
    assert!(store.status("c").starts_with("running"));
    store.must(&["rm", "--force", "c"]);
    assert_eq!(running.wait(), Some(137));
}

#[test]
fn a_command_that_was_started_with_nohup_does_not_hear_of_a_hangup() {
    with_each(
        |_| {},
        |store| {
            let script = "trap 'exit 9' HUP; trap 'exit 42' TERM; echo ready; \
                          while true; do sleep 0.05; done";
            let run = store.command(&["run", "box", "--name", "c", "--", "sh", "-c", script]);
            let mut command = Command::new("sh");
            command.args(["-c", r#"trap "" HUP; exec "$0" "$@""#]);
            command.arg(run.get_program()).args(run.get_args());
            for (name, value) in run.get_envs() {
                command.env(name, value.unwrap_or_default());
            }
            let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
            let mut said = [0; 6];
            child.stdout.take().unwrap().read_exact(&mut said).unwrap();
            let running = Running { child };
            running.signal(Signal::SIGHUP);
            running.signal(Signal::SIGTERM);
            assert_eq!(running.wait(), Some(42));
        },
    );
}

#[test]
fn a_container_that_is_renamed_while_it_runs_is_entered_and_put_back_under_its_new_name() {
    with_each(
        |_| {},
        |store| {
            let running = store.start("old", &["-v", "data:/mnt/deep/data"]);
            store.must(&["rename", "old", "new"]);
            // The old name may be another's by the time the first one ends.
            store.must(&["create", "box", "--name", "old"]);
            assert!(store.status("new").starts_with("running (pid "));
            store.must(&["exec", "new", "--", "sh", "-c", "echo x > /etc/mine"]);
            assert_eq!(store.must(&["diff", "new"]), "C /etc\nA /etc/mine\n");
            running.signal(Signal::SIGTERM);
            assert_eq!(running.wait(), Some(42));
            store.assert_nothing_runs();
            assert_eq!(store.must(&["diff", "new"]), "C /etc\nA /etc/mine\n");
            assert_eq!(store.must(&["diff", "old"]), "");
            store.must(&["exec", "new", "--", "test", "-e", "/etc/mine"]);
            store.must(&["rm", "old", "new"]);

            // So is one that goes with its command.
            let running = store.start("old", &["--rm"]);
            store.must(&["rename", "old", "new"]);
            running.signal(Signal::SIGTERM);
            assert_eq!(running.wait(), Some(42));
            assert_eq!(store.must(&["ps", "--json"]).trim(), "[]");
        },
    );
}

#[test]
fn files_are_copied_into_and_out_of_volumes_where_the_container_has_them_whether_it_runs_or_not() {
    with_each(
        |_| {},
        |store| {
            fs::write(store.path("new"), "new\n").unwrap();
            fs::create_dir_all(store.path("fixed")).unwrap();
            fs::write(store.path("fixed/there"), "there\n").unwrap();
            let new = store.path("new").display().to_string();
            let volumes = ["-v", "data:/mnt/deep/data", "-v", "./fixed:/fixed:ro"];
            let running = store.start("c", &volumes);
            let volume = store.path("store/volumes/data");
            let names = |dir: &str| -> Vec<String> {
                let out = store.path("out");
                let _ = fs::remove_dir_all(&out);
                store.must(&["cp", dir, out.to_str().unwrap()]);
                let mut names: Vec<String> = fs::read_dir(&out)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                    .collect();
                names.sort();
                names
            };
            for round in ["running", "stopped"] {
                store.must(&["cp", &new, &format!("c:/mnt/deep/data/{round}")]);
                assert_eq!(fs::read_to_string(volume.join(round)).unwrap(), "new\n");
                store.must(&["cp", &new, &format!("c:/tmp/{round}")]);
                if round == "running" {
                    let seen = [
                        "exec",
                        "c",
                        "--",
                        "cat",
                        "/mnt/deep/data/running",
                        "/tmp/running",
                    ];
                    assert_eq!(store.must(&seen), "new\nnew\n");
                }
                // A directory above it has it too, and what is under it has not.
                let out = store.path("mnt");
                let _ = fs::remove_dir_all(&out);
                store.must(&["cp", "c:/mnt/.", out.to_str().unwrap()]);
                let copied = fs::read_to_string(out.join("deep/data").join(round));
                assert_eq!(copied.unwrap(), "new\n");
                assert_eq!(names("c:/fixed"), ["there"]);
                let said = store.vellum(&["cp", &new, "c:/fixed"]);
                assert_eq!(said.status, 1);
                assert!(
                    said.err.contains("a volume that is read-only in c"),
                    "{said:?}"
                );
                let said = store.vellum(&["cp", &new, "c:/fixed/there"]);
                assert_eq!(said.status, 1, "{said:?}");
                if round == "running" {
                    running.signal(Signal::SIGTERM);
                    store.wait_until(|| !store.status("c").starts_with("running"));
                }
            }
            assert_eq!(running.wait(), Some(42));
            // A whole tree goes to each part's place.
            fs::create_dir_all(store.path("tree2/mnt/deep/data")).unwrap();
            fs::write(store.path("tree2/mnt/deep/data/third"), "3").unwrap();
            fs::write(store.path("tree2/tmp2"), "2").unwrap();
            store.must(&["cp", &format!("{}/.", store.path("tree2").display()), "c:/"]);
            assert_eq!(fs::read_to_string(volume.join("third")).unwrap(), "3");
            let changes = store.must(&["diff", "c"]);
            assert!(changes.contains("A /tmp2"), "{changes}");
            assert!(!changes.contains("third"), "{changes}");
            store.must(&["rm", "c"]);

            // A file that is mounted is left as it is, and nothing comes to lie beside it on the host.
            store.must(&[
                "run",
                "box",
                "--name",
                "f",
                "-v",
                "./new:/given",
                "--",
                "cat",
                "/given",
            ]);
            fs::create_dir_all(store.path("tree3/given/beside")).unwrap();
            let tree = format!("{}/.", store.path("tree3").display());
            let said = store.vellum(&["cp", &tree, "f:/"]);
            assert_eq!(said.status, 1);
            assert!(said.err.contains("something is mounted there"), "{said:?}");
            let tree = format!("{}/given/.", store.path("tree3").display());
            assert_eq!(store.vellum(&["cp", &tree, "f:/given"]).status, 1);
            assert!(!store.path("beside").exists());
            assert_eq!(fs::read_to_string(store.path("new")).unwrap(), "new\n");
            store.must(&["rm", "f"]);

            // Where the root is read-only, only volumes can be written.
            store.must(&[
                "run",
                "box",
                "--name",
                "r",
                "--read-only",
                "-v",
                "data:/data",
                "--",
                "test",
                "-d",
                "/data",
            ]);
            let said = store.vellum(&["cp", &new, "r:/tmp"]);
            assert_eq!(said.status, 1);
            assert!(
                said.err.contains("root file system of r is read-only"),
                "{said:?}"
            );
            store.must(&["cp", &new, "r:/data/fourth"]);
            assert_eq!(fs::read_to_string(volume.join("fourth")).unwrap(), "new\n");
            store.must(&["rm", "r"]);
        },
    );
}
