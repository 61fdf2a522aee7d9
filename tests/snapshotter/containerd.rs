//! Real containerd and runc on the snapshotter, with roots, states and sockets of their own.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use crate::diff;
use crate::snapshotter_support::client::Client;
use crate::snapshotter_support::oci::{archive_of, tar_of};
use crate::snapshotter_support::{Area, Daemon, PACKAGES, wait_for};
use nix::sys::signal::Signal;
use serde_json::Value;
use sha2::{Digest, Sha256};

const IMAGE: &str = "docker.io/library/vellum-test:1";

pub struct Stack {
    snapshotter: Option<Daemon>,
    _containerd: Daemon,
    pub area: Area,
}

impl Stack {
    pub fn start() -> Stack {
        let area = Area::new();
        let config = format!(
            "version = 2\nroot = '{0}/containerd'\nstate = '{0}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri']\n\
             [grpc]\naddress = '{0}/containerd.sock'\n\
             [proxy_plugins.vellum]\ntype = 'snapshot'\naddress = '{0}/socket/vellum.sock'\n",
            area.path().display()
        );
        fs::write(area.path().join("containerd.toml"), config).unwrap();
        let config = format!(
            "version = 1\ndefault_size = '1G'\n[diff]\ncontainerd = '{}'\n[log]\nlevel = 'debug'\n\
             format = 'json'\n",
            area.at("containerd.sock")
        );
        fs::write(area.path().join("vellum.toml"), config).unwrap();
        let snapshotter = snapshotter(&area);
        let containerd = Daemon::start(
            Command::new("containerd").args(["--config", &area.at("containerd.toml")]),
            &area.path().join("containerd.log"),
        );
        let stack = Stack {
            snapshotter: Some(snapshotter),
            _containerd: containerd,
            area,
        };
        wait_for("containerd answers", Duration::from_secs(30), || {
            stack.try_ctr(&["version"]).status.success()
        });
        stack
    }

    fn restart_snapshotter(&mut self) {
        self.snapshotter = Some(snapshotter(&self.area));
    }

    fn try_ctr(&self, arguments: &[&str]) -> Output {
        Command::new("ctr")
            .args(["--address", &self.area.at("containerd.sock")])
            // Also names the containers' control groups.
            .args(["--namespace", &self.area.name()])
            .args(arguments)
            .output()
            .unwrap_or_else(|error| panic!("ctr: {error}: {PACKAGES}"))
    }

    pub fn ctr(&self, arguments: &[&str]) -> String {
        let output = self.try_ctr(arguments);
        assert!(
            output.status.success(),
            "ctr {arguments:?}: {}\n{}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            fs::read_to_string(self.area.path().join("vellum.log")).unwrap_or_default()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn import(&self) {
        let tar = self.area.at("image.tar");
        fs::write(&tar, image()).unwrap();
        self.ctr(&["images", "import", "--snapshotter", "vellum", &tar]);
    }

    fn run(&self, options: &[&str], name: &str, command: &[&str]) -> String {
        let mark = format!("VELLUM_TEST={}", self.area.path().display());
        let runc = self.area.at("runc");
        let mut all = vec!["run", "--snapshotter", "vellum", "--env", &mark];
        all.extend(["--runc-root", &runc]);
        all.extend(options);
        all.extend([IMAGE, name]);
        all.extend(command);
        self.ctr(&all)
    }

    fn exec(&self, name: &str, script: &str) -> String {
        let shell = ["/bin/busybox", "sh", "-c", script];
        let mut all = vec!["tasks", "exec", "--exec-id", "x", name];
        all.extend(shell);
        self.ctr(&all)
    }

    fn end(&self, name: &str) {
        self.ctr(&["tasks", "kill", "--signal", "KILL", name]);
        wait_for("the task ends", Duration::from_secs(10), || {
            self.try_ctr(&["tasks", "rm", name]).status.success()
        });
        self.ctr(&["containers", "rm", name]);
    }

    /// Bytes that the layers take on disk.
    fn layer_bytes(&self) -> u64 {
        disk_usage(&self.area.path().join("root/layers"))
    }

    fn layers(&self) -> usize {
        let dir = self.area.path().join("root/layers");
        fs::read_dir(dir).unwrap().count()
    }
}

fn snapshotter(area: &Area) -> Daemon {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vellum"));
    command
        .args(["--root", &area.at("root"), "snapshotter"])
        .args(["--config", &area.at("vellum.toml")])
        .args(["--address", &area.at("socket/vellum.sock")]);
    let daemon = Daemon::start(&mut command, &area.path().join("vellum.log"));
    wait_for("the snapshotter listens", Duration::from_secs(20), || {
        std::os::unix::net::UnixStream::connect(area.at("socket/vellum.sock")).is_ok()
    });
    daemon
}

/// Bytes that a directory takes. What goes while it is looked at takes none.
fn disk_usage(path: &Path) -> u64 {
    let gone = |error: std::io::Error| assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => {
            gone(error);
            return 0;
        }
    };
    let mut bytes = metadata.blocks() * 512;
    if metadata.is_dir() {
        match fs::read_dir(path) {
            Ok(entries) => {
                for entry in entries {
                    bytes += disk_usage(&entry.unwrap().path());
                }
            }
            Err(error) => gone(error),
        }
    }
    bytes
}

/// An OCI image of two layers: busybox and a file; another file, and the first deleted.
fn image() -> Vec<u8> {
    let busybox = fs::read("/bin/busybox")
        .unwrap_or_else(|error| panic!("/bin/busybox: {error}: {PACKAGES}"));
    let first = tar_of(&[
        ("bin/busybox", &busybox, 0o755),
        ("etc/one", b"first\n", 0o640),
        ("etc/gone", b"deleted above\n", 0o644),
    ]);
    let second = tar_of(&[
        ("etc/two", b"second\n", 0o600),
        ("etc/.wh.gone", b"", 0o644),
    ]);
    archive_of(IMAGE, &[first, second], &["/bin/busybox", "sh"])
}

#[test]
fn containers_share_an_image_keep_their_writes_apart_and_give_their_space_back() {
    let stack = Stack::start();
    stack.import();
    // The template and one layer for each of the image's.
    assert_eq!(stack.layers(), 3);
    let shell = ["/bin/busybox", "sh", "-c"];
    let script = "busybox cat /etc/one /etc/two; busybox stat -c %a /etc/two; busybox ls /etc/gone";
    let script = format!("{script} || echo no gone");
    let output = stack.run(&["--rm"], "once", &[shell[0], shell[1], shell[2], &script]);
    assert_eq!(output, "first\nsecond\n600\nno gone\n");

    for name in ["a", "b"] {
        let command = ["/bin/busybox", "sleep", "1000"];
        stack.run(&["--detach"], name, &command);
    }
    stack.exec("a", "echo mine > /etc/mine; echo changed > /etc/one");
    assert_eq!(
        stack.exec("a", "busybox cat /etc/one /etc/mine"),
        "changed\nmine\n"
    );
    assert_eq!(
        stack.exec(
            "b",
            "busybox cat /etc/one; busybox test -e /etc/mine || echo none"
        ),
        "first\nnone\n"
    );
    let idle = stack.layer_bytes();
    stack.exec(
        "b",
        "busybox dd if=/dev/zero of=/big bs=1M count=20 2>/dev/null; busybox sync -f /",
    );
    let full = stack.layer_bytes();
    assert!(full > idle + (20 << 20), "{idle} to {full}");
    let usage = stack.ctr(&["snapshots", "--snapshotter", "vellum", "usage", "b"]);
    assert!(usage.contains("20.") || usage.contains("21."), "{usage}");
    stack.end("a");
    stack.end("b");
    // Has containerd collect its garbage now, rather than at some time.
    stack.ctr(&["images", "tag", IMAGE, "docker.io/library/other:1"]);
    stack.ctr(&["images", "rm", "--sync", "docker.io/library/other:1"]);
    wait_for(
        "the container's space is free",
        Duration::from_secs(20),
        || stack.layer_bytes() < idle && stack.layers() == 3,
    );
    stack.ctr(&["images", "rm", "--sync", IMAGE]);
    wait_for("the image's space is free", Duration::from_secs(20), || {
        stack.layers() == 1
    });
    wait_for("nothing is mounted", Duration::from_secs(20), || {
        fs::read_dir(stack.area.path().join("root/mnt"))
            .unwrap()
            .count()
            == 0
    });
}

#[test]
fn a_killed_snapshotter_leaves_containers_running_and_the_next_goes_on_with_them() {
    let mut stack = Stack::start();
    stack.import();
    stack.run(&["--detach"], "c", &["/bin/busybox", "sleep", "1000"]);
    stack.exec("c", "echo before > /file");
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        stack.snapshotter.take().unwrap().signal(signal);
        // Nobody serves gRPC now; the container does not care.
        assert_eq!(stack.exec("c", "busybox cat /file"), "before\n");
        stack.exec("c", "echo again >> /during; busybox sync -f /");
        stack.restart_snapshotter();
        // containerd connects again by itself, after a pause.
        wait_for("containerd goes on", Duration::from_secs(30), || {
            let mounts = ["snapshots", "--snapshotter", "vellum", "mounts", "/x", "c"];
            let mounts = stack.try_ctr(&mounts);
            String::from_utf8_lossy(&mounts.stdout).contains("root/mnt/")
        });
    }
    assert_eq!(stack.exec("c", "busybox cat /during"), "again\nagain\n");
    stack.run(&["--rm"], "other", &["/bin/busybox", "true"]);
    stack.end("c");
    stack.ctr(&["images", "rm", "--sync", IMAGE]);
    wait_for("all space is free", Duration::from_secs(20), || {
        stack.layers() == 1
    });
}

#[test]
fn after_a_reboot_mounts_brings_what_was_written_back() {
    let mut stack = Stack::start();
    stack.import();
    stack.run(&["--detach"], "c", &["/bin/busybox", "sleep", "1000"]);
    stack.exec("c", "echo kept > /file; busybox sync -f /");
    stack.ctr(&["tasks", "kill", "--signal", "KILL", "c"]);
    wait_for("the task ends", Duration::from_secs(10), || {
        stack.try_ctr(&["tasks", "rm", "c"]).status.success()
    });
    stack.snapshotter.take().unwrap().signal(Signal::SIGKILL);
    stack.area.end_devices();
    stack.restart_snapshotter();
    wait_for("containerd goes on", Duration::from_secs(30), || {
        let task = ["tasks", "start", "--detach", "c"];
        stack.try_ctr(&task).status.success()
    });
    assert_eq!(
        stack.exec("c", "busybox cat /file /etc/one"),
        "kept\nfirst\n"
    );
    stack.end("c");
}

#[test]
fn a_running_container_is_committed_as_it_was_and_goes_on() {
    let stack = Stack::start();
    stack.import();
    stack.run(&["--detach"], "c", &["/bin/busybox", "sleep", "1000"]);
    stack.exec("c", "echo before > /file");
    let snapshots = |arguments: &[&str]| {
        let mut all = vec!["snapshots", "--snapshotter", "vellum"];
        all.extend(arguments);
        stack.ctr(&all)
    };
    snapshots(&["commit", "snap", "c"]);
    stack.exec(
        "c",
        "echo after > /file; echo more > /more; busybox sync -f /",
    );
    assert_eq!(stack.exec("c", "busybox cat /file"), "after\n");
    let seen = |key: &str| {
        let target = stack.area.at(key);
        fs::create_dir(&target).unwrap();
        let command = snapshots(&["mounts", &target, key]);
        let words: Vec<&str> = command.split_whitespace().collect();
        let (program, arguments) = words.split_first().unwrap();
        let mounted = Command::new(program).args(arguments).status().unwrap();
        assert!(mounted.success(), "{command}");
        let file = fs::read_to_string(Path::new(&target).join("file")).unwrap();
        let more = Path::new(&target).join("more").exists();
        let write = fs::write(Path::new(&target).join("own"), "x").is_ok();
        nix::mount::umount(target.as_str()).unwrap();
        (file, more, write)
    };
    snapshots(&["view", "v", "snap"]);
    assert_eq!(seen("v"), ("before\n".to_owned(), false, false));
    snapshots(&["prepare", "p", "snap"]);
    assert_eq!(seen("p"), ("before\n".to_owned(), false, true));
    stack.ctr(&["tasks", "kill", "--signal", "KILL", "c"]);
}

#[test]
fn a_label_makes_a_running_container_larger_or_is_refused_where_this_host_may_not() {
    let stack = Stack::start();
    stack.import();
    let writes = "while busybox true; do busybox dd if=/dev/zero of=/busy bs=64k count=9 conv=fsync \
                  2>/dev/null || echo failed >> /failed; echo x >> /rounds; done";
    let command = ["/bin/busybox", "sh", "-c", writes];
    stack.run(&["--detach"], "c", &command);
    let kilobytes = || -> u64 {
        let text = stack.exec("c", "set -- $(busybox df -k / | busybox tail -1); echo $2");
        text.trim().parse().unwrap()
    };
    let label = "containerd.io/snapshot/vellum.size=3G";
    let grow = ["snapshots", "--snapshotter", "vellum", "label", "c", label];
    if vellum_fs::ext4::may_grow_mounted().unwrap() {
        stack.ctr(&grow);
    } else {
        let refused = stack.try_ctr(&grow);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && said.contains("CAP_SYS_RESOURCE"),
            "{said}"
        );
        assert!(kilobytes() < 1_100_000, "nothing is changed");
        stack.ctr(&["tasks", "kill", "--signal", "KILL", "c"]);
        wait_for("the task ends", Duration::from_secs(10), || {
            stack.try_ctr(&["tasks", "rm", "c"]).status.success()
        });
        stack.ctr(&grow);
        stack.ctr(&["tasks", "start", "--detach", "c"]);
    }
    assert!(kilobytes() > 2_900_000, "{}", kilobytes());
    stack.exec(
        "c",
        "busybox dd if=/dev/zero of=/fill bs=1M count=1100 2>/dev/null",
    );
    assert_eq!(
        stack.exec("c", "busybox cat /failed 2>/dev/null; busybox true"),
        ""
    );
    let smaller = "containerd.io/snapshot/vellum.size=1G";
    let smaller = [
        "snapshots",
        "--snapshotter",
        "vellum",
        "label",
        "c",
        smaller,
    ];
    let refused = stack.try_ctr(&smaller);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("can only grow"),
        "{said}"
    );
    stack.end("c");
}

#[test]
fn check_finds_nothing_wrong_with_the_layers_of_unpacked_images() {
    let stack = Stack::start();
    stack.import();
    // Checksums and sizes come a moment after containerd's commit.
    wait_for("check has nothing to say", Duration::from_secs(60), || {
        let output = Command::new(env!("CARGO_BIN_EXE_vellum"))
            .args(["--root", &stack.area.at("root"), "check"])
            .output()
            .unwrap();
        let said = format!("{output:?}");
        let calm = output.status.success() && !said.contains("note:");
        if !calm {
            println!("{said}");
        }
        calm
    });
}

#[test]
fn a_label_makes_a_container_larger_and_a_full_one_hurts_nobody_else() {
    let stack = Stack::start();
    stack.import();
    let sleep = ["/bin/busybox", "sleep", "1000"];
    let label = "containerd.io/snapshot/vellum.size=2G";
    stack.run(&["--detach", "--snapshotter-label", label], "large", &sleep);
    stack.run(&["--detach"], "small", &sleep);
    let size = |name| -> u64 {
        let text = stack.exec(name, "set -- $(busybox df -k / | busybox tail -1); echo $2");
        text.trim().parse().unwrap()
    };
    let (small, large) = (size("small"), size("large"));
    assert!((900_000..1_100_000).contains(&small), "{small}");
    assert!((1_900_000..2_200_000).contains(&large), "{large}");
    let fill = "busybox dd if=/dev/zero of=/fill bs=1M count=1100 2>&1; busybox rm /fill";
    let told = stack.exec("small", fill);
    assert!(told.contains("No space left"), "{told}");
    stack.exec("small", "echo fine > /file && busybox sync -f /");
    stack.exec("large", "echo fine > /file && busybox sync -f /");
    stack.end("small");
    stack.end("large");
}

/// One member of a layer that has everything a member can have.
struct Member<'a> {
    path: &'a str,
    kind: tar::EntryType,
    mode: u32,
    owner: (u64, u64),
    device: (u32, u32),
    link: &'a str,
    content: &'a [u8],
    xattrs: &'a [(&'a str, &'a [u8])],
}

impl Default for Member<'_> {
    fn default() -> Self {
        Member {
            path: "",
            kind: tar::EntryType::Regular,
            mode: 0o644,
            owner: (0, 0),
            device: (0, 0),
            link: "",
            content: b"",
            xattrs: &[],
        }
    }
}

fn layer_of(members: &[Member<'_>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (number, member) in members.iter().enumerate() {
        let pax: Vec<(String, &[u8])> = member
            .xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value))
            .collect();
        let pax = pax.iter().map(|(name, value)| (name.as_str(), *value));
        if !member.xattrs.is_empty() {
            tar.append_pax_extensions(pax).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(member.kind);
        header.set_mode(member.mode);
        header.set_uid(member.owner.0);
        header.set_gid(member.owner.1);
        header.set_mtime(1_500_000_000 + number as u64);
        header.set_size(member.content.len() as u64);
        header.set_device_major(member.device.0).unwrap();
        header.set_device_minor(member.device.1).unwrap();
        if member.link.is_empty() {
            tar.append_data(&mut header, member.path, member.content)
                .unwrap();
        } else {
            tar.append_link(&mut header, member.path, member.link)
                .unwrap();
        }
    }
    tar.into_inner().unwrap()
}

/// Everything that a program could tell of the files below a directory.
fn description(root: &Path) -> std::collections::BTreeMap<String, String> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = std::collections::BTreeMap::new();
    let mut first_of = std::collections::HashMap::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        let mut entries: Vec<_> = fs::read_dir(&dir)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        entries.sort();
        for path in entries {
            let name = path.strip_prefix(root).unwrap().display().to_string();
            let there = fs::symlink_metadata(&path).unwrap();
            let kind = there.file_type();
            let mut text = format!("{:o} {}:{}", there.mode(), there.uid(), there.gid());
            if kind.is_dir() {
                dirs.push(path.clone());
            } else {
                text += &format!(
                    " links {} at {}.{}",
                    there.nlink(),
                    there.mtime(),
                    there.mtime_nsec()
                );
                let first = first_of.entry(there.ino()).or_insert(name.clone());
                text += &format!(" same as {first}");
            }
            if kind.is_file() {
                let bytes = fs::read(&path).unwrap();
                text += &format!(" {} bytes {:x?}", bytes.len(), Sha256::digest(&bytes));
            }
            if kind.is_symlink() {
                text += &format!(" to {}", fs::read_link(&path).unwrap().display());
            }
            if kind.is_char_device() || kind.is_block_device() {
                text += &format!(" device {:x}", there.rdev());
            }
            let mut names: Vec<_> = xattr::list(&path).unwrap().collect();
            names.sort();
            for name in names {
                let value = xattr::get(&path, &name).unwrap();
                text += &format!(" {}={value:x?}", name.display());
            }
            found.insert(name, text);
        }
    }
    found
}

#[test]
fn an_image_comes_out_file_by_file_as_with_the_overlayfs_snapshotter() {
    use tar::EntryType::{Block, Char, Directory, Fifo, Link, Symlink};
    let large: Vec<u8> = (0..3_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    // cap_net_raw+ep, as setcap writes it.
    let capability: &[u8] = &[
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let long = format!("long/{}", "n".repeat(200));
    let dir = |path, mode, owner| Member {
        path,
        kind: Directory,
        mode,
        owner,
        ..Member::default()
    };
    let file = |path, content| Member {
        path,
        content,
        ..Member::default()
    };
    let lower = layer_of(&[
        dir("etc/", 0o755, (0, 0)),
        dir("home/u/", 0o750, (1000, 1001)),
        dir("tmp/", 0o1777, (0, 0)),
        Member {
            mode: 0o4755,
            ..file("bin/setuid", b"setuid")
        },
        Member {
            mode: 0o2755,
            owner: (0, 42),
            ..file("bin/setgid", b"setgid")
        },
        Member {
            xattrs: &[("security.capability", capability)],
            mode: 0o755,
            ..file("bin/ping", b"ping")
        },
        Member {
            xattrs: &[("user.note", b"a\0b"), ("user.other", b"x")],
            ..file("etc/noted", b"noted")
        },
        Member {
            owner: (4_000_000_000, 65_534),
            mode: 0o600,
            ..file("home/u/large", &large)
        },
        file("data/a", b"linked"),
        Member {
            kind: Link,
            link: "data/a",
            ..file("data/b", b"")
        },
        Member {
            kind: Symlink,
            link: "../etc/noted",
            mode: 0o777,
            ..file("data/symlink", b"")
        },
        Member {
            kind: Symlink,
            link: "/nowhere",
            mode: 0o777,
            owner: (7, 8),
            ..file("data/dangling", b"")
        },
        Member {
            kind: Char,
            device: (1, 3),
            mode: 0o666,
            ..file("dev/char", b"")
        },
        Member {
            kind: Block,
            device: (7, 99),
            mode: 0o660,
            owner: (0, 6),
            ..file("dev/block", b"")
        },
        Member {
            kind: Fifo,
            mode: 0o620,
            ..file("dev/fifo", b"")
        },
        file("empty", b""),
        file(&long, b"long"),
        file("n\u{e4}me \u{1f600}", b"name"),
        file("gone", b"gone"),
        file("gonedir/sub/file", b"gone"),
        file("opaque/old", b"old"),
        file("opaque/sub/old", b"old"),
        file("becomes/dir", b"a file"),
        dir("becomes/file/", 0o755, (0, 0)),
        file("becomes/file/in", b"in"),
        Member {
            kind: Symlink,
            link: "empty",
            mode: 0o777,
            ..file("becomes/regular", b"")
        },
        Member {
            mode: 0o600,
            ..file("changed", b"before")
        },
    ]);
    let upper = layer_of(&[
        file(".wh.gone", b""),
        file(".wh.gonedir", b""),
        file("opaque/.wh..wh..opq", b""),
        file("opaque/new", b"new"),
        dir("becomes/dir/", 0o700, (5, 5)),
        file("becomes/dir/in", b"in"),
        file("becomes/file", b"a file"),
        file("becomes/regular", b"regular"),
        Member {
            mode: 0o640,
            owner: (1, 2),
            ..file("changed", b"after")
        },
        dir("home/u/", 0o700, (1000, 1002)),
        file("home/u/more", b"more"),
    ]);
    let stack = Stack::start();
    let name = "docker.io/library/compare:1";
    let tar = stack.area.at("compare.tar");
    fs::write(
        &tar,
        archive_of(name, &[lower, upper], &["/bin/busybox", "sh"]),
    )
    .unwrap();
    let seen = |snapshotter: &str| {
        stack.ctr(&["images", "import", "--snapshotter", snapshotter, &tar]);
        let target = stack.area.at(&format!("as {snapshotter}"));
        fs::create_dir(&target).unwrap();
        stack.ctr(&[
            "images",
            "mount",
            "--snapshotter",
            snapshotter,
            name,
            &target,
        ]);
        let found = description(Path::new(&target));
        nix::mount::umount(target.as_str()).unwrap();
        found
    };
    let (overlay, ours) = (seen("overlayfs"), seen("vellum"));
    assert!(ours.len() > 30 && !ours.contains_key("gone"), "{ours:#?}");
    assert!(
        ours["bin/ping"].contains("security.capability"),
        "{}",
        ours["bin/ping"]
    );
    let different: Vec<_> = overlay
        .keys()
        .chain(ours.keys())
        .filter(|name| overlay.get(*name) != ours.get(*name))
        .map(|name| (name, overlay.get(name), ours.get(name)))
        .collect();
    assert!(
        different.is_empty(),
        "(path, overlayfs, ours): {different:#?}"
    );
}

/// What containerd's differ leaves out and ours does not: attributes other than capabilities, and the
/// directories of which the time alone changed.
#[test]
fn a_layer_in_containerds_store_has_the_entries_that_its_own_differ_finds() {
    let stack = Stack::start();
    stack.import();
    stack.run(&["--detach"], "c", &["/bin/busybox", "sleep", "1000"]);
    stack.exec(
        "c",
        "busybox mkdir -p /new/dir /etc/below; echo x > /new/dir/file; busybox rm /etc/one; echo more >> /etc/two; \
         busybox ln -s ../etc/two /new/symlink; busybox ln /etc/two /new/link; busybox mknod /new/null c 1 3; \
         busybox chown 7:8 /new/dir; busybox chmod 4711 /new/dir/file; busybox mkfifo /new/fifo; \
         busybox dd if=/dev/zero of=/new/holes bs=1 count=1 seek=9000000 2>/dev/null; \
         busybox truncate -s 20M /new/holes; busybox cp /bin/busybox /new/busybox",
    );
    let client = Client::new(stack.area.at("socket/vellum.sock"));
    let key = |name: &str| {
        let mut infos = client.list(&[]).unwrap().into_iter();
        infos.find(|info| info.name.ends_with(name)).unwrap()
    };
    let container = key("/c");
    let mount = client.mounts(&container.name).unwrap();
    nix::unistd::syncfs(fs::File::open(&mount.source).unwrap()).unwrap();
    let file = Path::new(&mount.source).join("new/dir/file");
    let capability: &[u8] = &[
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    xattr::set(file, "security.capability", capability).unwrap();
    // containerd collects what nothing refers to, and removes snapshots that it does not know.
    let keep = |name: &str| {
        let label = "containerd.io/gc.root=now";
        stack.ctr(&["snapshots", "--snapshotter", "vellum", "label", name, label]);
    };
    let view_of = |name: &str, of: &str| {
        stack.ctr(&["snapshots", "--snapshotter", "vellum", "view", name, of]);
        keep(name);
        client.mounts(&key(&format!("/{name}")).name).unwrap()
    };
    let info = stack.ctr(&["snapshots", "--snapshotter", "vellum", "info", "c"]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let parent = view_of("parent", info["Parent"].as_str().unwrap());
    let stored = |right: &vellum_snapshotter::proto::types::Mount, media_type: &str| {
        let mut wanted = diff::request(&[&parent], &[right]);
        wanted.media_type = media_type.into();
        let found = client.diff(&[], &wanted).unwrap();
        let listed = stack.ctr(&["content", "ls"]);
        let line = listed.lines().find(|line| line.contains(&found.digest));
        let line = line
            .unwrap_or_else(|| panic!("{}: {listed}", found.digest))
            .to_owned();
        let bytes = stack.try_ctr(&["content", "get", &found.digest]).stdout;
        assert_eq!(bytes.len() as i64, found.size);
        (bytes, line)
    };
    let plain = "application/vnd.oci.image.layer.v1.tar";
    let walked = |key: &str| {
        let arguments = [
            "snapshots",
            "--snapshotter",
            "vellum",
            "diff",
            "--media-type",
            plain,
            key,
        ];
        let output = stack.try_ctr(&arguments);
        assert!(output.status.success(), "{output:?}");
        diff::entries(&output.stdout)
    };
    let (bytes, _) = stored(&mount, plain);
    let (ours, theirs) = (diff::entries(&bytes), walked("c"));
    assert!(
        theirs.len() > 12 && theirs.contains_key("etc/.wh.one"),
        "{theirs:#?}"
    );
    assert!(
        theirs["new/dir/file"].contains("security.capability"),
        "{theirs:#?}"
    );
    assert_eq!(ours, theirs);
    let (_, line) = stored(&mount, "");
    assert!(
        line.contains("containerd.io/uncompressed=sha256:"),
        "{line}"
    );
    // Committed, it is the same.
    stack.ctr(&[
        "snapshots",
        "--snapshotter",
        "vellum",
        "commit",
        "image",
        "c",
    ]);
    keep("image");
    let view = view_of("seen", "image");
    assert_eq!(diff::entries(&stored(&view, plain).0), theirs);
    assert_eq!(walked("image"), theirs);
    stack.ctr(&["tasks", "kill", "--signal", "KILL", "c"]);
}
