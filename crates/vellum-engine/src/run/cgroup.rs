//! The processes of a container, by its cgroup: what a runtime was killed too early to note is there too.

use std::collections::HashSet;
use std::fs;
use std::io;

use vellum_base::error::{Error, Result, ResultExt};
use vellum_export::device::{Identity, is_ending};

/// How often /proc is listed where processes that it names end before they are looked at: each may have
/// started another in its place, which the list does not have.
const LISTS: usize = 10;

/// The living processes of the cgroup `name`, or of one below it, wherever its hierarchy is mounted.
///
/// # Errors
/// Where /proc cannot be read: that there are none is known only of all.
pub(crate) fn members(name: &str) -> Result<Vec<Identity>> {
    let mut found = Vec::new();
    // That one is a zombie is no news twice.
    let mut dead = HashSet::new();
    for _ in 0..LISTS {
        let mut news = false;
        // The youngest first, before it ends too.
        for pid in listed()?.into_iter().rev() {
            match look(pid, name)? {
                Look::Member(process) => found.push(process),
                Look::Other => {}
                Look::Ended => news |= dead.insert(pid),
            }
        }
        if !found.is_empty() || !news {
            break;
        }
    }
    Ok(found)
}

fn listed() -> Result<Vec<i32>> {
    let what = || "/proc: cannot be read";
    let mut pids = Vec::new();
    for process in fs::read_dir("/proc").context(what)? {
        let name = process.context(what)?.file_name();
        pids.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(pids)
}

/// The process of that pid, where it lives and is in the cgroup `name` or below it.
///
/// # Errors
/// Where it cannot be looked at.
pub(crate) fn member(pid: i32, name: &str) -> Result<Option<Identity>> {
    Ok(match look(pid, name)? {
        Look::Member(process) => Some(process),
        Look::Other | Look::Ended => None,
    })
}

/// What a process of a list is.
enum Look {
    Member(Identity),
    Other,
    Ended,
}

fn look(pid: i32, name: &str) -> Result<Look> {
    let path = format!("/proc/{pid}/cgroup");
    let groups = match fs::read_to_string(&path) {
        Ok(groups) => groups,
        Err(error) if is_gone(&error) => return Ok(Look::Ended),
        Err(error) => return Err(Error::io(format!("{path}: cannot be read"), error)),
    };
    if !is_in(&groups, name) {
        // The first version of cgroups shows the root for what has ended.
        let ended = is_in(&groups, "") && is_ending(pid)?;
        return Ok(if ended { Look::Ended } else { Look::Other });
    }
    let process = Identity::of(pid)?.filter(|process| process.is_alive());
    Ok(process.map_or(Look::Ended, Look::Member))
}

/// Whether a process of `/proc/PID/cgroup` is in the cgroup `name` of some hierarchy, or below it; `""` is
/// the root.
fn is_in(groups: &str, name: &str) -> bool {
    let paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths
        .map(|path| path.trim_start_matches('/'))
        .any(|path| path.split('/').any(|part| part == name))
}

/// True for the errors of reading of a process that has ended.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// A cgroup of the test's own in the first hierarchy there is, gone with it.
    struct Group(PathBuf);

    impl Group {
        fn new(name: &str) -> Group {
            let base = Path::new("/sys/fs/cgroup");
            let below = fs::read_dir(base).unwrap().flatten();
            let hierarchy = below
                .map(|entry| entry.path())
                .chain([base.to_owned()])
                .find(|dir| dir.join("cgroup.procs").exists() && dir.join("tasks").exists())
                .unwrap_or_else(|| base.to_owned());
            let dir = hierarchy.join(name);
            fs::create_dir(&dir)
                .unwrap_or_else(|error| panic!("{}: {error}: tests need root", dir.display()));
            Group(dir)
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            for _ in 0..100 {
                if fs::remove_dir(&self.0).is_ok() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    }

    #[test]
    fn of_processes_that_each_start_the_next_and_end_one_is_found_until_the_last_has_ended() {
        let name = format!("vellum-test-{}", std::process::id());
        let group = Group::new(&name);
        let dir = tempfile::tempdir().unwrap();
        let done = dir.path().join("done");
        // Each lives about as long as a list is looked at; the last makes the file.
        let link = "sleep 0.003
            [ $2 -gt 0 ] || { : >\"$1\"; exit; }
            sh -c \"$0\" \"$0\" \"$1\" $(($2 - 1)) &";
        let first = "echo $$ >\"$1/cgroup.procs\"
            sh -c \"$0\" \"$0\" \"$2\" 10 &";
        for _ in 0..10 {
            let status = Command::new("sh")
                .args(["-c", first, link])
                .args([&group.0, &done])
                .status()
                .unwrap();
            assert!(status.success());
            while !members(&name).unwrap().is_empty() {}
            assert!(done.exists(), "a process was overlooked");
            fs::remove_file(&done).unwrap();
        }
    }
}
