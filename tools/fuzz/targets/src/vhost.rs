//! The disk of a virtual machine: what a guest has in its memory, and what a server before left.

use std::sync::Arc;

use vellum_base::ErrorKind;
use vellum_base::block::{BlockDevice, MemoryDevice};
use vellum_export::vhost::{Disk, Place, serve_memory};

use crate::Seed;
use crate::input::{put_piece, take_piece, with_mode};

const DISK: u64 = 1 << 20;
/// Bytes of the guest's memory.
const MEMORY: usize = 64 << 10;
/// Where the rings are.
const TABLE: usize = 0;
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x1800;
/// Where the seeds have their buffers.
const BUFFERS: usize = 0x2000;

/// The first byte: 2 to this power is the size of the queue.
const SIZE: u8 = 7;
/// Bits of the first byte: interrupts are asked for by index; the input begins with an inflight region; the
/// disk is read-only.
const EVENT_IDX: u8 = 8;
const INFLIGHT: u8 = 16;
const READ_ONLY: u8 = 32;

/// A queue in a guest's memory: rings, descriptors and requests.
///
/// * As many answers are in the used ring as the server says it gave, each for a head that the queue has.
/// * A disk that is read-only stays as it is, whatever the guest asks for.
/// * What cannot be served is an error of a few kinds.
pub fn queue(input: &[u8]) {
    let Some((&mode, mut bytes)) = input.split_first() else {
        return;
    };
    let inflight = (mode & INFLIGHT != 0).then(|| take_piece(&mut bytes).unwrap_or_default());
    let mut memory = vec![0; MEMORY];
    let len = bytes.len().min(MEMORY);
    memory[..len].copy_from_slice(&bytes[..len]);
    let device = Arc::new(MemoryDevice::new(DISK));
    let disk = Disk {
        device: device.clone(),
        serial: "0123456789abcdefghijklmn".into(),
        read_only: mode & READ_ONLY != 0,
    };
    let place = Place {
        size: 1 << (mode & SIZE),
        descriptors: TABLE as u64,
        available: AVAILABLE as u64,
        used: USED as u64,
        next_available: 0,
        event_idx: mode & EVENT_IDX != 0,
    };
    let begun = index(&memory);
    match serve_memory(&disk, &mut memory, place, inflight) {
        Ok(served) => check_answers(&memory, begun, served, place.size),
        Err(error) => {
            let kinds = [
                ErrorKind::InvalidInput,
                ErrorKind::Unsupported,
                ErrorKind::Protocol,
            ];
            assert!(kinds.contains(&error.kind()), "{error:?}");
        }
    }
    if disk.read_only {
        let mut content = vec![1; DISK as usize];
        device.read_at(&mut content, 0).unwrap();
        assert!(content.iter().all(|byte| *byte == 0));
    }
}

/// The index of the used ring.
fn index(memory: &[u8]) -> u16 {
    u16::from_le_bytes(memory[USED + 2..USED + 4].try_into().unwrap())
}

/// A guest that has the disk write into the used ring gets what it asked for, so that only the last answer
/// is looked at, which nothing came after.
fn check_answers(memory: &[u8], begun: u16, served: usize, size: u16) {
    if served == 0 {
        assert_eq!(index(memory), begun);
        return;
    }
    let end = begun.wrapping_add(served as u16);
    assert_eq!(index(memory), end);
    let last = USED + 4 + 8 * usize::from(end.wrapping_sub(1) % size);
    let head = u32::from_le_bytes(memory[last..last + 4].try_into().unwrap());
    assert!(head < u32::from(size), "an answer to {head}");
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A guest's memory as its driver fills it.
struct Guest {
    memory: Vec<u8>,
    descriptors: u16,
    requests: u16,
    free: usize,
}

impl Guest {
    fn new() -> Guest {
        Guest {
            memory: vec![0; BUFFERS],
            descriptors: 0,
            requests: 0,
            free: BUFFERS,
        }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if self.memory.len() < at + bytes.len() {
            self.memory.resize(at + bytes.len(), 0);
        }
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Room for some bytes.
    fn room(&mut self, len: usize) -> usize {
        let at = self.free;
        self.free += len.next_multiple_of(16);
        at
    }

    fn descriptor(&mut self, at: usize, len: usize, flags: u16, next: u16) -> u16 {
        let index = self.descriptors;
        self.descriptors += 1;
        let bytes = descriptor(at, len, flags, next);
        self.put(TABLE + 16 * usize::from(index), &bytes);
        index
    }

    fn offer(&mut self, head: u16) {
        let entry = AVAILABLE + 4 + 2 * usize::from(self.requests);
        self.put(entry, &head.to_le_bytes());
        self.requests += 1;
        let index = self.requests.to_le_bytes();
        self.put(AVAILABLE + 2, &index);
    }

    /// A request of that type, with bytes to be written and room for bytes that are read.
    fn request(mut self, kind: u32, sector: u64, payload: &[u8], wanted: usize) -> Guest {
        let at = self.room(16 + payload.len());
        self.put(at, &header(kind, sector));
        self.put(at + 16, payload);
        let answer = self.room(wanted + 1);
        let first = self.descriptors;
        self.descriptor(at, 16, NEXT, first + 1);
        self.descriptor(at + 16, payload.len(), NEXT, first + 2);
        self.descriptor(answer, wanted, NEXT | WRITE, first + 3);
        self.descriptor(answer + wanted, 1, WRITE, 0);
        self.offer(first);
        self
    }

    /// A read by way of an indirect table.
    fn indirect(mut self) -> Guest {
        let at = self.room(16);
        self.put(at, &header(0, 8));
        let answer = self.room(513);
        let table = self.room(48);
        let parts = [
            descriptor(at, 16, NEXT, 1),
            descriptor(answer, 512, NEXT | WRITE, 2),
            descriptor(answer + 512, 1, WRITE, 0),
        ];
        self.put(table, &parts.concat());
        let head = self.descriptor(table, 48, INDIRECT, 0);
        self.offer(head);
        self
    }

    /// A chain that leads in a circle.
    fn circle(mut self) -> Guest {
        let head = self.descriptor(BUFFERS, 16, NEXT, self.descriptors);
        self.offer(head);
        self
    }
}

fn descriptor(at: usize, len: usize, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = (at as u64).to_le_bytes().to_vec();
    bytes.extend((len as u32).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// An inflight region of one queue with the heads that a server before took.
fn region(size: u16, used: u16, last: u16, heads: &[u16]) -> Vec<u8> {
    let mut bytes = vec![0; 16 + 16 * usize::from(size)];
    bytes[8..10].copy_from_slice(&1u16.to_le_bytes());
    bytes[10..12].copy_from_slice(&size.to_le_bytes());
    bytes[12..14].copy_from_slice(&last.to_le_bytes());
    bytes[14..16].copy_from_slice(&used.to_le_bytes());
    for (counter, head) in heads.iter().enumerate() {
        let at = 16 + 16 * usize::from(*head);
        bytes[at] = 1;
        bytes[at + 8..at + 16].copy_from_slice(&(counter as u64).to_le_bytes());
    }
    bytes
}

pub fn queue_seeds() -> Vec<Seed> {
    let requests = || {
        Guest::new()
            .request(1, 8, &[7; 1024], 0)
            .request(0, 8, &[], 1024)
            .request(4, 0, &[], 0)
            .request(8, 0, &[], 20)
            .request(11, 0, &[range(0, 8, 0), range(16, 8, 0)].concat(), 0)
            .request(13, 0, &range(8, 1, 1), 0)
            .indirect()
            .memory
    };
    let refused = Guest::new()
        .request(0, u64::MAX, &[], 512)
        .request(1, 0, &[1; 100], 0)
        .request(77, 0, &[], 0)
        .request(8, 0, &[], 19)
        .request(11, 0, &range(0, u32::MAX, 0), 0)
        .request(13, 0, &range(0, 8, 2), 0)
        .circle()
        .memory;
    let twice = {
        let mut guest = Guest::new().request(4, 0, &[], 0);
        guest.offer(0);
        guest.memory
    };
    let left = |last, heads: &[u16]| {
        let mut bytes = Vec::new();
        put_piece(&mut bytes, &region(32, 0, last, heads));
        bytes.extend(requests());
        bytes
    };
    vec![
        ("requests".into(), with_mode(5 | EVENT_IDX, &requests())),
        ("read-only".into(), with_mode(5 | READ_ONLY, &requests())),
        ("small-queue".into(), with_mode(1, &requests())),
        ("refused".into(), with_mode(5, &refused)),
        ("one-head-twice".into(), with_mode(3, &twice)),
        (
            "left-behind".into(),
            with_mode(5 | INFLIGHT, &left(4, &[4, 0, 8])),
        ),
        (
            "left-behind-beyond-the-queue".into(),
            with_mode(4 | INFLIGHT, &left(99, &[31, 30])),
        ),
    ]
}
