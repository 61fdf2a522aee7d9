//! `tools/package`: what it makes is installed, used, upgraded and removed in roots that have nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// In a root's own mount namespace, with the static program at /vellum-static.
const STATIC_INSTALLED_USED_AND_REMOVED: &str = r#"
set -eu
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
check() { echo "-- $*"; }

check installs
install -m 755 /vellum-static /usr/local/bin/vellum
! readelf -d /usr/local/bin/vellum | grep -q NEEDED
! readelf -S /usr/local/bin/vellum | grep -q "\.debug_"
vellum doctor | grep -q "mke2fs: /usr/sbin/mke2fs"
mkdir /tmp/man
vellum man /tmp/man
test -s /tmp/man/vellum-run.1

check "is used"
export VELLUM_ROOT=/tmp/store
mkdir -p /tmp/tree/bin /tmp/tree/etc
cp /busybox /tmp/tree/bin/busybox
ln -s busybox /tmp/tree/bin/sh
echo "somebody:x:1234:1234::/:/bin/sh" >/tmp/tree/etc/passwd
vellum import box /tmp/tree >/dev/null
vellum run --name one box /bin/sh -c 'echo hello >/said'
at=$(vellum mount one)
test "$(cat "$at/said")" = hello
# Names of hosts and of users are looked up without a library of the host's.
echo "127.0.0.1 registry.test" >/etc/hosts
vellum pull registry.test:1/nothing:1 2>&1 | grep -q "refused"
test "$(vellum run --rm --user somebody box /bin/busybox id -u)" = 1234

check "is upgraded while it serves"
install -m 755 /vellum-static /usr/local/bin/vellum
vellum upgrade-servers
test "$(cat "$at/said")" = hello

check "is removed while it serves, comes back and ends it in order"
rm /usr/local/bin/vellum
test "$(cat "$at/said")" = hello
install -m 755 /vellum-static /usr/local/bin/vellum
vellum umount one
rm /usr/local/bin/vellum
"#;

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

/// A Debian package of the program that the tests start, and the static program, which is built where it is not yet.
fn packages(out: &Path) -> (PathBuf, PathBuf) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/package");
    for what in [&["--no-build", "deb"][..], &["static"]] {
        let mut make = Command::new(&script);
        // Or cargo builds anew what it has built without them.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"]
                .iter()
                .any(|own| name.starts_with(own))
            {
                make.env_remove(name);
            }
        }
        let output = run(make.args(["--profile", "dev", "--out"]).arg(out).args(what));
        passed(&output, &format!("tools/package {}", what.join(" ")));
    }
    let files = fs::read_dir(out).unwrap().map(|file| file.unwrap().path());
    let files: Vec<PathBuf> = files.collect();
    let deb = files
        .iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "deb"))
        .find(|file| !file.to_str().unwrap().contains("dbgsym"));
    let end = format!("-{}", std::env::consts::ARCH);
    let program = files
        .iter()
        .find(|file| file.to_str().unwrap().ends_with(&end));
    (
        deb.expect("a package was made").clone(),
        program.expect("a static program was made").clone(),
    )
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

/// Runs a script in a root, in namespaces of mounts and processes: whatever is left ends with them, also when a check
/// fails.
fn run_in(root: &Path, script: &str) {
    fs::write(root.join("check"), script).unwrap();
    let enter = r#"
        set -eu
        mount --bind "$1" "$1"
        cd "$1"
        mount -t proc proc proc
        mount --rbind /sys sys
        mount --rbind /dev dev
        mount -t tmpfs tmpfs run
        mkdir -p old
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
        .arg(root));
    passed(&output, &root.display().to_string());
}

fn in_a_clean_root(release: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (deb, program) = packages(&dir.path().join("packages"));
    let inside = dir.path().join(release);
    root(release, &inside);
    fs::copy(deb, inside.join("vellum.deb")).unwrap();
    fs::copy(program, inside.join("vellum-static")).unwrap();
    fs::copy("/bin/busybox", inside.join("busybox")).expect("apt-get install busybox-static");
    run_in(&inside, STATIC_INSTALLED_USED_AND_REMOVED);
    fs::remove_dir_all(inside.join("tmp/tree")).unwrap();
    run_in(&inside, INSTALLED_USED_AND_REMOVED);
}

#[test]
fn a_static_program_and_a_debian_package_are_installed_used_upgraded_and_removed_in_a_clean_debian_12()
 {
    in_a_clean_root("bookworm");
}

#[test]
fn a_static_program_and_a_debian_package_are_installed_used_upgraded_and_removed_in_a_clean_debian_13()
 {
    in_a_clean_root("trixie");
}
