//! Images and containers: whether their layers are there, fit each other, and are theirs.

use std::path::PathBuf;

use uuid::Uuid;

use super::layers::LayerStates;
use super::{Check, Finding, Remedy, Severity};
use vellum_base::error::Result;
use vellum_base::storage::LockMode;
use vellum_core::layer::Header;
use vellum_store::{ContainerRecord, ImageRecord, SnapshotKind, SnapshotRecord};

/// What is wrong with a stack of layers.
struct Trouble {
    problem: String,
    /// It cannot be opened; otherwise some of its blocks cannot be read.
    fatal: bool,
}

impl Check<'_> {
    /// Looks at every image, container and template.
    pub(super) fn stacks(&mut self, states: &LayerStates) -> Result<()> {
        for image in std::mem::take(&mut self.records.images) {
            self.report.images += 1;
            self.image(&image, states);
        }
        for container in std::mem::take(&mut self.records.containers) {
            self.report.containers += 1;
            self.container(&container, states)?;
        }
        for snapshot in std::mem::take(&mut self.records.snapshots) {
            self.report.snapshots += 1;
            self.snapshot(&snapshot, states);
        }
        Ok(())
    }

    fn snapshot(&mut self, snapshot: &SnapshotRecord, states: &LayerStates) {
        let chain = self.store.ancestry(Some(snapshot.base));
        let trouble = match chain {
            Ok(mut chain) => {
                chain.extend(&snapshot.layers);
                let top = chain.last().and_then(|layer| states.get(layer));
                let sealed = top.and_then(|state| state.header.as_ref());
                let sealed = sealed.is_some_and(|header| header.sealed);
                match (snapshot.kind, snapshot.layers.len()) {
                    // A commit is at work, or was cut off: the next mount sorts its layers out.
                    (SnapshotKind::Active, 2..) => None,
                    (SnapshotKind::Active, _) if !sealed => stack_of(&chain, states, true),
                    _ => stack(&chain, states),
                }
            }
            Err(error) => Some(Trouble {
                problem: error.to_string(),
                fatal: true,
            }),
        };
        let Some(trouble) = trouble else { return };
        let path = self.store.root().join("snapshots");
        self.find(Finding::new(
            Severity::Error,
            format!("snapshot {}", snapshot.key),
            path.join(format!("{}.json", snapshot.id)),
            trouble.problem,
            "containerd owns it: remove what was made from it there, then the image, and pull or \
             import that again",
            None,
        ));
    }

    fn image(&mut self, image: &ImageRecord, states: &LayerStates) {
        let what = format!("image {}", image.name);
        let path = self.record(&format!("images/{}", image.name));
        if let Some(trouble) = stack(&image.layers, states) {
            let name = image.name.clone();
            let remedy = Remedy::QuarantineImage(name, trouble.problem.clone());
            self.find(Finding::new(
                Severity::Error,
                &what,
                &path,
                trouble.problem,
                "no container should be made from it: --repair puts it in quarantine, then import \
                 it again",
                Some(remedy),
            ));
            return;
        }
        let top = image.layers.last().and_then(|layer| states.get(layer));
        let size = top.and_then(|state| Some(state.header.as_ref()?.virtual_size));
        if let Some(size) = size.filter(|size| *size != image.disk.virtual_size) {
            self.find(Finding::new(
                Severity::Error,
                &what,
                &path,
                format!(
                    "says {} bytes; its top layer has {size}",
                    image.disk.virtual_size
                ),
                "the record was changed by hand or is of another store: import the image again",
                None,
            ));
        }
    }

    fn container(&mut self, container: &ContainerRecord, states: &LayerStates) -> Result<()> {
        let what = format!("container {}", container.name);
        let path = self.record(&format!("containers/{}", container.name));
        let lock = self.store.runs().container_lock(container.id);
        // A command that has it changes its layers.
        let held = self
            .store
            .storage()
            .lock(&lock, LockMode::Exclusive, false)
            .map_err(|error| {
                vellum_base::Error::io(format!("cannot lock {}", lock.display()), error)
            })?;
        if held.is_none() {
            self.find(Finding::new(
                Severity::Note,
                &what,
                &path,
                "a command is at work on it, so it was not looked at",
                "check again when that is done",
                None,
            ));
            return Ok(());
        }
        let resolved = match self.store.resolve(container) {
            Ok(resolved) => resolved,
            Err(error) => {
                self.bad_container(container, &path, error.to_string());
                return Ok(());
            }
        };
        let mut layers = resolved.sealed.clone();
        layers.push(resolved.top);
        match stack_of(&layers, states, true) {
            Some(trouble) if trouble.fatal => {
                self.bad_container(container, &path, trouble.problem);
                return Ok(());
            }
            // It can be mounted, and its own data saved.
            Some(trouble) => self.find(Finding::new(
                Severity::Error,
                &what,
                &path,
                trouble.problem,
                format!(
                    "it can still be mounted, and reads of the bad blocks fail with EIO: save what \
                     you need, then `vellum rm {}`",
                    container.name
                ),
                None,
            )),
            None => {}
        }
        self.kept(container, states);
        if container.next.is_some() {
            self.find(Finding::new(
                Severity::Note,
                &what,
                &path,
                "a commit was cut off; its next mount or commit goes on from there",
                "`vellum prune` finishes it",
                Some(Remedy::Settle(container.name.clone())),
            ));
        }
        Ok(())
    }

    /// The snapshots of a container: those that its own layers do not begin with may be damaged by themselves.
    fn kept(&mut self, container: &ContainerRecord, states: &LayerStates) {
        for snapshot in &container.snapshots {
            let name = format!("{}@{}", container.name, snapshot.name);
            let problem = match container.snapshot_layers(snapshot.id) {
                Ok(layers) => stack(&layers, states).map(|trouble| trouble.problem),
                Err(error) => Some(error.to_string()),
            };
            if let Some(problem) = problem {
                self.find(Finding::new(
                    Severity::Error,
                    format!("snapshot {name}"),
                    self.record(&format!("containers/{}", container.name)),
                    problem,
                    format!(
                        "put the layer's files back from a backup; otherwise `vellum rm {name}`, which \
                         leaves the container as it is"
                    ),
                    None,
                ));
            }
        }
    }

    fn bad_container(&mut self, container: &ContainerRecord, path: &std::path::Path, why: String) {
        let remedy = Remedy::QuarantineContainer(container.name.clone(), why.clone());
        self.find(Finding::new(
            Severity::Error,
            format!("container {}", container.name),
            path,
            why,
            "it cannot be opened: put the layer's files back from a backup, or have --repair put \
             the container in quarantine, where its own layer is kept",
            Some(remedy),
        ));
    }

    fn record(&self, name: &str) -> PathBuf {
        let (directory, name) = name.split_once('/').unwrap_or(("", name));
        self.store.record_path(directory, name)
    }
}

fn stack(layers: &[Uuid], states: &LayerStates) -> Option<Trouble> {
    stack_of(layers, states, false)
}

/// What is wrong with layers on each other, from the bottom up; the last may be writable.
fn stack_of(layers: &[Uuid], states: &LayerStates, writable_top: bool) -> Option<Trouble> {
    let fatal = |problem: String| {
        Some(Trouble {
            problem,
            fatal: true,
        })
    };
    if layers.is_empty() {
        return fatal("it has no layers".into());
    }
    let mut below: Option<&Header> = None;
    let mut corrupt = None;
    for (index, layer) in layers.iter().enumerate() {
        let Some(state) = states.get(layer) else {
            return fatal(format!("its layer {layer} was not looked at"));
        };
        if let Some(broken) = &state.broken {
            return fatal(format!("its layer {layer} is damaged: {broken}"));
        }
        let Some(header) = &state.header else {
            return fatal(format!("its layer {layer} cannot be read"));
        };
        if !header.fits_on(below) {
            let named = |layer: Option<Uuid>| layer.map_or("nothing".into(), |l| l.to_string());
            return fatal(format!(
                "its layer {layer} belongs on {}, but lies on {}",
                named(header.parent),
                named(below.map(|below| below.uuid))
            ));
        }
        let top = index + 1 == layers.len();
        if header.sealed == (top && writable_top) {
            return fatal(format!(
                "its layer {layer} is {}sealed",
                if header.sealed { "" } else { "not " }
            ));
        }
        if let (Some(problem), None) = (&state.corrupt, &corrupt) {
            corrupt = Some(format!("its layer {layer} is damaged: {problem}"));
        }
        below = Some(header);
    }
    corrupt.map(|problem| Trouble {
        problem,
        fatal: false,
    })
}
