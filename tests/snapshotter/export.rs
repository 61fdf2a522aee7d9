//! What `vellum export` writes, under containerd.

use std::fs;
use std::process::Command;

use crate::containerd::Stack;
use crate::snapshotter_support::PACKAGES;

#[test]
fn exported_images_are_imported_by_containerd_and_run() {
    let stack = Stack::start();
    let root = stack.area.path().join("tree");
    for dir in ["bin", "etc"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .unwrap_or_else(|error| panic!("/bin/busybox: {error}: {PACKAGES}"));
    fs::write(root.join("etc/one"), "first\n").unwrap();
    fs::write(root.join("etc/gone"), "deleted above\n").unwrap();
    let vellum = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_vellum"))
            .args(["--root", &stack.area.at("exporting")])
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    };
    vellum(&["import", "base", &stack.area.at("tree"), "--size", "64M"]);
    vellum(&["create", "base", "--name", "c"]);
    let dir = vellum(&["mount", "c"]);
    let etc = std::path::Path::new(dir.trim_end()).join("etc");
    fs::write(etc.join("two"), "second\n").unwrap();
    fs::remove_file(etc.join("gone")).unwrap();
    vellum(&["umount", "c"]);
    for (format, name) in [("oci", "from-oci"), ("docker", "from-docker")] {
        let file = stack.area.at(&format!("{format}.tar"));
        vellum(&["export", "c", &file, "--format", format, "--name", name]);
        stack.ctr(&["images", "import", "--snapshotter", "vellum", &file]);
        let image = format!("docker.io/library/{name}:latest");
        let script = "busybox cat /etc/one /etc/two; busybox ls /etc/gone || echo no gone";
        let output = stack.ctr(&[
            "run",
            "--rm",
            "--snapshotter",
            "vellum",
            "--env",
            &format!("VELLUM_TEST={}", stack.area.path().display()),
            "--env",
            "PATH=/bin",
            "--runc-root",
            &stack.area.at("runc"),
            &image,
            name,
            "/bin/busybox",
            "sh",
            "-c",
            script,
        ]);
        assert_eq!(output, "first\nsecond\nno gone\n", "{format}");
    }
    vellum(&["rm", "c"]);
}
