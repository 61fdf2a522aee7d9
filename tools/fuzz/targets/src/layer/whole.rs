//! A whole layer: a directory of files.

use std::path::Path;

use vellum_base::block::{BLOCK_SIZE, MAX_VIRTUAL_SIZE};
use vellum_base::storage::{OpenMode, SimStorage, Storage};
use vellum_core::layer::Header;

use super::disk::{DIR, FIX, SMALL, UUID, file, fresh, path, put_file, sealed, with_seal, written};
use super::exercise::exercise;
use super::live::{cut_down_live, put_live};
use super::{TWO, split};
use crate::input::{self, take_file};
use crate::{Seed, fixup};

const FILES: [&str; 7] = [
    "layer",
    "map",
    "journal.0",
    "journal.1",
    "seal",
    "live",
    "data",
];

/// A directory of files, each a byte for its name, two for its length, and its bytes. Data files
/// that are not there are made as the header wants them. As [`exercise()`].
pub fn open(input: &[u8]) {
    let Some((mode, bytes)) = split(input) else {
        return;
    };
    let mut files: Vec<(&str, Vec<u8>)> = Vec::new();
    let mut rest = &bytes[..];
    while let Some((name, bytes)) = take_file(&mut rest, &FILES) {
        files.push((name, bytes.to_vec()));
    }
    let disk = SimStorage::new();
    disk.create_dir(Path::new(DIR)).unwrap();
    let mut header = None;
    for (name, bytes) in &mut files {
        if *name == "layer" {
            if mode & FIX != 0 {
                fixup::header(bytes);
            }
            header = Header::decode(bytes).ok();
        }
    }
    let uuid = header.as_ref().map_or(UUID, |header| header.uuid);
    let size = header.as_ref().map_or(SMALL, |header| header.virtual_size);
    let mut live = None;
    for (name, mut bytes) in files {
        if mode & FIX != 0 {
            match name {
                "map" | "seal" => fixup::table(&mut bytes, uuid, size),
                "journal.0" | "journal.1" => fixup::journal(&mut bytes, uuid),
                _ => {}
            }
        }
        if name == "live" {
            // It names the others.
            live = Some(bytes);
        } else {
            put_file(&disk, name, &bytes);
        }
    }
    if mode & TWO == 0 {
        let segment = 8u64 << 40;
        for number in 0..size.div_ceil(segment) {
            let name = match number {
                0 => "data".to_owned(),
                _ => format!("data.{number}"),
            };
            let file = disk.open(&path(&name), OpenMode::Create).unwrap();
            file.set_len((size - number * segment).min(segment))
                .unwrap();
            file.sync().unwrap();
        }
    }
    if let Some(bytes) = live {
        put_live(&disk, mode, &bytes, uuid);
    }
    disk.sync_dir(Path::new(DIR)).unwrap();
    let is_sealed = header.is_some_and(|header| header.sealed);
    exercise(&disk, is_sealed, size <= SMALL);
}

/// The files of a layer as an input of [`open`], each cut to what an input has room for.
fn pack(mode: u8, disk: &SimStorage) -> Vec<u8> {
    let mut out = vec![mode];
    for entry in disk.list(Path::new(DIR)).unwrap() {
        let Some(which) = FILES.iter().position(|name| *name == entry.name) else {
            continue;
        };
        let mut bytes = match entry.name.as_str() {
            "live" => cut_down_live(disk),
            "data" => {
                let mut bytes = vec![0; 2 * BLOCK_SIZE as usize];
                let data = disk.open(&path("data"), OpenMode::Read).unwrap();
                data.read_at(&mut bytes, 0).unwrap();
                bytes
            }
            name => file(disk, name),
        };
        bytes.truncate(9000);
        input::put_file(&mut out, which as u8, &bytes);
    }
    out
}

pub fn open_seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (name, size) in [("small", SMALL), ("large", MAX_VIRTUAL_SIZE)] {
        seeds.push((format!("{name}-new"), pack(FIX, &fresh(size))));
        seeds.push((format!("{name}-closed"), pack(FIX, &written(size, true))));
        seeds.push((format!("{name}-killed"), pack(FIX, &written(size, false))));
        seeds.push((format!("{name}-pending"), pack(FIX, &sealed(size))));
        seeds.push((format!("{name}-sealed"), pack(FIX, &with_seal(size))));
    }
    seeds
}
