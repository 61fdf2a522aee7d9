//! Which QEMU is called: this host's, or that of a Debian root of another release, in place.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::host;

/// Where a root has the dynamic loader of its programs (System V ABI supplements of AMD64 and AArch64).
const LOADERS: [&str; 2] = ["lib64/ld-linux-x86-64.so.2", "lib/ld-linux-aarch64.so.1"];

/// A QEMU. As many as the command line names, for as long as the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Qemu {
    /// What is on the PATH.
    Host,
    /// That of a root.
    Rooted(&'static Rooted),
}

/// A QEMU of a root.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rooted {
    programs: PathBuf,
    loader: PathBuf,
    libraries: PathBuf,
    /// Like `10`.
    major: String,
}

impl Qemu {
    /// That of the root in a directory.
    ///
    /// # Errors
    /// Where there is no root of this processor, or none with qemu-utils.
    pub fn of_root(root: &Path) -> Result<Self> {
        let find = || {
            let root = fs::canonicalize(root)?;
            let loader = LOADERS.map(|loader| root.join(loader));
            let loader = loader.into_iter().find(|loader| loader.is_file());
            let libraries = fs::read_dir(root.join("usr/lib"))?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .find(|path| path.to_string_lossy().ends_with("-linux-gnu"));
            let mut rooted = Rooted {
                programs: root.join("usr/bin"),
                loader: loader.context("it has no dynamic loader that is known here")?,
                libraries: libraries.context("it has no libraries")?,
                major: String::new(),
            };
            let said = host::run(rooted.command("qemu-nbd").arg("--version"))?.stdout;
            // /srv/trixie/usr/bin/qemu-nbd 10.0.8 (Debian 1:10.0.8+ds-0+deb13u1)
            let version = said.split_whitespace().nth(1);
            let major = version.and_then(|version| version.split_once('.'));
            let (major, _) = major.with_context(|| format!("its qemu-nbd says: {said}"))?;
            rooted.major = major.to_owned();
            Ok::<_, anyhow::Error>(rooted)
        };
        let rooted = find().with_context(|| {
            format!(
                "--qemu {}: name the directory of a Debian root with qemu-utils",
                root.display()
            )
        })?;
        Ok(Qemu::Rooted(Box::leak(Box::new(rooted))))
    }

    /// A program of it, to be given arguments.
    pub fn command(self, program: &str) -> Command {
        match self {
            Qemu::Host => Command::new(program),
            Qemu::Rooted(rooted) => rooted.command(program),
        }
    }

    /// Why it lacks one of its programs.
    pub fn missing(self, programs: &[(&str, &str)]) -> Option<String> {
        match self {
            Qemu::Host => super::missing(programs),
            Qemu::Rooted(rooted) => programs.iter().find_map(|(program, package)| {
                let file = rooted.programs.join(program);
                (!file.is_file()).then(|| format!("no {} (Debian: {package})", file.display()))
            }),
        }
    }

    /// What a program of it says of its version.
    pub fn version(self, program: &str) -> Option<String> {
        let said = host::run(self.command(program).arg("--version")).ok()?;
        // It says how it was called, which may be a path.
        let line = said.stdout.lines().next()?;
        let line = line.find(program).and_then(|start| line.get(start..))?;
        Some(line.trim().chars().take(70).collect())
    }

    /// What is added to the names of its drivers: nothing for this host's, else like `10`.
    pub fn major(self) -> Option<&'static str> {
        match self {
            Qemu::Host => None,
            Qemu::Rooted(rooted) => Some(&rooted.major),
        }
    }
}

impl Rooted {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(&self.loader);
        command
            .arg("--library-path")
            .arg(&self.libraries)
            .arg(self.programs.join(program));
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_qemu_is_refused_with_what_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        for dir in [dir.path(), Path::new("/nowhere")] {
            let error = format!("{:#}", Qemu::of_root(dir).unwrap_err());
            assert!(error.contains("Debian root with qemu-utils"), "{error}");
        }
    }

    #[test]
    fn this_hosts_own_root_is_a_root_whose_qemu_says_its_version() {
        let qemu = Qemu::of_root(Path::new("/")).unwrap();
        let version = Qemu::Host.version("qemu-nbd").unwrap();
        assert_eq!(qemu.version("qemu-nbd"), Some(version.clone()));
        let major = qemu.major().unwrap();
        assert!(version.contains(&format!(" {major}.")), "{version}");
        assert_eq!(qemu.missing(&[("qemu-nbd", "qemu-utils")]), None);
    }
}
