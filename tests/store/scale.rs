//! Many containers, deep images: what it costs to make and open them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::common::TestStore;
use vellum_base::block::{BLOCK_SIZE, Block, BlockDevice, Span};
use vellum_base::storage::{FaultStorage, FileStorage, OpKind, SimStorage, Storage};
use vellum_core::chain::{ChainSpec, open_chain};
use vellum_core::layer::{Header, LayerOptions, WritableLayer, seal_in_place};
use vellum_engine::commit::commit;
use vellum_engine::device::Target;
use vellum_engine::import::{ImportOptions, import};
use vellum_engine::known::Known;
use vellum_engine::watch::Quiet;
use vellum_store::{NewContainer, Store};

/// An image of 64 layers, each of which a commit made.
fn deep_image(store: &TestStore) {
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    // Two layers are there: the file system and the files.
    for depth in 3..=64 {
        let name = format!("deep-{depth}");
        store.ok(&["commit", "c", &name]);
    }
}

/// Bytes that this process gave to write(2) and the like.
fn written() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("wchar:"))
        .unwrap();
    line["wchar: ".len()..].parse().unwrap()
}

#[test]
fn a_container_on_a_deep_image_is_made_without_copying() {
    let store = TestStore::new();
    deep_image(&store);
    let image = &store.json(&["inspect", "deep-64"])[0]["image"];
    assert_eq!(image["layers"].as_array().unwrap().len(), 64);

    let opened = Store::open_or_create(&store.root).unwrap();
    let mut times = Vec::new();
    let mut most = 0;
    for number in 0..64 {
        let name = format!("n{number}");
        let new = NewContainer {
            image: "deep-64",
            name: Some(&name),
            ..NewContainer::default()
        };
        let (before, begin) = (written(), Instant::now());
        opened.create_container(&new).unwrap();
        times.push(begin.elapsed());
        most = most.max(written() - before);
    }
    times.sort();
    println!(
        "create on 64 layers: median {:?}, slowest {:?}, at most {most} bytes written",
        times[32], times[63]
    );
    assert!(most <= 64 << 10, "{most} bytes written");
    assert_eq!(store.names("ps").len(), 65);

    // All of them work.
    for name in ["n0", "n63"] {
        let dir = store.mount(name);
        assert_eq!(std::fs::read(dir.join("file")).unwrap().len(), 100_000);
        store.ok(&["umount", name]);
    }
    let rows = store.json(&["ps", "-s"]);
    let untouched = rows
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["size"] == 0)
        .count();
    assert_eq!(untouched, 63, "c and those not mounted");
    store.ok(&["check"]);
}

#[test]
fn a_chain_of_a_thousand_layers_opens_and_reads_each() {
    let dir = tempfile::tempdir().unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let mut headers = Vec::new();
    for _ in 0..1000 {
        let parent = headers.last().map(|header: &Header| header.uuid);
        headers.push(Header::new(parent, 64 << 20).unwrap());
    }
    let path = |number: usize| dir.path().join(number.to_string());
    let make = |number: usize| {
        let path = path(number);
        WritableLayer::create(&*storage, &path, &headers[number]).unwrap();
        let layer = WritableLayer::open(storage.clone(), &path, LayerOptions::default()).unwrap();
        {
            let at = Block::new(number as u64);
            let held = layer.lock_blocks(Span::of(at)).unwrap();
            let block = [number as u8; 4096];
            layer.write_blocks(&held, at, &block).unwrap();
        }
        layer.seal().unwrap();
        drop(layer);
        seal_in_place(&*storage, &path, |_| {}).unwrap();
    };
    // Each waits for the disk several times: side by side they wait together.
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                while let Some(number) = Some(next.fetch_add(1, Ordering::Relaxed))
                    && number < 1000
                {
                    make(number);
                }
            });
        }
    });
    let sealed = (0..1000).map(path).collect();
    // As the command does for itself.
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let spec = ChainSpec {
        sealed,
        ..ChainSpec::default()
    };
    let begin = Instant::now();
    let chain = open_chain(&storage, &spec).unwrap();
    println!("1,000 layers opened in {:?}", begin.elapsed());
    let mut block = vec![0; 4096];
    for number in 0..1000 {
        chain.read_at(&mut block, number * 4096).unwrap();
        assert!(block.iter().all(|byte| *byte == number as u8), "{number}");
    }
}

/// An image `base` of a few blocks, and a container `c` of it.
fn small(store: &Store) {
    let raw = tempfile::NamedTempFile::new().unwrap();
    raw.as_file().set_len(8 * BLOCK_SIZE).unwrap();
    import(store, "base", raw.path(), &ImportOptions::default(), &Quiet).unwrap();
    let new = NewContainer {
        image: "base",
        name: Some("c"),
        ..NewContainer::default()
    };
    store.create_container(&new).unwrap();
}

/// Opens and reads that `images` costs with so many images, each one deeper than the one before, and
/// what `rmi` of all of them costs: (listing, removing).
fn cost_of_deep_images(images: usize) -> (u64, u64) {
    let disk = SimStorage::new();
    let root = std::path::Path::new("/vellum-simulated-store");
    disk.create_dir(root).unwrap();
    let faults = FaultStorage::new(Arc::new(disk));
    let store = Store::with_storage(root, Arc::new(faults.clone())).unwrap();
    small(&store);
    let names: Vec<String> = (0..images).map(|number| format!("deep-{number}")).collect();
    for name in &names {
        commit(&store, "c", name, None).unwrap();
    }
    store.remove_container("c").unwrap();
    let counted = |work: &dyn Fn()| {
        let before = faults.counts();
        work();
        let counts = faults.counts().since(&before);
        [OpKind::Open, OpKind::Read, OpKind::Look]
            .map(|kind| counts.of(kind))
            .iter()
            .sum()
    };
    let listing = counted(&|| {
        let known = Known::new(&store, &[]);
        for image in store.images().unwrap() {
            known.bytes_of(&image.layers);
        }
    });
    let removing = counted(&|| {
        let (each, collected) = store.remove_images(&names).unwrap();
        each.into_iter().for_each(|outcome| outcome.unwrap());
        collected.unwrap();
    });
    assert_eq!(store.images().unwrap().len(), 1);
    assert_eq!(store.layers().unwrap().len(), 1);
    (listing, removing)
}

/// Each image asked for each of its layers, and each removal read the records of all.
#[test]
fn listing_and_removing_images_costs_in_proportion_to_them_however_deep() {
    let (few, many) = (cost_of_deep_images(15), cost_of_deep_images(60));
    println!("15 and 60 images: {few:?}, {many:?} opens and reads");
    assert!(many.0 <= 5 * few.0, "listing: {few:?}, {many:?}");
    assert!(many.1 <= 5 * few.1, "removing: {few:?}, {many:?}");
}

/// What this process has open below `dir`.
fn open_below(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap();
    entries
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.starts_with(dir))
        .collect()
}

/// The lease of each layer that was the top once stayed open.
#[test]
fn commits_on_a_server_leave_open_the_layers_data_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path()).unwrap();
    small(&store);
    let open = Target::of(&store.container("c").unwrap())
        .open(&store)
        .unwrap();
    let open_now = || open_below(store.root());
    let before = open_now().len();
    let pin = store.pin_layers().unwrap();
    let locks = open_now().len() - before;
    for _ in 0..200 {
        let (record, prepared) = store.prepare_commit("c", None, &pin).unwrap();
        let next = record.next.unwrap();
        open.prepare_seal(next).unwrap();
        open.seal_top(next).unwrap();
        store.settle("c").unwrap();
        seal_in_place(&**store.storage(), &store.layer_dir(prepared.top), |_| {}).unwrap();
    }
    let after = open_now();
    let leases = after.iter().filter(|path| path.ends_with("lease")).count();
    assert_eq!(leases, 1, "{after:?}");
    // A layer's data is read from, so it is open.
    assert!(
        after.len() <= before + locks + 200,
        "{before} before, {} after 200 commits: {after:?}",
        after.len()
    );
    drop(open);
    assert_eq!(open_now().len(), locks);
}
