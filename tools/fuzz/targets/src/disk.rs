//! Disk images in QEMU's format, on their way to a layer.

use std::io::Write;

use vellum_image::{Format, Source, SourceOptions};

use crate::Seed;
use crate::archive::judge;

/// As much as is read of a disk.
const MOST: u64 = 4 << 20;
/// Bytes of a cluster of the seeds: the least that there is.
const CLUSTER: usize = 512;

/// A qcow2, beside which lie a raw disk and nothing else that it could name: what is read of it are its
/// bytes, the other's, or zeros.
pub fn qcow2(input: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let base = dir.path().join("base.raw");
    std::fs::write(&path, input).unwrap();
    std::fs::write(&base, [b'b'; 2048]).unwrap();
    let mut options = SourceOptions::new(dir.path());
    // It shows nothing that a disk does.
    options.allow_backing = vec![base];
    options.format = Some(Format::Qcow2);
    let disk = match Source::open(&path, &options) {
        Ok(Source::Disk(disk)) => disk,
        Ok(other) => panic!("{other:?}"),
        Err(error) => return judge(&error),
    };
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while let Some(range) = disk.next_data(at).inspect_err(judge).ok().flatten() {
        assert!(at <= range.start && range.start < range.end && range.end <= disk.size);
        at = range.start;
        while at < range.end && at < MOST {
            let len = (range.end - at).min(buffer.len() as u64);
            if let Err(error) = disk.read_at(&mut buffer[..len as usize], at) {
                return judge(&error);
            }
            at += len;
        }
        at = at.max(range.end);
    }
}

/// An image of eight clusters: data, zeros, compressed data, and one that is not there.
fn image(version: u32, backing: &str) -> Vec<u8> {
    let mut file = vec![0; 6 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let (l1, l2, data, packed) = (CLUSTER, 2 * CLUSTER, 3 * CLUSTER, 4 * CLUSTER);
    put(0, b"QFI\xfb");
    put(4, &version.to_be_bytes());
    if !backing.is_empty() {
        put(8, &400u64.to_be_bytes());
        put(16, &(backing.len() as u32).to_be_bytes());
        put(400, backing.as_bytes());
    }
    put(20, &9u32.to_be_bytes());
    put(24, &(8 * CLUSTER as u64).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(l1 as u64).to_be_bytes());
    put(48, &(5 * CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    let mut extensions = 72;
    if version == 3 {
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        extensions = 104;
    }
    put(extensions, &0xE279_2ACAu32.to_be_bytes());
    put(extensions + 4, &3u32.to_be_bytes());
    put(extensions + 8, b"raw");
    put(l1, &(l2 as u64 | 1 << 63).to_be_bytes());
    put(l2, &(data as u64 | 1 << 63).to_be_bytes());
    put(l2 + 8, &u64::from(version == 3).to_be_bytes());
    put(data, &[b'd'; CLUSTER]);
    let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    deflate.write_all(&[b'z'; CLUSTER]).unwrap();
    put(packed, &deflate.finish().unwrap());
    // With clusters of 512 bytes, 61 bits say where, and none how many sectors more there are.
    put(l2 + 16, &(packed as u64 | 1 << 62).to_be_bytes());
    file
}

pub fn qcow2_seeds() -> Vec<Seed> {
    vec![
        ("version-3".into(), image(3, "")),
        ("version-2".into(), image(2, "")),
        ("on-a-raw-disk".into(), image(3, "base.raw")),
        ("on-a-file-of-the-host".into(), image(3, "/etc/passwd")),
        ("cut-off".into(), image(3, "")[..3 * CLUSTER + 1].to_vec()),
    ]
}
