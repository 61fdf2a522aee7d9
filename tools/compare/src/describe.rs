//! The host and the places, for the report.

use std::fs;
use std::path::Path;

use crate::host;
use crate::report::{Host, Place};

/// The file system of a directory.
pub fn place(dir: &Path) -> Place {
    let shown = dir.display().to_string();
    let kind = host::sh("findmnt", &["-n", "-o", "FSTYPE", "-T", &shown])
        // The uppermost of several mounts is the last.
        .ok()
        .and_then(|done| done.stdout.trim().lines().last().map(str::to_owned));
    Place {
        id: shown.clone(),
        title: match kind.as_deref() {
            Some("tmpfs") => "Memory (tmpfs)".to_owned(),
            Some(kind) => format!("Disk ({kind})"),
            None => "Unknown file system".to_owned(),
        },
        dir: shown,
        in_memory: kind.as_deref() == Some("tmpfs"),
    }
}

/// The mean number of running processes over the last minute.
pub fn load() -> Option<f64> {
    let load = fs::read_to_string("/proc/loadavg").ok()?;
    load.split(' ').next()?.parse().ok()
}

/// The host as it is before the run.
pub fn host() -> Host {
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
    Host {
        kernel: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
        processors: format!("{number} × {model}"),
        processor_count: number,
        emulated: model.contains("QEMU TCG"),
        memory: memory * 1024,
        load: load().into_iter().collect(),
        steal: 0.0,
        versions: versions(),
    }
}

/// What /proc does not say is unknown.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Of the programs that do the work; those of drivers stand beside the drivers.
fn versions() -> Vec<String> {
    let programs = ["fio", "sqlite3", "mariadbd", "sysbench"].map(str::to_owned);
    let postgres = crate::workload::postgres_program();
    let all = programs.into_iter().chain(postgres);
    let version = |program: String| {
        let said = host::sh(&program, &["--version"]).ok()?.stdout;
        let line: String = said.lines().next()?.chars().take(60).collect();
        let name = Path::new(&program).file_name()?.to_string_lossy();
        Some(if line.contains(&*name) {
            line
        } else {
            format!("{name} {line}")
        })
    };
    all.filter_map(version).collect()
}
