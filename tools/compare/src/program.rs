//! The vellum program that is measured.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The one that was given, or that of this workspace, built first.
///
/// # Errors
/// Without such a program; when cargo is missing or fails.
pub fn vellum(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(program) = given {
        ensure!(
            program.is_file(),
            "{}: no such program: name one with --vellum, or leave it out to build it",
            program.display()
        );
        return fs::canonicalize(program).context("the vellum program");
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--release", "--locked", "--bin", "vellum"]);
    build.arg("--manifest-path").arg(&manifest);
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_of_this_package(name)) {
        build.env_remove(name);
    }
    let status = build
        .status()
        .context("cargo, to build vellum (or name a program with --vellum)")?;
    ensure!(
        status.success(),
        "cargo could not build vellum: {status}: name a program with --vellum"
    );
    // Beside this program, whose directory is of the same profile or one beside that.
    let own = std::env::current_exe()?;
    let target = own.ancestors().nth(2).context("this program is nowhere")?;
    Ok(target.join("release/vellum"))
}

/// What `cargo run` tells the program that it runs about its package (The Cargo Book, “Environment
/// Variables”). Build scripts ask for some of them, so a cargo that inherits them builds anew what is
/// built already. What configures cargo itself stays.
fn is_of_this_package(name: &OsString) -> bool {
    let name = name.to_string_lossy();
    [
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_BIN_",
        "CARGO_CRATE_",
        "CARGO_CFG_",
        "CARGO_FEATURE_",
    ]
    .iter()
    .any(|start| name.starts_with(start))
        || ["CARGO_PRIMARY_PACKAGE", "OUT_DIR", "CARGO_MAKEFLAGS"].contains(&&*name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cargo_says_of_this_package_is_not_passed_on_and_its_settings_are() {
        let is = |name: &str| is_of_this_package(&name.into());
        for name in [
            "CARGO_PKG_NAME",
            "CARGO_MANIFEST_DIR",
            "CARGO_MANIFEST_PATH",
            "CARGO_PRIMARY_PACKAGE",
            "OUT_DIR",
        ] {
            assert!(is(name), "{name}");
        }
        for name in [
            "CARGO_HOME",
            "CARGO_TARGET_DIR",
            "CARGO_BUILD_JOBS",
            "CARGO_NET_OFFLINE",
            "RUSTFLAGS",
            "PATH",
        ] {
            assert!(!is(name), "{name}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_refused() {
        let error = vellum(Some(Path::new("/nowhere/vellum"))).unwrap_err();
        assert!(format!("{error}").contains("--vellum"));
    }
}
