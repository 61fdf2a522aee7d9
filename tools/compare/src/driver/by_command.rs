//! A driver that the user brings: commands that mount and unmount a container, or a program that does
//! (docs/comparing.md).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

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
    /// What knows further commands than these two.
    program: Option<PathBuf>,
}

impl std::str::FromStr for Brought {
    type Err = String;

    /// `NAME=up:CMD,down:CMD`, whose commands may hold commas and colons; or the path of a program.
    fn from_str(given: &str) -> Result<Self, String> {
        let wrong = |what: &str| {
            format!(
                "{given}: {what}; a driver is given like name=up:COMMAND,down:COMMAND, or is the path of \
                 a program, with a slash in it"
            )
        };
        if given.contains('/') && !given.contains("=up:") {
            return Self::program(Path::new(given)).map_err(|what| wrong(&what));
        }
        let (name, commands) = given.split_once('=').ok_or_else(|| wrong("has no name"))?;
        if !is_name(name) {
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
            program: None,
        })
    }
}

/// Whether a driver may be called so.
fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.chars().all(good)
}

impl Brought {
    /// A program, which is called with the name of a step.
    fn program(file: &Path) -> Result<Self, String> {
        let program = fs::canonicalize(file).map_err(|error| error.to_string())?;
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        if !program.is_file() || !is_name(&name) || program.to_string_lossy().contains('\'') {
            return Err("is no program that a driver can be called by".to_owned());
        }
        Ok(Brought {
            name: name.into_owned(),
            up: Self::call(&program, "up"),
            down: Self::call(&program, "down"),
            program: Some(program.clone()),
        })
    }

    /// A command for sh that calls a program, in whose path is no quote.
    fn call(program: &Path, step: &str) -> String {
        format!("exec '{}' {step}", program.display())
    }

    /// What the program says of itself, or why this host cannot have it.
    fn ask(&self, program: &Path) -> Result<String, String> {
        let asked = Command::new(program)
            .arg("version")
            .stdin(Stdio::null())
            .output();
        let asked = asked.map_err(|error| format!("{}: {error}", program.display()))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        match asked.status.success() {
            true => Ok(text(&asked.stdout)),
            false => Err(text(&asked.stderr)),
        }
    }
}

/// The driver of such commands.
pub(super) struct ByCommand {
    about: About,
    brought: Brought,
    /// What a program said of itself.
    said: OnceLock<Result<String, String>>,
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
            said: OnceLock::new(),
        }
    }

    /// None where there are only two commands.
    fn said(&self) -> Option<&Result<String, String>> {
        let program = self.brought.program.as_ref()?;
        Some(self.said.get_or_init(|| self.brought.ask(program)))
    }
}

/// Where the image's layers lie, from the bottom up, beside the containers.
const LAYERS: &str = "layers.json";
/// What a program makes of them.
const IMAGE: &str = "image";

impl Driver for ByCommand {
    fn about(&self) -> About {
        self.about
    }

    fn absent(&self) -> Option<String> {
        self.said()?.as_ref().err().cloned()
    }

    fn version(&self) -> Option<String> {
        let Brought { up, down, .. } = &self.brought;
        self.said().map_or_else(
            || Some(format!("up: {up}; down: {down}")),
            |said| said.as_ref().ok().cloned(),
        )
    }

    fn prepare(&self, dir: &Path, base: &Base) -> Result<()> {
        let kept = Kept {
            layers: base.layers.clone(),
            size: base.size,
        };
        fs::write(dir.join(LAYERS), serde_json::to_vec(&kept)?)?;
        fs::create_dir(dir.join(IMAGE))?;
        Containers::of(&self.brought, dir)?.step("prepare")
    }

    fn open(&self, dir: &Path) -> Result<Box<dyn Image>> {
        let containers = Containers::of(&self.brought, dir)?;
        containers.step("open")?;
        Ok(Box::new(containers))
    }
}

/// What an image is made from.
#[derive(serde::Serialize, serde::Deserialize)]
struct Kept {
    /// From the bottom up.
    layers: Vec<PathBuf>,
    /// Bytes of block devices and file systems for it.
    size: u64,
}

struct Containers {
    brought: Brought,
    dir: PathBuf,
    kept: Kept,
    /// Their mount points.
    started: BTreeMap<String, PathBuf>,
}

impl Containers {
    fn of(brought: &Brought, dir: &Path) -> Result<Self> {
        let kept = fs::read(dir.join(LAYERS)).context(LAYERS)?;
        Ok(Containers {
            brought: brought.clone(),
            dir: dir.to_owned(),
            kept: serde_json::from_slice(&kept).context(LAYERS)?,
            started: BTreeMap::new(),
        })
    }

    /// Has a program do what concerns the image as a whole; nothing where there are only two commands.
    fn step(&self, step: &str) -> Result<()> {
        if let Some(program) = &self.brought.program {
            host::run(self.told(program).arg(step))
                .with_context(|| format!("{step} of {}", self.brought.name))?;
        }
        Ok(())
    }

    /// A command that finds the image.
    fn told(&self, program: &Path) -> Command {
        // The uppermost first, as mount(8) of overlayfs wants them.
        let layers: Vec<_> = self
            .kept
            .layers
            .iter()
            .rev()
            .map(|l| l.to_string_lossy())
            .collect();
        let mut command = Command::new(program);
        command
            .current_dir(&self.dir)
            .env("LAYERS", layers.join(":"))
            .env("SIZE", self.kept.size.to_string())
            .env("IMAGE", self.dir.join(IMAGE));
        command
    }

    fn own(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn command(&self, script: &str, name: &str, at: &Path) -> Command {
        let mut command = self.told(Path::new("sh"));
        command
            .args(["-c", script])
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
        let at = self.dir.join(format!("{name}.mnt"));
        if let Some(program) = &self.brought.program {
            let script = Brought::call(program, "remove");
            host::run(&mut self.command(&script, name, &at))
                .with_context(|| format!("removing {name} by {}", self.brought.name))?;
        }
        fs::remove_dir_all(self.own(name))?;
        fs::remove_dir_all(at)?;
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
            let mut down = self.command(&self.brought.down, &name, &at);
            report(
                host::clean_up(&mut down).with_context(|| format!("unmounting {name} by command")),
            );
            if host::is_mounted(&at) {
                report(host::Mount::existing(&at).unmount());
            }
        }
        // Also after a step that failed half way.
        if let Some(program) = &self.brought.program {
            report(
                host::clean_up(self.told(program).arg("close"))
                    .with_context(|| format!("close of {}", self.brought.name)),
            );
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
            "/",
            "./nowhere",
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

    /// A program of that name with this body, made executable.
    fn program(dir: &Path, body: &str) -> ByCommand {
        use std::os::unix::fs::PermissionsExt;
        let file = dir.join("mine");
        fs::write(&file, format!("#!/bin/sh -e\n{body}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        ByCommand::new(file.to_str().unwrap().parse().unwrap())
    }

    #[test]
    fn a_program_makes_the_image_once_and_is_told_of_every_step() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("d");
        fs::create_dir(&at).unwrap();
        let driver = program(
            dir.path(),
            "case $1 in version) echo 'mine 3'; exit;; esac
             echo \"$1 $NAME\" >> ../steps
             case $1 in
             prepare) echo \"$SIZE\" > \"$IMAGE/size\";;
             up) cp \"$IMAGE/size\" \"$MNT\";;
             esac",
        );
        assert_eq!(driver.about().id, "mine");
        assert_eq!(
            (driver.absent(), driver.version()),
            (None, Some("mine 3".into()))
        );
        driver
            .prepare(&at, &Base::of_layers(vec![dir.path().to_owned()], 1 << 20))
            .unwrap();
        let mut image = driver.open(&at).unwrap();
        image.create("c").unwrap();
        let access = image.start("c").unwrap();
        let seen = fs::read_to_string(access.dir().unwrap().join("size")).unwrap();
        assert_eq!(seen, "1048576\n");
        image.stop("c").unwrap();
        image.remove("c").unwrap();
        drop(image);
        let steps = fs::read_to_string(dir.path().join("steps")).unwrap();
        let steps: Vec<&str> = steps.lines().map(str::trim).collect();
        // What makes an image closes it as well.
        let all = [
            "prepare", "close", "open", "up c", "down c", "remove c", "close",
        ];
        assert_eq!(steps, all);
    }

    #[test]
    fn a_close_that_fails_says_what_is_left_and_so_does_the_step_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("d");
        fs::create_dir(&at).unwrap();
        let driver = program(dir.path(), "echo \"no $1 today\" >&2; exit 3");
        let base = Base::of_layers(vec![dir.path().to_owned()], 1 << 20);
        let error = driver.prepare(&at, &base).unwrap_err();
        let said = format!("{error:#}");
        assert!(
            said.contains("prepare of mine") && said.contains("no prepare today"),
            "{said}"
        );
        let mut close = Command::new(dir.path().join("mine"));
        close.arg("close");
        let said = format!("{:#}", host::clean_up(&mut close).unwrap_err());
        assert!(
            said.contains("status: 3") && said.contains("no close today"),
            "{said}"
        );
    }

    #[test]
    fn a_program_says_why_a_host_cannot_have_it() {
        let dir = tempfile::tempdir().unwrap();
        let driver = program(dir.path(), "echo 'no such module' >&2; exit 1");
        assert_eq!(driver.absent().as_deref(), Some("no such module"));
        assert_eq!(driver.version(), None);
    }
}
