//! Before any timing: does a driver keep what it acknowledged as durable?
//!
//! The driver's whole storage lies on a disk image of its own, a loop device with an ext4. A
//! container writes and flushes; at once the disk image is copied *below* the file system. The
//! copy is what a power cut would leave: what was only in the page cache is not in it. Then the
//! driver is opened on the copy, and what was flushed must be there. The loop device must also have
//! been asked to flush, since a disk may lose what it was not asked to keep.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::driver::{Access, Base, Driver, Kind};
use crate::host::{self, Loop, Mount, sh};

const DISK: u64 = 3 << 30;
const BASE: u64 = 8 << 20;
/// What is written: many small pieces, so that one that happens to be written back proves nothing.
const PIECES: u64 = 16;
const PIECE: u64 = 8192;

/// What the check found.
#[derive(Debug, Clone, Serialize)]
pub struct Flush {
    /// Whether all that was flushed survived.
    pub passed: bool,
    /// What happened.
    pub detail: String,
}

/// Checks a driver in a directory, which is empty again afterwards.
///
/// # Errors
/// When the check itself could not be carried out.
pub fn check(driver: &dyn Driver, dir: &Path) -> Result<Flush> {
    let scratch = tempfile::Builder::new().prefix("flush").tempdir_in(dir)?;
    let disk = scratch.path().join("disk");
    let cut = scratch.path().join("cut");
    let at = scratch.path().join("at");
    File::create(&disk)?.set_len(DISK)?;
    sh(
        "mke2fs",
        &["-q", "-F", "-t", "ext4", "-m", "0", &disk.to_string_lossy()],
    )?;

    let kind = driver.about().kind;
    let flushes;
    // It stays: what lies on the copy would be on the same device otherwise, and what a driver keeps
    // in memory that outlives its processes, for as long as the machine runs, would be taken for that
    // of the copy. A power cut leaves nothing of it.
    let device = Loop::new(&disk)?;
    {
        let _mount = Mount::new(&at, Path::new("/"), &["-t", "ext4", device.device()])?;
        let base = make_base(kind, &at)?;
        let place = at.join("d");
        fs::create_dir(&place)?;
        driver.prepare(&place, &base)?;
        let mut image = driver.open(&place)?;
        image.create("c")?;
        let access = image.start("c")?;
        // All that came before is on the disk, and the disk is quiet.
        if let Access::Dir(dir) = &access {
            host::sync_fs(dir)?;
        }
        host::sync_fs(&at)?;
        let before = device.flushes()?;
        write_and_flush(&access)?;
        let copied = sh(
            "cp",
            &[
                "--sparse=always",
                &disk.to_string_lossy(),
                &cut.to_string_lossy(),
            ],
        );
        flushes = device.flushes()? - before;
        copied?;
        let _cleaning = host::CleaningUp::begin();
        image.stop("c")?;
    }

    let device = Loop::new(&cut)?;
    let _mount = Mount::new(&at, Path::new("/"), &["-t", "ext4", device.device()])
        .context("the host's file system after the power cut")?;
    // A driver whose image cannot even be opened has lost everything, too.
    let found = driver.open(&at.join("d")).and_then(|mut image| {
        let found = image.start("c").and_then(|access| read_back(&access));
        let _cleaning = host::CleaningUp::begin();
        let stopped = image.stop("c");
        found.and_then(|found| stopped.map(|()| found))
    });
    // What was killed for lack of time says nothing about the driver.
    if host::out_of_time() {
        found.context("the check did not end within the time limit")?;
        bail!("the check did not end within the time limit");
    }
    Ok(verdict(found, flushes))
}

fn verdict(found: Result<u64>, flushes: u64) -> Flush {
    let (passed, detail) = match found {
        Err(error) => (
            false,
            format!("after the power cut the container could not be used: {error:#}"),
        ),
        Ok(found) if found < PIECES => (
            false,
            format!("{} of {PIECES} flushed pieces were lost", PIECES - found),
        ),
        Ok(_) if flushes == 0 => (
            false,
            "everything was there, but the disk was never asked to flush".to_owned(),
        ),
        Ok(_) => (
            true,
            format!("all {PIECES} flushed pieces survived; the disk flushed {flushes} times"),
        ),
    };
    Flush { passed, detail }
}

fn make_base(kind: Kind, at: &Path) -> Result<Base> {
    let tree = at.join("b/0");
    fs::create_dir_all(&tree)?;
    let size = BASE + (512 << 20);
    Ok(match kind {
        Kind::Files => {
            fs::write(tree.join("file"), vec![1; usize::try_from(BASE)?])?;
            Base::of_layers(vec![tree], size)
        }
        Kind::Nbd => {
            let raw = at.join("b/device.raw");
            fs::write(&raw, vec![1; usize::try_from(BASE)?])?;
            Base::of_raw(raw, BASE)
        }
        Kind::Pull => bail!("a pull acknowledges no write"),
    })
}

/// Where piece `number` lies, and what it holds.
fn piece(number: u64) -> (u64, u8) {
    (number * (BASE / PIECES) + 12_288, 0xa0 + number as u8)
}

fn write_and_flush(access: &Access) -> Result<()> {
    match access {
        Access::Dir(dir) => {
            let file = OpenOptions::new().write(true).open(dir.join("file"))?;
            for number in 0..PIECES {
                let (offset, byte) = piece(number);
                file.write_all_at(&[byte; PIECE as usize], offset)?;
            }
            file.sync_all()?;
        }
        Access::Nbd(uri) => {
            qemu_io(uri, "write -P", &["flush"])?;
        }
    }
    Ok(())
}

/// Pieces that are there.
fn read_back(access: &Access) -> Result<u64> {
    let mut found = 0;
    match access {
        Access::Dir(dir) => {
            let mut file = File::open(dir.join("file"))?;
            let mut content = Vec::new();
            file.read_to_end(&mut content)?;
            for number in 0..PIECES {
                let (offset, byte) = piece(number);
                let start = usize::try_from(offset)?;
                let bytes = content
                    .get(start..start + usize::try_from(PIECE)?)
                    .context("the file became shorter")?;
                found += u64::from(bytes.iter().all(|&b| b == byte));
            }
        }
        Access::Nbd(uri) => {
            let said = qemu_io(uri, "read -P", &[])?;
            found = PIECES - said.matches("Pattern verification failed").count() as u64;
        }
    }
    Ok(found)
}

/// The same command for each piece, in one connection.
fn qemu_io(uri: &str, verb: &str, more: &[&str]) -> Result<String> {
    let mut arguments = vec!["qemu-io".to_owned(), "-f".into(), "raw".into()];
    for number in 0..PIECES {
        let (offset, byte) = piece(number);
        arguments.extend(["-c".into(), format!("{verb} {byte} {offset} {PIECE}")]);
    }
    for command in more {
        arguments.extend(["-c".into(), (*command).to_owned()]);
    }
    arguments.push(uri.to_owned());
    // It fails when a pattern is not found, and says so: that is an answer.
    let line: Vec<String> = arguments.iter().map(|a| format!("'{a}'")).collect();
    let script = format!("{} 2>&1 || true", line.join(" "));
    let said = sh("sh", &["-c", &script])?.stdout;
    ensure!(
        said.matches("ops;").count() as u64
            + said.matches("Pattern verification failed").count() as u64
            >= PIECES,
        "qemu-io: {said}"
    );
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_passes_only_with_every_piece_and_a_flush_of_the_disk() {
        assert!(verdict(Ok(PIECES), 1).passed);
        assert!(!verdict(Ok(PIECES), 0).passed);
        assert!(!verdict(Ok(PIECES - 1), 5).passed);
        assert!(!verdict(Err(anyhow::anyhow!("gone")), 5).passed);
    }

    #[test]
    fn pieces_lie_within_the_file_and_apart() {
        for number in 0..PIECES {
            let (offset, _) = piece(number);
            assert!(offset + PIECE <= BASE);
            if number > 0 {
                assert!(piece(number - 1).0 + PIECE < offset);
            }
        }
    }
}
