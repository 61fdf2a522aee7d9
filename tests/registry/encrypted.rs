//! Encrypted images: who has an identity reads them, registries and mirrors serve them without: docs/encryption.md.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::{TestStore, run, shell};
use crate::healing::{damage_in, finds};
use crate::lazy::{end_fetchers, files};
use crate::mirrors::configure;
use crate::registry_support::{Registry, clean, digests, store, with_images};

const TRACE: &str = "sh -c 'read x </etc/web; echo $x'";
const START: [&str; 4] = ["--", "sh", "-c", "read x </etc/web; echo $x"];

/// A new identity: its file, and its recipient.
fn identity(store: &TestStore, name: &str) -> (String, String) {
    let path = store.arg(name);
    run("age-keygen", &["-o", &path]);
    let recipient = run("age-keygen", &["-y", &path]);
    (path, recipient.trim().to_owned())
}

/// A store with the image `web`, which has a file `etc/noise` that cannot be compressed, and 32 bytes of that.
fn with_noise() -> (TestStore, Vec<u8>) {
    let store = with_images();
    store.ok(&["create", "web", "--name", "noisy"]);
    let dir = store.mount("noisy");
    let mut noise = vec![0; 300_000];
    let mut random = fs::File::open("/dev/urandom").unwrap();
    random.read_exact(&mut noise).unwrap();
    fs::write(dir.join("etc/noise"), &noise).unwrap();
    store.ok(&["umount", "noisy"]);
    store.ok(&["commit", "noisy", "other"]);
    store.ok(&["rm", "noisy"]);
    store.ok(&["rmi", "web"]);
    store.ok(&["tag", "other", "web"]);
    store.ok(&["rmi", "other"]);
    (store, noise[100_000..100_032].to_vec())
}

/// Whether one of these files has the bytes in it.
fn shows(files: &[PathBuf], bytes: &[u8]) -> bool {
    files.iter().any(|file| {
        let content = fs::read(file).unwrap();
        content.windows(bytes.len()).any(|part| part == bytes)
    })
}

fn blobs(registry: &Registry) -> Vec<PathBuf> {
    registry.blobs().into_iter().map(|(path, _)| path).collect()
}

/// The layers' directories that have a key.
fn with_keys(store: &TestStore) -> Vec<PathBuf> {
    let dirs = store.layers().into_iter();
    let dirs = dirs.map(|layer| store.root.join("layers").join(layer));
    dirs.filter(|dir| dir.join("key").exists()).collect()
}

#[test]
fn what_a_registry_has_of_an_encrypted_image_shows_nothing_and_its_chunks_are_sent_once() {
    let ((from, noise), registry) = (with_noise(), Registry::new());
    let (_, recipient) = identity(&from, "web.key");
    let image = registry.image("team/web:1");
    let push = ["push", "web", &image, "--encrypt-to", &recipient];
    let pushed = from.json(&push);
    assert_eq!(pushed["format"], "blocks", "{pushed}");
    let layers = digests(&from, "web");
    let hex = |digest: &str| digest.trim_start_matches("sha256:").to_owned();
    let raw = |digest: &str| -> Vec<u8> {
        let digits = hex(digest);
        let pairs = (0..digits.len()).step_by(2);
        pairs
            .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
            .collect()
    };
    let mut needles = vec![noise, b"virtual_size".to_vec()];
    for layer in &layers {
        needles.push(hex(layer).into_bytes());
        needles.push(raw(layer));
    }
    let encrypted = blobs(&registry);
    for needle in &needles {
        assert!(!shows(&encrypted, needle), "{needle:?}");
    }
    let manifest = registry.document(pushed["digest"].as_str().unwrap());
    let text = manifest.to_string();
    for word in ["layer.digest", "diff-id", "template"] {
        assert!(!text.contains(word), "{text}");
    }
    assert!(
        manifest["config"]["mediaType"] == "application/vnd.vellum.image.config.v1+json+age",
        "{text}"
    );
    // The same again: only the configuration is another. Another repository has the others mounted.
    let again = from.json(&push);
    assert_eq!(
        (&again["sent"], &again["mounted"]),
        (&1.into(), &0.into()),
        "{again}"
    );
    let beside = registry.image("team/other:1");
    let beside = from.json(&["push", "web", &beside, "--encrypt-to", &recipient]);
    assert_eq!(beside["sent"], 1, "{beside}");
    assert_eq!(beside["mounted"], again["existed"], "{beside}");
    // Another namespace has another salt, and nothing in common.
    let apart = registry.image("else/web:1");
    let apart = from.json(&["push", "web", &apart, "--encrypt-to", &recipient]);
    assert_eq!(apart["sent"], pushed["sent"], "{apart}");
    // All of these are found in a plain one, which is warned of.
    let plain = registry.image("plain/web:1");
    let output = from.output(&["push", "web", &plain, "--format", "blocks"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && said.contains("--encrypt-to"),
        "{said}"
    );
    for needle in &needles {
        assert!(shows(&blobs(&registry), needle), "{needle:?}");
    }
    assert_eq!(with_keys(&from), Vec::<PathBuf>::new());
    clean(&from);
}

#[test]
fn who_has_an_identity_pulls_it_and_nobody_else_does() {
    let (from, to, registry) = (with_images(), store(), Registry::new());
    let (key, recipient) = identity(&from, "web.key");
    let (second, more) = identity(&from, "second.key");
    let (other, _) = identity(&from, "other.key");
    let file = from.arg("recipients");
    fs::write(&file, format!("# ops\n{more}\n")).unwrap();
    let image = registry.image("team/web:1");
    let pushed = from.json(&[
        "push",
        "web",
        &image,
        "--encrypt-to",
        &recipient,
        "--encrypt-to",
        &file,
    ]);
    for identities in [&[][..], &["--identity", &other]] {
        for lazy in [&[][..], &["--lazy"]] {
            let error = to.fails(&[&["pull", &image, "web"], identities, lazy].concat());
            assert!(error.contains("2 of the kind X25519"), "{error}");
            assert!(error.contains("--identity"), "{error}");
        }
    }
    assert_eq!(to.names("images"), Vec::<String>::new());
    let pulled = to.json(&[
        "pull",
        &image,
        "web",
        "--identity",
        &other,
        "--identity",
        &second,
    ]);
    assert_eq!(pulled["came"], "blocks", "{pulled}");
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    assert_eq!(files(&to, "web"), files(&from, "web"));
    // The environment names files too, and nobody reads the key but its owner.
    let mut third = store();
    third
        .env
        .push(("VELLUM_IDENTITY", format!("{other}:{key}").leak()));
    third.ok(&["pull", &image, "web"]);
    assert_eq!(digests(&third, "web"), digests(&from, "web"));
    for (store, least) in [(&from, 2), (&third, 1)] {
        let dirs = with_keys(store);
        assert!(dirs.len() >= least, "{dirs:?}");
        for dir in dirs {
            let mode = fs::metadata(dir.join("key")).unwrap().mode();
            assert_eq!(mode & 0o777, 0o600);
            let key = fs::read_to_string(dir.join("key")).unwrap();
            let remote = fs::read_to_string(dir.join("remote")).unwrap();
            assert!(!remote.contains(&key));
        }
    }
    // age itself reads the configuration.
    let manifest = registry.document(pushed["digest"].as_str().unwrap());
    let config = registry.blob_file(manifest["config"]["digest"].as_str().unwrap());
    let config = run("age", &["-d", "-i", &key, &config.display().to_string()]);
    let config: Value = serde_json::from_str(&config).unwrap();
    let said: Vec<&str> = config["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["digest"].as_str().unwrap())
        .collect();
    assert_eq!(said, digests(&from, "web"));
    assert!(config["description"]["virtual_size"].is_u64(), "{config}");
    [&to, &from, &third].into_iter().for_each(clean);
}

#[test]
fn a_lazy_encrypted_image_runs_heals_and_is_completed_without_an_identity_and_through_a_mirror() {
    let (from, mut to, registry) = (with_images(), store(), Registry::new());
    let (key, recipient) = identity(&from, "web.key");
    let image = registry.image("team/web:1");
    let pushed = from.json(&[
        "push",
        "web",
        &image,
        "--encrypt-to",
        &recipient,
        "--trace",
        TRACE,
    ]);
    let manifest = registry.document(pushed["digest"].as_str().unwrap());
    assert!(
        manifest.to_string().contains("vnd.vellum.hot.v1"),
        "{manifest}"
    );
    let hosts = format!(
        "[host.\"http://{}\"]\ncapabilities = ['pull', 'resolve']\n",
        registry.host()
    );
    configure(&mut to, "upstream.invalid", &hosts);
    let image = "upstream.invalid/team/web:1";
    let said = to.ok(&[
        &["run", "--lazy", "--identity", &key, "--name", "w", image],
        &START[..],
    ]
    .concat());
    assert_eq!(said, "web\n");
    fs::remove_file(&key).unwrap();
    end_fetchers(&to);
    // A fetcher that begins anew has no identity.
    assert_eq!(files(&to, image), files(&from, "web"));
    to.ok(&["complete", image]);
    end_fetchers(&to);
    assert_eq!(digests(&to, image), digests(&from, "web"));
    damage(&to);
    assert_eq!(files(&to, image), files(&from, "web"));
    to.ok(&["check", "--scrub", "--repair"]);
    end_fetchers(&to);
    // So does who pushed it.
    damage(&from);
    from.ok(&["check", "--scrub", "--repair"]);
    end_fetchers(&from);
    from.ok(&["check", "--scrub"]);
    to.ok(&["rm", "w"]);
    clean(&to);
    clean(&from);
}

/// Changes a byte of every block that holds something, of layers with keys, and has the next reads come from the disk.
fn damage(store: &TestStore) {
    damage_in(with_keys(store), 1);
    finds(store, &["check", "--scrub"]);
}

#[test]
fn a_layer_whose_key_is_lost_is_an_error_that_says_so_and_comes_back_by_a_pull() {
    let (mut from, registry) = (with_images(), Registry::new());
    let (key, recipient) = identity(&from, "web.key");
    let image = registry.image("team/web:1");
    let push = ["push", "web", &image, "--encrypt-to", &recipient];
    from.ok(&push);
    let keys = with_keys(&from);
    for dir in &keys {
        fs::write(dir.join("key"), "0".repeat(64)).unwrap();
    }
    from.env.push(("VELLUM_STALL", "fail"));
    damage(&from);
    let raw = from.arg("web.raw");
    let error = from.fails(&["export", "web", &raw, "--format", "raw"]);
    assert!(error.contains("does not match its tag"), "{error}");
    for dir in &keys {
        fs::remove_file(dir.join("key")).unwrap();
    }
    end_fetchers(&from);
    let error = from.fails(&["export", "web", &raw, "--format", "raw"]);
    assert!(error.contains("the key of the encrypted layer"), "{error}");
    assert!(error.contains("pull the image once more"), "{error}");
    end_fetchers(&from);
    from.ok(&["pull", &image, "again", "--identity", &key]);
    from.ok(&["export", "web", &raw, "--format", "raw"]);
    end_fetchers(&from);
}

#[test]
fn layouts_and_archives_have_encrypted_images_too_also_for_recipients_that_age_adds() {
    let (from, to) = (with_images(), store());
    let (key, recipient) = identity(&from, "web.key");
    let dir = from.path("layout");
    let name = format!("file://{}:1", dir.display());
    let pushed = from.json(&["push", "web", &name, "--encrypt-to", &recipient]);
    to.fails(&["pull", &name, "web"]);
    to.ok(&["pull", "--lazy", &name, "web", "--identity", &key]);
    assert_eq!(files(&to, "web"), files(&from, "web"));
    to.ok(&["complete", "web"]);
    end_fetchers(&to);
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    // The configuration again, for another, as any program with age can write it.
    let (second, other) = identity(&from, "second.key");
    rewrap(&dir, pushed["digest"].as_str().unwrap(), (&key, &other));
    let name = format!("file://{}:2", dir.display());
    let third = store();
    third.fails(&["pull", &name, "web", "--identity", &key]);
    third.ok(&["pull", &name, "web", "--identity", &second]);
    assert_eq!(digests(&third, "web"), digests(&from, "web"));
    // An archive of two images.
    let file = from.arg("images.tar");
    from.ok(&[
        "save",
        "web",
        "base",
        "-o",
        &file,
        "--encrypt-to",
        &recipient,
    ]);
    assert!(!shows(&[PathBuf::from(&file)], b"virtual_size"));
    let fourth = store();
    let error = fourth.fails(&["load", "-i", &file]);
    assert!(error.contains("X25519"), "{error}");
    fourth.ok(&["load", "-i", &file, "--identity", &key]);
    for image in ["web", "base"] {
        assert_eq!(digests(&fourth, image), digests(&from, image));
    }
    [&to, &from, &third, &fourth].into_iter().for_each(clean);
}

/// Adds the tag 2 to a layout: the manifest with its configuration encrypted anew.
fn rewrap(dir: &Path, manifest: &str, (key, recipient): (&str, &str)) {
    let blob = |digest: &str| {
        dir.join("blobs/sha256")
            .join(digest.trim_start_matches("sha256:"))
    };
    let add = |bytes: &[u8]| {
        let digest = Sha256::digest(bytes);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = format!("sha256:{digest}");
        fs::write(blob(&digest), bytes).unwrap();
        (digest, bytes.len())
    };
    let mut document: Value = serde_json::from_slice(&fs::read(blob(manifest)).unwrap()).unwrap();
    let config = blob(document["config"]["digest"].as_str().unwrap());
    let script = format!(
        "age -d -i {key} {} | age -r {recipient} -o rewrapped",
        config.display()
    );
    shell(dir, &script);
    let (digest, size) = add(&fs::read(dir.join("rewrapped")).unwrap());
    document["config"]["digest"] = json!(digest);
    document["config"]["size"] = json!(size);
    let (digest, size) = add(document.to_string().as_bytes());
    let path = dir.join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut entry = index["manifests"][0].clone();
    entry["digest"] = json!(digest);
    entry["size"] = json!(size);
    entry["annotations"]["org.opencontainers.image.ref.name"] = json!("2");
    index["manifests"].as_array_mut().unwrap().push(entry);
    fs::write(&path, index.to_string()).unwrap();
}

#[test]
fn who_shares_a_salt_sends_no_chunk_twice() {
    let (from, to, registry) = (with_images(), store(), Registry::new());
    let (key, recipient) = identity(&from, "web.key");
    let image = registry.image("team/web:1");
    let salt = from.arg("team.salt");
    let push = ["push", "web", &image, "--encrypt-to", &recipient];
    from.ok(&[&push[..], &["--new-salt", &salt]].concat());
    assert_eq!(fs::metadata(&salt).unwrap().mode() & 0o777, 0o600);
    assert!(!from.root.join("salts").exists());
    let error = from.fails(&[&push[..], &["--new-salt", &salt]].concat());
    assert!(error.contains("is there already"), "{error}");
    to.ok(&["pull", &image, "web", "--identity", &key]);
    let shared = to.json(&[&push[..], &["--salt", &salt]].concat());
    assert_eq!(shared["sent"], 1, "{shared}");
    let own = to.json(&push);
    assert!(own["sent"].as_u64().unwrap() > 1, "{own}");
    clean(&to);
    clean(&from);
}

#[test]
fn what_cannot_be_encrypted_is_refused_before_anything_is_done() {
    let (from, registry) = (with_images(), Registry::new());
    let (key, recipient) = identity(&from, "web.key");
    let image = registry.image("team/web:1");
    let secret = fs::read_to_string(&key).unwrap();
    let secret = secret.lines().last().unwrap().to_owned();
    for (more, says) in [
        (&["--encrypt-to", "age1wrong"][..], "age1wrong"),
        (&["--encrypt-to", "ssh-ed25519 AAAA"], "SSH keys"),
        (&["--encrypt-to", "/nonexistent"], "/nonexistent"),
        (&["--encrypt-to", &key], "age-keygen -y"),
        (&["--encrypt-to", &secret], "age-keygen -y"),
        (
            &["--encrypt-to", &recipient, "--format", "both"],
            "plain image",
        ),
        (
            &["--encrypt-to", &recipient, "--format", "oci"],
            "plain image",
        ),
        (
            &["--encrypt-to", &recipient, "--salt", "/nonexistent"],
            "--new-salt",
        ),
        (
            &["--encrypt-to", &recipient, "--salt", &key],
            "64 hexadecimal digits",
        ),
    ] {
        let error = from.fails(&[&["push", "web", &image], more].concat());
        assert!(error.contains(says), "{error}");
        assert!(!error.contains(&secret[20..50]), "a secret is shown");
        let file = from.arg("web.tar");
        let error = from.fails(&[&["save", "web", "-o", &file], more].concat());
        assert!(error.contains(says), "{error}");
        assert!(!from.path("web.tar").exists());
    }
    // The registry makes the directory of its blobs with the first of them.
    let none = registry.blob_file(&format!("sha256:{}", "0".repeat(64)));
    assert!(!none.ancestors().nth(4).unwrap().exists());
    assert!(!from.root.join("salts").exists());
}
