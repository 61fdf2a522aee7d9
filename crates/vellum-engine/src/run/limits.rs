//! Limits of a container: what its control group is told, and whether this host can.

use std::fs;
use std::path::Path;

use oci_spec::runtime::{
    LinuxCpu, LinuxCpuBuilder, LinuxMemory, LinuxMemoryBuilder, LinuxPids, LinuxPidsBuilder,
};

use super::refused::failure;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_store::{Confinement, PidsLimit};

/// Processes and threads of a container that was given no limit: what services need and to spare, and
/// an end to a fork bomb. As podman has it.
const DEFAULT_PIDS: u32 = 2048;
/// Less than this does not even start a container, as docker has it.
const MIN_MEMORY: u64 = 6 << 20;
/// Microseconds in which a quota of processor time is counted.
const PERIOD: u64 = 100_000;
const CGROUPS: &str = "/sys/fs/cgroup";

/// What a container's control group is told.
#[derive(Debug, Default)]
pub(super) struct Limits {
    pub(super) memory: Option<LinuxMemory>,
    pub(super) pids: Option<LinuxPids>,
    pub(super) cpu: Option<LinuxCpu>,
}

/// Whether control groups of this host have a controller, in either version.
fn has(controller: &str) -> bool {
    let listed = |file: &Path| {
        fs::read_to_string(file)
            .is_ok_and(|text| text.split_whitespace().any(|name| name == controller))
    };
    let base = Path::new(CGROUPS);
    // Version 2 lists its controllers; version 1 has a hierarchy for each.
    listed(&base.join("cgroup.controllers")) || base.join(controller).is_dir()
}

fn need(controller: &str, option: &str) -> Result<()> {
    if has(controller) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "this host has no control groups with the controller {controller:?}, which {option} needs: \
             mount them at {CGROUPS}, boot with cgroup_enable={controller}, or leave {option} out"
        ),
    ))
}

fn memory(bytes: u64) -> Result<LinuxMemory> {
    if bytes < MIN_MEMORY {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("--memory {bytes} is too little: at least 6M"),
        ));
    }
    need("memory", "--memory")?;
    let limit = i64::try_from(bytes).unwrap_or(i64::MAX);
    let mut memory = LinuxMemoryBuilder::default().limit(limit);
    if counts_swap() {
        // As docker has it: as much swap again.
        memory = memory.swap(limit.saturating_mul(2));
    }
    memory.build().map_err(failure)
}

/// Whether the host limits swap: its own groups say so, the root's does not in version 2.
fn counts_swap() -> bool {
    let base = Path::new(CGROUPS);
    let of_child = || {
        let children = fs::read_dir(base).into_iter().flatten().flatten();
        children
            .map(|entry| entry.path())
            .any(|dir| dir.join("memory.swap.max").exists())
    };
    base.join("memory/memory.memsw.limit_in_bytes").exists() || of_child()
}

fn cpu(millicpus: u64) -> Result<LinuxCpu> {
    let there = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    if !(10..=there * 1000).contains(&millicpus) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "--cpus {} is out of range: this host has {there}, and 0.01 is the least",
                millicpus as f64 / 1000.0
            ),
        ));
    }
    need("cpu", "--cpus")?;
    let quota = i64::try_from(millicpus * PERIOD / 1000).unwrap_or(i64::MAX);
    LinuxCpuBuilder::default()
        .period(PERIOD)
        .quota(quota)
        .build()
        .map_err(failure)
}

fn pids(limit: PidsLimit) -> Result<Option<LinuxPids>> {
    let limit = match limit {
        PidsLimit::Unlimited => return Ok(None),
        // Nobody asked for it, so its lack is no failure.
        PidsLimit::Default if !has("pids") => return Ok(None),
        PidsLimit::Default => DEFAULT_PIDS,
        PidsLimit::Limit(limit) => {
            need("pids", "--pids-limit")?;
            limit
        }
    };
    LinuxPidsBuilder::default()
        .limit(i64::from(limit))
        .build()
        .map(Some)
        .map_err(failure)
}

/// The limits of a container on this host.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for one that the host cannot keep, [`ErrorKind::InvalidInput`] for one
/// out of range.
pub(super) fn of(confinement: &Confinement) -> Result<Limits> {
    Ok(Limits {
        memory: confinement.memory.map(memory).transpose()?,
        pids: pids(confinement.pids)?,
        cpu: confinement.millicpus.map(cpu).transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_out_of_range_are_refused_before_anything_is_made() {
        for (confinement, why) in [
            (
                Confinement {
                    memory: Some(1 << 20),
                    ..Confinement::default()
                },
                "at least 6M",
            ),
            (
                Confinement {
                    millicpus: Some(1),
                    ..Confinement::default()
                },
                "0.01",
            ),
            (
                Confinement {
                    millicpus: Some(1 << 40),
                    ..Confinement::default()
                },
                "this host has",
            ),
        ] {
            let error = of(&confinement).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn a_controller_that_the_host_lacks_is_named() {
        let error = need("no-such", "--memory").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("\"no-such\""), "{error}");
    }
}
