//! Measures storage drivers for containers side by side: the same work through each of them, in
//! turns, with a check of durability before any timing; writes report.html and report.json.

mod cpu;
mod driver;
mod durability;
mod host;
mod report;
mod run;
mod schedule;
mod stats;
mod workload;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use report::{Host, Place, Report, html};
use workload::{BaseKind, Sizes};

/// Measure storage drivers for containers side by side.
///
/// Each workload runs through each driver that this host has, in turns, round by round. Needs
/// root. Writes report.html, for people, and report.json, with every figure.
#[derive(Debug, Parser)]
#[command(
    name = "compare",
    version,
    max_term_width = 100,
    args_override_self = true
)]
struct Cli {
    /// Only these drivers (the references always run too); see --list
    #[arg(long, value_delimiter = ',', value_name = "ID")]
    drivers: Vec<String>,
    /// Only these workloads; see --list
    #[arg(long, value_delimiter = ',', value_name = "ID")]
    workloads: Vec<String>,
    /// Rounds; fewer than three prove nothing [default: 5, with --quick 1]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Measure on the file system of this directory; may be given several times
    /// [default: /var/tmp and /dev/shm, so disk and memory]
    #[arg(long, value_name = "DIR")]
    dir: Vec<PathBuf>,
    /// A first impression within 5 minutes: small sizes, one round, the rest left out
    #[arg(long)]
    quick: bool,
    /// Take this long in all; what says least is left out first, and the report says what
    /// [default: 40 for each directory, with --quick 4.5; 0 for no limit]
    #[arg(long, value_name = "MINUTES")]
    time_limit: Option<f64>,
    /// Scale of pgbench: 15 MB each [default: 130, so 2 GB; with --quick 3]
    #[arg(long, value_name = "N")]
    pg_scale: Option<u32>,
    /// Seconds of pgbench; 60 or more for figures of the first minute [default: 45, with --quick 4]
    #[arg(long, value_name = "N")]
    pg_seconds: Option<u32>,
    /// The tree of many small files
    #[arg(long, value_name = "DIR", default_value = "/usr/include")]
    tree: PathBuf,
    /// Write the reports into this directory
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
    /// The vellum program [default: the release build of this workspace, built first]
    #[arg(long, value_name = "FILE", env = "VELLUM_BIN")]
    vellum: Option<PathBuf>,
    /// Hardly any work, to see that everything works
    #[arg(long, hide = true)]
    smoke: bool,
    /// List drivers and workloads, with what this host lacks
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match compare(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

const MIB: u64 = 1 << 20;

/// How much of everything.
fn sizes(quick: bool, pg_scale: u32, pg_seconds: u32, tree: PathBuf) -> Sizes {
    let pick = |full, small| if quick { small } else { full };
    Sizes {
        file: pick(256, 64) * MIB,
        large_file: pick(1024, 256) * MIB,
        synced_writes: pick(1500, 200) as u32,
        buffered_writes: pick(16_384, 4096) as u32,
        reads: pick(4000, 1000) as u32,
        commits: pick(600, 100) as u32,
        pg_scale,
        pg_seconds,
        maria_rows: pick(100_000, 5000) as u32,
        maria_seconds: pick(20, 4) as u32,
        containers: pick(10, 3) as u32,
        swarm: 16,
        swarm_file: pick(32, 8) * MIB,
        swarm_writes: pick(2048, 256) as u32,
        swarm_synced: pick(150, 16) as u32,
        fork_data: pick(256, 64) * MIB,
        chain: pick(64, 32) * MIB,
        device: pick(256, 64) * MIB,
        millis: pick(2000, 500) as u32,
        tree,
    }
}

/// The smallest of everything.
fn smoke_sizes(tree: PathBuf) -> Sizes {
    Sizes {
        file: 4 * MIB,
        large_file: 8 * MIB,
        synced_writes: 8,
        buffered_writes: 32,
        reads: 16,
        commits: 4,
        containers: 1,
        maria_rows: 50,
        maria_seconds: 2,
        swarm: 3,
        swarm_file: MIB,
        swarm_writes: 16,
        swarm_synced: 4,
        fork_data: 4 * MIB,
        chain: 4 * MIB,
        device: 8 * MIB,
        millis: 50,
        ..sizes(true, 1, 2, tree)
    }
}

#[expect(
    clippy::too_many_lines,
    reason = "the steps of a comparison, in their order"
)]
fn compare(cli: &Cli) -> Result<()> {
    let began = Instant::now();
    let drivers = driver::all(Path::new("vellum"));
    let workloads = workload::all();
    let quick = cli.quick || cli.smoke;
    let sizes = if cli.smoke {
        smoke_sizes(cli.tree.clone())
    } else {
        let scale = cli.pg_scale.unwrap_or(if quick { 3 } else { 130 });
        let seconds = cli.pg_seconds.unwrap_or(if quick { 4 } else { 45 });
        sizes(quick, scale.max(1), seconds.max(2), cli.tree.clone())
    };
    if cli.list {
        list(&sizes);
        return Ok(());
    }
    check_names(
        "driver",
        &cli.drivers,
        drivers.iter().map(|d| d.about().id.to_owned()),
    )?;
    check_names("workload", &cli.workloads, workloads.iter().map(|w| w.id()))?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "mounting needs root: run it as root, for example with sudo -E"
    );
    host::catch_signals()?;
    let vellum = vellum_program(cli)?;

    let mut left_out = Vec::new();
    let wanted = |id: &str, list: &[String]| list.is_empty() || list.iter().any(|name| name == id);
    let selected: Vec<_> = driver::all(&vellum)
        .into_iter()
        .filter(|driver| {
            let about = driver.about();
            wanted(about.id, &cli.drivers)
                || about.id == driver::reference(about.kind)
                || about.id == driver::control(about.kind)
        })
        .collect();
    let mut chosen = Vec::new();
    for workload in workloads {
        let deep = matches!(workload.base(), BaseKind::Layers(depth) if depth > 8);
        if !wanted(&workload.id(), &cli.workloads) {
            continue;
        }
        if quick && deep && cli.workloads.is_empty() {
            left_out.push(format!("{}: not with --quick", workload.title()));
        } else {
            chosen.push(workload);
        }
    }
    let used = |kind| chosen.iter().any(|workload| workload.kind() == kind);
    let selected: Vec<_> = selected
        .into_iter()
        .filter(|driver| used(driver.about().kind))
        .collect();
    left_out.push(
        "Drivers that need a kernel module of their own (ublk, device-mapper thin pools, ZFS) are \
         not part of this comparison."
            .to_owned(),
    );
    let dirs = places(&cli.dir)?;
    let usual = if quick { 4.5 } else { 40.0 * dirs.len() as f64 };
    let minutes = cli.time_limit.unwrap_or(usual);
    ensure!(
        (0.0..=1e6).contains(&minutes),
        "--time-limit {minutes}: no number of minutes"
    );
    let end = (minutes > 0.0).then(|| began + Duration::from_secs_f64(minutes * 60.0));
    if let Some(end) = end {
        host::limit_commands(end);
    }
    fs::create_dir_all(&cli.out).with_context(|| cli.out.display().to_string())?;
    let out = cli.out.clone();
    let plan = run::Plan {
        drivers: selected,
        workloads: chosen,
        rounds: cli.rounds.unwrap_or(if quick { 1 } else { 5 }).max(1),
        dirs,
        sizes: sizes.clone(),
        end,
        save: Box::new(move |report| {
            report.cut_short = Some("it was still running when this was written".to_owned());
            let saved = finish(report, began, &out);
            host::report(saved.context("the report so far"));
        }),
    };
    let mut report = Report {
        command: std::env::args().collect::<Vec<_>>().join(" "),
        started: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        seconds: 0.0,
        cut_short: None,
        host: describe_host(&vellum),
        sizes,
        rounds: plan.rounds,
        places: plan.dirs.iter().map(|dir| describe_place(dir)).collect(),
        drivers: Vec::new(),
        workloads: Vec::new(),
        samples: Vec::new(),
        curves: Vec::new(),
        pictures: Vec::new(),
        took: Vec::new(),
        failures: Vec::new(),
        left_out,
        summary: Vec::new(),
        goals: Vec::new(),
    };
    let ended = run::run(&plan, &mut report);
    report.cut_short = ended.as_ref().err().map(|error| format!("{error:#}"));
    report.host.load.push(load());
    finish(&mut report, began, &cli.out)?;
    for name in ["report.html", "report.json"] {
        println!("{}", cli.out.join(name).display());
    }
    ended?;
    ensure!(
        report.failures.is_empty(),
        "{} runs failed; the report says which",
        report.failures.len()
    );
    Ok(())
}

/// Works out what the figures say and writes both reports, each at once or not at all.
fn finish(report: &mut Report, began: Instant, out: &Path) -> Result<()> {
    report.seconds = began.elapsed().as_secs_f64();
    report.summarise();
    replace(
        &out.join("report.json"),
        &serde_json::to_string_pretty(report)?,
    )?;
    replace(&out.join("report.html"), &html::render(report)?)
}

fn replace(file: &Path, content: &str) -> Result<()> {
    let beside = file.with_extension("new");
    fs::write(&beside, content)
        .and_then(|()| fs::rename(&beside, file))
        .with_context(|| file.display().to_string())
}

fn check_names(what: &str, names: &[String], known: impl Iterator<Item = String>) -> Result<()> {
    let known: Vec<String> = known.collect();
    for name in names {
        if !known.contains(name) {
            bail!(
                "no {what} is called {name}; there are: {}",
                known.join(", ")
            );
        }
    }
    Ok(())
}

fn list(sizes: &Sizes) {
    println!("Drivers:");
    for driver in driver::all(Path::new("vellum")) {
        let absent = driver.absent().map(|why| format!(" (absent: {why})"));
        println!(
            "  {:18} {}{}",
            driver.about().id,
            driver.about().title,
            absent.unwrap_or_default()
        );
    }
    println!("Workloads:");
    for workload in workload::all() {
        let absent = workload
            .absent(sizes)
            .map(|why| format!(" (absent: {why})"));
        println!(
            "  {:18} {}{}",
            workload.id(),
            workload.title(),
            absent.unwrap_or_default()
        );
    }
}

/// The program to measure, built first if it is this workspace's.
fn vellum_program(cli: &Cli) -> Result<PathBuf> {
    if let Some(program) = &cli.vellum {
        ensure!(program.is_file(), "{}: no such program", program.display());
        return fs::canonicalize(program).context("the vellum program");
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "build",
            "--release",
            "--locked",
            "--bin",
            "vellum",
            "--manifest-path",
        ])
        .arg(&manifest)
        .status()
        .context("cargo, to build vellum (or name a program with --vellum)")?;
    ensure!(status.success(), "cargo could not build vellum: {status}");
    // Beside this program, whose directory is of the same profile or one beside that.
    let own = std::env::current_exe()?;
    let target = own.ancestors().nth(2).context("this program is nowhere")?;
    Ok(target.join("release/vellum"))
}

/// The directories to measure in.
fn places(given: &[PathBuf]) -> Result<Vec<PathBuf>> {
    if !given.is_empty() {
        return given
            .iter()
            .map(|dir| fs::canonicalize(dir).with_context(|| dir.display().to_string()))
            .collect();
    }
    let usual = ["/var/tmp", "/dev/shm"].map(PathBuf::from);
    Ok(usual.into_iter().filter(|dir| dir.is_dir()).collect())
}

fn describe_place(dir: &Path) -> Place {
    let shown = dir.display().to_string();
    let kind = host::sh("findmnt", &["-n", "-o", "FSTYPE", "-T", &shown])
        // The uppermost of several mounts is the last.
        .map(|done| {
            done.stdout
                .trim()
                .lines()
                .last()
                .unwrap_or_default()
                .to_owned()
        })
        .unwrap_or_default();
    Place {
        id: shown.clone(),
        title: match kind.as_str() {
            "tmpfs" => "Memory (tmpfs)".to_owned(),
            "" => "Unknown file system".to_owned(),
            kind => format!("Disk ({kind})"),
        },
        dir: shown,
        in_memory: kind == "tmpfs",
    }
}

fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or_default().to_owned()
}

fn describe_host(vellum: &Path) -> Host {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let model = processors
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("", |(_, model)| model);
    let number = processors
        .lines()
        .filter(|l| l.starts_with("processor"))
        .count();
    let memory = read("/proc/meminfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0_u64);
    let commands: [(&str, &[&str]); 9] = [
        (&vellum.to_string_lossy(), &["--version"]),
        ("fio", &["--version"]),
        ("qemu-nbd", &["--version"]),
        ("nbdkit", &["--version"]),
        ("fuse-overlayfs", &["--version"]),
        ("crun", &["--version"]),
        ("sqlite3", &["--version"]),
        ("mariadbd", &["--version"]),
        ("sysbench", &["--version"]),
    ];
    let version = |(program, arguments): (&str, &[&str])| {
        let said = host::sh(program, arguments).ok()?.stdout;
        let line: String = said.lines().next()?.chars().take(60).collect();
        let name = Path::new(program)
            .file_name()?
            .to_string_lossy()
            .into_owned();
        Some(if line.contains(&name) {
            line
        } else {
            format!("{name} {line}")
        })
    };
    Host {
        kernel: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
        processors: format!("{number} × {model}"),
        memory: memory * 1024,
        load: vec![load()],
        versions: commands.into_iter().filter_map(version).collect(),
    }
}
