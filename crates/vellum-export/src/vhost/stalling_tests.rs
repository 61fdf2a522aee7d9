//! A queue all of whose other requests wait for blocks from elsewhere.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};

use super::Disk;
use super::chain::Memory;
use super::queue::{Parts, RunningQueue};
use super::ring::{Place, Ring};
use crate::stalling::{Stalling, assert_not_held_up, p99};
use vellum_base::block::Durability;

/// What QEMU offers.
const QUEUE: u16 = 128;
/// Where the driver has its rings, and for each request a table, a header, a status and its data.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const TABLES: u64 = 0x1_0000;
const HEADERS: u64 = 0x2_0000;
const STATUS: u64 = 0x3_0000;
const DATA: u64 = 0x10_0000;
const MEMORY: usize = 2 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

struct Driver {
    memory: Memory,
    kick: File,
    made: u16,
}

impl Driver {
    fn put(&self, at: u64, descriptor: Descriptor) {
        self.memory.write_obj(descriptor, GuestAddress(at)).unwrap();
    }

    /// Makes a request of 4 KiB, which takes one entry of the queue.
    fn submit(&mut self, head: u16, kind: u32, offset: u64) {
        let number = u64::from(head);
        let (table, header) = (TABLES + number * 64, HEADERS + number * 16);
        let (status, data) = (STATUS + number, DATA + number * 4096);
        let sector = offset / 512;
        self.memory
            .write_obj(u64::from(kind), GuestAddress(header))
            .unwrap();
        self.memory
            .write_obj(sector, GuestAddress(header + 8))
            .unwrap();
        self.memory
            .write_obj(0xee_u8, GuestAddress(status))
            .unwrap();
        let mut len = 3;
        self.put(table, Descriptor::new(header, 16, NEXT, 1));
        let flags = if kind == IN { NEXT | WRITE } else { NEXT };
        match kind {
            FLUSH => len = 2,
            _ => self.put(table + 16, Descriptor::new(data, 4096, flags, 2)),
        }
        let last = table + 16 * (len - 1);
        self.put(last, Descriptor::new(status, 1, WRITE, 0));
        let entry = Descriptor::new(table, 16 * len as u32, INDIRECT, 0);
        self.put(TABLE + number * 16, entry);
        let slot = AVAILABLE + 4 + 2 * u64::from(self.made % QUEUE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.made = self.made.wrapping_add(1);
        let index = GuestAddress(AVAILABLE + 2);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.memory.write_obj(self.made, index).unwrap();
        self.kick.write_all(&1u64.to_ne_bytes()).unwrap();
    }

    fn status(&self, head: u16) -> u8 {
        let at = GuestAddress(STATUS + u64::from(head));
        self.memory.read_obj(at).unwrap()
    }

    fn answered(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn wait_until(&self, answered: u16) {
        let began = Instant::now();
        while self.answered() != answered {
            assert!(began.elapsed() < Duration::from_secs(30), "no answer");
            std::thread::yield_now();
        }
    }

    /// Writes, reads what is here, and flushes, one after the other.
    fn round(&mut self, head: u16) {
        for kind in [OUT, IN, FLUSH] {
            let before = self.answered();
            self.submit(head, kind, 4096);
            self.wait_until(before.wrapping_add(1));
            assert_eq!(self.status(head), 0);
        }
    }
}

#[test]
fn a_queue_full_of_cold_reads_but_for_one_entry_serves_that_as_if_it_were_alone() {
    let device = Arc::new(Stalling::new());
    let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let place = Place {
        size: QUEUE,
        descriptors: TABLE,
        available: AVAILABLE,
        used: USED,
        next_available: 0,
        event_idx: false,
    };
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let kick = File::from(std::os::fd::OwnedFd::from(
        EventFd::from_value_and_flags(0, flags).unwrap(),
    ));
    let parts = Parts {
        index: 0,
        disk: Arc::new(Disk {
            device: device.clone(),
            serial: "stalling".into(),
            read_only: false,
        }),
        memory: GuestMemoryAtomic::new(memory.clone()),
        kick: kick.try_clone().unwrap(),
        broken: None,
        durability: Durability::Buffered,
        leaves: false,
    };
    let ring = Ring::new(place, &memory, None, None).unwrap();
    let queue = RunningQueue::start(parts, ring).unwrap();
    let mut driver = Driver {
        memory,
        kick,
        made: 0,
    };
    let (cold, own) = (QUEUE - 1, QUEUE - 1);
    let idle = p99(|| driver.round(own));
    let before = driver.answered();
    for head in 0..cold {
        driver.submit(head, IN, Stalling::FAR + u64::from(head) * 4096);
    }
    device.wait_for(cold.into());
    let beside = p99(|| driver.round(own));
    assert!((0..cold).all(|head| driver.status(head) == 0xee));
    device.come();
    driver.wait_until(before.wrapping_add(600).wrapping_add(cold));
    assert!((0..cold).all(|head| driver.status(head) == 0));
    assert_eq!(queue.stop(), driver.made);
    assert_not_held_up(idle, beside);
}
