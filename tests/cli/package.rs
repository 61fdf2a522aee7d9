//! `tools/package`: what it makes is installed, used, upgraded and removed in roots that have nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// In a root's own mount namespace, with the package at /vellum.deb.
const INSTALLED_USED_AND_REMOVED: &str = r#"
set -eu
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
check() { echo "-- $*"; }

check installs
dpkg -i /vellum.deb >/tmp/said
grep -q "^vellum doctor, about this host:" /tmp/said
grep -q "mke2fs: /usr/sbin/mke2fs" /tmp/said
dpkg -L vellum | grep -v '^/\.$' >/tmp/files
test -s /etc/vellum/config.toml
test -s /usr/share/bash-completion/completions/vellum
zcat /usr/share/man/man1/vellum-run.1.gz | grep -q "vellum run"
grep -q '"name": "zstd"' /usr/share/doc/vellum/vellum.cdx.json
# The symbols are in a package of their own.
! readelf -S /usr/bin/vellum | grep -q "\.debug_"

check "is used"
mkdir -p /tmp/tree/bin
cp /busybox /tmp/tree/bin/busybox
ln -s busybox /tmp/tree/bin/sh
vellum import box /tmp/tree >/dev/null
vellum run --name one box /bin/sh -c 'echo hello >/said'
at=$(vellum mount one)
test "$(cat "$at/said")" = hello

check "is upgraded while it serves"
dpkg -i /vellum.deb >/tmp/said
grep -q "one: served by" /tmp/said
test "$(cat "$at/said")" = hello

check "is removed while it serves"
dpkg --remove vellum >/tmp/said
grep -q "stays mounted and is served on" /tmp/said
test "$(cat "$at/said")" = hello
test -s /etc/vellum/config.toml

check "comes back and ends it in order"
dpkg -i /vellum.deb >/dev/null
vellum umount one
dpkg --purge vellum >/tmp/said
grep -q "stay in /var/lib/vellum" /tmp/said
test -e /var/lib/vellum/vellum.json
while read -r file; do
    if [ -f "$file" ]; then echo "left behind: $file" >&2; exit 1; fi
done </tmp/files
test ! -e /etc/vellum
"#;

fn run(command: &mut Command) -> Output {
    let name = command.get_program().display().to_string();
    command
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn passed(output: &Output, what: &str) {
    assert!(
        output.status.success(),
        "{what}: {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The package of the program that the tests start, made once for each test.
fn package(out: &Path) -> PathBuf {
    let output = run(
        Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/package"))
            .args(["--profile", "dev", "--no-build", "--out"])
            .arg(out)
            .arg("deb"),
    );
    passed(&output, "tools/package deb");
    let files = fs::read_dir(out).unwrap().map(|file| file.unwrap().path());
    files
        .filter(|file| file.extension().is_some_and(|extension| extension == "deb"))
        .find(|file| !file.to_str().unwrap().contains("dbgsym"))
        .expect("a package was made")
}

/// A root of that release with what the package depends on, and a runtime.
fn root(release: &str, at: &Path) {
    let output = run(Command::new("mmdebstrap")
        .args(["--quiet", "--mode=root", "--variant=essential"])
        .args([
            "--dpkgopt=force-unsafe-io",
            "--aptopt=APT::Install-Recommends \"false\"",
        ])
        .args([
            "--aptopt=Acquire::Retries \"3\"",
            "--aptopt=Acquire::Check-Valid-Until \"false\"",
        ])
        .arg("--include=e2fsprogs,crun,ca-certificates,binutils,libgcc-s1,mount")
        .arg(release)
        .arg(at));
    passed(
        &output,
        "mmdebstrap (apt-get install mmdebstrap debian-archive-keyring)",
    );
}

fn in_a_clean_root(release: &str) {
    let dir = tempfile::tempdir().unwrap();
    let deb = package(&dir.path().join("packages"));
    let inside = dir.path().join("root");
    root(release, &inside);
    fs::copy(deb, inside.join("vellum.deb")).unwrap();
    fs::copy("/bin/busybox", inside.join("busybox")).expect("apt-get install busybox-static");
    fs::write(inside.join("check"), INSTALLED_USED_AND_REMOVED).unwrap();
    // A mount namespace and one of processes: whatever is left ends with them, also when a check fails.
    let enter = r#"
        set -eu
        mount --bind "$1" "$1"
        cd "$1"
        mount -t proc proc proc
        mount --rbind /sys sys
        mount --rbind /dev dev
        mount -t tmpfs tmpfs run
        mkdir old
        pivot_root . old
        umount -l old
        exec sh -x /check
    "#;
    let output = run(Command::new("unshare")
        .args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
        ])
        .args(["sh", "-c", enter, "sh"])
        .arg(&inside));
    passed(&output, release);
}

#[test]
fn debian_package_is_installed_used_upgraded_and_removed_in_a_clean_debian_12() {
    in_a_clean_root("bookworm");
}

#[test]
fn debian_package_is_installed_used_upgraded_and_removed_in_a_clean_debian_13() {
    in_a_clean_root("trixie");
}
