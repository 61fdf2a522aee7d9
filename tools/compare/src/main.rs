//! Measures storage drivers for containers side by side: the same work through each of them, in
//! turns, with a check of durability before any timing; writes report.html and report.json.

mod baseline;
mod cli;
mod cpu;
mod describe;
mod driver;
mod durability;
mod host;
mod plan;
mod program;
mod relay;
mod report;
mod run;
mod schedule;
mod stats;
mod workload;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use cli::{Cli, Measure, Other};
use cpu::HostTime;
use report::{Report, calm, files};

/// The exit status where a driver became slower than its baseline.
const SLOWER: u8 = 3;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.other {
        Some(Other::Diff { a, b }) => baseline::diff(a, b).map(|()| ExitCode::SUCCESS),
        Some(Other::Relay { listen, to, micros }) => {
            relay::listen(listen, to, Duration::from_micros(*micros)).map(|()| ExitCode::SUCCESS)
        }
        None if cli.measure.list => list(&cli.measure).map(|()| ExitCode::SUCCESS),
        None => compare(&cli.measure),
    };
    done.unwrap_or_else(|error| {
        eprintln!("compare: {error:#}");
        ExitCode::FAILURE
    })
}

fn compare(options: &Measure) -> Result<ExitCode> {
    plan::check_names(options)?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "mounting needs root: run it as root, for example with sudo -E"
    );
    // Before the hour's work, not after it.
    let baseline = options.baseline.as_deref().map(baseline::Run::read);
    let baseline = baseline.transpose()?;
    let vellum = program::vellum(options.vellum.as_deref())?;
    let chosen = plan::choose(options, &vellum)?;
    host::catch_signals()?;
    fs::create_dir_all(&options.out).with_context(|| format!("--out {}", options.out.display()))?;

    // Here the clock starts: what had to be built is built.
    let clock = Clock::start();
    let end = plan::end(chosen.limit);
    if let Some(end) = end {
        host::limit_commands(end);
    }
    let mut report = Report {
        command: std::env::args().collect::<Vec<_>>().join(" "),
        started: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        limit: chosen.limit.map(|limit| limit.as_secs_f64()),
        host: describe::host(),
        sizes: chosen.sizes.clone(),
        rounds: chosen.rounds,
        places: chosen.dirs.iter().map(|dir| describe::place(dir)).collect(),
        left_out: chosen.left_out,
        ..Report::default()
    };
    for warning in calm::warnings(&report) {
        eprintln!("compare: {warning}");
    }
    let out = options.out.clone();
    let plan = run::Plan {
        drivers: chosen.drivers,
        workloads: chosen.workloads,
        rounds: chosen.rounds,
        dirs: chosen.dirs,
        sizes: chosen.sizes,
        end,
        save: Box::new(move |report| {
            report.cut_short = Some("it was still running when this was written".to_owned());
            let saved = clock.finish(report, &out);
            host::report(saved.context("the report so far"));
        }),
    };
    let ended = run::run(&plan, &mut report);
    report.cut_short = ended.as_ref().err().map(|error| format!("{error:#}"));
    report.host.load.extend(describe::load());
    clock.finish(&mut report, &options.out)?;
    for name in ["report.html", "report.json"] {
        println!("{}", options.out.join(name).display());
    }
    for warning in calm::warnings(&report) {
        eprintln!("compare: {warning}");
    }
    ended?;
    ensure!(
        report.failures.is_empty(),
        "{} runs failed; the report says which",
        report.failures.len()
    );
    let slower = baseline
        .map(|baseline| baseline::hold(&baseline, &report, options.tolerance))
        .transpose()?;
    Ok(if slower == Some(true) {
        ExitCode::from(SLOWER)
    } else {
        ExitCode::SUCCESS
    })
}

/// When the run began.
#[derive(Clone, Copy)]
struct Clock {
    began: Instant,
    host: Option<HostTime>,
}

impl Clock {
    fn start() -> Self {
        Clock {
            began: Instant::now(),
            host: HostTime::now(),
        }
    }

    /// Works out what the figures say and writes all reports.
    fn finish(self, report: &mut Report, out: &Path) -> Result<()> {
        report.seconds = self.began.elapsed().as_secs_f64();
        if let Some((now, then)) = HostTime::now().zip(self.host) {
            (_, report.host.steal) = now.since(then);
        }
        report.summarise();
        files::write(report, out)
    }
}

fn list(options: &Measure) -> Result<()> {
    let sizes = plan::sizes(options);
    let mut text = "Drivers:\n".to_owned();
    let line = |id: &str, title: &str, absent: Option<String>| {
        let absent = absent.map(|why| format!(" (absent: {why})"));
        format!("  {id:18} {title}{}\n", absent.unwrap_or_default())
    };
    for driver in driver::all(Path::new("vellum"), &options.qemu, &options.driver)? {
        text += &line(driver.about().id, driver.about().title, driver.absent());
    }
    text += "Workloads (* the six of --quick, which come first):\n";
    for workload in workload::all() {
        let star = if workload.headline() { "* " } else { "" };
        let title = format!("{star}{}", workload.title());
        text += &line(&workload.id(), &title, workload.absent(&sizes));
    }
    match std::io::stdout().write_all(text.as_bytes()) {
        // Who reads has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("standard output"),
    }
}
