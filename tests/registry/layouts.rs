//! Images in OCI layouts that are directories: docs/object-stores.md.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::bucket_support::{blob, data_blobs};
use crate::common::{TestStore, kill, shell};
use crate::image_support::{assert_same, snapshot};
use crate::lazy::end_fetchers;
use crate::registry_support::{clean, digests, goes_once_and_comes_as_blocks, store, with_images};

fn layout(store: &TestStore) -> (PathBuf, String) {
    let dir = store.path("layout");
    let name = format!("file://{}", dir.display());
    (dir, name)
}

fn index(dir: &std::path::Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("index.json")).unwrap()).unwrap()
}

#[test]
fn another_store_pulls_the_same_layers_from_a_directory() {
    let (from, to) = (with_images(), store());
    let (dir, name) = layout(&from);
    let image = format!("{name}:1");
    let pushed = goes_once_and_comes_as_blocks(&from, &to, &image);
    assert_eq!(digests(&to, &image), digests(&from, "web"));
    assert_same(&to.look(&image, snapshot), &from.look("web", snapshot));
    // By its digest, and alone without a tag.
    let digest = pushed["digest"].as_str().unwrap();
    to.ok(&["pull", &format!("{name}@{digest}"), "by-digest"]);
    to.ok(&["pull", &name, "alone"]);
    let error = to.fails(&["pull", &format!("{name}:2"), "other"]);
    assert!(error.contains("but 1"), "{error}");
    let error = to.fails(&["pull", "file:///nonexistent/layout", "other"]);
    assert!(error.contains("index.json"), "{error}");
    assert_eq!(index(&dir)["manifests"].as_array().unwrap().len(), 1);
    clean(&to);
    clean(&from);
}

#[test]
fn skopeo_reads_the_layout_and_what_it_writes_there_is_pulled() {
    let (from, to) = (with_images(), store());
    let (dir, name) = layout(&from);
    from.ok(&["push", "web", &format!("{name}:1")]);
    from.ok(&["push", "base", &format!("{name}:plain"), "--format", "oci"]);
    shell(
        from.dir.path(),
        "skopeo inspect oci:layout:1 >/dev/null
         skopeo inspect oci:layout:plain >/dev/null
         skopeo copy -q --insecure-policy oci:layout:1 oci:out:x
         umoci unpack --image out:x bundle >/dev/null 2>&1
         test \"$(cat bundle/rootfs/etc/web)\" = web
         skopeo copy -q --insecure-policy oci:layout:1 oci:layout:skopeo",
    );
    assert_eq!(index(&dir)["manifests"].as_array().unwrap().len(), 3);
    from.ok(&["push", "web", &format!("{name}:2")]);
    assert_eq!(index(&dir)["manifests"].as_array().unwrap().len(), 4);
    let plain = to.json(&["pull", &format!("{name}:plain"), "plain"]);
    assert_eq!(plain["came"], "tars", "{plain}");
    // skopeo takes the image for this platform alone; the blocks that it names are in the same layout.
    to.ok(&["pull", &format!("{name}:skopeo"), "skopeo"]);
    let said = to.ok(&[
        "run",
        "--rm",
        "skopeo",
        "--",
        "/bin/sh",
        "-c",
        "cat /etc/web",
    ]);
    assert_eq!(said, "web\n");
    clean(&to);
}

#[test]
fn an_image_runs_lazily_from_a_directory_and_a_flipped_byte_is_never_shown() {
    let (from, to) = (with_images(), store());
    let (dir, name) = layout(&from);
    let pushed = from.json(&["push", "web", &format!("{name}:1"), "--format", "blocks"]);
    let report = to.json(&["pull", "--lazy", &format!("{name}:1"), "web"]);
    assert_eq!(report["came"], "lazily", "{report}");
    assert!(to.disk_usage() < from.disk_usage() / 2);
    let said = to.ok(&["run", "--rm", "web", "--", "/bin/sh", "-c", "cat /etc/web"]);
    assert_eq!(said, "web\n");
    assert_same(&to.look("web", snapshot), &from.look("web", snapshot));
    to.ok(&["complete", "web"]);
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    end_fetchers(&to);
    clean(&to);
    // All bytes of all data blobs are others now.
    let manifest = dir.join(blob(pushed["digest"].as_str().unwrap()));
    let blobs = data_blobs(&fs::read_to_string(manifest).unwrap());
    for digest in &blobs {
        let path = dir.join(blob(digest));
        let bytes: Vec<u8> = fs::read(&path).unwrap().iter().map(|byte| !byte).collect();
        fs::write(&path, bytes).unwrap();
    }
    let mut third = store();
    third.env.push(("VELLUM_STALL", "1"));
    let error = third.fails(&["pull", &format!("{name}:1"), "whole"]);
    assert!(error.contains("damaged"), "{error}");
    third.ok(&["pull", "--lazy", &format!("{name}:1"), "lazy"]);
    let error = third.fails(&["complete", "lazy"]);
    assert!(blobs.iter().any(|blob| error.contains(blob)), "{error}");
    end_fetchers(&third);
    assert_eq!(third.names("images"), ["lazy"]);
}

#[test]
fn of_many_who_push_at_once_none_loses_anything() {
    let from = with_images();
    let (dir, name) = layout(&from);
    let tags: Vec<String> = (0..6).map(|number| format!("{name}:{number}")).collect();
    let pushers: Vec<_> = tags
        .iter()
        .map(|tag| {
            let mut push = from.command();
            push.args(["push", "base", tag, "--format", "blocks"])
                .spawn()
                .unwrap()
        })
        .collect();
    for mut pusher in pushers {
        assert!(pusher.wait().unwrap().success());
    }
    assert_eq!(
        index(&dir)["manifests"].as_array().unwrap().len(),
        tags.len()
    );
    let to = store();
    for tag in &tags {
        to.ok(&["pull", tag]);
    }
    clean(&to);
}

#[test]
fn a_push_that_is_killed_at_any_moment_leaves_the_layout_whole() {
    let (from, to) = (with_images(), store());
    let (dir, name) = layout(&from);
    from.ok(&["push", "base", &format!("{name}:1"), "--format", "blocks"]);
    // What one who was killed was about to write.
    fs::write(dir.join(".vellum-unfinished-x"), "half").unwrap();
    for millis in [10, 30, 60, 100, 150, 250] {
        let mut push = from.command();
        let mut push = push
            .args(["push", "web", &format!("{name}:2")])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(millis));
        kill(push.id() as i32);
        push.wait().unwrap();
        let image = format!("kept-{millis}");
        to.ok(&["pull", &format!("{name}:1"), &image]);
        assert_eq!(digests(&to, &image), digests(&from, "base"));
    }
    from.ok(&["push", "web", &format!("{name}:2")]);
    to.ok(&["pull", &format!("{name}:2"), "web"]);
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    let left = shell(from.dir.path(), "ls -A layout");
    assert_eq!(
        left,
        ".vellum-index.lock\n.vellum-push.lock\nblobs\nindex.json\noci-layout\n"
    );
    clean(&to);
    from.ok(&["prune"]);
    clean(&from);
}
