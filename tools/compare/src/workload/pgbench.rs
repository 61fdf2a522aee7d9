//! PostgreSQL under pgbench.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::{BaseKind, Better, Measured, Metric, Run, Sizes, Workload, missing_user};
use crate::host::{self, Server};
use crate::stats::percentile;

/// The cluster in the image.
const CLUSTER: &str = "cluster";
const USER: &str = "postgres";

/// Where Debian puts the newest version's programs.
pub(super) fn programs() -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .filter(|dir| dir.join("postgres").exists() && dir.join("pgbench").exists())
        .collect();
    versions.sort();
    versions.pop()
}

/// A program of PostgreSQL, as its user.
fn program(name: &str) -> Result<Command> {
    let dir = programs().context("no PostgreSQL under /usr/lib/postgresql")?;
    host::program_as(USER, &dir.join(name))
}

/// A running server.
struct Postgres {
    server: Server,
    /// Its socket, whose path must be short, and a place for logs.
    sockets: tempfile::TempDir,
}

impl Postgres {
    fn start(cluster: &Path) -> Result<Self> {
        let sockets = host::directory_for(USER)?;
        let server = Server::start(
            program("postgres")?
                .arg("-D")
                .arg(cluster)
                .arg("-k")
                .arg(sockets.path())
                .args(["-c", "listen_addresses="]),
            // Ends the sessions and writes a checkpoint.
            Signal::SIGINT,
            || {
                program("pg_isready").is_ok_and(|mut ready| {
                    let ready = ready.arg("-q").arg("-h").arg(sockets.path());
                    host::run(ready).is_ok()
                })
            },
        )?;
        Ok(Postgres { server, sockets })
    }

    /// pgbench as a client of this server.
    fn bench(&self) -> Result<Command> {
        let mut command = program("pgbench")?;
        command
            .arg("-h")
            .arg(self.sockets.path())
            .current_dir(self.sockets.path());
        Ok(command)
    }
}

/// Puts a cluster into the image's tree.
pub(super) fn fill(tree: &Path, sizes: &Sizes) -> Result<()> {
    let cluster = tree.join(CLUSTER);
    host::give(&cluster, USER)?;
    // Nothing has to survive a crash while it is made.
    host::run(program("initdb")?.arg("-D").arg(&cluster).args([
        "-A",
        "trust",
        "--no-sync",
        "--no-instructions",
    ]))?;
    let postgres = Postgres::start(&cluster)?;
    let scale = sizes.pg_scale.to_string();
    host::run(postgres.bench()?.args(["-i", "-q", "-s", &scale, USER]))?;
    postgres.server.stop()?;
    host::sync_fs(tree)
}

/// TPC-B-like transactions.
pub(super) struct Pgbench;

impl Workload for Pgbench {
    fn id(&self) -> String {
        "pgbench".to_owned()
    }

    fn title(&self) -> String {
        "PostgreSQL under pgbench".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        let (_, steady) = windows(sizes.pg_seconds);
        format!(
            "PostgreSQL with its default settings (every commit is durable) starts on a cluster \
             that the image holds (pgbench scale {}, about {} MB) with a cold cache, and pgbench \
             runs its TPC-B-like transactions with 4 clients for {} s. The first 30 s (or half) \
             and the first minute, where it lasts so long, with the first touch of most blocks, \
             apart from the last {steady} s.",
            sizes.pg_scale,
            sizes.pg_scale * 15 + 40,
            sizes.pg_seconds
        )
    }

    fn headline(&self) -> bool {
        true
    }

    fn caveats(&self) -> &'static str {
        "Start-up and first touches come together, as they do in use. Short runs end before a \
         checkpoint of PostgreSQL, which writes each page anew; with --pg-seconds 360 there \
         is one. Two processors for clients, server and driver are few, and then what a \
         driver computes counts twice."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("first30", "first 30 s", "TPS", Better::Higher),
            Metric::new("minute", "first minute", "TPS", Better::Higher).detail(),
            Metric::new("steady", "steady", "TPS", Better::Higher),
            Metric::new("start", "start of the server", "ms", Better::Lower).detail(),
            Metric::new("p50", "latency, median", "ms", Better::Lower).detail(),
            Metric::new("p95", "latency, 95 %", "ms", Better::Lower).detail(),
            Metric::new("p99", "latency, 99 %", "ms", Better::Lower),
        ];
        metrics.extend(Metric::costs());
        metrics
    }

    fn base(&self) -> BaseKind {
        BaseKind::Cluster
    }

    fn weight(&self) -> f64 {
        10.0
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        if programs().is_none() {
            return Some(
                "PostgreSQL is not installed (Debian: apt-get install postgresql)".to_owned(),
            );
        }
        missing_user(USER)
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let started = run.container()?;
        run.cold(&started)?;
        let mut measured = Measured::default();
        let meter = run.meter();
        let begin = std::time::Instant::now();
        let postgres = Postgres::start(&started.access.dir()?.join(CLUSTER))?;
        measured.add("start", begin.elapsed().as_secs_f64() * 1000.0);
        let seconds = run.sizes.pg_seconds.to_string();
        let bench = host::run(
            postgres
                .bench()?
                .args(["-n", "-c", "4", "-j", "2", "-l", "--log-prefix=log", "-T"])
                .args([&seconds, USER]),
        )?;
        let log = Transactions::read(postgres.sockets.path())?;
        let server = postgres.server.stop()?;
        measured.cpu(meter.stop(server + bench.cpu));
        log.summary(run.sizes.pg_seconds, &mut measured);
        measured.picture = run.image.picture(run.name, run.scratch);
        run.done(&started, &mut measured)?;
        Ok(measured)
    }
}

/// How many seconds count as the first part, and how many as steady, of a run of so many.
fn windows(seconds: u32) -> (u32, u32) {
    let first = if seconds > 30 { 30 } else { seconds / 2 };
    (first.max(1), (seconds / 3).clamp(1, 60))
}

/// Every transaction of a run.
#[derive(Debug, Default)]
struct Transactions {
    /// When it ended (seconds, from the start of the first) and how long it took (ms).
    done: Vec<(f64, f64)>,
}

impl Transactions {
    /// From pgbench's logs in a directory.
    fn read(dir: &Path) -> Result<Self> {
        let mut lines = String::new();
        for entry in fs::read_dir(dir)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("log.") {
                lines.push_str(&fs::read_to_string(entry.path())?);
            }
        }
        Self::parse(&lines).context("pgbench logged no transaction")
    }

    /// Lines of: client, number, latency in µs, script, second, microsecond of the end.
    fn parse(lines: &str) -> Option<Self> {
        let mut done: Vec<(f64, f64)> = lines
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(' ').skip(2);
                let latency: f64 = fields.next()?.parse().ok()?;
                let second: f64 = fields.nth(1)?.parse().ok()?;
                let micro: f64 = fields.next()?.parse().ok()?;
                Some((second + micro / 1e6, latency / 1000.0))
            })
            .collect();
        let starts = done.iter().map(|(end, latency)| end - latency / 1000.0);
        let origin = starts.min_by(f64::total_cmp)?;
        for (end, _) in &mut done {
            *end -= origin;
        }
        Some(Transactions { done })
    }

    fn rate(&self, from: f64, to: f64) -> f64 {
        let within = self.done.iter().filter(|(end, _)| (from..to).contains(end));
        within.count() as f64 / (to - from)
    }

    /// Of each of some twenty pieces of a run of so many seconds: its end, and the median and the 99th
    /// percentile of the latencies of what ended in it. A piece in which nothing ended has none.
    fn latencies(&self, seconds: f64) -> Vec<[f64; 3]> {
        const PIECES: u32 = 24;
        let step = seconds / f64::from(PIECES);
        (1..=PIECES)
            .filter_map(|number| {
                let end = f64::from(number) * step;
                let within = self
                    .done
                    .iter()
                    .filter(|(at, _)| (end - step..end).contains(at));
                let mut of: Vec<f64> = within.map(|(_, latency)| *latency).collect();
                of.sort_by(f64::total_cmp);
                Some([end, percentile(&of, 0.5)?, percentile(&of, 0.99)?])
            })
            .collect()
    }

    fn summary(&self, seconds: u32, measured: &mut Measured) {
        let (first, steady) = windows(seconds);
        measured.curve = (0..seconds)
            .map(|second| self.rate(f64::from(second), f64::from(second + 1)))
            .collect();
        measured.latency = self.latencies(f64::from(seconds));
        measured.add("first30", self.rate(0.0, f64::from(first)));
        if seconds >= 60 {
            measured.add("minute", self.rate(0.0, 60.0));
        }
        let from = f64::from(seconds - steady);
        measured.add("steady", self.rate(from, f64::from(seconds)));
        let mut latencies: Vec<f64> = self.done.iter().map(|(_, latency)| *latency).collect();
        latencies.sort_by(f64::total_cmp);
        for (id, part) in [("p50", 0.5), ("p95", 0.95), ("p99", 0.99)] {
            if let Some(value) = percentile(&latencies, part) {
                measured.add(id, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_counts_transactions_by_the_second_from_the_first_one_on() {
        // Started at 99.5 s, so ends fall into the seconds 0 (two), 2 (one).
        let log = "0 0 500000 0 100 0\n1 0 100000 0 100 400000\n0 1 9000 0 102 0\n";
        let transactions = Transactions::parse(log).unwrap();
        let mut measured = Measured::default();
        transactions.summary(3, &mut measured);
        assert_eq!(measured.curve, [2.0, 0.0, 1.0]);
        let value = |id| {
            let found = measured.values.iter().find(|(name, _)| *name == id);
            found.unwrap().1
        };
        assert_eq!(value("first30"), 2.0);
        assert_eq!(value("steady"), 1.0);
        assert_eq!(value("p50"), 100.0);
    }

    #[test]
    fn the_first_half_minute_the_first_minute_and_the_last_third_are_apart() {
        let mut log = String::new();
        for second in 0..90 {
            // One a second, and nine more in each second of the last third.
            for _ in 0..if second >= 60 { 10 } else { 1 } {
                log.push_str(&format!("0 0 0 0 {second} 500000 0\n"));
            }
        }
        let mut measured = Measured::default();
        Transactions::parse(&log)
            .unwrap()
            .summary(90, &mut measured);
        let value = |id| {
            let found = measured.values.iter().find(|(name, _)| *name == id);
            found.unwrap().1
        };
        assert_eq!((value("first30"), value("minute")), (1.0, 1.0));
        assert_eq!(value("steady"), 10.0);
    }

    #[test]
    fn latencies_are_of_pieces_of_the_run_from_its_start_on() {
        // One of 1 s at the start, then one of 10 ms every half second, until 12 s.
        let mut log = "0 0 1000000 0 100 0\n".to_owned();
        for half in 0..22 {
            let (second, micro) = (101 + half / 2, (half % 2) * 500_000 + 100_000);
            log.push_str(&format!("0 0 10000 0 {second} {micro}\n"));
        }
        let found = Transactions::parse(&log).unwrap().latencies(12.0);
        assert_eq!(found.first().unwrap()[1..], [1000.0, 1000.0]);
        assert!(found.iter().skip(1).all(|piece| piece[1..] == [10.0, 10.0]));
        assert!(found.last().unwrap()[0] <= 12.0 && found.is_sorted());
        assert!(Transactions::default().latencies(12.0).is_empty());
    }

    #[test]
    fn an_empty_log_is_an_error() {
        assert!(Transactions::parse("").is_none());
        assert!(Transactions::parse("nonsense\n").is_none());
    }
}
