//! Whether a store is as it should be, and making it so where that needs no guessing.
//!
//! What another process is changing at this moment is looked at only as far as its files cannot
//! contradict each other for a moment. What cannot be repaired is put in quarantine, so that one
//! bad layer never stops the others.
//!
//! A check is one type whose methods lie in this file, `layers` and `stacks` by subject, so these know each
//! other; `report` and `repair` stand below.

mod layers;
mod repair;
mod report;
mod stacks;

use uuid::Uuid;

use super::mount_point::mounted;
use super::snapshot::find;
use crate::progress::BlocksWatch;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_store::{ContainerRecord, Records, Store};

use report::Remedy;

pub use repair::finish_commits;
pub use report::{CheckReport, Finding, Severity};

/// What to check, and what to do about it.
#[derive(Debug, Clone, Default)]
pub struct CheckOptions {
    /// Images, containers and layers; everything where it is empty.
    pub names: Vec<String>,
    /// Read every block of sealed layers.
    pub scrub: bool,
    /// Repair what can be repaired.
    pub repair: bool,
}

/// One check in progress.
struct Check<'a> {
    store: &'a Store,
    records: Records,
    report: CheckReport,
    scrub: bool,
    repair: bool,
}

impl Check<'_> {
    fn find(&mut self, finding: Finding) {
        self.report.findings.push(finding);
    }
}

/// Checks the whole store, or some things in it, and repairs them where that is asked for.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a name; where the store itself cannot be read. What is wrong within
/// it is in the report.
pub fn check(
    store: &Store,
    options: &CheckOptions,
    watch: &dyn BlocksWatch,
) -> Result<CheckReport> {
    let mut check = Check {
        store,
        records: store.records()?,
        report: CheckReport::default(),
        scrub: options.scrub,
        repair: options.repair,
    };
    let everything = options.names.is_empty();
    let layers = if everything {
        check.all_layers()?
    } else {
        check.select(&options.names)?
    };
    if everything {
        check.damaged_records();
        check.space_policy();
        check.cache_limit();
    }
    let states = check.layers(&layers, watch)?;
    check.stacks(&states)?;
    if everything {
        check.leftovers()?;
    }
    check.forget_removed()?;
    let mut report = check.report;
    if options.repair {
        repair::repair(store, &mut report);
    }
    Ok(report)
}

impl Check<'_> {
    /// Every layer that is there or should be.
    fn all_layers(&self) -> Result<Vec<Uuid>> {
        let mut layers = self.store.layers()?;
        layers.extend(self.records.used_layers());
        layers.sort();
        layers.dedup();
        Ok(layers)
    }

    /// Keeps the records of these names alone, and returns their layers.
    fn select(&mut self, names: &[String]) -> Result<Vec<Uuid>> {
        let mut layers = Vec::new();
        for name in names {
            let known = self.records.images.iter().any(|image| image.name == *name)
                || self.records.containers.iter().any(|c| c.name == *name)
                || self.records.snapshots.iter().any(|s| s.key == *name);
            match uuid::Uuid::parse_str(name) {
                Ok(layer) if !known => layers.push(layer),
                _ if known => {}
                // Says what is wrong with the name, or with its record.
                _ => {
                    self.store.container(name)?;
                    self.store.image(name)?;
                }
            }
        }
        self.records.images.retain(|i| names.contains(&i.name));
        self.records.containers.retain(|c| names.contains(&c.name));
        self.records.snapshots.retain(|s| names.contains(&s.key));
        // Those that they were made from are part of them.
        for snapshot in &self.records.snapshots {
            layers.extend(self.store.ancestry(Some(snapshot.base)).unwrap_or_default());
        }
        self.records.templates.clear();
        self.records.quarantined_layers.clear();
        layers.extend(self.records.used_layers());
        layers.sort();
        layers.dedup();
        if let Some(missing) = layers.iter().find(|layer| {
            names.contains(&layer.to_string()) && self.store.layer_info(**layer).is_err()
        }) {
            let dir = self.store.layer_dir(*missing);
            if !dir.exists() {
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!("the store has no layer {missing}"),
                ));
            }
        }
        Ok(layers)
    }

    /// What another command removed while we looked is not missing.
    fn forget_removed(&mut self) -> Result<()> {
        if self.report.findings.is_empty() {
            return Ok(());
        }
        let records = self.store.records()?;
        let used = records.used_layers();
        let store = self.store;
        self.report.findings.retain(|finding| {
            let gone = |error: Error| error.kind() == ErrorKind::NotFound;
            match finding.what.split_once(' ') {
                _ if finding.severity == Severity::Note => true,
                Some(("layer", layer)) => Uuid::parse_str(layer)
                    .is_ok_and(|layer| used.contains(&layer) || store.layer_dir(layer).exists()),
                Some(("image", name)) => !store.image(name).is_err_and(gone),
                Some(("container", name)) => !store.container(name).is_err_and(gone),
                Some(("snapshot", key)) => {
                    let of_container = || find(store, key).is_ok_and(|found| found.is_some());
                    records.snapshots.iter().any(|s| s.key == key) || of_container()
                }
                _ => true,
            }
        });
        Ok(())
    }

    fn damaged_records(&mut self) {
        for error in std::mem::take(&mut self.records.damaged) {
            let root = self.store.root().to_owned();
            self.find(Finding::new(
                Severity::Error,
                "record",
                root,
                error.to_string(),
                "nobody knows what it named, so prune removes no layer: put the file back from a \
                 backup, or remove it if nothing of it is needed, and run `vellum prune`",
                None,
            ));
        }
        for entry in std::mem::take(&mut self.records.quarantined) {
            self.find(Finding::new(
                Severity::Note,
                format!("{} {}", entry.what, entry.name),
                &entry.path,
                format!("in quarantine: {}", entry.reason),
                "import the image again under its name; the layers of what is in quarantine are \
                 kept until its file is removed",
                None,
            ));
        }
    }

    fn space_policy(&mut self) {
        let Err(error) = self.store.space_policy() else {
            return;
        };
        self.find(Finding::new(
            Severity::Error,
            "space policy",
            self.store.root(),
            error.to_string(),
            "until it is set anew nothing new is made, and nothing of the disk is kept free",
            None,
        ));
    }

    fn cache_limit(&mut self) {
        let Err(error) = self.store.cache_limit() else {
            return;
        };
        self.find(Finding::new(
            Severity::Error,
            "cache of lazy layers",
            self.store.root(),
            error.to_string(),
            "until it is set anew nothing is evicted",
            None,
        ));
    }

    /// What prune would remove, and what died.
    fn leftovers(&mut self) -> Result<()> {
        let records = self.store.records()?;
        if !records.damaged.is_empty() {
            return Ok(());
        }
        self.orphans()?;
        self.leaks(&records.containers)?;
        for container in &records.containers {
            self.server_of(container)?;
        }
        Ok(())
    }

    /// What no record names.
    fn orphans(&mut self) -> Result<()> {
        match self.store.orphans()? {
            None => self.find(Finding::new(
                Severity::Note,
                "store",
                self.store.root(),
                "other commands are at work on layers, so leftovers were not looked for",
                "check again when they are done",
                None,
            )),
            Some(orphans) => {
                let layers = orphans.layers.iter().map(|l| self.store.layer_dir(*l));
                let layers = layers.map(|path| (path, "a layer that nothing uses"));
                let others = orphans.leftovers.into_iter();
                let others = others.map(|path| (path, "left by a command that was cut off"));
                let runs = orphans.run_dirs.into_iter();
                let runs = runs.map(|dir| dir.path().to_owned());
                let runs = runs.map(|path| (path, "a device whose command was cut off"));
                let all: Vec<_> = layers.chain(others).chain(runs).collect();
                for (path, problem) in all {
                    // It is in nobody's way, and wants nobody's attention.
                    self.find(Finding::new(
                        Severity::Note,
                        "leftover",
                        path,
                        problem,
                        "`vellum prune` removes it",
                        Some(Remedy::Prune),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Devices of containers that nobody serves any more.
    fn leaks(&mut self, containers: &[ContainerRecord]) -> Result<()> {
        for leak in vellum_export::device::find_leaks(&self.store.runs())? {
            let owner = containers
                .iter()
                .find(|container| leak.run_dir.id() == Some(container.id));
            // The others are orphans, see above.
            let Some(owner) = owner else { continue };
            // Every container that was mounted when the host crashed has such files, and one whose
            // commands were killed may have a device. But where a mount is dead, somebody may look
            // there and see errors.
            let (severity, advice) = if !leak.mounted {
                let advice = "the next command that wants the container cleans up; what was \
                              flushed is safe"
                    .into();
                (Severity::Note, advice)
            } else {
                let name = &owner.name;
                let advice = format!("`vellum umount {name}` cleans up; what was flushed is safe");
                (Severity::Warning, advice)
            };
            self.find(Finding::new(
                severity,
                format!("container {}", owner.name),
                leak.run_dir.path(),
                leak.what,
                advice,
                Some(Remedy::Detach(owner.name.clone())),
            ));
        }
        Ok(())
    }

    /// What is wrong with the device of a container that is served.
    fn server_of(&mut self, container: &ContainerRecord) -> Result<()> {
        let run_dir = self.store.run_dir(container);
        if let Some(mounted) = mounted(self.store, container)?.filter(|there| there.given_up) {
            let name = &container.name;
            self.find(Finding::new(
                Severity::Warning,
                format!("container {name}"),
                mounted.dir,
                "its file system met an error (a full disk of the host?) and takes no writes \
                 any more",
                format!("`vellum mount {name}` mounts it anew, when no program uses it"),
                None,
            ));
        }
        let status = vellum_export::device::status(&run_dir)?;
        if status.as_ref().is_some_and(|status| status.halted) {
            self.find(Finding::new(
                Severity::Warning,
                format!("container {}", container.name),
                run_dir.path(),
                "all processes of its server are stopped (by a signal or a debugger): whoever \
                 uses it waits for ever",
                "`kill -CONT` them, or `vellum umount --force`; what was flushed is safe",
                None,
            ));
        }
        if status.as_ref().is_some_and(|status| status.abandoned) {
            self.find(Finding::new(
                Severity::Warning,
                format!("container {}", container.name),
                run_dir.path(),
                "all processes of its server are dead, and the kernel keeps its ublk device: whoever \
                 uses it waits for ever",
                "`vellum umount --force` gives them I/O errors; what was flushed is safe",
                None,
            ));
        }
        if status.is_some_and(|status| status.alive && !status.supervised) {
            self.find(Finding::new(
                Severity::Warning,
                format!("container {}", container.name),
                run_dir.path(),
                "its server works, but nobody would restart it: its supervisor is dead",
                "--repair starts a supervisor",
                Some(Remedy::Supervise(container.name.clone())),
            ));
        }
        Ok(())
    }
}
