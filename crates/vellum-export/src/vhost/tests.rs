//! A driver that writes descriptors into memory, well and badly.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that panics has failed"
)]

use std::fs::File;

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, Memory, Table};
use super::exec::{Executor, Outcome, refuse};
use super::inflight::{Inflight, Left, Region};
use super::request::{Request, Status};
use super::ring::{Place, Ring};
use super::{Disk, Server, config};
use std::sync::Arc;
use vellum_base::block::{Durability, MemoryDevice};
use vellum_base::error::ErrorKind;

const MIB: u64 = 1 << 20;
const DISK: u64 = 16 * MIB;
const QUEUE: u16 = 16;
/// Where the driver has its rings and its buffers.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x10000;
const MEMORY: usize = 8 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

fn disk() -> Disk {
    Disk {
        device: Arc::new(MemoryDevice::new(DISK)),
        serial: "0123456789abcdefghijklmn".into(),
        read_only: false,
    }
}

fn table() -> Table {
    Table {
        at: TABLE,
        len: QUEUE.into(),
    }
}

fn put(memory: &Memory, index: u16, at: u64, len: u32, flags: u16, next: u16) {
    let place = GuestAddress(TABLE + u64::from(index) * 16);
    memory
        .write_obj(Descriptor::new(at, len, flags, next), place)
        .unwrap();
}

/// A request of that type as a driver makes it, its bytes in several descriptors; the status and what can be read.
fn submit(disk: &Disk, kind: u32, sector: u64, payload: &[u8], wanted: usize) -> (u8, Vec<u8>) {
    let memory = memory();
    let mut header = Vec::new();
    header.extend_from_slice(&kind.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&sector.to_le_bytes());
    header.extend_from_slice(payload);
    memory.write_slice(&header, GuestAddress(BUFFERS)).unwrap();
    let (first, rest) = (10, header.len() as u32 - 10);
    let answer = BUFFERS + 4 * MIB;
    put(&memory, 0, BUFFERS, first, NEXT, 1);
    put(&memory, 1, BUFFERS + u64::from(first), rest, NEXT, 2);
    put(&memory, 2, answer, wanted as u32, NEXT | WRITE, 3);
    put(&memory, 3, answer + wanted as u64, 1, WRITE, 0);
    memory
        .write_slice(&[0xee], GuestAddress(answer + wanted as u64))
        .unwrap();
    let chain = Chain::follow(&memory, table(), 0).unwrap();
    let status = match Request::parse(&chain, &memory, disk) {
        Err(refused) => refuse(disk, refused),
        Ok(request) => match executed(disk, &memory, &chain, &request) {
            Outcome::Done(status) => status,
            Outcome::Left => panic!("nothing is full"),
        },
    };
    let mut data = vec![0; wanted];
    memory.read_slice(&mut data, GuestAddress(answer)).unwrap();
    (status as u8, data)
}

fn executed(disk: &Disk, memory: &Memory, chain: &Chain, request: &Request) -> Outcome {
    Executor {
        disk,
        memory,
        durability: Durability::Buffered,
        ends: &|| false,
        buffer: &mut Vec::new(),
    }
    .execute(chain, request)
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend_from_slice(&sectors.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes
}

const OK: u8 = Status::Ok as u8;
const IOERR: u8 = Status::IoErr as u8;
const UNSUPPORTED: u8 = Status::Unsupported as u8;

#[test]
fn what_was_written_is_read_however_long_and_however_it_is_spread() {
    let disk = disk();
    let bytes: Vec<u8> = (0..(2 * MIB + 512) as usize)
        .map(|at| (at / 511) as u8)
        .collect();
    assert_eq!(submit(&disk, 1, 3, &bytes, 0).0, OK);
    assert_eq!(submit(&disk, 4, 0, &[], 0).0, OK);
    let (status, found) = submit(&disk, 0, 3, &[], bytes.len());
    assert_eq!(status, OK);
    assert!(found == bytes);
    assert_eq!(submit(&disk, 0, 3, &[], 0).0, OK);
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let disk = disk();
    let end = DISK / 512;
    for (kind, sector, payload, wanted, status) in [
        (0, end, vec![], 512, IOERR),
        (0, u64::MAX, vec![], 512, IOERR),
        (0, 0, vec![], 511, IOERR),
        (1, end - 1, vec![1; 1024], 0, IOERR),
        (1, 0, vec![1; 100], 0, IOERR),
        (7, 0, vec![], 0, UNSUPPORTED),
        (8, 0, vec![], 19, IOERR),
        (11, 0, range(0, 8, 1), 0, UNSUPPORTED),
        (11, 0, range(end, 8, 0), 0, IOERR),
        (11, 0, range(0, u32::MAX, 0), 0, IOERR),
        (11, 0, range(0, 8, 0)[1..].to_vec(), 0, IOERR),
        (11, 0, vec![], 0, IOERR),
        (11, 0, range(0, 8, 0).repeat(33), 0, IOERR),
        (13, 0, range(0, 8, 2), 0, UNSUPPORTED),
        (13, 0, range(0, 8, 0).repeat(2), 0, IOERR),
    ] {
        let (found, _) = submit(&disk, kind, sector, &payload, wanted);
        assert_eq!(
            found,
            status,
            "type {kind} at {sector}, {} bytes",
            payload.len()
        );
    }
    let mut bytes = vec![7; DISK as usize];
    disk.device.read_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
}

#[test]
fn ranges_are_discarded_and_zeroed_and_no_byte_beside_them() {
    let disk = disk();
    for (kind, ranges) in [
        (11, [range(8, 8, 0), range(24, 8, 0)].concat()),
        (13, range(8, 24, 0)),
        (13, range(8, 24, 1)),
    ] {
        assert_eq!(submit(&disk, 1, 0, &[9; 40 * 512], 0).0, OK);
        assert_eq!(submit(&disk, kind, 0, &ranges, 0).0, OK);
        let (_, found) = submit(&disk, 0, 0, &[], 40 * 512);
        let sectors: Vec<u8> = found.chunks(512).map(|sector| sector[0]).collect();
        assert_eq!((sectors[7], sectors[32]), (9, 9));
        assert_eq!(
            (sectors[8], sectors[15], sectors[24], sectors[31]),
            (0, 0, 0, 0)
        );
        assert_eq!(sectors[16], if kind == 11 { 9 } else { 0 });
    }
}

#[test]
fn a_disk_that_cannot_be_written_says_so_and_is_not() {
    let disk = Disk {
        read_only: true,
        ..disk()
    };
    assert_ne!(config::features(&disk) & config::feature::RO, 0);
    assert_eq!(config::features(&disk) & config::feature::DISCARD, 0);
    assert_eq!(submit(&disk, 1, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(submit(&disk, 11, 0, &range(0, 8, 0), 0).0, IOERR);
    assert_eq!(submit(&disk, 0, 0, &[], 512).0, OK);
    assert_eq!(
        submit(&disk, 8, 0, &[], 20),
        (OK, b"0123456789abcdefghij".to_vec())
    );
}

#[test]
fn chains_that_are_none_are_found_out() {
    let memory = memory();
    let why = |head: u16| Chain::follow(&memory, table(), head).unwrap_err().0;
    put(&memory, 0, BUFFERS, 16, NEXT, 1);
    put(&memory, 1, BUFFERS, 16, NEXT, 0);
    assert!(why(0).contains("no end"), "{}", why(0));
    put(&memory, 2, BUFFERS, 16, NEXT, QUEUE);
    assert!(why(2).contains("does not have"), "{}", why(2));
    assert!(why(QUEUE).contains("does not have"));
    put(&memory, 3, BUFFERS, 1, NEXT | WRITE, 4);
    put(&memory, 4, BUFFERS, 16, 0, 0);
    assert!(why(3).contains("goes back"), "{}", why(3));
    put(&memory, 5, BUFFERS, u32::MAX, NEXT, 4);
    assert!(why(5).contains("32 bits"), "{}", why(5));
    for (at, len, flags) in [
        (BUFFERS, 17, INDIRECT),
        (BUFFERS, 16, INDIRECT | NEXT),
        // A table in a table.
        (TABLE + 6 * 16, 16, INDIRECT),
    ] {
        put(&memory, 6, at, len, flags, 0);
        assert!(why(6).contains("indirect"), "{}", why(6));
    }
    put(&memory, 7, u64::MAX - 8, 32, INDIRECT, 0);
    assert!(why(7).contains("out of"), "{}", why(7));
    put(&memory, 8, MEMORY as u64 - 8, 16, NEXT, 9);
    put(&memory, 9, BUFFERS, 1, WRITE, 0);
    let chain = Chain::follow(&memory, table(), 8).unwrap();
    assert!(Request::parse(&chain, &memory, &disk()).is_err());
}

#[test]
fn an_indirect_table_is_followed() {
    let memory = memory();
    let inner = BUFFERS + MIB;
    let parts = [
        Descriptor::new(BUFFERS, 16, NEXT, 1),
        Descriptor::new(BUFFERS + 16, 512, NEXT | WRITE, 2),
        Descriptor::new(BUFFERS + 600, 1, WRITE, 0),
    ];
    for (number, part) in parts.into_iter().enumerate() {
        let at = GuestAddress(inner + number as u64 * 16);
        memory.write_obj(part, at).unwrap();
    }
    put(&memory, 5, inner, 48, INDIRECT, 0);
    let chain = Chain::follow(&memory, table(), 5).unwrap();
    let request = Request::parse(&chain, &memory, &disk()).unwrap();
    assert_eq!(
        request,
        Request::Read {
            offset: 0,
            len: 512
        }
    );
}

proptest! {
    #[test]
    fn no_bytes_of_a_guest_make_the_server_panic(bytes in prop::collection::vec(any::<u8>(), 256..4096), head in 0u16..20) {
        let memory = memory();
        memory.write_slice(&bytes, GuestAddress(TABLE)).unwrap();
        let disk = disk();
        if let Ok(chain) = Chain::follow(&memory, table(), head)
            && let Ok(request) = Request::parse(&chain, &memory, &disk)
        {
            executed(&disk, &memory, &chain, &request);
        }
    }
}

fn region() -> (vhost::vhost_user::message::VhostUserInflight, File) {
    Region::create(2, QUEUE).unwrap()
}

fn inflight(told: &vhost::vhost_user::message::VhostUserInflight, file: &File) -> Inflight {
    let region = Region::open(told, file.try_clone().unwrap()).unwrap();
    region.queue(1, QUEUE).unwrap()
}

fn heads(left: &Left) -> &[u16] {
    &left.heads
}

#[test]
fn the_next_server_finds_what_was_taken_and_not_answered_wherever_the_one_before_died() {
    let (told, file) = region();
    let queue = inflight(&told, &file);
    for (counter, head) in [(0, 7), (1, 2), (2, 9)] {
        queue.taken(head, counter);
    }
    assert_eq!(heads(&inflight(&told, &file).settle(0)), [7, 2, 9]);
    // Dead in A2, before the index was raised.
    queue.answers(2);
    assert_eq!(heads(&inflight(&told, &file).settle(0)), [7, 2, 9]);
    // Dead between A2 and A3.
    let left = inflight(&told, &file).settle(1);
    assert_eq!((heads(&left), left.counter), (&[7, 9][..], 3));
    // All of it done, and the head taken again.
    queue.answers(7);
    queue.answered(7, 2);
    queue.taken(7, 3);
    assert_eq!(heads(&inflight(&told, &file).settle(2)), [9, 7]);
    // Dead between A3 and A4: the index differs, and what it was for is clear already.
    queue.answers(9);
    queue.answered(9, 2);
    assert_eq!(heads(&inflight(&told, &file).settle(3)), [7]);
    // The other queue has a part of its own.
    let region = Region::open(&told, file).unwrap();
    assert!(region.queue(0, QUEUE).unwrap().settle(0).heads.is_empty());
}

#[test]
fn a_region_that_cannot_be_one_is_refused() {
    let (told, file) = region();
    let mut short = told;
    short.mmap_size -= 1;
    let open = |told| Region::open(told, file.try_clone().unwrap());
    assert_eq!(open(&short).unwrap_err().kind(), ErrorKind::InvalidInput);
    let mut beyond = told;
    beyond.mmap_offset = 4096;
    assert_eq!(open(&beyond).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(Region::create(0, 1).is_err() && Region::create(1, u16::MAX).is_err());
    let region = open(&told).unwrap();
    assert!(region.queue(2, QUEUE).is_err() && region.queue(0, QUEUE * 2).is_err());
    // Of version 2.
    use std::os::unix::fs::FileExt;
    file.write_all_at(&[2], 8).unwrap();
    assert_eq!(
        region.queue(0, QUEUE).unwrap_err().kind(),
        ErrorKind::Unsupported
    );
}

fn place() -> Place {
    Place {
        size: QUEUE,
        descriptors: TABLE,
        available: AVAILABLE,
        used: USED,
        next_available: 0,
        event_idx: false,
    }
}

fn make_available(memory: &Memory, heads: &[u16]) {
    for (number, head) in heads.iter().enumerate() {
        let at = AVAILABLE + 4 + 2 * number as u64;
        memory.write_obj(*head, GuestAddress(at)).unwrap();
    }
    let index = heads.len() as u16;
    memory
        .write_obj(index, GuestAddress(AVAILABLE + 2))
        .unwrap();
}

#[test]
fn a_queue_goes_on_where_the_server_before_was_killed() {
    let (memory, (told, file)) = (memory(), region());
    make_available(&memory, &[3, 5, 8, 1]);
    let ring = || {
        let inflight = Some(inflight(&told, &file));
        Ring::new(place(), &memory, inflight, None).unwrap()
    };
    let mut first = ring();
    for head in [3, 5, 8] {
        assert_eq!(first.take(&memory).unwrap(), Some(head));
    }
    first.answer(&memory, 5, 1).unwrap();
    drop(first);
    let mut second = ring();
    assert_eq!(second.left(), 2);
    let mut taken = Vec::new();
    while let Some(head) = second.take(&memory).unwrap() {
        taken.push(head);
        second.answer(&memory, head, 1).unwrap();
    }
    assert_eq!(taken, [3, 8, 1]);
    assert_eq!(second.next_available(), 4);
    let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
    assert_eq!(used, 4);
    assert_eq!(ring().left(), 0);
}

#[test]
fn a_ring_is_idle_once_all_that_the_driver_made_available_is_answered() {
    let memory = memory();
    let mut ring = Ring::new(place(), &memory, None, None).unwrap();
    assert!(ring.is_idle(&memory));
    make_available(&memory, &[0, 1]);
    assert!(!ring.is_idle(&memory), "nothing is taken yet");
    for head in [0, 1] {
        assert_eq!(ring.take(&memory).unwrap(), Some(head));
        assert!(!ring.is_idle(&memory));
        ring.answer(&memory, head, 1).unwrap();
    }
    assert!(ring.is_idle(&memory));
}

#[test]
fn a_ring_that_no_driver_could_have_written_breaks_its_queue() {
    for heads in [vec![QUEUE], vec![4, 4]] {
        let memory = memory();
        make_available(&memory, &heads);
        let mut ring = Ring::new(place(), &memory, None, None).unwrap();
        let error = loop {
            match ring.take(&memory) {
                Ok(head) => assert!(head.is_some(), "{heads:?}"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Protocol, "{heads:?}");
    }
    let memory = memory();
    memory
        .write_obj(QUEUE + 1, GuestAddress(AVAILABLE + 2))
        .unwrap();
    let mut ring = Ring::new(place(), &memory, None, None).unwrap();
    assert_eq!(ring.take(&memory).unwrap_err().kind(), ErrorKind::Protocol);
    for (descriptors, used) in [(8, USED), (TABLE, MEMORY as u64 - 4)] {
        let place = Place {
            descriptors,
            used,
            ..place()
        };
        assert!(Ring::new(place, &memory, None, None).is_err());
    }
}

#[test]
fn the_configuration_grows_with_the_disk_and_has_what_the_page_says() {
    let disk = disk();
    let space = config::space(&disk, 3);
    let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from(word(0)), DISK / 512);
    assert_eq!((word(12), word(20), space[24], space[34]), (126, 512, 3, 3));
    assert_eq!((word(36), word(40), word(44)), (1 << 21, 32, 8));
    assert_eq!((word(48), word(52), space[56]), (1 << 18, 1, 1));
    assert!(space[57..].iter().all(|byte| *byte == 0));
    assert!(Server::new(disk.clone(), 0).is_err() && Server::new(disk, 257).is_err());
}
