//! What a flush would have to do is begun once a write is answered, where a flush is likely to come.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

use vellum_export::nbd::ServerConfig;

use crate::common::TestStore;
use crate::lab::{Lab, PATIENCE};
use crate::nbd_client;
use crate::nbd_server::Server;
use crate::raw::{FLUSH, Running, WRITE, header};

const FUA: u16 = 1;

fn expecting(lab: Lab) -> (Arc<Lab>, Running) {
    lab.flushes_soon.store(true, SeqCst);
    let lab = Arc::new(lab);
    (lab.clone(), Running::new(ServerConfig::default(), lab))
}

/// Waits until the device was asked so often.
fn await_ahead(lab: &Lab, wanted: usize) {
    let began = Instant::now();
    while lab.ahead.load(SeqCst) != wanted {
        let found = lab.ahead.load(SeqCst);
        assert!(began.elapsed() < PATIENCE, "{found}, not {wanted}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_write_is_answered_before_the_flush_that_is_likely_to_come_is_prepared() {
    let lab = Lab::stuck();
    lab.flushes_soon.store(true, SeqCst);
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut client = running.client();
    client.write(0, 0, &[1; 4096]);
    await_ahead(&lab, 1);
    // Nobody else waits for it.
    assert_eq!(running.client().read(0, 4096), [1; 4096]);
    lab.let_go();
    client.write(0, 0, &[2; 4096]);
    await_ahead(&lab, 2);
}

/// A client whose requests are served one after the other, whether they are slow or not.
fn while_requests_wait(lab: Lab) {
    lab.flushes_soon.store(true, SeqCst);
    let lab = Arc::new(lab);
    let config = ServerConfig {
        threads_per_connection: 1,
        ..ServerConfig::default()
    };
    let running = Running::new(config, lab.clone());
    let mut client = running.client();
    let mut three = Vec::new();
    for cookie in 1..=3 {
        three.extend(header(WRITE, 0, cookie, cookie * 4096, 4096));
        three.extend([cookie as u8; 4096]);
    }
    // One message, so all of them are there at once.
    client.stream.write_all(&three).unwrap();
    for cookie in 1..=3 {
        assert_eq!(client.reply().unwrap(), (0, cookie));
    }
    await_ahead(&lab, 1);
    client.read(0, 4096);
    // A write that is durable already, and one with the flush right behind it.
    client.write(FUA, 0, &[1; 4096]);
    let mut flushed = header(WRITE, 0, 7, 0, 4096);
    flushed.extend([7; 4096]);
    flushed.extend(header(FLUSH, 0, 8, 0, 0));
    client.stream.write_all(&flushed).unwrap();
    assert_eq!(client.reply().unwrap(), (0, 7));
    assert_eq!(client.reply().unwrap(), (0, 8));
    client.read(0, 4096);
    assert_eq!(lab.ahead.load(SeqCst), 1);
}

#[test]
fn while_requests_wait_to_be_answered_no_flush_is_prepared() {
    while_requests_wait(Lab::new());
}

#[test]
fn while_requests_wait_behind_slow_writes_no_flush_is_prepared() {
    while_requests_wait(Lab::slow(Duration::from_millis(3)));
}

/// Wherever the threads are when the last of the writes is answered, one of them prepares the flush.
#[test]
fn of_slow_writes_that_are_served_beside_each_other_the_last_is_followed_by_one_preparation() {
    let (lab, running) = expecting(Lab::slow(Duration::from_millis(3)));
    let mut client = running.client();
    client.write(0, 0, &[1; 4096]);
    for round in 0..50 {
        await_ahead(&lab, round + 1);
        let mut four = Vec::new();
        for cookie in 1..=4 {
            four.extend(header(WRITE, 0, cookie, cookie * 4096, 4096));
            four.extend([cookie as u8; 4096]);
        }
        client.stream.write_all(&four).unwrap();
        for _ in 1..=4 {
            assert_eq!(client.reply().unwrap().0, 0);
        }
    }
    await_ahead(&lab, 51);
}

#[test]
fn what_came_while_a_write_was_served_goes_before_the_flush_that_is_likely_to_come() {
    let (lab, running) = expecting(Lab::slow(Duration::from_millis(500)));
    let mut client = running.client();
    client.send_write(0, 1, 0, &[1; 4096]);
    while lab.most.load(SeqCst) == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    client.send_write(0, 2, 4096, &[2; 4096]);
    assert_eq!(client.reply().unwrap(), (0, 1));
    assert_eq!(client.reply().unwrap(), (0, 2));
    await_ahead(&lab, 1);
    assert_eq!(client.read(0, 4096), [1; 4096]);
    assert_eq!(lab.ahead.load(SeqCst), 1);
}

#[test]
fn while_a_request_is_in_flight_no_flush_is_prepared() {
    let lab = Lab::stuck();
    lab.flushes_soon.store(true, SeqCst);
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut client = running.client();
    client.send(FLUSH, 0, 77, 0, 0);
    lab.await_flushing(1);
    client.write(0, 0, &[1; 4096]);
    assert_eq!(client.read(0, 4096), [1; 4096]);
    assert_eq!(lab.ahead.load(SeqCst), 0);
    lab.let_go();
    assert_eq!(client.reply().unwrap(), (0, 77));
}

#[test]
fn a_slow_write_too_is_answered_and_then_the_flush_prepared() {
    let (lab, running) = expecting(Lab::slow(Duration::from_millis(3)));
    let mut client = running.client();
    // The first one shows that writes are slow here; the others are served aside. Then long ones.
    for (done, len) in [(1, 4096), (2, 4096), (3, 4096), (4, 100_000), (5, 100_000)] {
        client.write(0, 0, &vec![1; len]);
        await_ahead(&lab, done);
    }
}

#[test]
fn without_a_flush_to_come_nothing_is_prepared() {
    let lab = Arc::new(Lab::new());
    let running = Running::new(ServerConfig::default(), lab.clone());
    let mut client = running.client();
    client.write(0, 0, &[1; 4096]);
    client.write(0, 0, &[1; 100_000]);
    client.read(0, 4096);
    assert_eq!(lab.ahead.load(SeqCst), 0);
}

/// The journal's record is written while the client thinks.
#[test]
fn a_client_that_flushes_after_each_write_finds_its_record_written() {
    let store = TestStore::new();
    store.small_image("base");
    store.ok(&["create", "base", "--name", "c"]);
    let server = Server::start(&store, &["c"]);
    let mut client = nbd_client::Client::new(&server.socket, "c");
    for round in 0..20 {
        client.write(round * 4096, 4096, 1);
        thread::sleep(Duration::from_millis(5));
        client.request(FLUSH, 0, 0, 0, &[]);
    }
    let stats = store.json(&["stats", "c"]);
    let flushes = &stats[0]["counters"]["flushes"];
    let ahead = flushes["records_ahead"].as_u64().unwrap();
    assert!(ahead >= 10, "{flushes}");
}
