//! The snapshots API, asked as containerd asks it when it pulls an image.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use vellum_base::crash_point;

use crate::common::TestStore;
use crate::image::{Image, lazy_bytes, lazy_layers};
use crate::registry_support::{Registry, Setup, with_images};
use crate::snapshotter_support::client::ALREADY_EXISTS;
use crate::snapshotter_support::rig::Rig;
use crate::snapshotter_support::wait_for;

/// The push of `web`, and a snapshotter that takes block layers from the registry.
fn pushed(format: &str) -> (Registry, TestStore, Image, Rig) {
    pushed_with(&["--format", format])
}

fn pushed_with(options: &[&str]) -> (Registry, TestStore, Image, Rig) {
    let (registry, from) = (Registry::new(), with_images());
    let name = registry.image("web:1");
    let push = [&["push", "web", &name], options].concat();
    let pushed = from.json(&push);
    let image = Image::new(&registry, "web:1", pushed["digest"].as_str().unwrap());
    let rig = rig(&registry, "off");
    (registry, from, image, rig)
}

fn rig(registry: &Registry, background: &str) -> Rig {
    Rig::new(&format!(
        "[remote]\nfrom = ['{}']\nbackground = '{background}'\n[log]\nlevel = 'debug'\n",
        registry.host()
    ))
}

/// All layers of an image, none of which is unpacked; the key of the uppermost.
fn pull(rig: &Rig, image: &Image, who: &str) -> String {
    let mut parent = String::new();
    for layer in 0..image.chain_ids.len() {
        let key = format!("{who}/{layer}/extract");
        let answer = image.prepare(&rig.client, layer, &key, &parent);
        let code = answer.unwrap_err().code();
        assert_eq!(code, Some(ALREADY_EXISTS), "{}", rig.log());
        // Another namespace has its own.
        let mut found = image.found(&rig.client, layer, &parent);
        found.retain(|name| name.starts_with(who));
        let [name] = &found[..] else {
            panic!("{found:?}");
        };
        parent.clone_from(name);
    }
    parent
}

fn unpacks(rig: &Rig, image: &Image) {
    let mount = image.prepare(&rig.client, 0, "a/1/extract", "");
    let mount = mount.unwrap_or_else(|failure| panic!("{failure:?}\n{}", rig.log()));
    fs::write(Path::new(&mount.source).join("file"), "unpacked").unwrap();
    rig.client.commit("a/2/one", "a/1/extract", &[]).unwrap();
    assert_eq!(rig.content("a/2/one", "file").unwrap(), "unpacked");
    rig.client.remove("a/2/one").unwrap();
    rig.assert_whole("unpacked");
}

#[test]
fn what_a_start_needs_comes_ahead_once_all_layers_of_an_image_are_there() {
    let trace = "sh -c 'read x </etc/web; echo $x'";
    let (registry, _from, image, rig) = pushed_with(&["--trace", trace]);
    let top = pull(&rig, &image, "a");
    let hot = || {
        let mut layers = lazy_layers(&rig.root()).into_iter();
        layers.any(|dir| dir.join("hot").exists())
    };
    wait_for("the hot pack", Duration::from_secs(30), || !hot());
    // What was traced is here without the registry.
    drop(registry);
    let mount = rig.client.prepare("a/9/web", &top, &[]).unwrap();
    let web = Path::new(&mount.source).join("etc/web");
    assert_eq!(fs::read_to_string(web).unwrap(), "web\n");
}

#[test]
fn layers_with_blocks_in_the_registry_are_there_at_once_and_their_bytes_come_when_they_are_read() {
    let (_registry, _from, image, rig) = pushed("both");
    assert_eq!(image.chain_ids.len(), 2);
    let top = pull(&rig, &image, "a");
    let (here, all) = lazy_bytes(&rig.root());
    assert!(here * 4 < all, "{here} of {all}");
    let usage = rig.client.usage(&top).unwrap();
    assert!(usage.size > 0, "{usage:?}");
    // A second namespace has the same blocks.
    let other = pull(&rig, &image, "b");
    assert_eq!(rig.client.usage(&other).unwrap(), usage);
    assert_eq!(fs::read_dir(rig.root().join("layers")).unwrap().count(), 3);

    let mount = rig.client.prepare("a/9/web", &top, &[]).unwrap();
    let dir = Path::new(&mount.source);
    assert_eq!(fs::read_to_string(dir.join("etc/web")).unwrap(), "web\n");
    assert!(!dir.join("noise").exists());
    let (here, all) = lazy_bytes(&rig.root());
    assert!(here * 2 < all, "{here} of {all}");
    assert_eq!(
        fs::read(dir.join("bin/sh")).unwrap(),
        fs::read("/bin/busybox").unwrap()
    );
    // All that is done to snapshots is done to these.
    fs::write(dir.join("own"), "own").unwrap();
    rig.client.commit("a/10/own", "a/9/web", &[]).unwrap();
    assert_eq!(rig.content("a/10/own", "own").unwrap(), "own");
    assert_eq!(rig.content("a/10/own", "etc/web").unwrap(), "web\n");
    rig.assert_checks();
    for name in rig.client.list(&[]).unwrap() {
        assert!(rig.client.stat(&name.name).is_ok());
    }
}

#[test]
fn what_is_removed_takes_its_lazy_layers_along_unless_another_snapshot_has_them() {
    let (_registry, _from, image, rig) = pushed("both");
    let top = pull(&rig, &image, "a");
    let other = pull(&rig, &image, "b");
    assert_eq!(rig.content(&top, "etc/web").unwrap(), "web\n");
    let remove = |top: &str| {
        let parent = rig.client.stat(top).unwrap().parent;
        rig.client.remove(top).unwrap();
        rig.client.remove(&parent).unwrap();
    };
    remove(&top);
    rig.assert_whole("one of two is removed");
    assert_eq!(rig.content(&other, "etc/web").unwrap(), "web\n");
    remove(&other);
    rig.assert_whole("all are removed");
    assert_eq!(fs::read_dir(rig.root().join("layers")).unwrap().count(), 1);
    // And again.
    let top = pull(&rig, &image, "c");
    assert_eq!(rig.content(&top, "etc/web").unwrap(), "web\n");
    remove(&top);
    rig.assert_whole("removed again");
}

#[test]
fn an_image_on_an_empty_file_system_of_another_size_than_this_hosts_leaves_nothing_behind() {
    let (registry, _from, image, _) = pushed("both");
    let rig = Rig::new(&format!(
        "[remote]\nfrom = ['{}/web']\n[log]\nlevel = 'debug'\n",
        registry.host()
    ));
    let config = fs::read_to_string(rig.area.at("config.toml")).unwrap();
    fs::write(
        rig.area.at("config.toml"),
        config.replace("default_size = '64M'", "default_size = '96M'"),
    )
    .unwrap();
    let mut rig = rig;
    rig.end(Signal::SIGTERM);
    rig.start();
    let top = pull(&rig, &image, "a");
    let mount = rig.client.prepare("a/9/web", &top, &[]).unwrap();
    let file = Path::new(&mount.source).join("etc/web");
    assert_eq!(fs::read_to_string(file).unwrap(), "web\n");
    rig.client.remove("a/9/web").unwrap();
    let parent = rig.client.stat(&top).unwrap().parent;
    rig.client.remove(&top).unwrap();
    rig.client.remove(&parent).unwrap();
    rig.assert_whole("all are removed");
}

#[test]
fn a_layer_whose_parent_was_unpacked_has_all_blocks_of_its_chain() {
    let (_registry, _from, image, rig) = pushed("both");
    rig.committed("a/2/one", "", "etc-is-not-here", "unpacked");
    let answer = image.prepare(&rig.client, 1, "a/3/extract", "a/2/one");
    assert_eq!(answer.unwrap_err().code(), Some(ALREADY_EXISTS));
    let found = image.found(&rig.client, 1, "a/2/one");
    assert_eq!(rig.content(&found[0], "etc/web").unwrap(), "web\n");
    rig.assert_checks();
    rig.client.remove(&found[0]).unwrap();
    rig.client.remove("a/2/one").unwrap();
    rig.assert_whole("removed");
}

#[test]
fn blocks_that_nobody_reads_come_in_the_background_and_then_no_registry_is_needed() {
    let (mut registry, _from, image, _) = pushed("both");
    let mut rig = rig(&registry, "full");
    let top = pull(&rig, &image, "a");
    let limit = Duration::from_secs(60);
    wait_for("all is here", limit, || lazy_layers(&rig.root()).is_empty());
    registry.stop();
    assert_eq!(rig.content(&top, "etc/web").unwrap(), "web\n");
    rig.end(Signal::SIGKILL);
    rig.area.end_devices();
    rig.start();
    assert_eq!(rig.content(&top, "etc/web").unwrap(), "web\n");
    rig.assert_checks();
}

#[test]
fn a_snapshotter_that_starts_without_a_network_goes_on_with_what_is_here() {
    let (mut registry, _from, image, mut rig) = pushed("both");
    let top = pull(&rig, &image, "a");
    let mount = rig.client.prepare("a/9/web", &top, &[]).unwrap();
    let dir = Path::new(&mount.source).to_owned();
    assert_eq!(fs::read_to_string(dir.join("etc/web")).unwrap(), "web\n");
    fs::write(dir.join("own"), "own").unwrap();
    registry.stop();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        rig.end(signal);
        assert_eq!(fs::read_to_string(dir.join("own")).unwrap(), "own");
        rig.start();
        assert_eq!(rig.client.stat(&top).unwrap().kind, 3, "committed");
        // What was read is here, for other containers too.
        let mount = rig.client.prepare("a/10/second", &top, &[]).unwrap();
        let file = Path::new(&mount.source).join("etc/web");
        assert_eq!(fs::read_to_string(file).unwrap(), "web\n");
        rig.client.remove("a/10/second").unwrap();
    }
    // A pull of the same image by another namespace needs none either.
    pull(&rig, &image, "b");
    rig.client.remove("a/9/web").unwrap();
}

#[test]
fn a_container_that_waits_for_a_registry_says_so_and_goes_on_when_that_is_back() {
    let (mut registry, _from, image, rig) = pushed("both");
    let top = pull(&rig, &image, "a");
    let mount = rig.client.prepare("a/9/web", &top, &[]).unwrap();
    registry.stop();
    let shell = Path::new(&mount.source).join("bin/sh");
    let reader = std::thread::spawn(move || fs::read(shell).unwrap());
    let ps = || String::from_utf8(rig.vellum(&["ps"]).stdout).unwrap();
    let limit = Duration::from_secs(30);
    wait_for("ps says who waits", limit, || {
        ps().contains("waiting for registry")
    });
    // Writes, and other snapshots, do not.
    fs::write(Path::new(&mount.source).join("own"), "own").unwrap();
    rig.committed("a/11/other", "", "file", "text");
    assert!(!reader.is_finished());
    registry.start_again();
    assert_eq!(reader.join().unwrap(), fs::read("/bin/busybox").unwrap());
    assert!(!ps().contains("waiting"));
}

#[test]
fn two_pulls_of_an_image_at_once_share_its_layers() {
    let (_registry, _from, image, rig) = pushed("both");
    std::thread::scope(|scope| {
        for who in ["a", "b", "c", "d"] {
            let (rig, image) = (&rig, &image);
            scope.spawn(move || pull(rig, image, who));
        }
    });
    assert_eq!(lazy_layers(&rig.root()).len(), 2);
    rig.assert_checks();
    assert_eq!(rig.log().matches("manifest=").count(), 1);
}

#[test]
fn an_image_without_block_layers_is_unpacked_after_one_look_at_its_manifest() {
    let (mut registry, _from, image, rig) = pushed("oci");
    unpacks(&rig, &image);
    // That it has none is known from now on.
    registry.stop();
    let begin = Instant::now();
    unpacks(&rig, &image);
    assert!(begin.elapsed() < Duration::from_secs(3));
    assert_eq!(rig.log().matches("has no block layers").count(), 1);
    assert_eq!(rig.log().matches("cannot be had").count(), 0);
}

#[test]
fn an_image_whose_block_layers_or_registry_are_gone_is_unpacked_without_delay() {
    for gone in ["artifact", "table", "data", "registry", "right", "answers"] {
        let (mut registry, from, image, mut rig) = pushed("both");
        let artifact =
            registry.document(&image.manifest)["annotations"]["dev.vellum.blocks.digest"]
                .as_str()
                .unwrap()
                .to_owned();
        let mut silent = None;
        let mut image = image;
        match gone {
            "artifact" => fs::remove_file(registry.blob_file(&artifact)).unwrap(),
            "table" => {
                let layers = registry.document(&artifact)["layers"].clone();
                let mut layers = layers.as_array().unwrap().iter().rev();
                let is_table = |layer: &&Value| layer["mediaType"].to_string().contains("table");
                let table = layers.find(is_table).unwrap()["digest"].as_str();
                fs::remove_file(registry.blob_file(table.unwrap())).unwrap();
            }
            "data" => {
                let data = registry.data_blobs(&artifact);
                fs::remove_file(registry.blob_file(data.last().unwrap())).unwrap();
            }
            "registry" => registry.stop(),
            "right" => {
                registry = Registry::with(&Setup {
                    auth: true,
                    ..Setup::default()
                });
                image.name = registry.image("web:1");
                rig = self::rig(&registry, "off");
            }
            _ => {
                let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                let host = listener.local_addr().unwrap().to_string();
                image.name = format!("{host}/web:1");
                rig = Rig::new(&format!("[remote]\nfrom = ['{host}']\n"));
                silent = Some(listener);
            }
        }
        let begin = Instant::now();
        let mount = image.prepare(&rig.client, 0, "a/1/extract", "");
        assert!(mount.is_ok(), "{gone}: {mount:?}\n{}", rig.log());
        let took = begin.elapsed();
        // On a busy host, with mkfs and a mount.
        assert!(took < Duration::from_secs(15), "{gone}: {took:?}");
        rig.client.remove("a/1/extract").unwrap();
        // Once is enough.
        unpacks(&rig, &image);
        let said = rig.log().matches("manifest=").count();
        assert_eq!(said, 1, "{gone}: {}", rig.log());
        drop((silent, from));
    }
}

#[test]
fn block_layers_of_other_files_than_containerd_is_about_to_unpack_are_not_used() {
    let (registry, from, image, rig) = pushed("both");
    let other = from.json(&["push", "base", &registry.image("base:1")]);
    let base = Image::new(&registry, "base:1", other["digest"].as_str().unwrap());
    let wrong = Image {
        chain_ids: vec![format!("sha256:{}", "1".repeat(64))],
        ..base
    };
    unpacks(&rig, &wrong);
    assert!(rig.log().contains("are of other files"));
    // Nor a manifest that is none of an image.
    let wrong = Image {
        manifest: registry.document(&image.manifest)["annotations"]["dev.vellum.blocks.digest"]
            .as_str()
            .unwrap()
            .to_owned(),
        ..image
    };
    unpacks(&rig, &wrong);
}

#[test]
fn registries_that_the_configuration_does_not_name_are_not_asked() {
    let (_registry, _from, image, _) = pushed("both");
    for config in ["", "[remote]\nfrom = ['registry.example', '127.0.0.1:1']\n"] {
        let rig = Rig::new(&format!("{config}[log]\nlevel = 'debug'\n"));
        unpacks(&rig, &image);
        assert!(!rig.log().contains("block layers"), "{}", rig.log());
    }
}

#[test]
fn killed_anywhere_while_it_makes_a_lazy_layer_the_next_pull_has_it_and_nothing_is_left() {
    let (_registry, _from, image, mut rig) = pushed("both");
    let pulls = ["pull: layer staged", "pull: layer published"];
    for place in pulls.into_iter().chain(crash_point::REMOTE) {
        let died = rig.dies_at(place, |client| {
            image.prepare(client, 0, "a/1/extract", "").unwrap_err()
        });
        assert!(died, "{place}: {}", rig.log());
        rig.assert_whole(place);
        rig.assert_checks();
        let who = place.replace(' ', "-");
        let top = pull(&rig, &image, &who);
        assert_eq!(rig.content(&top, "etc/web").unwrap(), "web\n");
        for info in rig.client.list(&[]).unwrap().iter().rev() {
            // From the top down, whoever they are.
            let _ = rig.client.remove(&info.name);
        }
        for info in rig.client.list(&[]).unwrap() {
            rig.client.remove(&info.name).unwrap();
        }
        rig.assert_whole(place);
    }
}
