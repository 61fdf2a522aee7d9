//! Makes checksums fit again, since a fuzzer that has to guess them gets nowhere.

use uuid::Uuid;
use vellum_base::storage::{Evidence, FileId};

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

fn get_u32(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..at + 4).map_or(0, |field| {
        u32::from_le_bytes(field.try_into().unwrap()) as usize
    })
}

fn get_u64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .map_or(0, |field| u64::from_le_bytes(field.try_into().unwrap()))
}

fn put_crc(bytes: &mut [u8], range: std::ops::Range<usize>, at: usize) {
    let crc = bytes.get(range).map(crc32fast::hash).unwrap_or_default();
    put(bytes, at, &crc.to_le_bytes());
}

/// A backup (backup.md): its description, its header, and all records as far as they have the lengths for it.
pub fn backup(bytes: &mut [u8]) {
    let mut at = 256usize.saturating_add(get_u32(bytes, 12));
    put_crc(bytes, 256..at, 116);
    put_crc(bytes, 0..252, 252);
    while bytes.len().saturating_sub(at) >= 32 {
        let rest = &mut bytes[at..];
        let payload = get_u32(rest, 8).min(rest.len() - 32);
        put_crc(rest, 32..32 + payload, 24);
        put_crc(rest, 0..28, 28);
        at += 32 + payload;
    }
}

/// A layer's header (format.md, section 1).
pub fn header(bytes: &mut [u8]) {
    put_crc(bytes, 0..508, 508);
}

/// The windows of a lazy layer (section 8) that are here: of that layer, and each page in its place.
pub fn have(bytes: &mut [u8], uuid: Uuid, virtual_size: u64) {
    put(bytes, 16, uuid.as_bytes());
    put(bytes, 32, &virtual_size.to_le_bytes());
    put_crc(bytes, 0..4092, 4092);
    for (number, page) in (0..).zip(bytes.chunks_exact_mut(4096).skip(1)) {
        let number: u32 = number;
        put(page, 4088, &number.to_le_bytes());
        put_crc(page, 0..4092, 4092);
    }
}

/// A table (section 3.1) of that layer.
pub fn table(bytes: &mut [u8], uuid: Uuid, virtual_size: u64) {
    put(bytes, 16, uuid.as_bytes());
    put(bytes, 40, &virtual_size.to_le_bytes());
    let len = bytes.len() as u64;
    let extents = get_u64(bytes, 48).min(len) as usize * 24;
    let sums = get_u64(bytes, 56).min(len) as usize * 4;
    put_crc(bytes, 4096..4096 + extents, 96);
    let sums_at = (4096 + extents).next_multiple_of(4096);
    put_crc(bytes, sums_at..sums_at + sums, 100);
    if sums == 0 {
        put(bytes, 100, &crc32fast::hash(&[]).to_le_bytes());
    }
    put_crc(bytes, 0..4092, 4092);
    segments(bytes, uuid, sums_at);
}

/// The segments of changes behind a checkpoint (section 3.1.1).
fn segments(bytes: &mut [u8], uuid: Uuid, table_len: usize) {
    let table_crc = bytes.get(4092..4096).unwrap_or_default().to_vec();
    let mut at = table_len;
    while at < bytes.len() {
        let rest = &mut bytes[at..];
        if !rest.starts_with(b"VELLUMMC") {
            at += 4096;
            continue;
        }
        put(rest, 16, uuid.as_bytes());
        put(rest, 48, &table_crc);
        let len = get_u32(rest, 56);
        put(rest, 60, &[0; 4]);
        if len >= 64 && len <= rest.len() {
            put_crc(rest, 0..len, 60);
        }
        at += len.clamp(4096, 16 << 20).next_multiple_of(4096);
    }
}

/// The records of a journal's area (section 3.2) of that layer.
pub fn journal(bytes: &mut [u8], uuid: Uuid) {
    let mut at = 0;
    while at < bytes.len() {
        let rest = &mut bytes[at..];
        if !rest.starts_with(b"VELLUMJR") {
            at += 4096;
            continue;
        }
        put(rest, 16, uuid.as_bytes());
        let len = get_u32(rest, 64);
        put(rest, 68, &[0; 4]);
        if len >= 128 && len <= rest.len() {
            put_crc(rest, 0..len, 68);
        }
        at += len.clamp(4096, 16 << 20).next_multiple_of(4096);
    }
}

/// The log of changes (section 6) of that layer in this boot: its header, 128 bytes.
pub fn live_header(bytes: &mut [u8], uuid: Uuid, boot: [u8; 16]) {
    // Whatever an older version had there.
    put(bytes, 8, &[2, 0, 0, 0, 0, 0, 0, 0]);
    put(bytes, 48, &[0; 4]);
    put(bytes, 16, uuid.as_bytes());
    put(bytes, 32, &boot);
    put_crc(bytes, 0..52, 52);
    put_crc(bytes, 64..76, 76);
    put_crc(bytes, 80..92, 92);
}

/// What it belongs to: 384 bytes from 128 on.
pub fn live_bond(log: FileId, header: FileId, data: &[FileId], evidence: Evidence) -> Vec<u8> {
    let id = |id: &FileId| {
        [id.device, id.inode, id.born]
            .map(u64::to_le_bytes)
            .concat()
    };
    let mut bytes = id(&log);
    // A simulated disk tells no times.
    bytes.extend([header.inode, 0].map(u64::to_le_bytes).concat());
    bytes.extend(evidence.witness);
    bytes.extend(evidence.mounts.map(u64::to_le_bytes).concat());
    bytes.extend(u32::from(evidence.marked).to_le_bytes());
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend(data.iter().flat_map(id));
    bytes.resize(384, 0);
    put_crc(&mut bytes, 0..380, 380);
    bytes
}

/// An entry of it, 32 bytes.
pub fn live_entry(bytes: &mut [u8]) {
    put_crc(bytes, 0..28, 28);
}

/// The header and the list of a hot pack (registry.md).
pub fn registry_hot(bytes: &mut [u8]) {
    put_crc(bytes, 128..bytes.len().max(128), 120);
    put_crc(bytes, 0..124, 124);
}

/// The table of a layer in a registry (registry.md): its body, and its header.
pub fn registry_table(bytes: &mut [u8]) {
    put_crc(bytes, 256..bytes.len().max(256), 248);
    put_crc(bytes, 0..252, 252);
}
