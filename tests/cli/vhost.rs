//! `vellum vhost` and a simulated machine, which speaks to it by way of the crate `vhost`.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::common::{Running, TestStore, wait_until};

/// Entries of the machine's one queue.
const QUEUE: u16 = 16;
/// Where in the machine's memory what lies.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x4000;
const DATA: u64 = 0x1_0000;
const MEMORY: usize = 1 << 20;

/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Types of requests, and the answers to them.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;

/// Features of a device.
const READ_ONLY: u64 = 1 << 5;
const HAS_FLUSH: u64 = 1 << 9;
const VERSION_1: u64 = 1 << 32;

/// The message that says that the configuration changed.
const CONFIG_CHANGE: u32 = 2;

fn serve(store: &TestStore, name: &str, options: &[&str]) -> Running {
    let socket = store.path("vhost.sock");
    let child = store
        .command()
        .args(["-q", "vhost", name, "--socket"])
        .arg(&socket)
        .args(options)
        .spawn()
        .unwrap();
    let server = Running(child);
    // Not by connecting: a server takes one machine after the other.
    wait_until("the server listens", || socket.exists());
    server
}

/// A machine whose disk is served.
struct Machine {
    frontend: Frontend,
    features: u64,
    memory: GuestMemoryMmap,
    kick: EventFd,
    call: EventFd,
    /// What the server says first.
    channel: UnixStream,
    /// Requests made.
    made: u16,
}

impl Machine {
    fn connect(store: &TestStore) -> Machine {
        let file = File::from(memfd_create("machine", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(MEMORY as u64).unwrap();
        let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let frontend = Frontend::connect(store.path("vhost.sock"), 1).unwrap();
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        let (channel, theirs) = UnixStream::pair().unwrap();
        channel
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        let mut machine = Machine {
            frontend,
            features,
            memory,
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(0).unwrap(),
            channel,
            made: 0,
        };
        machine.start(&theirs);
        machine
    }

    /// In the order in which QEMU says it.
    fn start(&mut self, theirs: &UnixStream) {
        let frontend = &mut self.frontend;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let offered = frontend.get_protocol_features().unwrap();
        frontend
            .set_protocol_features(offered & (Protocol::CONFIG | Protocol::BACKEND_REQ))
            .unwrap();
        frontend.set_backend_request_fd(theirs).unwrap();
        frontend
            .set_features(self.features & (VERSION_1 | HAS_FLUSH | READ_ONLY | protocol))
            .unwrap();
        let region = self.memory.iter().next().unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.set_mem_table(&[region]).unwrap();
        frontend.set_vring_num(0, QUEUE).unwrap();
        let rings = VringConfigData {
            queue_max_size: QUEUE,
            queue_size: QUEUE,
            desc_table_addr: region.userspace_addr + TABLE,
            used_ring_addr: region.userspace_addr + USED,
            avail_ring_addr: region.userspace_addr + AVAILABLE,
            ..Default::default()
        };
        frontend.set_vring_addr(0, &rings).unwrap();
        frontend.set_vring_base(0, 0).unwrap();
        frontend.set_vring_call(0, &self.call).unwrap();
        frontend.set_vring_kick(0, &self.kick).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn describe(&self, index: u64, at: u64, len: usize, flags: u16) {
        let descriptor = TABLE + index * 16;
        self.put(at, descriptor);
        self.put(len as u32, descriptor + 8);
        self.put(flags, descriptor + 12);
        self.put(index as u16 + 1, descriptor + 14);
    }

    /// Makes a request and waits for its answer.
    fn request(&mut self, kind: u32, sector: u64, data: &mut [u8]) -> u8 {
        self.put(kind, HEADER);
        self.put(sector, HEADER + 8);
        self.put(0xee_u8, STATUS);
        self.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        self.describe(0, HEADER, 16, NEXT);
        let direction = if kind == IN { WRITE } else { 0 };
        self.describe(1, DATA, data.len(), NEXT | direction);
        self.describe(2, STATUS, 1, WRITE);
        // The head of the chain is descriptor 0, as it is in every entry of the ring that was never written.
        self.made += 1;
        let order = std::sync::atomic::Ordering::SeqCst;
        let index = GuestAddress(AVAILABLE + 2);
        self.memory.store(self.made, index, order).unwrap();
        self.kick.write(1).unwrap();
        wait_until("the server answers", || {
            let used: u16 = self.memory.load(GuestAddress(USED + 2), order).unwrap();
            used == self.made
        });
        self.memory.read_slice(data, GuestAddress(DATA)).unwrap();
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    fn write(&mut self, sector: u64, byte: u8) -> u8 {
        self.request(OUT, sector, &mut [byte; 4096])
    }

    fn read(&mut self, sector: u64) -> u8 {
        let mut data = [0; 4096];
        assert_eq!(self.request(IN, sector, &mut data), OK);
        assert!(data.iter().all(|byte| *byte == data[0]), "torn");
        data[0]
    }

    /// Of the configuration, in bytes.
    fn capacity(&mut self) -> u64 {
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, bytes) = self.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap()) * 512
    }
}

#[test]
fn a_machine_writes_a_container_and_only_reads_its_snapshot_or_what_is_served_read_only() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let server = serve(&store, "c", &[]);
    let mut machine = Machine::connect(&store);
    assert_eq!(machine.features & READ_ONLY, 0);
    assert_eq!(machine.write(64, 1), OK);
    store.ok(&["snapshot", "c", "before"]);
    assert_eq!(machine.write(64, 2), OK);
    assert_eq!(machine.request(FLUSH, 0, &mut [0; 8]), OK);
    for (refused, why) in [
        (&["commit", "c", "image"][..], "cannot be frozen from here"),
        (&["mount", "c"], "served over vhost-user"),
        (&["rm", "--snapshots", "c"], "vhost"),
    ] {
        let error = store.fails(refused);
        assert!(error.contains(why), "{refused:?}: {error}");
    }
    assert_eq!(store.names("images"), ["base"]);
    drop(machine);
    server.end();
    for (name, options, byte) in [("c@before", &[][..], 1), ("c", &["--read-only"], 2)] {
        let server = serve(&store, name, options);
        let mut machine = Machine::connect(&store);
        assert_ne!(machine.features & READ_ONLY, 0, "{name}");
        assert_eq!(machine.read(64), byte, "{name}");
        assert_eq!(machine.write(64, 3), IO_ERROR, "{name}");
        assert_eq!(machine.read(64), byte, "{name}");
        // The interrupts for these came.
        assert!(machine.call.read().unwrap() > 0, "{name}");
        drop(machine);
        server.end();
    }
    store.assert_nothing_runs();
}

/// The journal's record is written while the guest thinks.
#[test]
fn a_guest_that_flushes_after_each_write_finds_its_record_written() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let server = serve(&store, "c", &[]);
    let mut machine = Machine::connect(&store);
    for round in 0..20 {
        assert_eq!(machine.write(round * 8, 1), OK);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(machine.request(FLUSH, 0, &mut [0; 8]), OK);
    }
    let stats = store.json(&["stats", "c"]);
    let flushes = &stats[0]["counters"]["flushes"];
    let ahead = flushes["records_ahead"].as_u64().unwrap();
    assert!(ahead >= 10, "{flushes}");
    drop(machine);
    server.end();
}

#[test]
fn a_machine_hears_that_its_disk_grew_whether_it_was_connected_then_or_not() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let server = serve(&store, "c", &[]);
    // No machine is there to hear of it.
    store.ok(&["resize", "c", "1G"]);
    let mut machine = Machine::connect(&store);
    for size in [1 << 30, 2 << 30] {
        let mut message = [0; 12];
        machine.channel.read_exact(&mut message).unwrap();
        assert_eq!(message[..4], CONFIG_CHANGE.to_ne_bytes());
        assert_eq!(machine.capacity(), size);
        if size == 1 << 30 {
            store.ok(&["resize", "c", "2G"]);
        }
    }
    drop(machine);
    server.end();
}
