//! MariaDB under sysbench.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{BaseKind, Better, Measured, Metric, Run, Sizes, Workload, missing, missing_user};
use crate::host::{self, Server, find_program};

/// The data directory in the image.
const DATA: &str = "mariadb";
const USER: &str = "mysql";
const TABLES: u32 = 4;

/// A program, as the server's user.
fn program(name: &str) -> Result<Command> {
    let file = find_program(name).with_context(|| format!("{name} is not installed"))?;
    host::program_as(USER, &file)
}

/// A running server, with Debian's defaults of the program itself: every commit is durable.
struct MariaDb {
    server: Server,
    /// Its socket, whose path must be short.
    sockets: tempfile::TempDir,
}

impl MariaDb {
    fn start(data: &Path) -> Result<Self> {
        let sockets = host::directory_for(USER)?;
        let socket = sockets.path().join("s");
        let server = Server::start(
            program("mariadbd")?
                .args(["--no-defaults", "--skip-networking", "--skip-log-bin"])
                .arg(format!("--datadir={}", data.display()))
                .arg(format!("--tmpdir={}", sockets.path().display()))
                .arg(format!("--socket={}", socket.display()))
                .arg(format!("--pid-file={}", sockets.path().join("p").display())),
            Signal::SIGTERM,
            || {
                socket.exists()
                    && program("mariadb-admin").is_ok_and(|mut ping| {
                        let ping = ping.arg("--no-defaults").arg("-S").arg(&socket);
                        host::run(ping.args(["-u", "root", "ping"])).is_ok()
                    })
            },
        )?;
        Ok(MariaDb { server, sockets })
    }

    /// sysbench as a client of this server.
    fn bench(&self, sizes: &Sizes) -> Result<Command> {
        let mut command = program("sysbench")?;
        command
            .args(["oltp_read_write", "--db-driver=mysql"])
            .args(["--mysql-user=root", "--mysql-db=sbtest"])
            .arg(format!(
                "--mysql-socket={}",
                self.sockets.path().join("s").display()
            ))
            .arg(format!("--tables={TABLES}"))
            .arg(format!("--table-size={}", sizes.maria_rows))
            .arg("--threads=4");
        Ok(command)
    }
}

/// Puts a data directory with filled tables into the image's tree.
pub(super) fn fill(tree: &Path, sizes: &Sizes) -> Result<()> {
    let data = tree.join(DATA);
    host::give(&data, USER)?;
    let scratch = host::directory_for(USER)?;
    host::run(
        Command::new(find_program("mariadb-install-db").context("mariadb-install-db")?)
            .env("TMPDIR", scratch.path())
            .args(["--no-defaults", "--skip-test-db"])
            .args(["--user=mysql", "--auth-root-authentication-method=normal"])
            .arg(format!("--datadir={}", data.display())),
    )?;
    let maria = MariaDb::start(&data)?;
    host::run(
        program("mariadb")?
            .arg("--no-defaults")
            .arg("-S")
            .arg(maria.sockets.path().join("s"))
            .args(["-u", "root", "-e", "CREATE DATABASE sbtest"]),
    )?;
    host::run(maria.bench(sizes)?.arg("prepare"))?;
    maria.server.stop()?;
    host::sync_fs(tree)
}

/// sysbench's read-write transactions.
pub(super) struct Sysbench;

impl Workload for Sysbench {
    fn id(&self) -> String {
        "mariadb".to_owned()
    }

    fn title(&self) -> String {
        "MariaDB under sysbench".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "mariadbd without any configuration file (every commit is durable) starts on a data \
             directory that the image holds ({TABLES} tables of {} rows) with a cold cache, and \
             sysbench runs oltp_read_write with 4 threads for {} s. The first third apart from the \
             last.",
            sizes.maria_rows, sizes.maria_seconds
        )
    }

    fn caveats(&self) -> &'static str {
        "As for PostgreSQL: start-up and first touches come together, and short runs see no \
         late checkpoint."
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![
            Metric::new("first", "first third", "TPS", Better::Higher),
            Metric::new("steady", "last third", "TPS", Better::Higher),
            Metric::new("start", "start of the server", "ms", Better::Lower).detail(),
            Metric::new("p95", "latency, 95 %", "ms", Better::Lower),
        ];
        metrics.extend(Metric::costs());
        metrics
    }

    fn base(&self) -> BaseKind {
        BaseKind::MariaDb
    }

    fn weight(&self) -> f64 {
        6.0
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        missing(&[
            ("mariadbd", "mariadb-server"),
            ("mariadb-install-db", "mariadb-server"),
            ("mariadb-admin", "mariadb-client"),
            ("sysbench", "sysbench"),
        ])
        .or_else(|| missing_user(USER))
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let started = run.container()?;
        run.cold(&started)?;
        let mut measured = Measured::default();
        let meter = run.meter();
        let begin = std::time::Instant::now();
        let maria = MariaDb::start(&started.access.dir()?.join(DATA))?;
        measured.add("start", begin.elapsed().as_secs_f64() * 1000.0);
        let bench = host::run(
            maria
                .bench(run.sizes)?
                .arg(format!("--time={}", run.sizes.maria_seconds))
                .args(["--report-interval=1", "--percentile=95", "run"]),
        )?;
        let server = maria.server.stop()?;
        measured.cpu(meter.stop(server + bench.cpu));
        summary(&bench.stdout, &mut measured)?;
        run.done(&started, &mut measured)?;
        Ok(measured)
    }
}

/// Transactions a second, from the lines like `[ 1s ] thds: 4 tps: 748.48 qps: …`.
fn summary(said: &str, measured: &mut Measured) -> Result<()> {
    let after = |line: &str, label: &str| -> Option<f64> {
        let (_, rest) = line.split_once(label)?;
        rest.split_whitespace().next()?.parse().ok()
    };
    let curve: Vec<f64> = said
        .lines()
        .filter(|line| line.starts_with('['))
        .filter_map(|line| after(line, " tps: "))
        .collect();
    ensure!(!curve.is_empty(), "sysbench reported no transaction");
    let part = (curve.len() / 3).max(1);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    measured.add("first", mean(curve.get(..part).unwrap_or_default()));
    let last = curve.get(curve.len() - part..).unwrap_or_default();
    measured.add("steady", mean(last));
    let p95 = said
        .lines()
        .find_map(|line| after(line, "95th percentile:"));
    if let Some(p95) = p95 {
        measured.add("p95", p95);
    }
    measured.curve = curve;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysbench_lines_become_a_curve_with_its_first_and_last_third() {
        let said = "Threads started!\n\
             [ 1s ] thds: 4 tps: 10.00 qps: 1 lat (ms,95%): 10.09 err/s: 0.00\n\
             [ 2s ] thds: 4 tps: 20.00 qps: 1\n\
             [ 3s ] thds: 4 tps: 40.50 qps: 1\n\
             \x20        95th percentile:                       12.34\n";
        let mut measured = Measured::default();
        summary(said, &mut measured).unwrap();
        assert_eq!(measured.curve, [10.0, 20.0, 40.5]);
        let value = |id| {
            let found = measured.values.iter().find(|(name, _)| *name == id);
            found.unwrap().1
        };
        assert_eq!((value("first"), value("steady")), (10.0, 40.5));
        assert_eq!(value("p95"), 12.34);
        assert!(summary("FATAL: error", &mut measured).is_err());
    }
}
