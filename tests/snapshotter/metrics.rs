//! What Prometheus is told.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use crate::ports::free_port;
use crate::snapshotter_support::rig::Rig;
use crate::snapshotter_support::wait_for;

fn get(address: &str, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Parsed as the OpenMetrics specification has it: types, suffixes, units, buckets, order.
fn strictly_parsed(response: &str) {
    let (_, text) = response.split_once("\r\n\r\n").unwrap();
    // The parser refuses units of histograms, which the specification has in its own examples.
    let is_histogram = |line: &str| {
        let name = line.split(' ').nth(2).unwrap_or_default();
        text.contains(&format!("# TYPE {name} histogram"))
    };
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with("# UNIT") || !is_histogram(line))
        .map(|line| format!("{line}\n"))
        .collect();
    let parsed = openmetrics_parser::openmetrics::parse_openmetrics(&text);
    let parsed = parsed.unwrap_or_else(|error| panic!("{error:?}\n{text}"));
    for (name, family) in &parsed.families {
        assert!(name.starts_with("vellum_"), "{name}");
        assert!(!family.help.is_empty(), "{name} has no help");
    }
}

#[test]
fn prometheus_gets_calls_snapshots_devices_and_space() {
    let address = format!("127.0.0.1:{}", free_port());
    let rig = Rig::new(&format!("[metrics]\naddress = '{address}'\n"));
    rig.committed("base", "", "file", &"base".repeat(100_000));
    let key = "ns/1/a \"quoted\" \\ key";
    let source = rig.client.prepare(key, "base", &[]).unwrap().source;
    let file = Path::new(&source).join("own");
    fs::write(&file, vec![1; 1 << 20]).unwrap();
    fs::File::open(&file).unwrap().sync_all().unwrap();
    rig.client.view("v", "base", &[]).unwrap();
    rig.client.prepare(key, "base", &[]).unwrap_err();
    wait_for(
        "the committed one's device is gone",
        Duration::from_secs(30),
        || {
            rig.client.cleanup().unwrap();
            get(&address, "/metrics").contains("vellum_backlog 0")
        },
    );
    let text = get(&address, "/metrics");
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    assert!(text.contains("application/openmetrics-text"), "{text}");
    for line in [
        "vellum_requests_total{method=\"prepare\",code=\"Ok\"} 2",
        "vellum_requests_total{method=\"prepare\",code=\"AlreadyExists\"} 1",
        "vellum_request_duration_seconds_count{method=\"commit\"} 1",
        "vellum_snapshots{kind=\"committed\"} 1",
        "vellum_snapshots{kind=\"active\"} 1",
        "vellum_snapshots{kind=\"view\"} 1",
        "vellum_devices{state=\"serving\"} 2",
        "vellum_devices{state=\"failed\"} 0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    let number = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(number("vellum_snapshot_data_bytes{kind=\"committed\"}") > 400_000);
    assert!(number("vellum_store_free_bytes") < number("vellum_store_size_bytes"));
    assert!(text.trim_end().ends_with("# EOF"), "{text}");
    // The container, by its key; views and committed ones have no counters.
    let label = "{kind=\"snapshot\",key=\"ns/1/a \\\"quoted\\\" \\\\ key\"";
    let of = |metric: &str| number(&format!("vellum_container_{metric}{label}"));
    assert!(of("written_bytes_total") >= 1 << 20, "{text}");
    assert!(of("data_bytes") >= 1 << 20);
    // The only active one, and its server is asked once.
    let active = number("vellum_snapshot_data_bytes{kind=\"active\"}");
    assert_eq!(active, of("data_bytes"));
    assert_eq!(of("size_bytes"), 64 << 20);
    assert!(of("flush_duration_seconds_count") > 0);
    let first = text.lines().filter(|line| {
        line.starts_with("vellum_container_writes_total") && line.contains("touch=\"first\"")
    });
    let first: Vec<&str> = first.collect();
    assert!(first.len() == 1 && !first[0].ends_with(" 0"), "{first:?}");
    assert_eq!(number("vellum_containers_left_out"), 0);
    let keys = text
        .lines()
        .filter(|l| l.starts_with("vellum_container_size_bytes"));
    assert_eq!(keys.count(), 1);
    strictly_parsed(&text);
    // Counters only grow, and one that is removed has none any more.
    let written = of("written_bytes_total");
    fs::write(&file, vec![2; 2 << 20]).unwrap();
    fs::File::open(&file).unwrap().sync_all().unwrap();
    let text = get(&address, "/metrics");
    let line = format!("vellum_container_written_bytes_total{label}");
    let line = text.lines().find(|l| l.starts_with(&line)).unwrap();
    let now: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(now >= written + (2 << 20), "{written} to {now}");
    rig.client.remove(key).unwrap();
    assert!(!get(&address, "/metrics").contains("vellum_container_"));
    assert!(get(&address, "/").starts_with("HTTP/1.1 404"));
}
