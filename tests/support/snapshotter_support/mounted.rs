//! What the snapshotter returns, mounted.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use nix::mount::MntFlags;
use vellum_snapshotter::proto::types::Mount;

use super::rig::Rig;

/// Something mounted as mount(8) does it with a Mount that was returned.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn new(rig: &Rig, name: &str, mount: &Mount) -> Mounted {
        let dir = rig.area.path().join(name);
        fs::create_dir(&dir).unwrap();
        let options = mount.options.join(",");
        let output = Command::new("mount")
            .args(["-t", &mount.r#type, "-o", &options, &mount.source])
            .arg(&dir)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{mount:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Mounted(dir)
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if nix::mount::umount(&self.0).is_err() {
            let _ = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
}
