//! What a container may do and use, with crun and with runc: system calls, capabilities, limits, the
//! network; that it keeps them; and that nothing of the caller's own process gets into it.

use crate::run_support;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::run_support::{RUNTIMES, Said, Store};

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;

fn with_each(more: impl Fn(&Path), test: impl Fn(&Store)) {
    for runtime in RUNTIMES {
        let store = Store::new(runtime, &more);
        test(&store);
        store.assert_nothing_runs();
    }
}

/// Puts a program that makes forbidden system calls into the image.
fn calls(tree: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/run/run_support/calls.c");
    let built = Command::new("gcc")
        .args(["-static", "-O1", "-o"])
        .arg(tree.join("bin/calls"))
        .arg(source)
        .status()
        .expect("gcc: apt-get install gcc libc6-dev");
    assert!(built.success());
}

/// The error of each call; 0 for success.
fn errors(output: &str) -> HashMap<&str, i32> {
    output
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, error)| (name, error.parse().unwrap()))
        .collect()
}

#[test]
fn forbidden_system_calls_fail_unless_the_profile_or_a_capability_allows_them() {
    with_each(calls, |store| {
        let run = |options: &[&str]| {
            let mut arguments = vec!["run", "box", "--rm"];
            arguments.extend(options);
            arguments.extend(["--", "calls"]);
            store.must(&arguments)
        };
        let plain = run(&[]);
        let plain = errors(&plain);
        // Whatever the capabilities are.
        let never = [
            "keyctl",
            "add_key",
            "request_key",
            "io_uring_setup",
            "io_uring_enter",
            "userfaultfd",
            "kexec_load",
            "swapon",
            "move_pages",
            "pivot_root",
            "socket_alg",
            "socket_vsock",
        ];
        let with_capability = [
            "bpf",
            "perf_event_open",
            "mount",
            "umount2",
            "fsopen",
            "open_tree",
            "setns",
            "open_by_handle_at",
            "init_module",
            "delete_module",
            "reboot",
            "settimeofday",
            "clock_settime",
            "acct",
            "quotactl",
            "syslog",
            "unshare_none",
            "clone_user",
            "clone_net",
            "clone_mount_pid",
        ];
        for call in never.iter().chain(&with_capability) {
            assert_eq!(plain[call], EPERM, "{call}: {plain:?}");
        }
        // Programs go on without these.
        assert_eq!((plain["clone3"], plain["unknown"]), (ENOSYS, ENOSYS));
        assert_eq!(plain["personality_norandom"], ENOSYS);
        let allowed = [
            "clone",
            "ptrace",
            "process_vm_readv",
            "name_to_handle_at",
            "chroot",
            "socket_inet",
            "socket_unix",
            "personality_get",
        ];
        for call in allowed {
            assert!(![EPERM, ENOSYS].contains(&plain[call]), "{call}: {plain:?}");
        }
        let all = run(&["--cap-add", "ALL"]);
        let all = errors(&all);
        for call in never {
            assert_eq!(all[call], EPERM, "{call}: {all:?}");
        }
        // CAP_SYS_ADMIN, without which this test could not mount either.
        let by_admin = [
            "mount",
            "umount2",
            "fsopen",
            "open_tree",
            "setns",
            "quotactl",
            "unshare_none",
            "clone_user",
            "clone_net",
            "clone_mount_pid",
        ];
        for call in by_admin {
            assert_ne!(all[call], EPERM, "{call}: {all:?}");
        }
        let unconfined = run(&["--security-opt", "seccomp=unconfined"]);
        let unconfined = errors(&unconfined);
        for call in ["keyctl", "unshare_none", "clone_user", "socket_vsock"] {
            assert_ne!(unconfined[call], EPERM, "{call}: {unconfined:?}");
        }
        // A profile of one's own, in docker's form, which the container keeps.
        fs::write(
            store.path("profile.json"),
            r#"{ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                { "names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95, "includes": { "caps": ["CAP_SYS_CHROOT"] } },
                { "names": ["bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95, "excludes": { "caps": ["CAP_SYS_CHROOT"] } } ] }"#,
        )
        .unwrap();
        let own = [
            "run",
            "box",
            "--name",
            "own",
            "--security-opt",
            "seccomp=profile.json",
            "--",
            "calls",
        ];
        let first = store.must(&own);
        fs::remove_file(store.path("profile.json")).unwrap();
        let again = store.must(&["exec", "own", "--", "calls"]);
        for output in [&first, &again] {
            let own = errors(output);
            assert_eq!(own["chroot"], 95);
            assert!(own["bpf"] != 95 && own["clone_user"] == 0, "{own:?}");
        }
        let said = store.vellum(&own);
        assert_eq!(said.status, 125);
        assert!(said.err.contains("profile.json"), "{said:?}");
        store.must(&["rm", "own"]);
    });
}

/// A line of `/proc/PID/status`.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find(|line| line.starts_with(name));
    line.expect(status)
        .split_whitespace()
        .nth(1)
        .unwrap()
        .to_owned()
}

#[test]
fn what_a_container_was_given_holds_for_every_later_start_in_it() {
    with_each(
        |_| {},
        |store| {
            let look = "cat /proc/self/status; readlink /proc/self/ns/net; hostname; echo $HOSTNAME; \
                        touch /x 2>/dev/null || echo read-only; cat /etc/hosts";
            let run = [
                "run",
                "box",
                "--name",
                "c",
                "--hostname",
                "my-box",
                "--cap-drop",
                "ALL",
                "--cap-add",
                "cap_chown,NET_ADMIN",
                "--security-opt",
                "no-new-privileges",
                "--read-only",
                "--",
                "sh",
                "-c",
                look,
            ];
            let host = fs::read_link("/proc/self/ns/net").unwrap();
            let check = |out: &str| {
                // CHOWN and NET_ADMIN.
                assert_eq!(field(out, "CapEff:"), "0000000000001001");
                assert_eq!(field(out, "CapBnd:"), "0000000000001001");
                assert_eq!(field(out, "NoNewPrivs:"), "1");
                assert_eq!(field(out, "Seccomp:"), "2");
                assert!(
                    !out.contains(host.to_str().unwrap()),
                    "the host's network: {out}"
                );
                assert!(out.contains("\nmy-box\nmy-box\nread-only\n"), "{out}");
                assert!(out.contains("127.0.1.1\tmy-box"), "{out}");
            };
            check(&store.must(&run));
            let exec = ["exec", "c", "--", "sh", "-c", look];
            check(&store.must(&exec));
            store.must(&["rm", "c"]);
            // Beside a command that runs, too.
            let options = &run[4..run.len() - 4];
            let running = store.start("c", options);
            check(&store.must(&exec));
            store.must(&["rm", "--force", "c"]);
            running.wait();
            // And in one that was made before it was started.
            let mut create = vec!["create", "box", "--name", "c"];
            create.extend(options);
            store.must(&create);
            check(&store.must(&exec));
            let inspected = store.must(&["inspect", "c"]);
            assert!(inspected.contains("CAP_NET_ADMIN"), "{inspected}");
            store.must(&["rm", "c"]);
            // The host's network is what one asks for.
            store.must(&["create", "box", "--name", "c", "--network", "host"]);
            assert!(store.must(&exec).contains(host.to_str().unwrap()));
            forget_confinement(store, "c");
            let out = store.must(&exec);
            assert!(
                !out.contains(host.to_str().unwrap()),
                "of an old record: {out}"
            );
            store.must(&["rm", "c"]);
        },
    );
}

/// Makes a container's record one of a version that knew no confinement.
fn forget_confinement(store: &Store, name: &str) {
    let path = store.path("store/containers").join(format!("{name}.json"));
    let text = fs::read_to_string(&path).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(
        record
            .as_object_mut()
            .unwrap()
            .remove("confinement")
            .is_some()
    );
    fs::write(&path, record.to_string()).unwrap();
}

#[test]
fn limits_hold_or_are_refused_with_the_reason() {
    with_each(
        |_| {},
        |store| {
            let script = "i=0; while [ $i -lt 12 ]; do sleep 5 & i=$((i+1)); done; kill $(jobs -p); echo all";
            let said = store.vellum(&[
                "run",
                "box",
                "--rm",
                "--pids-limit",
                "8",
                "--",
                "sh",
                "-c",
                script,
            ]);
            assert!(
                said.err.contains("fork") && !said.out.contains("all"),
                "{said:?}"
            );
            let out = store.shell(&["--pids-limit", "-1"], script);
            assert_eq!(out, "all\n");
            // More than the limit ends the process, and not the host's patience.
            let eat = [
                "run",
                "box",
                "--rm",
                "--memory",
                "16M",
                "--",
                "busybox",
                "dd",
                "if=/dev/zero",
                "of=/dev/null",
                "bs=64M",
                "count=1",
            ];
            let said = store.vellum(&eat);
            assert_ne!(said.status, 0, "{said:?}");
            store.shell(&["-m", "64M", "--cpus", "0.5"], "true");
            for (option, value, why) in [
                ("--memory", "1M", "at least 6M"),
                ("--cpus", "100000", "this host has"),
                ("--cap-add", "EVERYTHING", "no capability"),
                ("--security-opt", "apparmor=x", "not known"),
                ("--hostname", "a b", "no host name"),
            ] {
                let said = store.vellum(&["run", "box", option, value, "--", "true"]);
                assert!([2, 125].contains(&said.status), "{said:?}");
                assert!(said.err.contains(why), "{said:?}");
            }
            assert_eq!(store.must(&["ps", "--json"]).trim(), "[]");
        },
    );
}

/// Runs a command of vellum from a shell, after `setup`.
fn from_shell(store: &Store, setup: &str, arguments: &[&str]) -> Said {
    let vellum = store.command(arguments);
    let mut shell = Command::new("bash");
    shell
        .arg("-c")
        .arg(format!("{setup}; exec \"$@\""))
        .arg("bash")
        .arg(vellum.get_program())
        .args(vellum.get_args())
        .env("VELLUM_RUNTIME", store.runtime)
        .current_dir(store.path(""))
        .stdin(Stdio::null());
    shell.output().unwrap().into()
}

#[test]
fn nothing_of_the_callers_process_gets_into_a_container() {
    with_each(
        |_| {},
        |store| {
            let setup =
                "umask 077; ulimit -S -t 1000; ulimit -n 500; trap '' USR1 HUP PIPE; exec 9>lock";
            let look = "umask; grep -E '^Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd; ulimit -t; \
                        cat /etc/hosts /etc/hostname /etc/resolv.conf >/dev/null && ls /vol /new/dir /made >/dev/null && \
                        busybox stat -c %a /etc/hosts /vol /new/dir /made /new";
            let options = ["-v", "v:/vol", "-v", "./made:/made", "-w", "/new/dir"];
            let run = [
                &["run", "box", "--name", "c", "-u", "web"],
                &options[..],
                &["--", "sh", "-c", look],
            ]
            .concat();
            let said = from_shell(store, setup, &run);
            assert_eq!(said.status, 0, "{said:?}");
            let only_says = "made: made for a volume, since it was not there\n";
            assert!(said.err.ends_with(only_says), "{said:?}");
            assert_eq!(said.err.lines().count(), 1, "{said:?}");
            let zero = "0000000000000000";
            // A shell reads a directory with descriptor 3.
            let expected = format!(
                "0022\nSigBlk:\t{zero}\nSigIgn:\t{zero}\n0\n1\n2\n3\nunlimited\n644\n755\n755\n755\n755\n"
            );
            assert_eq!(said.out, expected);
            let said = from_shell(store, setup, &["exec", "c", "--", "sh", "-c", look]);
            assert_eq!(
                (said.out, said.err),
                (expected.clone(), String::new()),
                "alone"
            );
            store.must(&["rm", "c"]);
            let running = store.start("c", &options);
            let said = from_shell(
                store,
                setup,
                &["exec", "-u", "web", "c", "--", "sh", "-c", look],
            );
            assert_eq!((said.out, said.err), (expected, String::new()), "beside");
            store.must(&["rm", "--force", "c"]);
            running.wait();
            store.must(&["volume", "rm", "v"]);
            // What outlives the command holds nothing of it.
            store.must(&["create", "box", "--name", "c"]);
            let said = from_shell(
                store,
                "exec 9>lock; flock 9; ulimit -S -f 2000",
                &["mount", "c"],
            );
            assert_eq!(said.status, 0, "{said:?}");
            let lock = fs::File::open(store.path("lock")).unwrap();
            lock.try_lock()
                .expect("a device process holds the caller's lock");
            let file = Path::new(said.out.trim()).join("large");
            fs::write(&file, vec![7; 8 << 20]).unwrap();
            fs::File::open(&file).unwrap().sync_all().unwrap();
            store.must(&["umount", "c"]);
            store.must(&["rm", "c"]);
        },
    );
}

#[test]
fn a_numeric_user_or_group_is_a_number_whatever_the_image_calls_by_it() {
    with_each(
        |tree| {
            let add = |name: &str, line: &str| {
                let path = tree.join(name);
                let text = fs::read_to_string(&path).unwrap();
                fs::write(&path, text + line).unwrap();
            };
            add("etc/passwd", "1001:x:0:0:numeric name:/root:/bin/sh\n");
            add("etc/group", "1002:x:0:\n");
        },
        |store| {
            let out = store.shell(&["-u", "1001"], "id -u; id -g; id -G");
            assert_eq!(out, "1001\n0\n0\n");
            let out = store.shell(&["-u", "1001:1002"], "id -u; id -g; id -G");
            assert_eq!(out, "1001\n1002\n1002\n");
        },
    );
}

#[test]
fn a_container_that_locks_its_volume_keeps_nobody_out() {
    with_each(calls, |store| {
        let child = store
            .command(&[
                "run", "box", "--name", "a", "-v", "v:/vol", "--", "calls", "/vol",
            ])
            .spawn()
            .unwrap();
        let running = run_support::Running { child };
        let volume = store.path("store/volumes/v");
        store.wait_until(|| {
            let lock = fs::File::open(&volume);
            lock.is_ok_and(|lock| lock.try_lock().is_err())
        });
        store.shell(&["-v", "v:/vol"], "touch /vol/x");
        assert!(volume.join("x").exists());
        store.must(&["rm", "--force", "a"]);
        running.wait();
        store.must(&["volume", "rm", "v"]);
    });
}

#[test]
fn a_first_fill_that_is_killed_leaves_no_half_of_a_volume() {
    // What fills it is no runtime's.
    let store = Store::new("runc", |tree| {
        fs::create_dir(tree.join("big")).unwrap();
        fs::set_permissions(tree.join("big"), fs::Permissions::from_mode(0o1777)).unwrap();
        for number in 0..3000 {
            fs::write(tree.join(format!("big/{number}")), "x").unwrap();
        }
    });
    let entries = |path: &str| fs::read_dir(store.path(path)).map_or(0, Iterator::count);
    let mut cut_off = 0;
    for _ in 0..3 {
        let child = store
            .command(&["run", "box", "--name", "a", "-v", "v:/big", "--", "true"])
            .spawn()
            .unwrap();
        let mut running = run_support::Running { child };
        // In the middle of it.
        store.wait_until(|| {
            entries("store/volumes/.v.new") > 100 || store.path("store/volumes/v").exists()
        });
        running.child.kill().unwrap();
        running.wait();
        if !store.path("store/volumes/v").exists() {
            cut_off += 1;
        }
        // The device's processes may need a moment to see that they are to end.
        store.wait_until(|| store.vellum(&["rm", "--force", "a"]).status == 0);
        assert!(!store.must(&["volume", "ls"]).contains('.'));
        if cut_off > 0 {
            break;
        }
        store.must(&["volume", "rm", "v"]);
    }
    assert!(cut_off > 0, "no fill was caught in the middle");
    assert!(store.path("store/volumes/.v.new").exists());
    store.must(&["prune"]);
    assert!(
        !store.path("store/volumes/.v.new").exists(),
        "prune removes it"
    );
    let out = store.shell(
        &["-v", "v:/big"],
        "ls /big | busybox wc -l; busybox stat -c %a /big",
    );
    assert_eq!(out, "3000\n1777\n");
    // One that was copied whole comes in by the next start, also where the volume is there.
    fs::rename(
        store.path("store/volumes/v"),
        store.path("store/volumes/.v.full"),
    )
    .unwrap();
    fs::create_dir(store.path("store/volumes/v")).unwrap();
    fs::write(store.path("store/volumes/v/7"), "mine").unwrap();
    let out = store.shell(
        &["-v", "v:/big"],
        "ls /big | busybox wc -l; cat /big/7; busybox stat -c %a /big",
    );
    assert_eq!(out, "3000\nmine1777\n");
    assert!(!store.path("store/volumes/.v.full").exists());
    store.must(&["volume", "rm", "v"]);
    store.assert_nothing_runs();
}
