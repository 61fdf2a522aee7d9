//! Volumes of the four kinds that people use: by relative and absolute path, named, and named with a path of
//! their own.

use std::fs;
use std::path::Path;

use crate::run_support::{RUNTIMES, Store};

fn with_each(test: impl Fn(&Store)) {
    for runtime in RUNTIMES {
        let store = Store::new(runtime, |_: &Path| {});
        test(&store);
        store.assert_nothing_runs();
    }
}

#[test]
fn volumes_of_all_kinds_keep_what_is_written_and_ro_keeps_writes_out() {
    with_each(|store| {
        let there = store.path("there");
        fs::create_dir(&there).unwrap();
        fs::write(there.join("old"), "old\n").unwrap();
        let there = there.to_str().unwrap();
        assert_eq!(store.must(&["volume", "create", "named"]), "named\n");
        assert_eq!(store.must(&["volume", "create", "named"]), "named\n");
        store.must(&["volume", "create", "placed", "--path", "there"]);
        assert_eq!(store.must(&["volume", "ls"]), "named\nplaced\n");
        let absolute = format!("{}:/a", store.path("absolute").display());
        let volumes = [
            "-v",
            "./relative:/r",
            "-v",
            &absolute,
            "-v",
            "named:/data",
            "-v",
            "placed:/p",
        ];
        let script = "cat /p/old /data/seed; for at in r a data p; do echo $at > /$at/new; done";
        assert_eq!(store.shell(&volumes, script), "old\nseed\n");
        for (dir, content) in [("relative", "r\n"), ("absolute", "a\n"), ("there", "p\n")] {
            assert_eq!(
                fs::read_to_string(store.path(dir).join("new")).unwrap(),
                content
            );
        }
        let said = store.vellum(&[
            "run",
            "--rm",
            "-v",
            "placed:/p:ro",
            "box",
            "sh",
            "-c",
            "cat /p/new; echo x > /p/x",
        ]);
        assert!(said.status != 0 && said.out == "p\n", "{said:?}");
        let mount = format!("type=bind,source={there},target=/m,readonly");
        let out = store.must(&["run", "--rm", "--mount", &mount, "box", "cat", "/m/old"]);
        assert_eq!(out, "old\n");
        // What -v makes is said, what --mount names is to be there.
        let said = store.vellum(&["run", "--rm", "-v", "./typo:/x", "box", "id"]);
        assert!(
            said.status == 0 && said.err.contains("typo: made for a volume"),
            "{said:?}"
        );
        let said = store.vellum(&[
            "run",
            "--mount",
            "type=bind,source=/no/such,target=/x",
            "box",
            "id",
        ]);
        assert!(
            said.status == 125 && said.err.contains("/no/such is not there"),
            "{said:?}"
        );
    });
}

#[test]
fn two_containers_share_a_volume_and_it_is_removed_when_nobody_has_it() {
    with_each(|store| {
        fs::create_dir(store.path("there")).unwrap();
        store.must(&["volume", "create", "v", "--path", "there"]);
        let said = store.vellum(&["volume", "create", "v", "--path", "tree"]);
        assert!(said.err.contains("there is a volume v already"), "{said:?}");
        store.must(&[
            "run", "-d", "--name", "w", "-v", "v:/v", "box", "sleep", "1000",
        ]);
        store.must(&[
            "run", "--name", "r", "-v", "v:/v:ro", "box", "test", "-d", "/v",
        ]);
        store.must(&["exec", "w", "sh", "-c", "echo shared > /v/file"]);
        assert_eq!(store.must(&["exec", "r", "cat", "/v/file"]), "shared\n");
        let shown: serde_json::Value =
            serde_json::from_str(&store.must(&["volume", "inspect", "v"])).unwrap();
        assert_eq!(shown[0]["elsewhere"], true);
        assert_eq!(shown[0]["used_by"][0]["container"], "r");
        assert_eq!(shown[0]["used_by"][0]["read_only"], true);
        assert_eq!(shown[0]["used_by"][1]["container"], "w");
        let said = store.vellum(&["volume", "rm", "v"]);
        assert!(said.err.contains("in use by container r, w"), "{said:?}");
        store.must(&["rm", "--force", "r", "w"]);
        store.must(&["volume", "rm", "v"]);
        assert_eq!(store.must(&["volume", "ls"]), "");
        let kept = fs::read_to_string(store.path("there/file")).unwrap();
        assert_eq!(kept, "shared\n", "the directory is its owner's");
        // One whose directory is gone says so.
        fs::create_dir(store.path("gone")).unwrap();
        store.must(&["volume", "create", "g", "--path", "gone"]);
        fs::remove_dir(store.path("gone")).unwrap();
        let said = store.vellum(&["run", "--rm", "-v", "g:/g", "box", "id"]);
        assert!(
            said.status == 125 && said.err.contains("no directory (any more)"),
            "{said:?}"
        );
    });
}

#[test]
fn a_read_only_mount_takes_no_writes_while_what_runs_in_the_container_does() {
    with_each(|store| {
        store.must(&["create", "--name", "c", "box"]);
        let dir = store.must(&["mount", "--read-only", "c"]);
        let dir = Path::new(dir.trim());
        let error = fs::write(dir.join("x"), "x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        store.must(&["exec", "c", "sh", "-c", "echo in > /written"]);
        assert_eq!(fs::read_to_string(dir.join("written")).unwrap(), "in\n");
        store.must(&["umount", "c"]);
        assert_eq!(store.must(&["diff", "c"]), "A /written\n");
        store.must(&["rm", "c"]);
    });
}
