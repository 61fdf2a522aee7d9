//! `vellum stats`, `map` and `prewarm` of containers that are mounted, served over NBD, or neither.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{TestStore, kill, run, wait_until};
use serde_json::Value;
use vellum_store::Store;

const BLOCK: usize = 4096;
/// Blocks of the image's large file.
const LARGE: usize = 4096;

/// A buffer for direct I/O.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

fn original(block: usize) -> [u8; BLOCK] {
    let mut bytes = [0x5a; BLOCK];
    bytes[..8].copy_from_slice(&(block as u64).to_le_bytes());
    bytes
}

/// A store with an image `base` that holds `/db/large`, 16 MiB of [`original`] blocks, and more.
fn store() -> TestStore {
    let store = TestStore::new();
    let root = store.path("root");
    fs::create_dir_all(root.join("db/below")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    let large: Vec<u8> = (0..LARGE).flat_map(original).collect();
    fs::write(root.join("db/large"), large).unwrap();
    fs::write(root.join("db/below/small"), vec![1; 50_000]).unwrap();
    fs::write(root.join("etc/hostname"), "base\n").unwrap();
    std::os::unix::fs::symlink("/db/large", root.join("etc/link")).unwrap();
    std::os::unix::fs::symlink("../../../../etc/passwd", root.join("etc/out")).unwrap();
    store.ok(&["import", "base", &store.arg("root"), "--size", "256M"]);
    store
}

fn direct(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(path)
        .unwrap()
}

fn write_block(file: &File, block: usize, bytes: [u8; BLOCK]) {
    let buf = Aligned(bytes);
    file.write_all_at(&buf.0, (block * BLOCK) as u64).unwrap();
}

fn read_block(file: &File, block: usize) -> [u8; BLOCK] {
    let mut buf = Aligned([0; BLOCK]);
    file.read_exact_at(&mut buf.0, (block * BLOCK) as u64)
        .unwrap();
    buf.0
}

fn stats(store: &TestStore, name: &str) -> Value {
    let all = store.json(&["stats", name]);
    assert_eq!(all.as_array().unwrap().len(), 1);
    all[0].clone()
}

fn number(value: &Value, path: &str) -> u64 {
    let found = value.pointer(path);
    let found = found.unwrap_or_else(|| panic!("no {path} in {value}"));
    found.as_u64().unwrap_or_else(|| panic!("{path}: {found}"))
}

#[test]
fn first_touches_and_steady_writes_of_a_mounted_container_are_told_apart() {
    let store = store();
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let before = stats(&store, "c");
    assert_eq!(before["schema"], 1);
    assert_eq!(before["server"], "device");
    assert_eq!(before["mounted"], dir.display().to_string());
    let large = direct(&dir.join("db/large"));
    for block in 0..500 {
        write_block(&large, block * 3, [1; BLOCK]);
    }
    let touched = stats(&store, "c");
    for block in 0..500 {
        write_block(&large, block * 3, [2; BLOCK]);
    }
    large.sync_all().unwrap();
    for block in 0..300 {
        assert_eq!(read_block(&large, block * 3 + 1), original(block * 3 + 1));
    }
    let after = stats(&store, "c");
    let grew = |from: &Value, to: &Value, path: &str| number(to, path) - number(from, path);
    let first = "/counters/writes/first_touch/count";
    let steady = "/counters/writes/steady/count";
    // Beside those of the file there are only the file system's own.
    let few = 40;
    let found = grew(&before, &touched, first);
    assert!((500..500 + few).contains(&found), "{found}");
    let found = grew(&touched, &after, first);
    assert!(found < few, "{found} first touches at the second time");
    let found = grew(&touched, &after, steady);
    assert!((500..500 + 2 * few).contains(&found), "{found}");
    assert!(grew(&touched, &after, "/counters/flushes/latency/count") >= 1);
    assert!(number(&after, "/counters/amplification/stored_bytes") >= 1000 * 4096);
    let factor = after.pointer("/counters/amplification/factor").unwrap();
    let factor = factor.as_f64().unwrap();
    assert!((0.99..3.0).contains(&factor), "{factor}");
    let latency = &after["counters"]["writes"]["first_touch"];
    let at = |name: &str| latency[name].as_f64().unwrap();
    assert!(0.0 < at("p50_us") && at("p50_us") <= at("p99_us"));
    assert!(at("p99_us") <= at("p999_us") && at("p999_us") <= at("max_us"));
    let counted = latency["histogram"]["buckets"].as_array().unwrap();
    let counted: u64 = counted.iter().map(|pair| pair[1].as_u64().unwrap()).sum();
    assert_eq!(counted, latency["timed"].as_u64().unwrap());
    // One in 16, and the few of the file system's own.
    assert!((5..100).contains(&counted), "{counted} writes were timed");

    let layers = after["layers"].as_array().unwrap();
    let top = layers.last().unwrap();
    assert_eq!(top["top"], true);
    assert!(number(top, "/blocks") >= 500);
    let image = &layers[layers.len() - 2];
    assert!(number(image, "/read_blocks") >= 300, "{image}");
    let over_time = after["counters"]["blocks"]["over_time"].as_array().unwrap();
    assert!(!over_time.is_empty());
    assert_eq!(
        number(over_time.last().unwrap(), "/total"),
        number(&after, "/counters/blocks/allocated")
    );
    let text = store.ok(&["stats", "c"]);
    for part in ["first touch", "steady", "flush", "writable layer"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(store.ok(&["ps", "-s"]).contains("mounted at"));
    drop(large);
    store.ok(&["umount", "c"]);
}

#[test]
fn counters_go_on_when_the_server_is_killed_and_over_a_commit() {
    let store = store();
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let large = direct(&dir.join("db/large"));
    for block in 0..64 {
        write_block(&large, block, [1; BLOCK]);
    }
    large.sync_all().unwrap();
    let before = stats(&store, "c");
    let worker = |store: &TestStore| {
        let rows = store.json(&["ps"]);
        // None while the next one is on its way.
        rows[0]["device"]["state"]["worker"]["pid"].as_i64()
    };
    let old = worker(&store).unwrap();
    kill(old as i32);
    wait_until("another worker serves", || {
        worker(&store).is_some_and(|new| new != old)
    });
    let after = stats(&store, "c");
    for path in [
        "/counters/writes/requests",
        "/counters/flushes/count",
        "/counters/copy_up/first_touch_blocks",
    ] {
        let (before, after) = (number(&before, path), number(&after, path));
        assert!(
            before <= after && after < before + 40,
            "{path}: {before} {after}"
        );
    }
    assert_eq!(before["counters"]["since"], after["counters"]["since"]);

    // What was read from the top counts for the layer that it becomes.
    for block in 0..64 {
        assert_eq!(read_block(&large, block), [1; BLOCK]);
    }
    let reads = stats(&store, "c");
    let layers = reads["layers"].as_array().unwrap().len();
    let of_top = number(&reads["layers"][layers - 1], "/read_blocks");
    assert!(of_top >= 64);
    store.ok(&["commit", "c", "two"]);
    let committed = stats(&store, "c");
    assert_eq!(committed["layers"].as_array().unwrap().len(), layers + 1);
    assert!(number(&committed["layers"][layers - 1], "/read_blocks") >= of_top);
    assert!(number(&committed["layers"][layers], "/read_blocks") < of_top);
    assert!(
        number(&committed, "/counters/writes/requests")
            >= number(&reads, "/counters/writes/requests")
    );
    drop(large);
    store.ok(&["umount", "c"]);
}

#[test]
fn a_container_served_over_nbd_has_exact_counters_and_no_socket_is_left() {
    let store = store();
    store.ok(&["create", "base", "--name", "c"]);
    let unserved = stats(&store, "c");
    assert_eq!(unserved["server"], Value::Null);
    assert_eq!(unserved["counters"], Value::Null);
    let layers = unserved["layers"].as_array().unwrap();
    assert_eq!(layers.last().unwrap()["blocks"], 0);
    assert!(number(&layers[layers.len() - 2], "/blocks") >= LARGE as u64);

    let (server, socket) = store.serve("c");
    let uri = format!("nbd+unix:///c?socket={}", socket.display());
    // Where the image has a block: found on the map.
    let map = store.json(&["map", "c"]);
    let image = map["layers"].as_array().unwrap().len() as i64 - 2;
    let mut at = 0;
    let place = map["runs"].as_array().unwrap().iter().find_map(|pair| {
        let start = at;
        at += pair[0].as_u64().unwrap();
        (pair[1] == image && pair[0].as_u64().unwrap() > 16).then_some(start)
    });
    let offset = place.unwrap() * 4096;
    let write = |at: u64, len: u64| format!("write -P 7 {at} {len}");
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-t",
            "writeback",
            "-c",
            &write(offset, 8192),
            "-c",
            &write(offset, 4096),
            "-c",
            &write(offset + 8192 + 512, 512),
            "-c",
            "flush",
            "-c",
            &format!("read {offset} 16384"),
            &uri,
        ],
    );
    let stats_now = stats(&store, "c");
    assert_eq!(stats_now["server"], "nbd");
    let counters = &stats_now["counters"];
    assert_eq!(counters["writes"]["requests"], 3);
    assert_eq!(counters["writes"]["bytes"], 8192 + 4096 + 512);
    assert_eq!(counters["writes"]["first_touch"]["count"], 2);
    assert_eq!(counters["writes"]["steady"]["count"], 1);
    assert_eq!(counters["copy_up"]["first_touch_blocks"], 3);
    assert_eq!(counters["copy_up"]["partial"], 1);
    assert_eq!(counters["copy_up"]["copied_bytes"], 3584);
    assert_eq!(
        counters["amplification"]["stored_bytes"],
        8192 + 4096 + 4096
    );
    assert_eq!(counters["blocks"]["held"], 3);
    let layers = stats_now["layers"].as_array().unwrap();
    assert_eq!(layers.last().unwrap()["read_blocks"], 3);
    assert_eq!(layers[image as usize]["read_blocks"], 1);
    let map = store.json(&["map", "c"]);
    assert_eq!(map["layers"][image as usize + 1]["shown_blocks"], 3);
    let refused = store.fails(&["prewarm", "c", "/db"]);
    assert!(refused.contains("served over NBD by process"), "{refused}");
    server.end();
    assert_eq!(stats(&store, "c")["server"], Value::Null);
    let left: Vec<_> = fs::read_dir(store.root.join("run"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".lock"))
        .collect();
    assert_eq!(left, Vec::<String>::new());

    // One that was killed leaves a socket on which nobody answers, and the next replaces it.
    let (mut killed, _) = store.serve("c");
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    assert_eq!(stats(&store, "c")["server"], Value::Null);
    let (server, _) = store.serve("c");
    assert_eq!(stats(&store, "c")["server"], "nbd");
    server.end();
    store.ok(&["rm", "c"]);
    store.assert_nothing_runs();
}

#[test]
fn all_served_containers_come_in_one_call_and_the_others_do_not() {
    let store = store();
    for name in ["mounted", "over-nbd", "idle"] {
        store.ok(&["create", "base", "--name", name]);
    }
    store.mount("mounted");
    let (server, _) = store.serve("over-nbd");
    let opened = Store::open_or_create(&store.root).unwrap();
    let names: Vec<String> = vellum_engine::stats::served(&opened)
        .unwrap()
        .into_iter()
        .inspect(|stats| assert!(stats.counters.is_some()))
        .map(|stats| stats.name)
        .collect();
    assert_eq!(names, ["mounted", "over-nbd"]);
    let listed = store.json(&["stats"]);
    assert_eq!(listed.as_array().unwrap().len(), 2);
    // One line of JSON each time.
    let watched = store.ok(&[
        "--json", "stats", "mounted", "--watch", "-n", "3", "-i", "0.05",
    ]);
    let lines: Vec<Value> = watched
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().all(|line| line[0]["name"] == "mounted"));
    let text = store.ok(&["stats", "--watch", "-n", "2", "-i", "0.05"]);
    assert!(text.contains("a second: "), "{text}");
    server.end();
    store.ok(&["umount", "mounted"]);
    assert_eq!(store.json(&["stats"]), serde_json::json!([]));
}

#[test]
fn a_prewarmed_file_is_written_without_a_first_touch() {
    let store = store();
    store.ok(&["create", "base", "--name", "c"]);
    // Not mounted: it is, for the purpose. Links lead where they do in the container.
    let report = store.json(&["prewarm", "c", "/etc/link"]);
    assert_eq!(report["files"], 1);
    assert_eq!(report["bytes"], (LARGE * BLOCK) as u64);
    assert_eq!(number(&report, "/copied_blocks"), LARGE as u64);
    store.assert_nothing_runs();
    let dir = store.mount("c");
    let before = stats(&store, "c");
    let large = direct(&dir.join("db/large"));
    for block in 0..LARGE {
        if block % 2 == 0 {
            assert_eq!(read_block(&large, block), original(block));
        }
        write_block(&large, block, [3; BLOCK]);
    }
    let after = stats(&store, "c");
    let first = "/counters/writes/first_touch/count";
    let grew = number(&after, first) - number(&before, first);
    assert!(grew < 40, "{grew} first touches in {LARGE} blocks");
    let image = after["layers"].as_array().unwrap().len() - 2;
    let read = number(&after["layers"][image], "/read_blocks");
    assert!(read < 1000, "{read} blocks were read from the image");
    // A second time there is nothing to do; directories are walked.
    let again = store.json(&["prewarm", "c", "db"]);
    assert_eq!(again["files"], 2);
    assert_eq!(number(&again, "/present_blocks"), LARGE as u64);
    assert_eq!(number(&again, "/copied_blocks"), 13);
    for (path, says) in [("/no/such", "/no/such"), ("/etc/out", "/etc/out")] {
        let error = store.fails(&["prewarm", "c", path]);
        assert!(error.contains(says), "{error}");
    }
    drop(large);
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
}

#[test]
fn prewarming_under_a_writer_loses_nothing_and_a_killed_server_goes_on() {
    let store = store();
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let stop = Arc::new(AtomicBool::new(false));
    // Each has every other sector of the file, so that both and the copy meet in each block.
    let writers: Vec<_> = (0..2usize)
        .map(|writer| {
            let (path, stop) = (dir.join("db/large"), stop.clone());
            std::thread::spawn(move || {
                let file = direct(&path);
                let mut last = vec![0u64; LARGE * 8];
                let (mut seed, mut count) = (writer as u64 + 1, 0u64);
                while !stop.load(Ordering::Relaxed) {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                    let sector = (seed >> 33) as usize % (LARGE * 4) * 2 + writer;
                    count += 1;
                    let mut buf = Aligned([0; BLOCK]);
                    buf.0[..512].copy_from_slice(&count.to_le_bytes().repeat(64));
                    file.write_all_at(&buf.0[..512], (sector * 512) as u64)
                        .unwrap();
                    last[sector] = count;
                    if count.is_multiple_of(200) {
                        file.sync_data().unwrap();
                    }
                }
                last
            })
        })
        .collect();
    wait_until("the writers write", || {
        number(&stats(&store, "c"), "/counters/writes/requests") > 100
    });
    let report = store.json(&["prewarm", "c", "/db/large"]);
    let old = store.json(&["ps"])[0]["device"]["state"]["worker"]["pid"]
        .as_i64()
        .unwrap();
    kill(old as i32);
    let blocks: u64 = ["/copied_blocks", "/zeroed_blocks", "/present_blocks"]
        .iter()
        .map(|path| number(&report, path))
        .sum();
    assert_eq!(blocks, LARGE as u64);
    assert!(number(&report, "/copied_blocks") > 0, "{report}");
    wait_until("they write on", || {
        let now = store.output(&["--json", "stats", "c"]);
        now.status.success()
    });
    stop.store(true, Ordering::Relaxed);
    let written: Vec<Vec<u64>> = writers.into_iter().map(|w| w.join().unwrap()).collect();
    let verify = |path: &Path| {
        let file = direct(path);
        for block in 0..LARGE {
            let mut expected = original(block);
            for sector in 0..8 {
                let value = written[sector % 2][block * 8 + sector];
                if value != 0 {
                    expected[sector * 512..(sector + 1) * 512]
                        .copy_from_slice(&value.to_le_bytes().repeat(64));
                }
            }
            assert!(read_block(&file, block) == expected, "block {block}");
        }
    };
    verify(&dir.join("db/large"));
    store.ok(&["umount", "c"]);
    let dir = store.mount("c");
    verify(&dir.join("db/large"));
    store.ok(&["umount", "c"]);
    store.ok(&["check", "--scrub"]);
}

#[test]
fn maps_say_the_same_served_or_not_and_pictures_can_be_read() {
    let store = store();
    store.ok(&["create", "base", "--name", "c"]);
    let dir = store.mount("c");
    let large = direct(&dir.join("db/large"));
    for block in 0..100 {
        write_block(&large, block * 17, [1; BLOCK]);
    }
    large.sync_all().unwrap();
    drop(large);
    run("sync", &["-f", dir.to_str().unwrap()]);
    let served = store.json(&["map", "c"]);
    store.ok(&["umount", "c"]);
    let on_disk = store.json(&["map", "c"]);
    for map in [&served, &on_disk] {
        assert_eq!(map["schema"], 1);
        assert_eq!(map["virtual_size"], 256 << 20);
        let runs = map["runs"].as_array().unwrap();
        let all: u64 = runs.iter().map(|pair| pair[0].as_u64().unwrap()).sum();
        assert_eq!(all, (256 << 20) / 4096);
        let layers = map["layers"].as_array().unwrap();
        let shown: u64 = layers.iter().map(|l| number(l, "/shown_blocks")).sum();
        assert_eq!(
            shown + number(map, "/hole_blocks") + number(map, "/zero_blocks"),
            all
        );
        let top = number(layers.last().unwrap(), "/shown_blocks");
        assert!((100..160).contains(&top), "{top}");
    }
    let image = store.json(&["map", "base"]);
    let layers = image["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["top"] == false));

    let (png, svg) = (store.arg("map.png"), store.arg("map.svg"));
    store.ok(&["map", "c", "--png", &png, "--svg", &svg]);
    let mut picture = png::Decoder::new(std::io::BufReader::new(File::open(&png).unwrap()))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; picture.output_buffer_size().unwrap()];
    let info = picture.next_frame(&mut pixels).unwrap();
    assert!(info.width >= 1024 && info.height >= 1024, "{info:?}");
    let red = [0xe0, 0x3b, 0x24];
    let written = pixels.chunks(3).filter(|pixel| *pixel == red).count();
    assert!(written > 100 * 16, "{written} pixels of the writable layer");
    let text = fs::read_to_string(&svg).unwrap();
    assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"));
    for part in [
        "c: where its blocks come from",
        "writable layer",
        "data:image/png",
    ] {
        assert!(text.contains(part), "no {part}");
    }
    // Not a terminal: signs, and no escape.
    for order in ["hilbert", "rows"] {
        let text = store.ok(&["map", "c", "--order", order]);
        assert!(!text.contains('\x1b') && text.contains('#'), "{text}");
        assert!(text.contains("never written"), "{text}");
    }
    let error = store.fails(&["map", "nobody"]);
    assert!(error.contains("there is no container nobody"), "{error}");
}

#[test]
fn a_map_is_in_colours_on_a_terminal_unless_no_color_says_no() {
    let store = store();
    store.ok(&["create", "base", "--name", "c"]);
    // script(1) gives it a terminal.
    let on_terminal = |prefix: &str| {
        let command = format!(
            "{prefix} {} --root {} map c",
            env!("CARGO_BIN_EXE_vellum"),
            store.root.display()
        );
        run("script", &["-qec", &command, "/dev/null"])
    };
    let coloured = on_terminal("env -u NO_COLOR TERM=xterm");
    assert!(coloured.contains("\x1b[38;2;") && coloured.contains('▀'));
    for plain in ["env NO_COLOR=1 TERM=xterm", "env -u NO_COLOR TERM=dumb"] {
        let text = on_terminal(plain);
        assert!(
            !text.contains('\x1b') && text.contains("never written"),
            "{plain}"
        );
    }
}
