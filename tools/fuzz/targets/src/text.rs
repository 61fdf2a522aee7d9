//! Short texts and records: containerd's filters, the configuration file, ext4's superblock.

use std::io::Write;
use std::sync::OnceLock;

use vellum_base::ErrorKind;
use vellum_fs::superblock::Superblock;
use vellum_snapshotter::config::Config;
use vellum_snapshotter::filter::Filters;
use vellum_store::SnapshotRecord;

use crate::Seed;

fn seeds(texts: &[(&str, &str)]) -> Vec<Seed> {
    let seed = |(name, text): &(&str, &str)| ((*name).to_owned(), text.as_bytes().to_vec());
    texts.iter().map(seed).collect()
}

fn records() -> &'static [SnapshotRecord] {
    static RECORDS: OnceLock<Vec<SnapshotRecord>> = OnceLock::new();
    RECORDS.get_or_init(|| {
        serde_json::from_str(
            r#"[{"key": "sha256:0a1b", "id": "00000000-0000-4000-8000-000000000001",
                 "kind": "committed", "base": "00000000-0000-4000-8000-000000000002",
                 "virtual_size": 1048576,
                 "labels": {"containerd.io/snapshot.ref": "sha256:0a1b", "a": "", "b": "ä"},
                 "created": {"secs_since_epoch": 1, "nanos_since_epoch": 0},
                 "updated": {"secs_since_epoch": 1, "nanos_since_epoch": 0}},
                {"key": "web", "id": "00000000-0000-4000-8000-000000000003",
                 "kind": "active", "parent": "sha256:0a1b",
                 "base": "00000000-0000-4000-8000-000000000002", "virtual_size": 4096,
                 "created": {"secs_since_epoch": 1, "nanos_since_epoch": 0},
                 "updated": {"secs_since_epoch": 1, "nanos_since_epoch": 0}}]"#,
        )
        .unwrap()
    })
}

/// Filters, with a zero byte between each. Any of several is enough, and what one refuses all do.
pub fn filter(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let texts: Vec<String> = text.split('\0').map(str::to_owned).collect();
    let each: Result<Vec<Filters>, _> = texts
        .iter()
        .map(|text| Filters::parse(std::slice::from_ref(text)))
        .collect();
    match (Filters::parse(&texts), each) {
        (Ok(all), Ok(each)) => {
            for record in records() {
                let any = each.iter().any(|filter| filter.matches(record));
                assert_eq!(all.matches(record), any);
            }
        }
        (Err(error), Err(_)) => assert_eq!(error.kind(), ErrorKind::InvalidInput),
        (all, _) => panic!("together: {}, one by one: the contrary", all.is_ok()),
    }
}

pub fn filter_seeds() -> Vec<Seed> {
    seeds(&[
        ("empty", ""),
        ("kind", "kind==committed,name!=web"),
        (
            "label",
            "labels.\"containerd.io/snapshot.ref\"==\"sha256:0a1b\"",
        ),
        ("regex", "name~=/^sha[0-9]+:/,parent"),
        ("quoted", "name==\"\\x41\\u00e4\\101\\n\\\"\",labels.a"),
        ("several", "kind==view\0name~=w.b\0labels.b==ä"),
        ("repetition", "name~=(a{50}){50}"),
    ])
}

/// The configuration file: what is accepted has a size.
pub fn config(input: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(input).unwrap();
    match Config::load(Some(file.path())) {
        Ok(config) => assert!(config.size().is_ok()),
        Err(error) => {
            let expected = match std::str::from_utf8(input) {
                Ok(_) => ErrorKind::InvalidInput,
                Err(_) => ErrorKind::Corrupt,
            };
            assert_eq!(error.kind(), expected, "{error:?}");
            let name = file.path().display().to_string();
            assert!(error.to_string().contains(&name), "{error}");
        }
    }
}

pub fn config_seeds() -> Vec<Seed> {
    seeds(&[
        (
            "whole",
            "version = 1\nroot = '/r'\naddress = '/s'\ndefault_size = '20G'\nmounts = 'device'\n\
             [metrics]\naddress = '127.0.0.1:9142'\n[log]\nlevel = 'debug'\nformat = 'json'\n",
        ),
        ("sizes", "default_size = \"1.5T\"\n"),
        ("inline", "log = { level = \"info\", format = \"text\" }\n"),
        ("unknown", "roots = [[1, 2], {a.b = 1979-05-27}]\n"),
        ("nothing", ""),
    ])
}

/// The superblock of an ext4: what is said of the journal lies within the file system.
pub fn superblock(input: &[u8]) {
    match Superblock::parse(input) {
        Ok(found) => {
            assert!((1024..=65536).contains(&found.block_size));
            for range in &found.journal {
                assert!(
                    range.start <= range.end && range.end <= found.size,
                    "{found:?}"
                );
            }
        }
        Err(error) => assert!(
            matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported),
            "{error:?}"
        ),
    }
}

pub fn superblock_seeds() -> Vec<Seed> {
    let mut bytes = vec![0; 1024];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0x00, &1000u32.to_le_bytes());
    put(0x04, &262_144u32.to_le_bytes());
    put(0x10, &900u32.to_le_bytes());
    put(0x18, &2u32.to_le_bytes());
    put(0x38, &0xEF53u16.to_le_bytes());
    put(0x3A, &1u16.to_le_bytes());
    put(0x5C, &4u32.to_le_bytes());
    put(0x60, &0xC2u32.to_le_bytes());
    put(0xFD, &[1]);
    put(0x10C, &0xF30Au16.to_le_bytes());
    put(0x10E, &[2, 0, 4, 0]);
    put(0x118, &[0, 0, 0, 0, 0, 16, 0, 0, 0, 64, 0, 0]);
    put(0x124, &[0, 16, 0, 0, 0, 16, 0, 0, 0, 128, 0, 0]);
    let mut plain = bytes.clone();
    plain[0x5C] = 0;
    vec![("journal".into(), bytes), ("no-journal".into(), plain)]
}
