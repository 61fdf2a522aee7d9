//! What a store has running: `ROOT/run`, with a directory for each device that is mounted, and what
//! lies beside these. Whoever wants a name of it finds it here; all others know only the types.
//!
//! | name in `ROOT/run/ID` | kept by | what it is |
//! |---|---|---|
//! | `dev` | the device | the file that its FUSE session is mounted on |
//! | `state.json` | the device | how it is doing |
//! | `control.sock` | the device | where its worker answers |
//! | `log` | the device | what its processes had to say |
//! | `loop` | attach | which loop device is on it |
//! | `rootfs` | mount | where it is mounted unless a directory is named |
//! | `inner` | run | where it is mounted a second time, for what runs in it |
//! | `etc` | run | a container's own /etc/hosts and such |
//! | `oci` | run | the bundle, and who waits for what runs |
//! | `owner` | a temporary mount | whose it is |

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::held_dir::{HeldDir, Place};
use vellum_base::error::{Result, ResultExt};

/// The directory in a store's root that [`RunRoot`] is.
pub const RUN: &str = "run";
/// The directory in a store's root in which the file systems of snapshots are mounted.
pub const SNAPSHOT_MOUNTS: &str = "mnt";
const DEV: &str = "dev";
const STATE: &str = "state.json";
/// How the name ends of a state that is being written.
const UNFINISHED: &str = ".tmp";
const CONTROL: &str = "control.sock";
const LOG: &str = "log";
const LOOP: &str = "loop";
/// End the names of what lies beside the run directory with the same id.
const LOCK_SUFFIX: &str = ".lock";
const SOCKET_SUFFIX: &str = ".sock";
const TRACE_SUFFIX: &str = ".trace";
const OUTPUT_SUFFIX: &str = ".log";
const OLD_OUTPUT_SUFFIX: &str = ".log.1";

/// The directory of all run directories of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunRoot {
    path: PathBuf,
}

impl RunRoot {
    /// That of the store with this root.
    pub fn of_store(root: &Path) -> RunRoot {
        RunRoot {
            path: root.join(RUN),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The run directory of a container, a snapshot or a temporary mount.
    pub fn dir(&self, id: Uuid) -> RunDir {
        RunDir::at(self.path.join(id.to_string()))
    }

    /// Where the fetcher of the store's lazy layers listens.
    pub fn fetcher(&self) -> DirSocket {
        DirSocket::new(&self.path, "fetcher.sock".to_owned())
    }

    /// What the fetcher says.
    pub fn fetcher_log(&self) -> PathBuf {
        self.path.join("fetcher.log")
    }

    /// Where the snapshotter tells the fetcher the pull secrets that it knows.
    pub fn pull_secrets(&self) -> DirSocket {
        DirSocket::new(&self.path, "pull-secrets.sock".to_owned())
    }

    /// Held by the fetcher.
    pub fn fetcher_lock(&self) -> PathBuf {
        self.path.join("fetcher.lock")
    }

    /// The run directory with this name in here, where it is one: they are called by ids.
    pub fn named(&self, name: &str) -> Option<RunDir> {
        let dir = || RunDir::at(self.path.join(name));
        Uuid::parse_str(name).is_ok().then(dir)
    }

    /// The run directory at a path, if it would lie in here.
    pub fn dir_at(&self, path: PathBuf) -> Option<RunDir> {
        (path.parent() == Some(&self.path)).then(|| RunDir::at(path))
    }

    /// True of a directory that lies in here.
    pub fn has(&self, dir: &RunDir) -> bool {
        dir.path.parent() == Some(&self.path)
    }

    /// All directories in here, whatever their names. Files beside them are others'.
    ///
    /// # Errors
    /// As opendir(3) and readdir(3).
    pub fn dirs(&self) -> io::Result<Vec<RunDir>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(RunDir::at(entry.path()));
            }
        }
        Ok(found)
    }

    /// The same one under an absolute path without links.
    ///
    /// # Errors
    /// As realpath(3).
    pub fn canonical(&self) -> io::Result<RunRoot> {
        let path = fs::canonicalize(&self.path)?;
        Ok(RunRoot { path })
    }

    /// The file whose lock keeps other processes from the container with this id.
    pub fn container_lock(&self, id: Uuid) -> PathBuf {
        self.path.join(format!("{id}{LOCK_SUFFIX}"))
    }

    /// The socket on which whoever serves the container with this id without a device answers.
    pub fn socket_beside(&self, id: Uuid) -> DirSocket {
        DirSocket::new(&self.path, format!("{id}{SOCKET_SUFFIX}"))
    }

    /// The file that, where it is there, gets what the container with this id reads of its sealed layers.
    pub fn trace(&self, id: Uuid) -> PathBuf {
        self.path.join(format!("{id}{TRACE_SUFFIX}"))
    }

    /// What the command of the container with this id wrote in the background: now, and before that.
    pub fn output_beside(&self, id: Uuid) -> [PathBuf; 2] {
        [OUTPUT_SUFFIX, OLD_OUTPUT_SUFFIX].map(|suffix| self.path.join(format!("{id}{suffix}")))
    }

    /// The id in the name of a container's lock, socket, trace or output in here; `None` of anything else.
    pub fn id_beside(name: &str) -> Option<&str> {
        let suffixes = [
            LOCK_SUFFIX,
            SOCKET_SUFFIX,
            TRACE_SUFFIX,
            OUTPUT_SUFFIX,
            OLD_OUTPUT_SUFFIX,
        ];
        let mut ids = suffixes.iter().map(|suffix| name.strip_suffix(suffix));
        let id = ids.find_map(|id| id)?;
        Uuid::parse_str(id).is_ok().then_some(id)
    }

    /// Where `vellum nbd` listens unless it is told another place.
    pub fn nbd_socket(&self) -> PathBuf {
        self.path.join("nbd.sock")
    }

    /// The file whose lock makes a snapshotter the store's one.
    pub fn snapshotter_lock(&self) -> PathBuf {
        self.path.join("snapshotter.lock")
    }
}

impl fmt::Display for RunRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// The run directory of a device: where its processes and whoever looks for them meet. It need not be
/// there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// The one at `path`: for a process that was told its run directory. All others have it from their
    /// store, by [`RunRoot`].
    pub fn at(path: PathBuf) -> RunDir {
        RunDir { path }
    }

    /// The one whose file `dev` would be at this path.
    pub fn of_dev(path: &Path) -> Option<RunDir> {
        let dir = path.parent()?;
        path.ends_with(DEV).then(|| RunDir::at(dir.to_owned()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last part of its path, which it keeps when its store is moved.
    pub fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or(self.path.as_os_str())
    }

    /// Whose it is: a container's, a snapshot's or a temporary mount's id. `None` where its name is none.
    pub fn id(&self) -> Option<Uuid> {
        Uuid::parse_str(self.name().to_str()?).ok()
    }

    /// The root of the store that it lies in, which is where the store is now.
    pub fn store_root(&self) -> Option<&Path> {
        self.path.ancestors().nth(2)
    }

    /// True where something is there.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Which directory it is: a copy of it is another one.
    ///
    /// # Errors
    /// As stat(2).
    pub fn place(&self) -> io::Result<Place> {
        Place::of(&self.path)
    }

    /// The same one under an absolute path without links.
    ///
    /// # Errors
    /// As realpath(3).
    pub fn canonical(&self) -> io::Result<RunDir> {
        fs::canonicalize(&self.path).map(RunDir::at)
    }

    /// Opens it for as long as the answer lives.
    ///
    /// # Errors
    /// As open(2).
    pub fn hold(&self) -> io::Result<HeldRunDir> {
        HeldDir::open(&self.path).map(HeldRunDir)
    }

    /// Removes it, where nothing is in it.
    ///
    /// # Errors
    /// As rmdir(2).
    pub fn remove_empty(&self) -> io::Result<()> {
        fs::remove_dir(&self.path)
    }

    /// The file that the device's FUSE session is mounted on.
    pub fn dev(&self) -> PathBuf {
        self.path.join(DEV)
    }

    /// The device's state, as JSON.
    pub fn state(&self) -> PathBuf {
        self.path.join(STATE)
    }

    /// The state while this process writes it: while a supervisor is replaced there may be two that
    /// write.
    pub fn unfinished_state(&self) -> PathBuf {
        let pid = std::process::id();
        self.path.join(format!("{STATE}.{pid}{UNFINISHED}"))
    }

    /// Files that processes left which were killed while they wrote the state.
    ///
    /// # Errors
    /// As opendir(3) and readdir(3).
    pub fn unfinished_states(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let name = path.file_name().and_then(OsStr::to_str);
            if name.is_some_and(|name| name.starts_with(STATE) && name.ends_with(UNFINISHED)) {
                found.push(path);
            }
        }
        Ok(found)
    }

    /// The socket on which the device's worker answers, and which all its processes hold.
    pub fn control(&self) -> DirSocket {
        DirSocket::new(&self.path, CONTROL.to_owned())
    }

    /// What the device's processes had to say.
    pub fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// Says which loop device is on the device.
    pub fn loop_hint(&self) -> PathBuf {
        self.path.join(LOOP)
    }

    /// All files of a device but unfinished ones.
    pub fn device_files(&self) -> [PathBuf; 5] {
        let control = self.control().path();
        [
            self.dev(),
            self.state(),
            control,
            self.log(),
            self.loop_hint(),
        ]
    }

    /// Whether anything of a device is there, or may be. Where nothing is, no process of a device is either:
    /// whoever starts one makes its log first.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn has_device_files(&self) -> io::Result<bool> {
        let files = self.device_files();
        Ok(files.iter().any(|file| is_there(file)) || !self.unfinished_states()?.is_empty())
    }

    /// Where the device is mounted unless a directory is named.
    pub fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    /// Where `run` and `exec` have a container that somebody mounted for people to look at.
    pub fn inner(&self) -> PathBuf {
        self.path.join("inner")
    }

    /// Where a container's own /etc/hosts and such lie.
    pub fn etc(&self) -> PathBuf {
        self.path.join("etc")
    }

    /// The files of a run: the bundle, what its runtime needs, and who waits for it.
    pub fn oci(&self) -> PathBuf {
        self.path.join("oci")
    }

    /// Says who has a temporary mount, and is locked while that process lives.
    pub fn owner(&self) -> PathBuf {
        self.path.join("owner")
    }

    /// [`RunDir::owner`] before it is locked.
    pub fn unlocked_owner(&self) -> PathBuf {
        self.path.join("owner.tmp")
    }
}

/// True unless `path` is known not to be there: a dead FUSE mount answers with an error.
pub fn is_there(path: &Path) -> bool {
    match path.symlink_metadata() {
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

impl fmt::Display for RunDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// A run directory that is held open, which is how others find the processes of a device: a store may
/// be moved while it is mounted, and copied, state and all.
#[derive(Debug)]
pub struct HeldRunDir(HeldDir);

impl HeldRunDir {
    /// The directory under the path that leads to it now.
    pub fn now(&self) -> RunDir {
        RunDir::at(self.0.path())
    }

    /// Which directory it is.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn place(&self) -> io::Result<Place> {
        self.0.place()
    }
}

/// A unix socket in a directory whose path may be longer than a socket's can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirSocket {
    dir: PathBuf,
    name: String,
}

impl DirSocket {
    /// `name` in `dir`.
    pub fn new(dir: &Path, name: String) -> DirSocket {
        DirSocket {
            dir: dir.to_owned(),
            name,
        }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// A path to it that is short however long that of its directory is: a socket's path has room for
    /// 107 bytes. Valid while the returned file is open.
    ///
    /// # Errors
    /// Where the directory cannot be opened.
    pub fn short_path(&self) -> Result<(File, PathBuf)> {
        let handle = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(&self.dir)
            .context(|| self.dir.display().to_string())?;
        let fd = handle.as_raw_fd();
        let path = PathBuf::from(format!("/proc/self/fd/{fd}/{}", self.name));
        Ok((handle, path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other versions' servers and stores, backups and docs/local-device.md name them so.
    #[test]
    fn what_lies_in_a_run_directory_keeps_its_names() {
        let id = Uuid::from_u128(1);
        let runs = RunRoot::of_store(Path::new("/s"));
        let dir = runs.dir(id);
        let at = |name: &str| PathBuf::from(format!("/s/run/{id}{name}"));
        assert_eq!(dir.path(), at(""));
        assert_eq!(
            dir.device_files(),
            ["/dev", "/state.json", "/control.sock", "/log", "/loop"].map(at)
        );
        let engines = [dir.rootfs(), dir.inner(), dir.etc(), dir.oci(), dir.owner()];
        assert_eq!(
            engines,
            ["/rootfs", "/inner", "/etc", "/oci", "/owner"].map(at)
        );
        assert_eq!(dir.unlocked_owner(), at("/owner.tmp"));
        assert_eq!(runs.container_lock(id), at(".lock"));
        assert_eq!(runs.socket_beside(id).path(), at(".sock"));
        assert_eq!(runs.nbd_socket(), Path::new("/s/run/nbd.sock"));
        assert_eq!(
            runs.snapshotter_lock(),
            Path::new("/s/run/snapshotter.lock")
        );
    }

    #[test]
    fn a_run_directory_knows_its_store_and_its_store_knows_it_again() {
        let id = Uuid::from_u128(7);
        let runs = RunRoot::of_store(Path::new("/s"));
        let dir = runs.dir(id);
        assert_eq!(dir.id(), Some(id));
        assert_eq!(dir.store_root(), Some(Path::new("/s")));
        assert!(runs.has(&dir));
        assert_eq!(runs.dir_at(dir.path().to_owned()).as_ref(), Some(&dir));
        assert_eq!(runs.named(&id.to_string()).as_ref(), Some(&dir));
        assert_eq!(RunDir::of_dev(&dir.dev()).as_ref(), Some(&dir));
        assert_eq!(RunDir::of_dev(&dir.log()), None);
        assert_eq!(runs.dir_at(dir.dev()), None);
        assert_eq!(runs.named("nbd.sock"), None);
        let beside = |path: PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            RunRoot::id_beside(&name).map(str::to_owned)
        };
        assert_eq!(beside(runs.container_lock(id)), Some(id.to_string()));
        let socket = runs.socket_beside(id).path();
        assert_eq!(beside(socket), Some(id.to_string()));
        assert_eq!(beside(runs.trace(id)), Some(id.to_string()));
        for output in runs.output_beside(id) {
            assert_eq!(beside(output), Some(id.to_string()));
        }
        assert_eq!(beside(runs.fetcher_log()), None);
        assert_eq!(beside(runs.pull_secrets().path()), None);
        assert_eq!(beside(runs.nbd_socket()), None);
        assert_eq!(beside(runs.snapshotter_lock()), None);
    }

    #[test]
    fn directories_are_found_and_files_beside_them_are_not() {
        let root = tempfile::tempdir().unwrap();
        let runs = RunRoot::of_store(root.path());
        assert_eq!(runs.dirs().unwrap_err().kind(), io::ErrorKind::NotFound);
        let dir = runs.dir(Uuid::from_u128(3));
        fs::create_dir_all(dir.path()).unwrap();
        fs::write(runs.nbd_socket(), "").unwrap();
        assert_eq!(runs.dirs().unwrap().as_slice(), std::slice::from_ref(&dir));
        assert!(dir.exists());
        dir.remove_empty().unwrap();
        assert_eq!(runs.dirs().unwrap(), []);
    }

    #[test]
    fn what_others_keep_in_a_run_directory_is_nothing_of_a_device() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::at(root.path().to_owned());
        for path in [dir.rootfs(), dir.inner(), dir.etc(), dir.oci()] {
            fs::create_dir(path).unwrap();
        }
        fs::write(dir.owner(), "").unwrap();
        assert!(!dir.has_device_files().unwrap());
        for path in dir
            .device_files()
            .into_iter()
            .chain([dir.unfinished_state()])
        {
            fs::write(&path, "").unwrap();
            assert!(dir.has_device_files().unwrap(), "{}", path.display());
            fs::remove_file(&path).unwrap();
        }
        assert!(!dir.has_device_files().unwrap());
    }

    #[test]
    fn a_half_written_state_is_found() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::at(root.path().to_owned());
        let others = root.path().join("state.json.1.tmp");
        for path in [&others, &dir.state(), &dir.log()] {
            fs::write(path, "").unwrap();
        }
        assert_eq!(dir.unfinished_states().unwrap(), [others]);
        fs::write(dir.unfinished_state(), "").unwrap();
        assert_eq!(dir.unfinished_states().unwrap().len(), 2);
    }
}
