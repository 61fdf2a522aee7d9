//! The processes of a container, by its cgroup: what a runtime was killed too early to note is there too.

use std::fs;
use std::io;

use vellum_base::error::{Error, Result, ResultExt};
use vellum_export::device::Identity;

/// The living processes of the cgroup `name`, or of one below it, wherever its hierarchy is mounted.
///
/// # Errors
/// Where /proc cannot be read: that there are none is known only of all.
pub(crate) fn members(name: &str) -> Result<Vec<Identity>> {
    let what = || "/proc: cannot be read";
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").context(what)? {
        let process = process.context(what)?.file_name();
        if let Some(pid) = process.to_str().and_then(|name| name.parse().ok()) {
            found.extend(member(pid, name)?);
        }
    }
    Ok(found)
}

/// The process of that pid, where it lives and is in the cgroup `name` or below it.
///
/// # Errors
/// Where it cannot be looked at.
pub(crate) fn member(pid: i32, name: &str) -> Result<Option<Identity>> {
    let path = format!("/proc/{pid}/cgroup");
    let groups = match fs::read_to_string(&path) {
        Ok(groups) => groups,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(Error::io(format!("{path}: cannot be read"), error)),
    };
    let mut parts = groups.lines().flat_map(|group| group.split('/'));
    if !parts.any(|part| part == name) {
        return Ok(None);
    }
    Ok(Identity::of(pid)?.filter(|process| process.is_alive()))
}

/// True for the errors of reading of a process that has ended.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}
