//! Hot packs: what a start touches, pushed once more and fetched ahead. docs/lazy.md, "The hot pack".

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{TestStore, run, wait_until};
use crate::faulty::read_head;
use crate::lazy::{end_fetchers, fetchers, files};
use crate::registry_support::{Registry, clean, digests, store, with_images};

/// What a start of `web` does.
const START: [&str; 3] = ["sh", "-c", "read x </etc/web; echo $x"];
const TRACE: &str = "sh -c 'read x </etc/web; echo $x'";

/// Stands before a registry, and knows what it was asked for.
struct Front {
    host: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// What parts of which blobs, or all of them: the digest, and the range.
    asked: Mutex<Vec<(String, Option<String>)>>,
    /// A blob that comes slowly: so many bytes at a time, and how long it waits before each.
    slow: Mutex<Option<(String, usize, Duration)>>,
    /// A blob whose next answer breaks off, so many bytes before its end.
    cut: Mutex<Option<(String, usize)>>,
}

impl Front {
    fn of(registry: &Registry) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let (to, shared) = (registry.host(), Arc::new(Shared::default()));
        let own = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (to, own) = (to.clone(), own.clone());
                // A client that goes away has what it wanted.
                std::thread::spawn(move || drop(own.serve(client.unwrap(), &to)));
            }
        });
        Front { host, shared }
    }

    fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.host)
    }

    fn slow(&self, digest: &str, bytes: usize, pause: Duration) {
        *self.shared.slow.lock().unwrap() = Some((digest.to_owned(), bytes, pause));
    }

    fn forget(&self) {
        self.shared.asked.lock().unwrap().clear();
    }

    /// The ranges in which a blob was asked for.
    fn asked_for(&self, digest: &str) -> Vec<Option<String>> {
        let asked = self.shared.asked.lock().unwrap();
        let ours = asked.iter().filter(|(of, _)| of == digest);
        ours.map(|(_, range)| range.clone()).collect()
    }

    fn asked_for_any(&self, digests: &[String]) -> usize {
        digests
            .iter()
            .map(|digest| self.asked_for(digest).len())
            .sum()
    }
}

impl Shared {
    fn serve(&self, mut client: TcpStream, to: &str) -> std::io::Result<()> {
        let head = read_head(&mut client)?;
        let mut lines: Vec<&str> = head.trim_end().lines().collect();
        let range = lines.iter().find_map(|line| {
            line.to_ascii_lowercase()
                .strip_prefix("range: ")
                .map(str::to_owned)
        });
        let path = lines[0].split(' ').nth(1).unwrap().to_owned();
        let digest = path.split_once("/blobs/").map(|(_, digest)| digest);
        let is_get = lines[0].starts_with("GET ");
        if let Some(digest) = digest.filter(|_| is_get) {
            let asked = (digest.to_owned(), range);
            self.asked.lock().unwrap().push(asked);
        }
        lines.retain(|line| !line.to_ascii_lowercase().starts_with("connection:"));
        lines.push("Connection: close\r\n\r\n");
        let mut server = TcpStream::connect(to)?;
        server.write_all(lines.join("\r\n").as_bytes())?;
        let mut answer = Vec::new();
        server.read_to_end(&mut answer)?;
        let mut cut = self.cut.lock().unwrap();
        if let Some((_, left_out)) = cut.take_if(|(of, _)| digest == Some(of)) {
            answer.truncate(answer.len() - left_out);
        }
        drop(cut);
        let slow = self.slow.lock().unwrap().clone();
        let slow = slow.filter(|(of, ..)| digest == Some(of));
        let Some((_, bytes, pause)) = slow else {
            return client.write_all(&answer);
        };
        for piece in answer.chunks(bytes) {
            std::thread::sleep(pause);
            client.write_all(piece)?;
        }
        Ok(())
    }
}

/// A registry that has `web:1` with a hot pack, the store that pushed it, the digest of the artifact, and that of the pack.
fn pushed() -> (Registry, TestStore, String, String) {
    let (registry, from) = (Registry::new(), with_images());
    let image = registry.image("web:1");
    let report = from.json(&[
        "push", "web", &image, "--format", "blocks", "--trace", TRACE,
    ]);
    let artifact = report["digest"].as_str().unwrap().to_owned();
    let pack = pack_of(&registry, &artifact).expect("a hot pack");
    (registry, from, artifact, pack)
}

/// The digest of an artifact's hot pack.
pub fn pack_of(registry: &Registry, artifact: &str) -> Option<String> {
    let manifest = registry.document(artifact);
    let layers = manifest["layers"].as_array().unwrap();
    let pack = layers
        .iter()
        .find(|layer| layer["mediaType"] == "application/vnd.vellum.hot.v1+zstd");
    pack.map(|pack| pack["digest"].as_str().unwrap().to_owned())
}

/// Packs that have not come.
pub fn noted(store: &TestStore) -> usize {
    let dirs = store.layers().into_iter();
    dirs.filter(|layer| store.root.join("layers").join(layer).join("hot").exists())
        .count()
}

fn start(store: &TestStore) -> String {
    store.ok(&[&["run", "--rm", "web", "--"], &START[..]].concat())
}

#[test]
fn an_image_with_a_hot_pack_starts_with_one_sequential_request() {
    let (registry, from, artifact, pack) = pushed();
    let (front, to) = (Front::of(&registry), store());
    let data = registry.data_blobs(&artifact);
    to.ok(&["pull", "--lazy", &front.image("web:1"), "web"]);
    wait_until("the pack has come", || noted(&to) == 0);
    assert_eq!(front.asked_for(&pack), [None]);
    // The first byte of each, by which the pull knows that they are there, and no more.
    let parts: Vec<_> = data
        .iter()
        .flat_map(|digest| front.asked_for(digest))
        .collect();
    assert!(
        parts
            .iter()
            .all(|range| range.as_deref() == Some("bytes=0-0")),
        "{parts:?}"
    );
    front.forget();
    assert_eq!(start(&to), "web\n");
    let asked = front.asked_for_any(&data);
    assert!(asked <= 1, "{asked} requests beside the pack");
    assert_eq!(files(&to, "web"), files(&from, "web"));
    to.ok(&["complete", "web"]);
    // It is a pack of the start, and not of everything.
    assert!(front.asked_for_any(&data) > asked);
    end_fetchers(&to);
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    clean(&to);
}

#[test]
fn who_starts_while_the_pack_still_comes_waits_for_it_rather_than_asking_once_more() {
    let (registry, _from, artifact, pack) = pushed();
    let (front, to) = (Front::of(&registry), store());
    let len = fs::metadata(registry.blob_file(&pack)).unwrap().len() as usize;
    // It takes two seconds.
    front.slow(&pack, len / 40, Duration::from_millis(50));
    to.ok(&["pull", "--lazy", &front.image("web:1"), "web"]);
    front.forget();
    assert_eq!(start(&to), "web\n");
    let asked = front.asked_for_any(&registry.data_blobs(&artifact));
    wait_until("the pack has come", || noted(&to) == 0);
    // The kernel may read further ahead than it did.
    assert!(asked <= 3, "{asked} requests beside the pack");
    assert!(front.asked_for(&pack).len() <= 1);
    end_fetchers(&to);
}

#[test]
fn a_pack_that_hardly_comes_holds_up_nobody() {
    let (registry, _from, artifact, pack) = pushed();
    let (front, to) = (Front::of(&registry), store());
    front.slow(&pack, 64, Duration::from_secs(3));
    to.ok(&["pull", "--lazy", &front.image("web:1"), "web"]);
    let began = std::time::Instant::now();
    assert_eq!(start(&to), "web\n");
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    assert!(front.asked_for_any(&registry.data_blobs(&artifact)) > 3);
    assert_eq!(noted(&to), 1);
    end_fetchers(&to);
    clean(&to);
    to.ok(&["rmi", "web"]);
    to.ok(&["prune"]);
    assert_eq!(noted(&to), 0);
    clean(&to);
}

/// Pulls and starts `web` whose pack was changed in the registry.
fn starts_with_a_pack(change: impl FnOnce(&mut Vec<u8>)) {
    let (registry, from, _, pack) = pushed();
    let to = store();
    let path = registry.blob_file(&pack);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    to.ok(&["pull", "--lazy", &registry.image("web:1"), "web"]);
    assert_eq!(start(&to), "web\n");
    wait_until("the pack is dropped", || noted(&to) == 0);
    assert_eq!(files(&to, "web"), files(&from, "web"));
    to.ok(&["complete", "web"]);
    end_fetchers(&to);
    assert_eq!(digests(&to, "web"), digests(&from, "web"));
    clean(&to);
}

#[test]
fn a_pack_with_a_wrong_frame_is_dropped_and_the_image_starts_without_it() {
    starts_with_a_pack(|bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    });
}

#[test]
fn a_pack_with_a_wrong_list_is_dropped_and_the_image_starts_without_it() {
    starts_with_a_pack(|bytes| bytes[130] ^= 1);
}

#[test]
fn a_pack_whose_frames_are_of_other_windows_is_dropped_and_the_image_starts_without_it() {
    starts_with_a_pack(|bytes| {
        // Both CRCs fit.
        let first = bytes[132];
        bytes[132] = first ^ 1;
        let count = u32::from_le_bytes(bytes[36..40].try_into().unwrap()) as usize;
        let list = crc32fast::hash(&bytes[128..128 + 16 * count]);
        bytes[120..124].copy_from_slice(&list.to_le_bytes());
        let header = crc32fast::hash(&bytes[..124]);
        bytes[124..128].copy_from_slice(&header.to_le_bytes());
    });
}

#[test]
fn a_pack_that_is_cut_off_in_its_list_is_dropped_and_the_image_starts_without_it() {
    starts_with_a_pack(|bytes| bytes.truncate(100));
}

#[test]
fn without_its_pack_an_image_starts_all_the_same() {
    let (registry, _from, _, pack) = pushed();
    let to = store();
    fs::remove_file(registry.blob_file(&pack)).unwrap();
    to.ok(&["pull", "--lazy", &registry.image("web:1"), "web"]);
    assert_eq!(start(&to), "web\n");
    wait_until("the pack is dropped", || noted(&to) == 0);
    end_fetchers(&to);
}

#[test]
fn a_fetcher_that_is_killed_while_the_pack_comes_leaves_it_to_the_next_one() {
    let (registry, from, artifact, pack) = pushed();
    let (front, to) = (Front::of(&registry), store());
    let len = fs::metadata(registry.blob_file(&pack)).unwrap().len() as usize;
    front.slow(&pack, len / 40, Duration::from_millis(100));
    to.ok(&["pull", "--lazy", &front.image("web:1"), "web"]);
    wait_until("it is asked for", || !front.asked_for(&pack).is_empty());
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(fetchers(&to).len(), 1);
    end_fetchers(&to);
    assert_eq!(noted(&to), 1);
    front.slow(&pack, len, Duration::ZERO);
    assert_eq!(start(&to), "web\n");
    wait_until("the pack has come", || noted(&to) == 0);
    assert!(front.asked_for(&pack).len() >= 2);
    front.forget();
    assert_eq!(start(&to), "web\n");
    assert_eq!(front.asked_for_any(&registry.data_blobs(&artifact)), 0);
    assert_eq!(files(&to, "web"), files(&from, "web"));
    end_fetchers(&to);
}

#[test]
fn a_pack_that_breaks_off_goes_on_where_it_did() {
    let (registry, _from, artifact, pack) = pushed();
    let (front, to) = (Front::of(&registry), store());
    let len = fs::metadata(registry.blob_file(&pack)).unwrap().len();
    *front.shared.cut.lock().unwrap() = Some((pack.clone(), 1000));
    to.ok(&["pull", "--lazy", &front.image("web:1"), "web"]);
    wait_until("the pack has come", || noted(&to) == 0);
    let rest = format!("bytes={}-", len - 1000);
    assert_eq!(front.asked_for(&pack), [None, Some(rest)]);
    front.forget();
    assert_eq!(start(&to), "web\n");
    assert!(front.asked_for_any(&registry.data_blobs(&artifact)) <= 1);
    end_fetchers(&to);
}

#[test]
fn a_pack_stays_with_its_tag_where_others_copy_it_and_whole_pulls_pass_over_it() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    from.ok(&["push", "web", &registry.image("web:1"), "--trace", TRACE]);
    run(
        "skopeo",
        &[
            "copy",
            "--quiet",
            "--all",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            &registry.skopeo("web:1"),
            &registry.skopeo("copy:1"),
        ],
    );
    let front = Front::of(&registry);
    let report = to.json(&["pull", "--lazy", &front.image("copy:1"), "web"]);
    let pack = pack_of(&registry, report["digest"].as_str().unwrap()).unwrap();
    wait_until("the pack has come", || noted(&to) == 0);
    assert_eq!(front.asked_for(&pack), [None]);
    assert_eq!(start(&to), "web\n");
    end_fetchers(&to);
    let whole = store();
    front.forget();
    whole.ok(&["pull", &front.image("web:1"), "web"]);
    assert!(front.asked_for(&pack).is_empty());
    assert_eq!((noted(&whole), start(&whole)), (0, "web\n".to_owned()));
    clean(&whole);
}

#[test]
fn the_same_trace_makes_the_same_pack_and_one_of_another_image_is_refused() {
    let (registry, from) = (Registry::new(), with_images());
    let trace = from.arg("web.trace");
    let record = ["trace", "web", "-o", &trace, "--"];
    let said = from.ok(&[&record[..], &START[..]].concat());
    assert!(said.starts_with("traced web: "), "{said}");
    let push = |name: &str, image: &str| {
        let image = registry.image(image);
        let arguments = [
            "push",
            name,
            &image,
            "--format",
            "blocks",
            "--trace-file",
            &trace,
        ];
        from.json(&arguments)["digest"].as_str().unwrap().to_owned()
    };
    let first = push("web", "web:1");
    assert_eq!(push("web", "again:1"), first);
    assert!(pack_of(&registry, &first).is_some());
    // What it shares with another image is of use there.
    let base = push("base", "base:1");
    assert!(pack_of(&registry, &base).is_some_and(|pack| Some(pack) != pack_of(&registry, &first)));
    let (other, root) = (store(), from.path("root"));
    fs::write(root.join("etc/other"), "other\n").unwrap();
    other.ok(&[
        "import",
        "other",
        &root.display().to_string(),
        "--size",
        "96M",
    ]);
    let image = registry.image("other:1");
    let said = other.fails(&["push", "other", &image, "--trace-file", &trace]);
    assert!(said.contains("nothing of the image's layers"), "{said}");
    let said = from.fails(&[
        "push",
        "web",
        &image,
        "--format",
        "oci",
        "--trace-file",
        &trace,
    ]);
    assert!(said.contains("--format oci leaves out"), "{said}");
    clean(&from);
}

#[test]
fn a_command_that_fails_is_no_trace_and_one_that_goes_on_is_ended_in_time() {
    let store = with_images();
    let trace = |command: &str| store.output(&["trace", "web", "--", "sh", "-c", command]);
    let said = |output: std::process::Output| String::from_utf8(output.stderr).unwrap();
    let failed = said(trace("exit 3"));
    assert!(failed.contains("status 3"), "{failed}");
    let absent = store.fails(&["trace", "web", "--", "nothing"]);
    assert!(absent.contains("nothing"), "{absent}");
    // What it says is not what vellum says.
    let output = trace("echo said");
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(
        stdout.starts_with("traced web") && !stdout.contains("said"),
        "{stdout}"
    );
    assert!(said(output).contains("said"));
    let server = "trap 'exit 3' TERM; while :; do :; done";
    let said = store.ok(&["trace", "web", "--for", "2", "--", "sh", "-c", server]);
    assert!(said.starts_with("traced web"), "{said}");
    assert!(store.names("ps").is_empty());
    clean(&store);
}

/// A container's own layer is sealed for it, as a push of it seals it.
#[test]
fn a_container_is_traced_with_what_it_changed() {
    let (registry, from, to) = (Registry::new(), with_images(), store());
    from.ok(&["create", "web", "--name", "c"]);
    let dir = from.mount("c");
    fs::write(dir.join("etc/web"), "changed\n").unwrap();
    from.ok(&["umount", "c"]);
    let report = from.json(&["push", "c", &registry.image("web:2"), "--trace", TRACE]);
    assert_eq!(report["format"], "both");
    to.ok(&["pull", "--lazy", &registry.image("web:2"), "web"]);
    wait_until("the pack has come", || noted(&to) == 0);
    assert_eq!(start(&to), "changed\n");
    end_fetchers(&to);
}
