//! The NBD server against raw clients: concurrency, limits, and clients that misbehave.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use vellum_base::ErrorKind;
use vellum_base::block::BlockDevice;
use vellum_export::nbd::{Export, Server, ServerConfig, bind_tcp};

use crate::lab::{Lab, PATIENCE, SIZE};
use crate::raw::{
    Client, DISC, FLUSH, READ, Running, TRIM, WRITE, closed, go_script, header, memory,
};

#[test]
fn a_flush_that_takes_long_does_not_hold_up_reads_and_writes() {
    let lab = Lab::stuck();
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut client = running.client();
    client.send(FLUSH, 0, 77, 0, 0);
    lab.await_flushing(1);
    client.write(0, 0, &[1; 4096]);
    assert_eq!(client.read(0, 4096), [1; 4096]);
    lab.let_go();
    assert_eq!(client.reply().unwrap(), (0, 77));
}

#[test]
fn writes_that_find_the_disk_full_wait_for_room_while_other_requests_are_served() {
    let lab = Arc::new(Lab::new());
    lab.full.store(true, SeqCst);
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut client = running.client();
    // Short ones, which are served by the thread that reads, and long ones, which are not.
    for cookie in 10..20 {
        let len = if cookie % 2 == 0 { 4096 } else { 200_000 };
        client.send_write(0, cookie, cookie << 20, &vec![cookie as u8; len]);
    }
    assert_eq!(client.read(0, 4096), [0; 4096]);
    client.send(FLUSH, 0, 77, 0, 0);
    assert_eq!(client.reply().unwrap(), (0, 77));
    client.send(TRIM, 0, 78, 0, 4096);
    assert_eq!(client.reply().unwrap(), (0, 78));
    lab.full.store(false, SeqCst);
    let mut replies: Vec<_> = (10..20).map(|_| client.reply().unwrap()).collect();
    replies.sort_unstable();
    assert_eq!(
        replies,
        (10..20).map(|cookie| (0, cookie)).collect::<Vec<_>>()
    );
    assert_eq!(client.read(15 << 20, 4096), [15; 4096]);
    // A server that is told to end does not wait.
    lab.full.store(true, SeqCst);
    let before = lab.waited.load(SeqCst);
    client.send_write(0, 99, 0, &[9; 4096]);
    while lab.waited.load(SeqCst) == before {
        thread::sleep(Duration::from_millis(1));
    }
    running.server.shutdown().unwrap();
    assert_eq!(client.reply().unwrap(), (28, 99));
}

#[test]
fn a_flush_on_one_connection_is_one_flush_of_the_device_for_all_of_them() {
    let lab = Arc::new(Lab::new());
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut writers: Vec<Client> = (0..4).map(|_| running.client()).collect();
    for (i, client) in writers.iter_mut().enumerate() {
        client.write(0, i as u64 * 4096, &[i as u8 + 1; 4096]);
    }
    let mut flusher = running.client();
    flusher.send(FLUSH, 0, 5, 0, 0);
    assert_eq!(flusher.reply().unwrap(), (0, 5));
    assert_eq!(lab.flushed.load(SeqCst), 1);
    // What one connection wrote every other one reads.
    for (i, client) in writers.iter_mut().rev().enumerate() {
        assert_eq!(client.read(i as u64 * 4096, 4096), [i as u8 + 1; 4096]);
    }
}

#[test]
fn slow_reads_of_one_connection_run_at_the_same_time() {
    let lab = Arc::new(Lab::slow(Duration::from_millis(3)));
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut client = running.client();
    for cookie in 0..64 {
        client.send(READ, 0, cookie, cookie * 4096, 4096);
    }
    let mut seen = [false; 64];
    for _ in 0..64 {
        let (error, cookie) = client.reply().unwrap();
        assert_eq!(error, 0);
        assert!(!std::mem::replace(&mut seen[cookie as usize], true));
        client.stream.read_exact(&mut [0; 4096]).unwrap();
    }
    let most = lab.most.load(SeqCst);
    let threads = ServerConfig::default().threads_per_connection;
    assert!((4..=threads).contains(&most), "{most} at the same time");
}

#[test]
fn long_writes_in_flight_stay_within_the_limit_in_bytes() {
    let lab = Arc::new(Lab::slow(Duration::from_millis(4)));
    let config = ServerConfig {
        bytes_in_flight: 2 << 20,
        ..ServerConfig::default()
    };
    let running = Running::new(config, lab.clone());
    let mut client = running.client();
    let data = vec![9; 1 << 20];
    for cookie in 0..16 {
        client.send_write(0, cookie, cookie << 20, &data);
    }
    for _ in 0..16 {
        assert_eq!(client.reply().unwrap().0, 0);
    }
    assert_eq!(lab.most_bytes.load(SeqCst), 2 << 20);
    // A request longer than the limit is served all the same, alone.
    let data = vec![8; 5 << 20];
    client.write(0, 0, &data);
    assert!(client.read(0, 5 << 20) == data);
}

#[test]
fn many_connections_write_and_read_back_their_own_blocks() {
    let running = Running::new(ServerConfig::default(), memory());
    thread::scope(|scope| {
        for id in 0..16u64 {
            let running = &running;
            scope.spawn(move || {
                let mut client = running.client();
                for round in 0..30u64 {
                    let offset = id * (4 << 20) + round * 70_000 + round;
                    // Short and long, in order and with FUA.
                    let len = [512, 4096, 70_000, 65_536][round as usize % 4];
                    let fill = (id * 31 + round) as u8;
                    client.write((round % 3 == 0).into(), offset, &vec![fill; len]);
                    let data = client.read(offset, len as u32);
                    assert!(data.iter().all(|byte| *byte == fill));
                }
                client.send(DISC, 0, 0, 0, 0);
                client.closed();
            });
        }
    });
    running.await_connections(0);
}

#[test]
fn shutdown_waits_for_requests_in_flight_and_sends_their_replies() {
    let lab = Lab::stuck();
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut client = running.client();
    let mut idle = running.client();
    client.send(FLUSH, 0, 7, 0, 0);
    lab.await_flushing(1);
    thread::scope(|scope| {
        let stopping = scope.spawn(|| running.server.shutdown());
        idle.closed();
        assert!(!stopping.is_finished());
        lab.let_go();
        assert_eq!(client.reply().unwrap(), (0, 7));
        client.closed();
        stopping.join().unwrap().unwrap();
    });
    assert_eq!(running.server.connections("disk"), Some(0));
}

#[test]
fn shutdown_serves_what_had_arrived_before_it() {
    let device = memory();
    let running = Running::new(ServerConfig::default(), device.clone());
    let mut client = running.client();
    for cookie in 0..100 {
        client.send_write(0, cookie, cookie * 4096, &[5; 4096]);
    }
    running.server.shutdown().unwrap();
    // Replies come in any order: requests of one connection run side by side.
    let mut served = [false; 100];
    for _ in 0..100 {
        let (error, cookie) = client.reply().unwrap();
        assert_eq!(error, 0);
        assert!(!std::mem::replace(&mut served[cookie as usize], true));
    }
    client.closed();
    let mut data = vec![0; 100 * 4096];
    device.read_at(&mut data, 0).unwrap();
    assert!(data.iter().all(|byte| *byte == 5));
}

#[test]
fn shutdown_gives_up_on_a_device_that_is_stuck() {
    let lab = Lab::stuck();
    let config = ServerConfig {
        drain_timeout: Duration::from_millis(100),
        ..ServerConfig::default()
    };
    let running = Running::new(config, lab.clone());
    let mut client = running.client();
    client.send(FLUSH, 0, 7, 0, 0);
    lab.await_flushing(1);
    let error = running.server.shutdown().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    client.closed();
    lab.let_go();
}

#[test]
fn a_withdrawn_export_drains_and_lets_go_of_its_device() {
    let lab = Lab::stuck();
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut client = running.client();
    client.send(FLUSH, 0, 7, 0, 0);
    lab.await_flushing(1);
    thread::scope(|scope| {
        let removing = scope.spawn(|| running.server.remove_export("disk"));
        thread::sleep(Duration::from_millis(20));
        assert!(!removing.is_finished());
        lab.let_go();
        assert_eq!(client.reply().unwrap(), (0, 7));
        removing.join().unwrap().unwrap();
    });
    assert_eq!(Arc::strong_count(&lab), 1);
    client.closed();
    assert!(running.try_client().is_err());
    let again = running.server.remove_export("disk").unwrap_err();
    assert_eq!(again.kind(), ErrorKind::NotFound);
    // The server serves on: the same name may come back.
    running
        .server
        .add_export(Export::new("disk", memory()))
        .unwrap();
    running.client().write(0, 0, &[1; 512]);
}

#[test]
fn two_exports_of_one_name_or_with_a_name_the_protocol_cannot_carry_are_refused() {
    let running = Running::new(ServerConfig::default(), memory());
    for (name, kind) in [
        ("disk".to_owned(), ErrorKind::AlreadyExists),
        ("a\0b".to_owned(), ErrorKind::InvalidInput),
        ("a".repeat(4097), ErrorKind::InvalidInput),
    ] {
        let error = running
            .server
            .add_export(Export::new(name, memory()))
            .unwrap_err();
        assert_eq!(error.kind(), kind);
    }
}

#[test]
fn limits_of_zero_are_refused() {
    let configs = [
        ServerConfig {
            max_connections: 0,
            ..ServerConfig::default()
        },
        ServerConfig {
            threads_per_connection: 0,
            ..ServerConfig::default()
        },
        ServerConfig {
            stall_timeout: Duration::ZERO,
            ..ServerConfig::default()
        },
    ];
    for config in configs {
        let error = Server::new(config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn clients_that_are_silent_or_slow_in_the_handshake_are_dropped_in_time() {
    let config = ServerConfig {
        handshake_timeout: Duration::from_secs(1),
        ..ServerConfig::default()
    };
    let running = Running::new(config, memory());
    let mut served = running.client();
    let began = Instant::now();
    let mut silent = running.silent();
    let mut dripping = running.silent();
    thread::scope(|scope| {
        scope.spawn(move || {
            // A byte now and then does not buy time.
            for byte in go_script("disk") {
                if dripping.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(40));
            }
            panic!("a handshake of {:?} was let through", began.elapsed());
        });
        closed(&mut silent);
        assert!(began.elapsed() >= Duration::from_millis(990));
    });
    assert!(began.elapsed() < Duration::from_secs(60));
    // Between requests a served client may be silent for longer than that.
    served.write(0, 0, &[1; 512]);
}

#[test]
fn a_flood_of_silent_clients_keeps_neither_served_nor_new_clients_out() {
    let config = ServerConfig {
        max_handshakes: 8,
        ..ServerConfig::default()
    };
    let running = Running::new(config, memory());
    let mut served = running.client();
    let stop = AtomicBool::new(false);
    let _newcomer = thread::scope(|scope| {
        scope.spawn(|| {
            let mut held = std::collections::VecDeque::new();
            while !stop.load(SeqCst) {
                held.push_back(UnixStream::connect(&running.path));
                if held.len() > 200 {
                    held.pop_front();
                }
            }
        });
        thread::sleep(Duration::from_millis(50));
        let began = Instant::now();
        for i in 0..200 {
            served.write(0, i * 4096, &[1; 4096]);
        }
        let calm = began.elapsed();
        // A newcomer may be turned away at the door, and tries again.
        let mut tries = 0;
        let mut newcomer = loop {
            match running.try_client() {
                Ok(client) => break client,
                Err(_) => tries += 1,
            }
            assert!(tries < 500, "nobody gets in");
        };
        newcomer.write(0, 0, &[2; 512]);
        stop.store(true, SeqCst);
        assert!(calm < Duration::from_secs(60), "200 writes took {calm:?}");
        newcomer
    });
    running.await_connections(2);
}

#[test]
fn clients_beyond_the_limit_are_turned_away_until_one_leaves() {
    let config = ServerConfig {
        max_connections: 2,
        ..ServerConfig::default()
    };
    let running = Running::new(config, memory());
    let mut first = running.client();
    let _second = running.client();
    assert!(running.try_client().is_err());
    first.write(0, 0, &[1; 512]);
    first.send(DISC, 0, 0, 0, 0);
    first.closed();
    running.await_connections(1);
    running.client().write(0, 0, &[1; 512]);
}

#[test]
fn a_newcomer_takes_the_place_of_a_client_that_has_asked_for_nothing_and_of_no_other() {
    let config = ServerConfig {
        max_connections: 2,
        handshake_timeout: Duration::from_millis(300),
        ..ServerConfig::default()
    };
    let running = Running::new(config, memory());
    let mut first = running.client();
    first.write(0, 0, &[1; 512]);
    let mut idler = running.client();
    let began = Instant::now();
    let mut newcomer = loop {
        // Its own handshake may have been too slow on a busy machine.
        match running.try_client() {
            Ok(client) => break client,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    newcomer.write(0, 512, &[2; 512]);
    idler.closed();
    // Both have asked for something: however long they are silent now, they stay.
    thread::sleep(Duration::from_millis(400));
    assert!(running.try_client().is_err());
    first.write(0, 0, &[3; 512]);
    newcomer.write(0, 512, &[4; 512]);
}

/// Memory that this process holds, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<usize>().unwrap() << 10
}

#[test]
fn clients_that_never_end_their_long_writes_take_little_memory_and_keep_nobody_out() {
    let running = Running::new(ServerConfig::default(), memory());
    running.client().write(0, 0, &vec![7; 32 << 20]);
    let before = resident();
    let mut stuck: Vec<_> = (0..16).map(|_| running.client()).collect();
    let most = vec![7; (32 << 20) - 1];
    for client in &mut stuck {
        let request = header(WRITE, 0, 1, 0, 32 << 20);
        client.stream.write_all(&request).unwrap();
        client.stream.write_all(&most).unwrap();
    }
    let took = resident().saturating_sub(before);
    assert!(took < 160 << 20, "{} MiB", took >> 20);
    let mut other = running.client();
    let data = vec![9; 8 << 20];
    other.write(1, 32 << 20, &data);
    assert!(other.read(32 << 20, 8 << 20) == data);
}

#[test]
fn a_long_write_that_fails_in_its_middle_is_answered_once_and_the_next_request_is_understood() {
    let lab = Arc::new(Lab::failing_from(5 << 20));
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut client = running.client();
    client.send_write(1, 1, 0, &vec![1; 8 << 20]);
    assert_eq!(client.reply().unwrap(), (5, 1));
    // What was not written needs no flush to be durable.
    assert_eq!(lab.flushed.load(SeqCst), 0);
    client.send_write(1, 2, 0, &vec![1; 5 << 20]);
    assert_eq!(client.reply().unwrap(), (0, 2));
    assert_eq!(lab.flushed.load(SeqCst), 1);
    client.write(0, 0, &[2; 512]);
    assert_eq!(client.read(0, 512), [2; 512]);
}

#[test]
fn clients_that_stall_within_a_request_are_dropped_and_others_not() {
    let config = ServerConfig {
        stall_timeout: Duration::from_millis(500),
        ..ServerConfig::default()
    };
    let device = memory();
    let running = Running::new(config, device.clone());
    let mut served = running.client();
    // Within a header, a short payload, and a long one.
    for cut in [10, 28, 100, 50_000] {
        let mut stalling = running.client();
        let mut bytes = header(WRITE, 0, 1, 0, 100_000);
        bytes.extend([1; 100_000]);
        if cut == 100 {
            bytes = header(WRITE, 0, 1, 0, 512);
            bytes.extend([1; 512]);
        }
        stalling.stream.write_all(&bytes[..cut]).unwrap();
        stalling.closed();
    }
    // And within the payload of one that is refused.
    let mut stalling = running.client();
    stalling.send(WRITE, 0, 1, SIZE, 100_000);
    stalling.stream.write_all(&[1; 50_000]).unwrap();
    stalling.closed();
    running.await_connections(1);
    served.write(0, 8192, &[2; 512]);
    assert_eq!(served.read(0, 4096), [0; 4096]);
}

#[test]
fn a_client_that_does_not_take_its_replies_is_dropped_and_others_not() {
    let config = ServerConfig {
        stall_timeout: Duration::from_millis(500),
        ..ServerConfig::default()
    };
    let running = Running::new(config, memory());
    let mut served = running.client();
    let mut greedy = running.client();
    greedy
        .stream
        .set_write_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let request = header(READ, 0, 1, 0, 1 << 20);
    for _ in 0..10_000 {
        if greedy.stream.write_all(&request).is_err() {
            break;
        }
    }
    served.write(0, 0, &[2; 512]);
    running.await_connections(1);
    served.write(0, 0, &[2; 512]);
}

#[test]
fn a_client_that_vanishes_within_a_payload_writes_nothing() {
    let device = memory();
    let running = Running::new(ServerConfig::default(), device.clone());
    for (len, sent) in [(4096, 2000), (1 << 20, 700_000)] {
        let mut client = running.client();
        client.send(WRITE, 0, 1, 0, len);
        client.stream.write_all(&vec![1; sent]).unwrap();
        drop(client);
        running.await_connections(0);
    }
    let mut data = vec![9; 1 << 20];
    device.read_at(&mut data, 0).unwrap();
    assert!(data.iter().all(|byte| *byte == 0));
}

#[test]
fn bad_framing_ends_one_connection_alone() {
    let running = Running::new(ServerConfig::default(), memory());
    let mut good = running.client();
    let mut bad = running.client();
    bad.stream.write_all(&[0xff; 28]).unwrap();
    bad.closed();
    running.await_connections(1);
    good.write(0, 0, &[1; 512]);
}

#[test]
fn a_device_that_panics_costs_the_connection_and_not_the_server() {
    let lab = Arc::new(Lab::new());
    let running = Running::new(ServerConfig::default(), lab.clone());
    for flags in [0, 1] {
        let mut client = running.client();
        lab.panics.store(true, SeqCst);
        // In the reader, and, since FUA counts as slow, in another thread.
        client.send_write(flags, 1, 0, &[1; 512]);
        client.closed();
        running.await_connections(0);
        lab.panics.store(false, SeqCst);
        running.client().write(0, 0, &[1; 512]);
        running.await_connections(0);
    }
}

#[test]
fn tcp_serves_on_loopback() {
    let running = Running::new(ServerConfig::default(), memory());
    let listener = bind_tcp("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    assert!(address.ip().is_loopback());
    let server = running.server.clone();
    let serving = thread::spawn(move || server.serve_tcp(listener));
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&go_script("disk")).unwrap();
    stream.read_exact(&mut [0; 52]).unwrap();
    stream.write_all(&header(FLUSH, 0, 3, 0, 0)).unwrap();
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4]);
    running.server.shutdown().unwrap();
    closed(&mut stream);
    serving.join().unwrap().unwrap();
}
