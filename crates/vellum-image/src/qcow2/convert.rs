//! What only QEMU reads of the format: qemu-img makes it raw, in a file that has no name.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::chain::{Link, Links};
use vellum_base::error::ResultExt;
use vellum_base::interrupt;
use vellum_base::{Error, ErrorKind, Result};

const PROGRAM: &str = "qemu-img";
/// How often it is looked whether it has ended.
const PAUSE: Duration = Duration::from_millis(20);
/// The most memory that it may take: an image may ask for any.
const MEMORY: u64 = 2 << 30;

/// Copies the disk to a new file in `spool`, byte for byte, with holes for zeros. The image is one that `why`.
///
/// # Errors
/// `Missing` where qemu-img is not installed; `Command` with what it said.
pub(super) fn to_raw(links: &Links, why: &str, spool: &Path) -> Result<File> {
    let temporary = || format!("making a temporary file in {}", spool.display());
    let raw = tempfile::tempfile_in(spool).context(temporary)?;
    let said = tempfile::tempfile_in(spool).context(temporary)?;
    let source = format!("json:{}", describe(links)?);
    // By this name it opens our file, which has none.
    let target = format!("/proc/{}/fd/{}", std::process::id(), raw.as_raw_fd());
    let child = Command::new("prlimit")
        .arg(format!("--as={MEMORY}"))
        .args([PROGRAM, "convert", "-q", "-O", "raw", &source, &target])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(said.try_clone().context(temporary)?))
        .spawn()
        .map_err(|error| Error::io("prlimit: cannot be run", error))?;
    wait(child, said, why)?;
    Ok(raw)
}

/// The image as QEMU is told of it: every file by name, so that it opens none that an image names.
fn describe(links: &Links) -> Result<Value> {
    let mut below = Value::Null;
    for link in links.iter().rev() {
        below = match link.header {
            Some(_) => json!({ "driver": "qcow2", "file": file(link)?, "backing": below }),
            None => json!({ "driver": "raw", "file": file(link)? }),
        };
    }
    Ok(below)
}

fn file(link: &Link) -> Result<Value> {
    let name = format!("/proc/{}/fd/{}", std::process::id(), link.file.as_raw_fd());
    let meta = link.file.metadata().context(|| "reading its attributes")?;
    let driver = if meta.is_file() {
        "file"
    } else {
        "host_device"
    };
    // The file that was looked at, whatever bears its name by now.
    Ok(json!({ "driver": driver, "filename": name, "locking": "off" }))
}

fn wait(mut child: Child, mut said: File, why: &str) -> Result<()> {
    let ended = loop {
        let ended = child.try_wait().context(|| PROGRAM)?;
        if let Some(status) = ended {
            break status;
        }
        if let Err(interrupted) = interrupt::check() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(interrupted);
        }
        std::thread::sleep(PAUSE);
    };
    if ended.success() {
        return Ok(());
    }
    // prlimit's, where there is no such program.
    if ended.code() == Some(127) {
        return Err(Error::with_source(
            ErrorKind::Missing,
            format!(
                "the image {why}, which only QEMU reads: {PROGRAM} is not installed (Debian: apt-get \
                 install qemu-utils)"
            ),
            io::Error::from(io::ErrorKind::NotFound),
        ));
    }
    let mut text = Vec::new();
    // What cannot be read was a word more about the failure.
    let _ = said
        .rewind()
        .and_then(|()| said.take(1 << 16).read_to_end(&mut text));
    let text = String::from_utf8_lossy(&text);
    Err(Error::new(
        ErrorKind::Command,
        format!("{PROGRAM}: {ended}: {}", text.trim().replace('\n', "; ")),
    ))
}
