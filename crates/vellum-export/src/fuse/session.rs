//! The mount of one regular file and the handshake, made by the process that owns the descriptor.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind as IoKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::abi::{self, InitIn, Operation, Request};
use super::ring::memory;
use crate::ublk::DeviceId;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

/// The file system type that mountinfo shows for our mounts.
pub const FS_TYPE: &str = "fuse.vellum";

/// A mounted FUSE file whose handshake is done; dropping it ends the session unless another
/// process holds the descriptor too.
#[derive(Debug)]
pub struct Session {
    /// The connection to the kernel.
    pub device: File,
    /// What was agreed on.
    pub features: Features,
}

/// What kernel and server agreed on at the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Features {
    /// The protocol's minor version in use.
    pub minor: u32,
    /// Unanswered requests can be sent again to a new server (Linux 6.9 or newer).
    pub resend: bool,
    /// Requests come by io_uring.
    #[serde(default)]
    pub ring: bool,
    /// They come from this ublk device, and not from a FUSE file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ublk: Option<DeviceId>,
}

impl Features {
    /// Those of a ublk device.
    pub(crate) fn of_ublk(id: DeviceId) -> Features {
        Features {
            minor: 0,
            resend: true,
            ring: false,
            ublk: Some(id),
        }
    }
}

/// Mounts a FUSE file system over the regular file `target` and answers the handshake.
///
/// The mount is one regular file: its root. `source` is what mountinfo shows as its source. With `ring`
/// requests come by io_uring, where the kernel offers that.
///
/// # Errors
/// [`ErrorKind::Missing`] without FUSE in the kernel, [`ErrorKind::Permission`] without
/// CAP_SYS_ADMIN.
pub fn mount_file(target: &Path, source: &str, read_only: bool, ring: bool) -> Result<Session> {
    let mut device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/fuse")
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::with_source(
                ErrorKind::Missing,
                "/dev/fuse: this kernel has no FUSE (load the module: modprobe fuse)",
                error,
            ),
            _ => Error::io("/dev/fuse: cannot be opened", error),
        })?;
    let options = format!(
        "fd={},rootmode=100000,user_id=0,group_id=0,max_read={}",
        device.as_raw_fd(),
        abi::MAX_IO
    );
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    if read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    mount(
        Some(source),
        target,
        Some(FS_TYPE),
        flags,
        Some(options.as_str()),
    )
    .context(|| {
        format!(
            "{}: a FUSE file cannot be mounted here (root is needed)",
            target.display()
        )
    })?;
    let features = handshake(&mut device, ring).inspect_err(|_| {
        let _ = nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH);
    })?;
    Ok(Session { device, features })
}

/// Reads INIT, which the kernel queued at mount, and answers it.
fn handshake(device: &mut File, ring: bool) -> Result<Features> {
    let mut buf = vec![0; abi::IN_HEADER_LEN + abi::WRITE_IN_LEN + abi::MAX_IO];
    let read = loop {
        match device.read(&mut buf) {
            Ok(read) => break read,
            Err(error) if error.kind() == IoKind::Interrupted => {}
            Err(error) => return Err(Error::io("/dev/fuse: no handshake from the kernel", error)),
        }
    };
    let (request, _) = buf.split_at(read);
    let request = Request::parse(request).map_err(|error| {
        Error::with_source(ErrorKind::Protocol, "/dev/fuse: a broken handshake", error)
    })?;
    let Operation::Init(init) = request.operation else {
        return Err(Error::new(
            ErrorKind::Protocol,
            format!(
                "/dev/fuse: opcode {} came before the handshake",
                request.opcode
            ),
        ));
    };
    let (features, flags) = negotiate(&init, ring)?;
    let max_io = match features.ring {
        true => memory::PAYLOAD,
        false => abi::MAX_IO,
    };
    let body = abi::init_out(features.minor, init.max_readahead, flags, max_io);
    let mut reply = Vec::with_capacity(abi::OUT_HEADER_LEN + body.len());
    reply.extend(abi::out_header(request.unique, 0, body.len()));
    reply.extend(body);
    device
        .write_all(&reply)
        .context(|| "/dev/fuse: the kernel refused the handshake")?;
    Ok(features)
}

/// What to answer to the kernel's offer.
fn negotiate(init: &InitIn, ring: bool) -> Result<(Features, u64)> {
    if init.major != abi::MAJOR || init.minor < abi::MIN_MINOR {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the kernel speaks FUSE {}.{}; {}.{} (Linux 5.4) or newer is needed",
                init.major,
                init.minor,
                abi::MAJOR,
                abi::MIN_MINOR
            ),
        ));
    }
    let ring = if ring { abi::INIT_OVER_IO_URING } else { 0 };
    let wanted = ring
        | abi::INIT_ASYNC_READ
        | abi::INIT_BIG_WRITES
        | abi::INIT_ASYNC_DIO
        | abi::INIT_MAX_PAGES
        | abi::INIT_EXT
        | abi::INIT_HAS_RESEND;
    let flags = init.flags & wanted;
    let features = Features {
        minor: init.minor.min(abi::MINOR),
        resend: flags & abi::INIT_HAS_RESEND != 0,
        ring: flags & abi::INIT_OVER_IO_URING != 0,
        ublk: None,
    };
    Ok((features, flags))
}

/// Tells the kernel to send every request again that was read and not answered. Nobody may be
/// reading the session when it is called.
///
/// # Errors
/// [`ErrorKind::Io`] where the session is over or the kernel lacks it.
pub fn resend(mut device: &File) -> Result<()> {
    device
        .write_all(&abi::notify_resend())
        .context(|| "/dev/fuse: the kernel did not take the order to resend")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(minor: u32, flags: u64) -> InitIn {
        InitIn {
            major: 7,
            minor,
            max_readahead: 0,
            flags,
        }
    }

    #[test]
    fn resend_is_agreed_on_only_where_the_kernel_offers_it() {
        let (features, _) = negotiate(&offer(44, u64::MAX), false).unwrap();
        assert!(features.resend);
        assert!(!negotiate(&offer(36, 0xffff_ffff), false).unwrap().0.resend);
    }

    /// It cannot be taken back: every request of the session then needs entries in every queue.
    #[test]
    fn io_uring_is_agreed_on_only_where_the_server_asked_and_the_kernel_offers_it() {
        let without = !abi::INIT_OVER_IO_URING;
        for (asked, offered, agreed) in [
            (true, u64::MAX, true),
            (false, u64::MAX, false),
            (true, without, false),
        ] {
            let (features, flags) = negotiate(&offer(44, offered), asked).unwrap();
            assert_eq!(features.ring, agreed);
            assert_eq!(flags & abi::INIT_OVER_IO_URING != 0, agreed);
        }
    }

    #[test]
    fn a_kernel_that_is_too_old_is_refused_with_its_version() {
        let error = negotiate(&offer(26, 0), false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("7.26"), "{error}");
    }
}
