//! Containers made, started and removed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use super::{Better, Measured, Metric, Run, Sizes, Workload, missing};
use crate::host::{self, find_program};
use crate::stats::Spread;

/// Puts a root that can run a command into the image's tree.
pub(super) fn fill(tree: &Path) -> Result<()> {
    for dir in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    if let Some(busybox) = find_program("busybox") {
        fs::copy(busybox, tree.join("bin/busybox"))?;
        symlink("busybox", tree.join("bin/true"))?;
    }
    Ok(())
}

/// Create, mount, run `true`, unmount, remove.
pub(super) struct Lifecycle;

impl Workload for Lifecycle {
    fn id(&self) -> String {
        "lifecycle".to_owned()
    }

    fn title(&self) -> String {
        "A container's life".to_owned()
    }

    fn what(&self, sizes: &Sizes) -> String {
        format!(
            "A container is made, mounted, runs `true` under {}, is unmounted and removed; the \
             median of {} of them, in milliseconds. Each step is the command that a person would \
             type, so starting a program is part of it. Space: after it has been made and mounted.",
            runtime(),
            sizes.containers
        )
    }

    fn caveats(&self) -> &'static str {
        "The time of the commands that a user would call, so the start of each driver's \
         programs is in it; an engine that keeps them running saves that."
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![
            Metric::new("create", "create", "ms", Better::Lower).detail(),
            Metric::new("mount", "mount", "ms", Better::Lower).detail(),
            Metric::new("start", "run true", "ms", Better::Lower).detail(),
            Metric::new("unmount", "unmount", "ms", Better::Lower).detail(),
            Metric::new("remove", "remove", "ms", Better::Lower).detail(),
            Metric::new("total", "all of it", "ms", Better::Lower),
            Metric::space("space taken by an unused container"),
        ]
    }

    fn absent(&self, _sizes: &Sizes) -> Option<String> {
        missing(&[("busybox", "busybox-static")]).or_else(|| missing(&[(runtime(), runtime())]))
    }

    fn run(&self, run: &mut Run<'_>) -> Result<Measured> {
        let steps = ["create", "mount", "start", "unmount", "remove"];
        let mut times: Vec<Vec<f64>> = vec![Vec::new(); steps.len() + 1];
        let mut measured = Measured::default();
        let before = run.image.used()?;
        for number in 0..run.sizes.containers {
            let name = format!("{}-{number}", run.name);
            let mut marks = vec![Instant::now()];
            run.image.create(&name)?;
            marks.push(Instant::now());
            let access = run.image.start(&name)?;
            marks.push(Instant::now());
            run_true(access.dir()?, &run.scratch.join("bundle"), &name)?;
            marks.push(Instant::now());
            if number == 0 {
                let used = run.image.used()?.saturating_sub(before);
                measured.add("space", used as f64 / 1e6);
                // What it took to find out is nobody's.
                let last = marks.last_mut().context("no mark")?;
                *last = Instant::now();
            }
            run.image.stop(&name)?;
            marks.push(Instant::now());
            run.image.remove(&name)?;
            marks.push(Instant::now());
            let spans = marks.iter().zip(marks.iter().skip(1));
            let mut total = 0.0;
            for (list, (from, to)) in times.iter_mut().zip(spans) {
                let millis = (*to - *from).as_secs_f64() * 1000.0;
                list.push(millis);
                total += millis;
            }
            if let Some(list) = times.last_mut() {
                list.push(total);
            }
        }
        for (id, list) in steps.into_iter().chain(["total"]).zip(times) {
            if let Some(spread) = Spread::of(list) {
                measured.add(id, spread.median);
            }
        }
        Ok(measured)
    }
}

/// crun; runc on hosts with both cgroup hierarchies in use, which crun refuses.
fn runtime() -> &'static str {
    let hybrid = fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers");
    if hybrid.is_ok_and(|controllers| !controllers.trim().is_empty())
        || find_program("crun").is_none()
    {
        "runc"
    } else {
        "crun"
    }
}

/// Runs `true` in a root directory.
fn run_true(root: &Path, bundle: &Path, id: &str) -> Result<()> {
    fs::create_dir_all(bundle)?;
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "root": {"path": root, "readonly": false},
        "process": {
            "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["/bin/true"],
            "env": ["PATH=/bin"], "noNewPrivileges": true,
        },
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
        ]},
    });
    fs::write(bundle.join("config.json"), config.to_string())?;
    let id = format!("compare-{}-{id}", std::process::id());
    host::run(
        Command::new(runtime())
            .arg("--root")
            .arg(bundle.join("state"))
            .args(["run", "-b"])
            .arg(bundle)
            .arg(&id),
    )?;
    Ok(())
}
