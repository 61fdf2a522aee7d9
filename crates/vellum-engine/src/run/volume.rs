//! Volumes as they appear in a container: where they lie on the host, and what fills a new one.

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::user::open_in_root;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_image::copy_tree;
use vellum_store::{ContainerRecord, Store, VolumeMount, VolumePlace, check_name};

/// How many links are followed, as the kernel has it.
const MAX_LINKS: usize = 40;

/// Reads `SRC:DST[:ro|rw]`. A source with a slash is a path on the host, relative to the working
/// directory; one without is the name of a volume of the store.
///
/// # Errors
/// [`ErrorKind::InvalidInput`], with what a volume looks like.
pub fn parse_volume(text: &str) -> Result<VolumeMount> {
    let bad = |why: &str| {
        Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{text:?} is no volume: {why}; write NAME:/dst, /src:/dst or ./src:/dst, with :ro to keep writes out"
            ),
        )
    };
    let mut parts = text.split(':');
    let source = parts.next().unwrap_or_default();
    let destination = parts
        .next()
        .ok_or_else(|| bad("it has no destination in the container"))?;
    let read_only = match parts.next() {
        None | Some("rw") => false,
        Some("ro") => true,
        Some(_) => return Err(bad("it may end with :ro or :rw")),
    };
    if parts.next().is_some() {
        return Err(bad("it has too many colons"));
    }
    let destination = normal(Path::new(destination))
        .ok_or_else(|| bad("its destination is not an absolute path below /, without .."))?;
    let source = if source.is_empty() {
        return Err(bad("it has no source"));
    } else if source.contains('/') || source == "." || source == ".." {
        let path = std::path::absolute(source).context(|| format!("cannot find {source}"))?;
        path.to_str()
            .ok_or_else(|| bad("its source is not UTF-8"))?
            .to_owned()
    } else {
        check_name("volume", source)?;
        source.to_owned()
    };
    Ok(VolumeMount {
        source,
        destination,
        read_only,
    })
}

/// Reads docker's `type=bind,source=/src,target=/dst[,readonly]`, and `type=volume,source=NAME,…`. Unlike with
/// [`parse_volume`], a directory of the host has to be there.
///
/// # Errors
/// [`ErrorKind::InvalidInput`], with what it looks like; [`ErrorKind::NotFound`] for the directory.
pub fn parse_mount(text: &str) -> Result<VolumeMount> {
    let bad = |why: &str| {
        Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{text:?} is no mount: {why}; write type=bind,source=/src,target=/dst or type=volume,source=NAME,\
                 target=/dst, with ,readonly to keep writes out"
            ),
        )
    };
    let (mut kind, mut source, mut target, mut read_only) = ("volume", None, None, false);
    for part in text.split(',') {
        match part.split_once('=').unwrap_or((part, "true")) {
            ("type", value @ ("bind" | "volume")) => kind = value,
            ("type", _) => return Err(bad("there are bind and volume")),
            ("source" | "src", value) => source = Some(value),
            ("target" | "destination" | "dst", value) => target = Some(value),
            ("readonly" | "ro", value @ ("true" | "false" | "1" | "0")) => {
                read_only = ["true", "1"].contains(&value);
            }
            (key, _) => return Err(bad(&format!("{key} is not known"))),
        }
    }
    let source = source.ok_or_else(|| bad("it has no source"))?;
    let target = target.ok_or_else(|| bad("it has no target"))?;
    if (kind == "bind") != source.starts_with('/')
        || [source, target].iter().any(|p| p.contains(':'))
    {
        return Err(bad(
            "the source of bind is an absolute path, that of volume a name, and neither has colons",
        ));
    }
    if kind == "bind" && !Path::new(source).exists() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{source} is not there: make it first, or give it with -v, which makes it"),
        ));
    }
    let mode = if read_only { "ro" } else { "rw" };
    parse_volume(&format!("{source}:{target}:{mode}"))
}

/// An absolute path with nothing odd in it; `None` for the root or one with `..`.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut components = path.components();
    if components.next() != Some(Component::RootDir) {
        return None;
    }
    let mut out = PathBuf::from("/");
    for component in components {
        match component {
            Component::Normal(name) => out.push(name),
            _ => return None,
        }
    }
    (out != Path::new("/")).then_some(out)
}

/// Checks that no two volumes want one place.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] names the place.
pub fn check_volumes(volumes: &[VolumeMount]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    match volumes
        .iter()
        .find(|volume| !seen.insert(&volume.destination))
    {
        Some(twice) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("two volumes want {}", twice.destination.display()),
        )),
        None => Ok(()),
    }
}

/// Where a volume lies on the host. A named one that is empty gets what the image has in its place;
/// a directory that is missing is made.
pub(super) fn prepare(store: &Store, volume: &VolumeMount, rootfs: &Path) -> Result<PathBuf> {
    if !volume.source.starts_with('/') {
        return fill(store, &volume.source, rootfs, &volume.destination)
            .map_err(|error| error.context(format!("cannot fill the volume {}", volume.source)));
    }
    let path = PathBuf::from(&volume.source);
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            fs::create_dir_all(&path).context(|| format!("cannot make {}", path.display()))?;
            // As docker does for -v; whoever mistyped a path wants to know.
            tracing::warn!(
                "{}: made for a volume, since it was not there",
                path.display()
            );
        }
        _ => {}
    }
    Ok(path)
}

/// A volume where it is mounted.
pub(crate) struct MountedVolume {
    /// On the host.
    pub source: PathBuf,
    /// In the container, without links.
    pub destination: PathBuf,
    /// No writes through this mount.
    pub read_only: bool,
}

/// Where the volumes of a container whose root is `rootfs` are mounted while it runs. One that is nowhere yet
/// is left out: its first run makes it.
pub(crate) fn mounted_volumes(
    store: &Store,
    container: &ContainerRecord,
    rootfs: &Path,
) -> Result<Vec<MountedVolume>> {
    let mut found = Vec::new();
    for volume in &container.volumes {
        let source = match volume.source.starts_with('/') {
            true => PathBuf::from(&volume.source),
            false => store.volume_place(&volume.source)?.dir,
        };
        if !source.exists() {
            continue;
        }
        found.push(MountedVolume {
            source,
            destination: follow(rootfs, &volume.destination)?,
            read_only: volume.read_only,
        });
    }
    Ok(found)
}

/// Where `path` leads in the container, with every link on the way followed inside it. Runtimes
/// refuse to mount on a link whose end is not there, like the `/etc/resolv.conf` of many images.
pub(super) fn follow(rootfs: &Path, path: &Path) -> Result<PathBuf> {
    let mut left: Vec<OsString> = names(path);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = left.pop() {
        if name == ".." {
            at.pop();
            continue;
        }
        at.push(&name);
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
        let Ok(fd) = open_in_root(rootfs, &at, flags) else {
            // The runtime makes what is missing.
            continue;
        };
        // Anything but a link has no target.
        let Ok(target) = nix::fcntl::readlinkat(&fd, "") else {
            continue;
        };
        links += 1;
        if links > MAX_LINKS {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{}: too many links in the image", path.display()),
            ));
        }
        at.pop();
        if Path::new(&target).is_absolute() {
            at = PathBuf::from("/");
        }
        left.extend(names(Path::new(&target)));
    }
    Ok(at)
}

/// The names in a path, the last one first.
fn names(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    let mut names: Vec<OsString> = names.collect();
    names.reverse();
    names
}

/// The image's directory at `place`, if it has one: the open directory itself, wherever links led to.
fn of_image(rootfs: &Path, place: &Path) -> Result<Option<OwnedFd>> {
    match open_in_root(rootfs, place, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
        Ok(source) => Ok(Some(source)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(Error::io(
            format!("cannot open {} of the image", place.display()),
            errno.into(),
        )),
    }
}

fn is_there(path: &Path) -> Result<bool> {
    path.try_exists()
        .context(|| format!("cannot stat {}", path.display()))
}

fn is_empty(dir: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(dir).context(|| format!("cannot list {}", dir.display()))?;
    Ok(entries.next().is_none())
}

/// Makes a volume where there is none, and gives an empty one what the image has at `at`, the
/// directory's mode and owner too.
fn fill(store: &Store, name: &str, rootfs: &Path, at: &Path) -> Result<PathBuf> {
    let place = store.volume_place(name)?;
    if place.elsewhere {
        return match place.dir.is_dir() {
            true => Ok(place.dir),
            false => Err(Error::new(
                ErrorKind::NotFound,
                format!("{} is no directory (any more)", place.dir.display()),
            )),
        };
    }
    // Two containers that start at once: the second finds it filled.
    let _lock = store.lock_volume(&place)?;
    move_in(store, &place)?;
    let there = is_there(&place.dir)?;
    if there && !is_empty(&place.dir)? {
        return Ok(place.dir);
    }
    let source = of_image(rootfs, at)?;
    if there && source.is_none() {
        return Ok(place.dir);
    }
    let doing = || format!("cannot make {}", place.fresh.display());
    if is_there(&place.fresh)? {
        fs::remove_dir_all(&place.fresh).context(doing)?;
    }
    fs::create_dir(&place.fresh).context(doing)?;
    if let Some(source) = source {
        // Nothing runs in the container yet.
        let source = fs::read_link(format!("/proc/self/fd/{}", source.as_raw_fd()))
            .context(|| "cannot read /proc/self/fd")?;
        copy_tree(&source, &place.fresh, None)?;
    }
    let fresh = fs::File::open(&place.fresh).context(doing)?;
    // Whole on the disk before its name says so.
    nix::unistd::syncfs(fresh).context(|| "cannot sync the volume")?;
    fs::rename(&place.fresh, &place.full).context(doing)?;
    move_in(store, &place)?;
    Ok(place.dir)
}

/// Brings what was copied whole into the volume; also what a crash kept from coming there.
fn move_in(store: &Store, place: &VolumePlace) -> Result<()> {
    if !is_there(&place.full)? {
        return Ok(());
    }
    let doing = || format!("cannot move {} into the volume", place.full.display());
    if !is_there(&place.dir)? {
        return store.publish_volume(place);
    }
    // It is there and was empty: a container may have it already, so it stays the same directory.
    let like = fs::metadata(&place.full).context(doing)?;
    std::os::unix::fs::chown(&place.dir, Some(like.uid()), Some(like.gid())).context(doing)?;
    fs::set_permissions(&place.dir, like.permissions()).context(doing)?;
    for entry in fs::read_dir(&place.full).context(doing)? {
        let entry = entry.context(doing)?;
        let target = place.dir.join(entry.file_name());
        match renameat_with(CWD, entry.path(), CWD, &target, RenameFlags::NOREPLACE) {
            // What a container has made there meanwhile stays.
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(Error::io(doing(), errno.into())),
        }
    }
    fs::remove_dir_all(&place.full).context(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_absolute_and_relative_sources_are_told_apart() {
        let named = parse_volume("data:/var/lib/data/").unwrap();
        assert_eq!(named.source, "data");
        assert_eq!(named.destination, Path::new("/var/lib/data"));
        assert!(!named.read_only);
        let absolute = parse_volume("/srv:/x:ro").unwrap();
        assert!(absolute.source == "/srv" && absolute.read_only);
        let here = std::env::current_dir().unwrap();
        for relative in ["./a", "a/"] {
            let volume = parse_volume(&format!("{relative}:/x:rw")).unwrap();
            assert_eq!(Path::new(&volume.source), here.join("a"), "{relative}");
        }
    }

    #[test]
    fn dockers_mounts_are_read_and_want_their_directory() {
        let bind = parse_mount("type=bind,src=/etc,dst=/x,readonly").unwrap();
        assert!(bind.source == "/etc" && bind.read_only);
        let volume = parse_mount("source=data,target=/x").unwrap();
        assert!(volume.source == "data" && !volume.read_only);
        for (text, why) in [
            ("type=tmpfs,target=/x", "bind and volume"),
            ("type=bind,source=data,target=/x", "absolute path"),
            ("source=data", "no target"),
            ("source=data,target=/x,uid=3", "uid is not known"),
            ("type=bind,source=/no/such/place,target=/x", "not there"),
        ] {
            let error = parse_mount(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn links_are_followed_inside_the_container_even_where_they_dangle() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let link = |target: &str, name: &str| {
            std::os::unix::fs::symlink(target, root.path().join(name)).unwrap();
        };
        link("../run/dns/stub", "etc/resolv.conf");
        link("/../../outside", "out");
        link("loop", "loop");
        let to = |path: &str| follow(root.path(), Path::new(path));
        assert_eq!(to("/etc/hosts").unwrap(), Path::new("/etc/hosts"));
        let resolv = to("/etc/resolv.conf").unwrap();
        assert_eq!(resolv, Path::new("/run/dns/stub"));
        assert_eq!(to("/out/x").unwrap(), Path::new("/outside/x"));
        assert!(to("/loop/x").is_err());
    }

    #[test]
    fn what_is_no_volume_is_refused_with_the_reason() {
        for (text, why) in [
            ("data", "no destination"),
            (":/x", "no source"),
            ("data:x", "absolute"),
            ("data:/", "below /"),
            ("data:/a/../..", ".."),
            ("data:/x:z", ":ro"),
            ("a:/b:ro:c", "colons"),
        ] {
            let error = parse_volume(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
            assert!(error.to_string().contains(why), "{error}");
        }
        let twice = [
            parse_volume("a:/x").unwrap(),
            parse_volume("b:/x/").unwrap(),
        ];
        assert!(check_volumes(&twice).is_err());
    }
}
