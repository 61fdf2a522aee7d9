//! What the store remembers: JSON files.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use uuid::Uuid;
use vellum_base::ErrorKind;
use vellum_base::storage::{OpenMode, SimStorage, Storage};
use vellum_core::chain::open_chain;
use vellum_core::layer::{Header, LayerOptions, WritableLayer};
use vellum_store::Store;

use crate::Seed;
use crate::input::{put_file, take_file};

const ROOT: &str = "/store";
const SEALED: Uuid = Uuid::from_u128(0x5eed_0000_0000_4000_8000_0000_0000_0011);
const TOP: Uuid = Uuid::from_u128(0x5eed_0000_0000_4000_8000_0000_0000_0012);
const ORPHAN: Uuid = Uuid::from_u128(0x5eed_0000_0000_4000_8000_0000_0000_0013);

const FILES: [&str; 11] = [
    "images/web.json",
    "containers/c.json",
    "templates/t.json",
    "snapshots/5eed0000-0000-4000-8000-000000000021.json",
    "layers/5eed0000-0000-4000-8000-000000000011/info.json",
    "vellum.json",
    "quarantine/images/old.json",
    "quarantine/images/old.reason",
    "images/other.json",
    "containers/d.json",
    "layers/5eed0000-0000-4000-8000-000000000012/info.json",
];

fn root(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

fn put(disk: &SimStorage, path: &Path, bytes: &[u8]) {
    let file = disk.open(path, OpenMode::Create).unwrap();
    file.set_len(0).unwrap();
    file.write_at(bytes, 0).unwrap();
}

/// A store of three layers and no records.
fn template() -> SimStorage {
    static DISK: OnceLock<SimStorage> = OnceLock::new();
    let make = || {
        let disk = SimStorage::new();
        disk.create_dir(Path::new(ROOT)).unwrap();
        disk.create_dir(Path::new("/outside")).unwrap();
        put(&disk, Path::new("/outside/kept.json"), b"kept");
        let store = open(&disk).unwrap();
        store.prepare_snapshots().unwrap();
        for name in ["quarantine", "quarantine/images", "quarantine/containers"] {
            disk.create_dir(&root(name)).unwrap();
        }
        for (uuid, parent) in [(SEALED, None), (TOP, Some(SEALED)), (ORPHAN, None)] {
            let header = Header {
                uuid,
                parent,
                stands_for: None,
                virtual_size: 1 << 20,
                sealed: uuid != TOP,
                lazy: false,
                created: 1,
            };
            let dir = root("layers").join(uuid.to_string());
            WritableLayer::create(&disk, &dir, &header).unwrap();
            put(&disk, &dir.join("info.json"), br#"{"origin":"a test"}"#);
        }
        disk
    };
    DISK.get_or_init(make).fork()
}

fn open(disk: &SimStorage) -> vellum_base::Result<Store> {
    Store::with_storage(Path::new(ROOT), Arc::new(disk.clone()))
}

fn judge(error: &vellum_base::Error) {
    let kinds = [
        ErrorKind::Corrupt,
        ErrorKind::Unsupported,
        ErrorKind::InvalidInput,
        ErrorKind::NotFound,
        ErrorKind::InUse,
    ];
    assert!(kinds.contains(&error.kind()), "{error:?}");
}

/// Records, each a byte for its file, two for its length, and its bytes.
///
/// * Nothing outside of the store is made, changed or removed, whatever names records hold.
/// * What is damaged is said, and stops no other record; while anything is, no layer is removed.
/// * `prune` removes the layer that no record names, and none that one names.
pub fn records(input: &[u8]) {
    let disk = template();
    disk.observe(Some(Arc::new(|moment| {
        let inside = moment.path.starts_with(ROOT)
            && moment
                .path
                .components()
                .all(|part| part.as_os_str() != "..");
        assert!(inside, "{moment:?}");
    })));
    let mut rest = input;
    while let Some((name, bytes)) = take_file(&mut rest, &FILES) {
        put(&disk, &root(name), bytes);
    }
    let store = match open(&disk) {
        Ok(store) => store,
        Err(error) => return judge(&error),
    };
    let records = store.records().unwrap();
    for image in &records.images {
        let _ = store.image(&image.name).inspect_err(judge);
    }
    for container in &records.containers {
        let _ = store.container(&container.name).inspect_err(judge);
        let Ok(resolved) = store.resolve(container).inspect_err(judge) else {
            continue;
        };
        let spec = store.chain_spec(&resolved, LayerOptions::default());
        let _ = open_chain(store.storage(), &spec).inspect_err(judge);
    }
    let _ = store.template("t").inspect_err(judge);
    for layer in [SEALED, TOP, ORPHAN] {
        let _ = store.layer_info(layer).inspect_err(judge);
    }
    let layers_before = store.layers().unwrap();
    let used = records.used_layers();
    match store.prune() {
        Ok(_) => {
            assert!(
                records.damaged.is_empty(),
                "pruned though a record is damaged"
            );
            let left = store.layers().unwrap();
            for layer in layers_before {
                // What only a template names may go with it.
                let template = records.templates.iter().any(|record| record.layer == layer);
                assert!(left.contains(&layer) || !used.contains(&layer) || template);
            }
        }
        Err(error) => {
            judge(&error);
            assert_eq!(store.layers().unwrap(), layers_before);
        }
    }
    for container in &records.containers {
        let _ = store.remove_container(&container.name).inspect_err(judge);
    }
    for image in &records.images {
        let _ = store.remove_image(&image.name).inspect_err(judge);
    }
    let _ = store.prune().inspect_err(judge);
    disk.observe(None);
    let kept = disk.read_all(Path::new("/outside/kept.json"), 100);
    assert_eq!(kept.unwrap(), b"kept");
}

fn pack(records: &[(u8, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (which, text) in records {
        put_file(&mut out, *which, text.as_bytes());
    }
    out
}

pub fn records_seeds() -> Vec<Seed> {
    let image = r#"{"name":"web","id":"5eed0000-0000-4000-8000-000000000031","layers":["5eed0000-0000-4000-8000-000000000011"],"virtual_size":1048576,"fs":{"kind":"ext4"},"config":{"architecture":"amd64","os":"linux","config":{"Cmd":["sh"]},"rootfs":{"type":"layers","diff_ids":[]}},"created":"2026-01-01T00:00:00Z"}"#;
    let container = r#"{"name":"c","id":"5eed0000-0000-4000-8000-000000000032","image":"web","image_id":"5eed0000-0000-4000-8000-000000000031","layers":["5eed0000-0000-4000-8000-000000000011"],"top":"5eed0000-0000-4000-8000-000000000012","virtual_size":1048576,"config":{},"volumes":[{"source":"v","destination":"/v"}],"created":"2026-01-01T00:00:00Z"}"#;
    let committing = container.replace(
        "\"top\"",
        "\"next\":\"5eed0000-0000-4000-8000-000000000013\",\"top\"",
    );
    let template =
        r#"{"key":"t","layer":"5eed0000-0000-4000-8000-000000000011","fs":{"kind":"ext4"}}"#;
    let snapshot = r#"{"key":"../../x","id":"5eed0000-0000-4000-8000-000000000021","kind":"active","parent":"p","base":"5eed0000-0000-4000-8000-000000000011","layers":["5eed0000-0000-4000-8000-000000000012"],"virtual_size":1048576,"labels":{"a":"b"},"created":{"secs_since_epoch":1,"nanos_since_epoch":0},"updated":{"secs_since_epoch":1,"nanos_since_epoch":0}}"#;
    let escaping = image.replace("\"web\"", "\"../../outside/kept\"");
    let marker = r#"{"vellum":"0.1.0","format":1}"#;
    let info =
        r#"{"origin":"layer 1","diff_id":"sha256:a","chain_key":"k","bytes":4096,"damaged":"yes"}"#;
    vec![
        (
            "image-and-container".into(),
            pack(&[(0, image), (1, container)]),
        ),
        (
            "committing".into(),
            pack(&[(0, image), (9, &committing.replace("\"c\"", "\"d\""))]),
        ),
        ("template".into(), pack(&[(2, template), (5, marker)])),
        ("snapshot".into(), pack(&[(3, snapshot)])),
        ("escaping-name".into(), pack(&[(8, &escaping), (4, info)])),
        (
            "quarantined".into(),
            pack(&[(6, image), (7, "why\n"), (10, info)]),
        ),
        (
            "damaged".into(),
            pack(&[(0, &image[..100]), (1, container)]),
        ),
        (
            "newer".into(),
            pack(&[(5, r#"{"vellum":"9.0.0","format":2}"#)]),
        ),
    ]
}
