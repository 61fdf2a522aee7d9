//! Whether what a dead process wrote and never synced is still in memory: proofs that the file system
//! below a file has stayed mounted since. docs/durability.md, "What proves that the page cache is
//! there".

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use uuid::Uuid;

use super::{FileId, end_of, host_offset};

/// What a process notes down about a file in memory, by which a later one of the same boot may prove
/// that the file system has stayed mounted since. All zero proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Evidence {
    /// Of the processes that hold a descriptor in that file system: see [`Witness`].
    pub witness: [u8; 16],
    /// Mounts of that file system, by the ids that no two mounts of a boot share (Linux 6.8).
    pub mounts: [u64; 2],
    /// The file's inode in memory carries a mark that goes away with it.
    pub marked: bool,
}

/// How it was proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// A process of ours had a file of that file system open all the time.
    Witness,
    /// A mount that was there is there.
    Mount,
    /// The file itself has stayed in memory.
    Inode,
}

/// A descriptor in a file system, which cannot go away while some process holds it, and a token that
/// only the processes know that have held it since: by fork(2), or across execve(2).
#[derive(Debug)]
pub struct Witness {
    token: Uuid,
    device: u64,
    file: OwnedFd,
}

/// What this process holds. Forks have it too, which is the point.
static HELD: OnceLock<Witness> = OnceLock::new();

impl Witness {
    /// Has this process, and what is forked from it, hold the file system of a directory from now on.
    /// What it holds already, it keeps.
    ///
    /// # Errors
    /// Where the directory cannot be opened.
    pub fn hold(dir: &Path) -> io::Result<()> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(dir)?;
        let device = file.metadata()?.dev();
        // A second one in a process that has one would only make two of what one is enough for.
        let _ = HELD.set(Witness {
            token: Uuid::new_v4(),
            device,
            file: file.into(),
        });
        Ok(())
    }

    /// Goes on holding what the program before, in this process or the one that started it, held.
    ///
    /// # Errors
    /// Where the descriptor is none of a file.
    pub fn inherit(file: OwnedFd, token: Uuid) -> io::Result<()> {
        let file = File::from(file);
        let device = file.metadata()?.dev();
        let _ = HELD.set(Witness {
            token,
            device,
            file: file.into(),
        });
        Ok(())
    }

    /// What this process holds.
    pub fn held() -> Option<&'static Witness> {
        HELD.get()
    }

    /// The descriptor.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The token.
    pub fn token(&self) -> Uuid {
        self.token
    }
}

/// The token of what this process holds in the file system `device`.
fn witness(device: u64) -> [u8; 16] {
    Witness::held()
        .filter(|held| held.device == device)
        .map_or([0; 16], |held| held.token.into_bytes())
}

/// Notes down what there is, and marks the inode.
pub(super) fn gather(file: &File) -> io::Result<Evidence> {
    Ok(Evidence {
        witness: witness(file.metadata()?.dev()),
        mounts: mounts(file),
        marked: set_mark(file) && has_mark(file),
    })
}

/// Whether the file system of `file` has stayed mounted since `evidence` was noted down of it.
pub(super) fn prove(file: &File, evidence: &Evidence) -> io::Result<Option<Proof>> {
    let witness = witness(file.metadata()?.dev());
    if witness != [0; 16] && witness == evidence.witness {
        return Ok(Some(Proof::Witness));
    }
    let there = mounts(file);
    if evidence
        .mounts
        .iter()
        .any(|mount| *mount != 0 && there.contains(mount))
    {
        return Ok(Some(Proof::Mount));
    }
    Ok((evidence.marked && has_mark(file)).then_some(Proof::Inode))
}

/// The mount that the file was opened through, and the one through which the first process of the
/// host sees it: the one outlives a mount namespace that only a server has.
fn mounts(file: &File) -> [u64; 2] {
    let own = statx(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH);
    let own = own.and_then(|stat| unique_mount(&stat));
    // 0 stands for none.
    [own.unwrap_or(0), first_mount(file).unwrap_or(0)]
}

fn first_mount(file: &File) -> Option<u64> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    let dir = path.parent()?;
    let ours = stat_path(dir)?;
    let theirs = stat_path(&PathBuf::from("/proc/1/root").join(dir.strip_prefix("/").ok()?))?;
    let device = |stat: &libc::statx| (stat.stx_dev_major, stat.stx_dev_minor);
    // The same directory of the same file system, and the file in it.
    let same = device(&ours) == device(&theirs)
        && ours.stx_ino == theirs.stx_ino
        && statx(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH)
            .is_some_and(|file| device(&file) == device(&ours));
    unique_mount(&theirs).filter(|_| same)
}

fn stat_path(path: &Path) -> Option<libc::statx> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    statx(libc::AT_FDCWD, &path, libc::AT_NO_AUTOMOUNT)
}

/// The id of the mount, where the kernel has such (Linux 6.8).
fn unique_mount(stat: &libc::statx) -> Option<u64> {
    (stat.stx_mask & libc::STATX_MNT_ID_UNIQUE != 0).then_some(stat.stx_mnt_id)
}

/// When the file was made, in nanoseconds since 1970; 0 where the file system does not note it.
fn born(file: &File) -> u64 {
    statx(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH)
        .filter(|stat| stat.stx_mask & libc::STATX_BTIME != 0)
        .map_or(0, |stat| {
            nanoseconds(stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec.into())
        })
}

/// Which file it is.
pub(super) fn file_id(file: &File) -> io::Result<FileId> {
    let metadata = file.metadata()?;
    Ok(FileId {
        device: metadata.dev(),
        inode: metadata.ino(),
        born: born(file),
    })
}

/// A time as one number that differs where the times do.
pub(super) fn nanoseconds(seconds: i64, nanoseconds: u64) -> u64 {
    seconds
        .cast_unsigned()
        .wrapping_mul(1_000_000_000)
        .wrapping_add(nanoseconds)
}

fn statx(dir: i32, path: &std::ffi::CStr, flags: i32) -> Option<libc::statx> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path ends in a zero and outlives the call, which writes one `statx` at most.
    let result = unsafe {
        libc::statx(
            dir,
            path.as_ptr(),
            flags,
            libc::STATX_INO | libc::STATX_BTIME | libc::STATX_MNT_ID_UNIQUE,
            stat.as_mut_ptr(),
        )
    };
    // SAFETY: it was zeroed, which is a valid value, and then perhaps written.
    (result == 0).then(|| unsafe { stat.assume_init() })
}

/// The mark: a hint of how long the file's bytes will live (fcntl(2)), which is nothing that any file
/// system stores. An inode that was read from the disk anew has none.
const MARK: u64 = 4;
/// From include/uapi/linux/fcntl.h (Linux 4.13).
const F_GET_RW_HINT: libc::c_int = 1024 + 11;
const F_SET_RW_HINT: libc::c_int = 1024 + 12;

fn set_mark(file: &File) -> bool {
    let hint = MARK;
    // SAFETY: the call reads the one number that it is given the address of.
    unsafe { libc::fcntl(file.as_raw_fd(), F_SET_RW_HINT, &raw const hint) == 0 }
}

fn has_mark(file: &File) -> bool {
    let mut hint = 0u64;
    // SAFETY: the call writes the one number that it is given the address of.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), F_GET_RW_HINT, &raw mut hint) };
    result == 0 && hint == MARK
}

/// From include/uapi/linux/magic.h: file systems that keep zeros that were written as bytes, so that a
/// hole is a place where nothing was. (ZFS makes holes of them.)
const KEEPING: [i64; 4] = [
    // ext4, XFS, Btrfs, tmpfs.
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0x0102_1994,
];

/// True where part of the range was never written, or is a hole again. Says nothing of file systems
/// that make holes by themselves.
pub(super) fn has_hole(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    let (end, at) = (end_of(offset, len)?, host_offset(offset)?);
    let kind = nix::sys::statfs::fstatfs(file)?.filesystem_type().0;
    if !KEEPING.contains(&(kind as i64)) {
        return Ok(false);
    }
    // SAFETY: the call takes numbers. It moves the descriptor's position, which nobody uses.
    let hole = unsafe { libc::lseek(file.as_raw_fd(), at, libc::SEEK_HOLE) };
    match u64::try_from(hole) {
        Ok(hole) => Ok(hole < end),
        Err(_) => match io::Error::last_os_error() {
            // Beyond the end there is nothing.
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(true),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_file_proves_that_it_stayed_in_memory_and_one_in_its_place_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = File::create(&path).unwrap();
        let evidence = gather(&file).unwrap();
        // Under another name, and after it was closed.
        let other = dir.path().join("other");
        fs::rename(&path, &other).unwrap();
        drop(file);
        let file = File::open(&other).unwrap();
        assert!(prove(&file, &evidence).unwrap().is_some());
        let mark_alone = Evidence {
            witness: [0; 16],
            mounts: [0; 2],
            ..evidence
        };
        if evidence.marked {
            let proof = prove(&file, &mark_alone).unwrap();
            assert_eq!(proof, Some(Proof::Inode));
            fs::remove_file(&other).unwrap();
            let copy = File::create(&other).unwrap();
            assert_eq!(prove(&copy, &mark_alone).unwrap(), None);
        }
        assert_eq!(prove(&file, &Evidence::default()).unwrap(), None);
    }

    #[test]
    fn a_hole_is_told_from_zeros_that_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("file"))
            .unwrap();
        file.set_len(1 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0; 8192], 65536).unwrap();
        let kept = KEEPING.contains(
            &(nix::sys::statfs::fstatfs(&file)
                .unwrap()
                .filesystem_type()
                .0 as i64),
        );
        assert!(!has_hole(&file, 65536, 8192).unwrap());
        assert_eq!(has_hole(&file, 65536, 16384).unwrap(), kept);
        assert_eq!(has_hole(&file, 0, 4096).unwrap(), kept);
        file.sync_all().unwrap();
        assert!(!has_hole(&file, 65536, 8192).unwrap());
    }
}
