//! Images in buckets of a real object store: docs/object-stores.md.

use std::time::Duration;

use crate::bucket_support::{Buckets, blob, data_blobs, with_credentials};
use crate::common::{TestStore, kill};
use crate::image_support::{assert_same, snapshot};
use crate::lazy::end_fetchers;
use crate::registry_support::{clean, digests, goes_once_and_comes_as_blocks, store, with_images};

/// An object store, a store with images that knows its credentials, and one without images that does.
fn ready() -> (Buckets, TestStore, TestStore) {
    let from = with_credentials(with_images());
    (Buckets::new(), from, with_credentials(store()))
}

#[test]
fn another_store_pulls_the_same_layers_from_a_bucket() {
    let (buckets, from, to) = ready();
    let image = buckets.image("team/web:1");
    goes_once_and_comes_as_blocks(&from, &to, &image);
    assert_eq!(to.names("images"), ["s3://bucket/team/web:1"]);
    assert_eq!(
        digests(&to, "s3://bucket/team/web:1"),
        digests(&from, "web")
    );
    from.ok(&[
        "push",
        "web",
        &buckets.image("team/web:plain"),
        "--format",
        "oci",
    ]);
    let plain = to.json(&["pull", &buckets.image("team/web:plain"), "plain"]);
    assert_eq!(plain["came"], "tars", "{plain}");
    let error = to.fails(&["pull", &buckets.image("team/web:2"), "other"]);
    assert!(error.contains("1, plain"), "{error}");
    let error = to.fails(&["pull", &buckets.image("nothing:1"), "other"]);
    assert!(error.contains("index.json"), "{error}");
    clean(&to);
    clean(&from);
}

#[test]
fn an_image_runs_lazily_from_a_bucket_and_who_fetches_knows_where_that_is() {
    let (mut buckets, from, to) = ready();
    let endpoint: &'static str = buckets.endpoint().leak();
    from.ok(&[
        "push",
        "web",
        &buckets.image("web:1"),
        "--trace",
        "/bin/sh -c true",
    ]);
    // The environment says where the store is, at the pull alone.
    let mut pull = to.command();
    let pull = pull.args(["pull", "--lazy", "s3://bucket/web:1", "web"]);
    assert!(
        pull.env("AWS_ENDPOINT_URL", endpoint)
            .status()
            .unwrap()
            .success()
    );
    // Of what the trace touched all may be here already: the shell. Of the 1.5 MB of noise nothing is.
    let (here, there) = (to.disk_usage(), from.disk_usage());
    assert!(here + 1_000_000 < there, "{here} of {there}");
    end_fetchers(&to);
    let said = to.ok(&["run", "--rm", "web", "--", "/bin/sh", "-c", "cat /etc/web"]);
    assert_eq!(said, "web\n");
    assert_same(&to.look("web", snapshot), &from.look("web", snapshot));
    to.ok(&["complete", "web"]);
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    end_fetchers(&to);
    buckets.stop();
    // What is here needs no store.
    let said = to.ok(&["run", "--rm", "web", "--", "/bin/sh", "-c", "cat /etc/web"]);
    assert_eq!(said, "web\n");
    end_fetchers(&to);
    clean(&to);
}

#[test]
fn a_large_blob_goes_in_parts_and_comes_back_whole() {
    let (buckets, from, to) = ready();
    let root = from.path("large");
    std::fs::create_dir_all(root.join("etc")).unwrap();
    let mut state = 1_u64;
    let noise: Vec<u8> = (0..20 << 20)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect();
    std::fs::write(root.join("noise"), noise).unwrap();
    from.ok(&[
        "import",
        "large",
        &root.display().to_string(),
        "--size",
        "64M",
    ]);
    from.ok(&["push", "large", &buckets.image("large:1")]);
    to.ok(&["pull", &buckets.image("large:1"), "large"]);
    assert_eq!(digests(&to, "large"), digests(&from, "large"));
    to.ok(&["pull", "--lazy", &buckets.image("large:1"), "again"]);
    clean(&to);
}

#[test]
fn of_many_who_push_to_one_layout_at_once_none_loses_anything() {
    let (buckets, from, to) = ready();
    // With the blobs there, nothing is left to do but what they get in each other's way with.
    let first = buckets.image("shared:first");
    from.ok(&["push", "base", &first, "--format", "blocks"]);
    let tags: Vec<String> = (0..8)
        .map(|number| buckets.image(&format!("shared:{number}")))
        .collect();
    let pushers: Vec<_> = tags
        .iter()
        .map(|tag| {
            let mut push = from.command();
            let push = push.args(["push", "base", tag, "--format", "blocks"]);
            push.spawn().unwrap()
        })
        .collect();
    for mut pusher in pushers {
        assert!(pusher.wait().unwrap().success());
    }
    for (number, tag) in tags.iter().chain([&first]).enumerate() {
        to.ok(&["pull", tag, &format!("image-{number}")]);
    }
    clean(&to);
}

#[test]
fn a_push_that_is_killed_at_any_moment_leaves_the_layout_whole() {
    let (buckets, from, to) = ready();
    let (kept, killed) = (buckets.image("shared:1"), buckets.image("shared:2"));
    from.ok(&["push", "base", &kept, "--format", "blocks"]);
    for millis in [200, 400, 600, 800] {
        let mut push = from.command();
        let mut push = push.args(["push", "web", &killed]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(millis));
        kill(push.id() as i32);
        push.wait().unwrap();
        let image = format!("kept-{millis}");
        to.ok(&["pull", &kept, &image]);
        assert_eq!(digests(&to, &image), digests(&from, "base"));
    }
    from.ok(&["push", "web", &killed]);
    to.ok(&["pull", &killed, "web"]);
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    clean(&to);
}

#[test]
fn a_blob_with_a_flipped_byte_is_refused_and_never_shown() {
    let (buckets, from, mut to) = ready();
    let image = buckets.image("web:1");
    let pushed = from.json(&["push", "web", &image, "--format", "blocks"]);
    let object = format!("bucket/web/{}", blob(pushed["digest"].as_str().unwrap()));
    let manifest = buckets.curl(&[], &object);
    let blobs = data_blobs(manifest.strip_suffix("200").unwrap());
    for digest in &blobs {
        buckets.flip(&from, &format!("bucket/web/{}", blob(digest)));
    }
    let error = to.fails(&["pull", &image, "web"]);
    assert!(error.contains("damaged"), "{error}");
    to.env.push(("VELLUM_STALL", "1"));
    to.ok(&["pull", "--lazy", &image, "web"]);
    let error = to.fails(&["complete", "web"]);
    assert!(blobs.iter().any(|blob| error.contains(blob)), "{error}");
    end_fetchers(&to);
    // A manifest is compared too.
    buckets.flip(&from, &object);
    let error = to.fails(&["pull", &image, "other"]);
    assert!(error.contains("damaged"), "{error}");
}

#[test]
fn what_is_wrong_with_a_bucket_is_said_with_what_to_do() {
    let (buckets, from, mut to) = ready();
    let nowhere = format!("s3://absent/web:1?endpoint={}", buckets.endpoint());
    let error = from.fails(&["push", "web", &nowhere]);
    assert!(
        error.contains("NoSuchBucket") && error.contains("make the bucket first"),
        "{error}"
    );
    let error = to.fails(&["pull", &nowhere, "web"]);
    assert!(error.contains("NoSuchBucket"), "{error}");
    let image = buckets.image("web:1");
    to.env.push(("AWS_SECRET_ACCESS_KEY", "wrong"));
    let error = to.fails(&["pull", &image, "web"]);
    assert!(error.contains("credentials"), "{error}");
    let error = to.fails(&[
        "pull",
        "s3://bucket/web:1?endpoint=http://192.0.2.1:1",
        "web",
    ]);
    assert!(error.contains("--plain-http"), "{error}");
    assert!(to.names("images").is_empty());
}
