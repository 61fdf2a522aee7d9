//! What newcomers try first: words of docker's, mistyped paths, questions about space and what differs.

use std::fs;
use std::process::Command;

use crate::common::TestStore;

fn usage_error(store: &TestStore, arguments: &[&str]) -> String {
    let output = store.output(arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_command_of_dockers_that_is_none_here_gets_one_sentence_and_a_mistyped_one_its_neighbours() {
    let store = TestStore::new();
    for (arguments, says) in [
        (&["build", "."][..], "builds no images"),
        (&["network", "ls"], "--network host"),
        (&["restart", "c"], "vellum stop C && vellum start C"),
        (&["snap", "c"], "vellum snapshot C"),
        (&["container", "ls"], "vellum ps"),
        (&["log", "c"], "vellum logs"),
    ] {
        let said = usage_error(&store, arguments);
        assert!(
            said.starts_with("vellum: ") && said.contains(says),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    let said = usage_error(&store, &["comit", "c", "image"]);
    assert!(said.contains("'commit'"), "{said}");
}

#[test]
fn a_mistyped_root_is_no_new_store() {
    let dir = tempfile::tempdir().unwrap();
    let typo = dir.path().join("typo");
    for command in [
        &["ps"][..],
        &["images"],
        &["rm", "c"],
        &["create", "image"],
        &["prune"],
    ] {
        let mut vellum = Command::new(env!("CARGO_BIN_EXE_vellum"));
        let output = vellum
            .arg("--root")
            .arg(&typo)
            .args(command)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code().unwrap(), 1, "{command:?}: {said}");
        assert!(
            said.contains("there is no store at") && said.contains("--root"),
            "{said}"
        );
        assert!(!typo.exists(), "{command:?}");
    }
}

#[test]
fn ps_lists_what_is_asked_for_as_it_is_asked_for() {
    let store = TestStore::new();
    store.small_image("base");
    store.small_image("other");
    store.ok(&["create", "base", "--name", "one"]);
    store.ok(&["create", "other", "--name", "two", "serve", "--now"]);
    assert_eq!(store.ok(&["ps", "-aq"]), "one\ntwo\n");
    assert_eq!(
        store.ok(&["ps", "-q", "--filter", "ancestor=other"]),
        "two\n"
    );
    let both = ["ps", "-q", "--filter", "name=on", "--filter", "name=tw"];
    assert_eq!(store.ok(&both), "one\ntwo\n");
    let none = [
        "ps",
        "-q",
        "--filter",
        "name=on",
        "--filter",
        "status=running",
    ];
    assert_eq!(store.ok(&none), "");
    let format = [
        "ps",
        "--format",
        r"table {{.Names}}\t{{.State}}\t{{.Command}}",
    ];
    let shown = store.ok(&format);
    assert_eq!(
        shown,
        "NAMES  STATE    COMMAND\none    created\ntwo    created  serve --now\n"
    );
    let shown = store.ok(&["ps", "--format", "{{.Image}}: {{.Names}}"]);
    assert_eq!(shown, "base: one\nother: two\n");
    assert!(store.ok(&["ps", "--format", "json"]).starts_with('['));
    assert!(usage_error(&store, &["ps", "--filter", "label=x"]).contains("ancestor="));
    assert!(usage_error(&store, &["ps", "--format", "{{.X}}"]).contains(".Names"));
}

#[test]
fn df_says_what_is_shared_and_what_a_removal_gives_back() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    fs::write(dir.join("large"), vec![9; 1 << 20]).unwrap();
    store.ok(&["umount", "c"]);
    store.ok(&["commit", "-m", "a large file", "c", "larger"]);
    let usage = store.json(&["df"]);
    let part = |name: &str| {
        let parts = usage["parts"].as_array().unwrap();
        let part = parts.iter().find(|part| part["name"] == name).unwrap();
        ["total", "shared", "unique"].map(|key| part[key].as_u64().unwrap())
    };
    let ([base, base_shared, base_unique], [total, shared, unique]) =
        (part("base"), part("larger"));
    assert!(
        base > 100_000 && base == base_shared && base_unique == 0,
        "{usage}"
    );
    assert!(
        total >= base + (1 << 20) && total == shared + unique,
        "{usage}"
    );
    // The container has the committed layer too.
    assert_eq!(unique, 0, "{usage}");
    store.ok(&["rm", "c"]);
    let usage = store.json(&["df"]);
    let larger = usage["parts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|p| p["name"] == "larger")
        .unwrap();
    assert!(larger["unique"].as_u64().unwrap() >= 1 << 20, "{usage}");
    assert!(usage["layer_bytes"].as_u64().unwrap() <= total, "{usage}");
    assert!(store.ok(&["df"]).contains("UNIQUE"));

    // What differs between the two, and the remark of the commit.
    assert_eq!(store.ok(&["diff", "base", "larger"]), "A /large\n");
    assert_eq!(store.ok(&["diff", "larger", "base"]), "D /large\n");
    assert!(
        store
            .fails(&["diff", "base", "none"])
            .contains("there is no image none")
    );
    assert!(store.ok(&["history", "larger"]).contains("a large file"));
    assert!(!store.ok(&["history", "base"]).contains("REMARK"));
    store.assert_nothing_runs();
}

#[test]
fn an_image_is_mounted_read_only_by_a_container_that_is_made_for_that() {
    let store = TestStore::new();
    store.small_image("base");
    let output = store.output(&["mount", "base"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("vellum rm --force base-1"), "{said}");
    let dir = String::from_utf8(output.stdout).unwrap();
    let file = std::path::Path::new(dir.trim()).join("etc/hostname");
    assert_eq!(fs::read_to_string(&file).unwrap(), "base\n");
    assert!(fs::write(&file, "x").is_err());
    store.ok(&["rm", "--force", "base-1"]);
    assert_eq!(store.names("ps"), Vec::<String>::new());
    store.assert_nothing_runs();
}

#[test]
fn names_are_completed_and_each_command_has_a_manual_page() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "zebra"]);
    let complete = |words: &[&str]| {
        let mut vellum = Command::new(env!("CARGO_BIN_EXE_vellum"));
        vellum
            .env("VELLUM_ROOT", &store.root)
            .env("COMPLETE", "bash");
        vellum.env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string());
        vellum.env("_CLAP_IFS", "\n").arg("--").args(words);
        String::from_utf8(vellum.output().unwrap().stdout).unwrap()
    };
    assert!(complete(&["vellum", "rm", "ze"]).contains("zebra"));
    assert!(complete(&["vellum", "run", "ba"]).contains("base"));
    assert!(store.ok(&["completions", "bash"]).contains("COMPLETE"));
    assert!(store.fails(&["completions", "tcsh"]).contains("bash"));

    let pages = store.path("pages");
    fs::create_dir(&pages).unwrap();
    store.ok(&["man", pages.to_str().unwrap()]);
    let first = fs::read_to_string(pages.join("vellum.1")).unwrap();
    let mut named = 0;
    for word in first.split_whitespace() {
        let Some((page, "(1)")) = word.split_at_checked(word.len().saturating_sub(3)) else {
            continue;
        };
        let page = page.replace('\\', "");
        assert!(pages.join(format!("{page}.1")).exists(), "{page}");
        named += 1;
    }
    assert!(named > 20, "{named}");
}
