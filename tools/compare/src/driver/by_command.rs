//! A driver that the user brings: commands that mount and unmount a container (docs/comparing.md).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{About, Access, Base, Driver, Image, Kind};
use crate::host::{self, allocated, report};

/// What `--driver` gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Brought {
    /// Its name.
    pub name: String,
    /// Mounts a container, and makes it where it is not yet there.
    up: String,
    /// Unmounts it.
    down: String,
}

impl std::str::FromStr for Brought {
    type Err = String;

    /// `NAME=up:CMD,down:CMD`; commands may hold commas and colons.
    fn from_str(given: &str) -> Result<Self, String> {
        let wrong = |what: &str| {
            format!("{given}: {what}; a driver is given like name=up:COMMAND,down:COMMAND")
        };
        let (name, commands) = given.split_once('=').ok_or_else(|| wrong("has no name"))?;
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || !name.chars().all(good) {
            return Err(wrong("its name may hold letters, digits, -, _ and . alone"));
        }
        let (up, down) = commands
            .strip_prefix("up:")
            .and_then(|rest| rest.split_once(",down:"))
            .ok_or_else(|| wrong("has no two commands"))?;
        if up.trim().is_empty() || down.trim().is_empty() {
            return Err(wrong("a command is empty"));
        }
        Ok(Brought {
            name: name.to_owned(),
            up: up.to_owned(),
            down: down.to_owned(),
        })
    }
}

/// The driver of such commands.
pub(super) struct ByCommand {
    about: About,
    brought: Brought,
}

impl ByCommand {
    pub fn new(brought: Brought) -> Self {
        // One for each option of the command line, for as long as the program runs.
        let name: &'static str = brought.name.clone().leak();
        ByCommand {
            about: About {
                id: name,
                title: name,
                what: "Given on the command line: mounted and unmounted by its own commands.",
                kind: Kind::Files,
                brought: true,
            },
            brought,
        }
    }
}

/// Where the image's layers lie, from the bottom up, beside the containers.
const LAYERS: &str = "layers.json";

impl Driver for ByCommand {
    fn about(&self) -> About {
        self.about
    }

    fn absent(&self) -> Option<String> {
        None
    }

    fn version(&self) -> Option<String> {
        let Brought { up, down, .. } = &self.brought;
        Some(format!("up: {up}; down: {down}"))
    }

    fn prepare(&self, dir: &Path, base: &Base) -> Result<()> {
        fs::write(dir.join(LAYERS), serde_json::to_vec(&base.layers)?)?;
        Ok(())
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        let layers = fs::read(dir.join(LAYERS)).context(LAYERS)?;
        Ok(Box::new(Containers {
            brought: self.brought.clone(),
            dir: dir.to_owned(),
            layers: serde_json::from_slice(&layers).context(LAYERS)?,
            started: BTreeMap::new(),
        }))
    }
}

struct Containers {
    brought: Brought,
    dir: PathBuf,
    layers: Vec<PathBuf>,
    /// Their mount points.
    started: BTreeMap<String, PathBuf>,
}

impl Containers {
    fn own(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn command(&self, script: &str, name: &str, at: &Path) -> Command {
        // The uppermost first, as mount(8) of overlayfs wants them.
        let layers: Vec<_> = self
            .layers
            .iter()
            .rev()
            .map(|l| l.to_string_lossy())
            .collect();
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .current_dir(&self.dir)
            .env("LAYERS", layers.join(":"))
            .env("DIR", self.own(name))
            .env("NAME", name)
            .env("MNT", at);
        command
    }
}

impl Image for Containers {
    fn create(&mut self, name: &str) -> Result<()> {
        fs::create_dir(self.own(name))?;
        fs::create_dir(self.dir.join(format!("{name}.mnt")))?;
        Ok(())
    }

    fn start(&mut self, name: &str) -> Result<Access> {
        let at = self.dir.join(format!("{name}.mnt"));
        // Also when it fails half way there may be something to unmount.
        self.started.insert(name.to_owned(), at.clone());
        host::run(&mut self.command(&self.brought.up, name, &at))
            .with_context(|| format!("mounting {name} by the command of {}", self.brought.name))?;
        let empty = fs::read_dir(&at)?.next().is_none();
        ensure!(
            !empty,
            "the command of {} ended well, but {} is empty: it has to show the files of $LAYERS at \
             $MNT when it ends",
            self.brought.name,
            at.display()
        );
        Ok(Access::Dir(at))
    }

    fn stop(&mut self, name: &str) -> Result<()> {
        if let Some(at) = self.started.get(name) {
            host::run(&mut self.command(&self.brought.down, name, at)).with_context(|| {
                format!("unmounting {name} by the command of {}", self.brought.name)
            })?;
            ensure!(
                !host::is_mounted(at),
                "the command of {} ended well, but {} is still mounted",
                self.brought.name,
                at.display()
            );
            self.started.remove(name);
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        fs::remove_dir_all(self.own(name))?;
        fs::remove_dir_all(self.dir.join(format!("{name}.mnt")))?;
        Ok(())
    }

    /// Those that `up` has written into `$DIR/pids`.
    fn servers(&self, name: &str) -> Vec<u32> {
        let list = fs::read_to_string(self.own(name).join("pids"));
        let list = list.iter().flat_map(|list| list.split_whitespace());
        list.filter_map(|pid| pid.parse().ok()).collect()
    }

    fn used(&self) -> Result<u64> {
        host::sync_fs(&self.dir)?;
        Ok(allocated(&self.dir))
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        for (name, at) in std::mem::take(&mut self.started) {
            // Not through `host::run`, which ends when the user interrupts.
            let status = self.command(&self.brought.down, &name, &at).status();
            report(status.map(drop).context("unmounting by command"));
            if host::is_mounted(&at) {
                report(host::Mount::existing(&at).unmount());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_a_name_and_two_commands_which_may_hold_commas() {
        let given = "mine=up:mount -o a,b=c:d \"$MNT\",down:umount \"$MNT\"";
        let found: Brought = given.parse().unwrap();
        assert_eq!(found.name, "mine");
        assert_eq!(found.up, "mount -o a,b=c:d \"$MNT\"");
        assert_eq!(found.down, "umount \"$MNT\"");
    }

    #[test]
    fn what_is_no_driver_is_refused_with_the_right_form() {
        for wrong in [
            "",
            "mine",
            "=up:a,down:b",
            "a b=up:a,down:b",
            "a=up:x",
            "a=up:,down:b",
            "a=down:b,up:a",
        ] {
            let error = wrong.parse::<Brought>().unwrap_err();
            assert!(
                error.contains("name=up:COMMAND,down:COMMAND"),
                "{wrong}: {error}"
            );
        }
    }

    #[test]
    fn commands_are_told_where_everything_lies_and_an_empty_mount_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        fs::create_dir(&layer).unwrap();
        fs::write(layer.join("file"), "x").unwrap();
        let base = Base::of_layers(vec![layer], 1 << 20);
        let at = dir.path().join("d");
        fs::create_dir(&at).unwrap();
        let driver = |given: &str| ByCommand::new(given.parse().unwrap());
        // No mount, but a copy: what counts is what lies there.
        let copy = driver("copy=up:cp -a \"$LAYERS/.\" \"$MNT\"; echo 1 > \"$DIR/pids\",down:true");
        copy.prepare(&at, &base).unwrap();
        let mut image = copy.open(&at).unwrap();
        image.create("c").unwrap();
        let access = image.start("c").unwrap();
        assert_eq!(fs::read(access.dir().unwrap().join("file")).unwrap(), b"x");
        assert_eq!(image.servers("c"), [1]);
        image.stop("c").unwrap();
        image.remove("c").unwrap();

        let mut image = driver("none=up:true,down:true").open(&at).unwrap();
        image.create("c").unwrap();
        let error = format!("{:#}", image.start("c").unwrap_err());
        assert!(error.contains("$LAYERS at $MNT"), "{error}");
    }
}
