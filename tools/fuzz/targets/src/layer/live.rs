//! `live`, the log of changes.

use std::path::Path;
use std::sync::OnceLock;

use uuid::Uuid;
use vellum_base::storage::{OpenMode, SimStorage, Storage};

use super::disk::{DIR, FIX, LARGE, UUID, file, path, template, written};
use super::exercise::exercise;
use super::{seeds_of_both_sizes, split};
use crate::{Seed, fixup};

/// The log of changes, cut down to its header and the entries of its two regions: as it lies in a
/// writable layer whose server was killed. First the number of entries in region 0.
pub(super) fn put_live(disk: &SimStorage, mode: u8, bytes: &[u8], uuid: Uuid) {
    const REGION: [u64; 2] = [4096, 8_392_704];
    let (count, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let (header, entries) = rest.split_at(rest.len().min(128));
    let mut header = header.to_vec();
    header.resize(128, 0);
    let boot = disk.boot_id();
    if mode & FIX != 0 {
        fixup::live_header(&mut header, uuid, boot);
    } else {
        header[32..48].copy_from_slice(&boot);
    }
    let file = disk.open(&path("live"), OpenMode::Create).unwrap();
    file.set_len(16_781_312).unwrap();
    file.write_at(&header, 0).unwrap();
    if mode & FIX != 0 {
        let id = |name: &str| Some(disk.open(&path(name), OpenMode::Read).ok()?.id().unwrap());
        let data = (0..8).map_while(|k| {
            id(&if k == 0 {
                "data".into()
            } else {
                format!("data.{k}")
            })
        });
        let bond = fixup::live_bond(
            file.id().unwrap(),
            id("layer").unwrap_or_default(),
            &data.collect::<Vec<_>>(),
            file.evidence().unwrap(),
        );
        file.write_at(&bond, 128).unwrap();
    }
    let mut placed = [0; 2];
    for (at, entry) in entries.chunks(32).enumerate() {
        let mut entry = entry.to_vec();
        entry.resize(32, 0);
        if mode & FIX != 0 {
            fixup::live_entry(&mut entry);
        }
        let region = usize::from(at >= usize::from(*count));
        file.write_at(&entry, REGION[region] + 32 * placed[region])
            .unwrap();
        placed[region] += 1;
    }
    file.sync().unwrap();
    disk.sync_dir(Path::new(DIR)).unwrap();
}

pub(super) fn cut_down_live(disk: &SimStorage) -> Vec<u8> {
    let live = file(disk, "live");
    let region = |at: usize| {
        let entries = live[at..].chunks(32);
        let used = entries.take_while(|entry| entry.iter().any(|byte| *byte != 0));
        used.flatten().copied().collect::<Vec<u8>>()
    };
    let (first, second) = (region(4096), region(8_392_704));
    let mut out = vec![(first.len() / 32) as u8];
    out.extend(&live[..128]);
    // Which boot it was is put in when it is used.
    out[33..49].fill(0);
    out[53..57].fill(0);
    out.extend(first);
    out.extend(second);
    out
}

/// `live`, in a writable layer whose server was killed: as [`exercise()`].
pub fn live(input: &[u8]) {
    static DISKS: [OnceLock<SimStorage>; 2] = [OnceLock::new(), OnceLock::new()];
    let Some((mode, bytes)) = split(input) else {
        return;
    };
    let disk = template(&DISKS, mode, |size| written(size, false));
    put_live(&disk, mode, &bytes, UUID);
    exercise(&disk, false, mode & LARGE == 0);
}

pub fn live_seeds() -> Vec<Seed> {
    seeds_of_both_sizes(|size| cut_down_live(&written(size, false)))
}
