//! The bundle of a run: what the OCI runtime is told, and the files that a container has of its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::mount_point;
use super::activity::Owner;
use super::executable::{self, Files, NoProgram};
use super::spec::{self, Bind, ContainerPlan, ProcessPlan};
use super::{capabilities, limits, scaffold, seccomp, user, volume};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_fs::run_dir::RunDir;
use vellum_store::{Confinement, ContainerRecord, Network, Store};

/// What is started in a container that nothing runs in; the rest is in the container's record.
pub(super) struct Start {
    pub(super) args: Vec<String>,
    pub(super) env: Vec<String>,
    pub(super) terminal: bool,
    /// The OCI runtime.
    pub(super) program: PathBuf,
}

/// Writes the bundle, unless the command is no program: then the answer is why.
pub(super) fn prepare(
    store: &Store,
    container: &ContainerRecord,
    start: &Start,
    run_dir: &RunDir,
    rootfs: &Path,
    owner: &Owner,
) -> Result<Option<NoProgram>> {
    let oci = run_dir.oci();
    let confinement = &container.confinement;
    let hostname = host_name(container);
    let config = &container.config.config;
    let who = user::resolve(rootfs, &config.user)?;
    let env = spec::environment(
        &hostname,
        start.terminal,
        &who.home,
        &config.env,
        &start.env,
    );
    let binds = binds(store, container, run_dir, rootfs, &hostname)?;
    check_paths(rootfs, &binds)?;
    let cwd = absolute(&config.working_dir);
    let files = Files {
        root: rootfs,
        binds: &binds,
    };
    if let Some(no) = executable::check(&files, &start.args, &env, &cwd) {
        return Ok(Some(no));
    }
    scaffold::make(store, container, rootfs, &binds)?;
    let capabilities = capabilities::of(confinement)?;
    let plan = ContainerPlan {
        rootfs: rootfs.to_owned(),
        seccomp: seccomp::of(&confinement.seccomp, &capabilities)?,
        process: ProcessPlan {
            args: start.args.clone(),
            env,
            cwd,
            who,
            terminal: start.terminal,
            capabilities,
            no_new_privileges: confinement.no_new_privileges,
        },
        hostname,
        network: confinement.network,
        read_only: confinement.read_only,
        limits: limits::of(confinement)?,
        binds,
        cgroup: owner.cgroup.clone(),
    };
    let spec = spec::container(&plan)?;
    write_json(&oci.join("config.json"), &spec).map(|()| None)
}

/// What appears in the container, where links in it lead.
fn binds(
    store: &Store,
    container: &ContainerRecord,
    run_dir: &RunDir,
    rootfs: &Path,
    hostname: &str,
) -> Result<Vec<Bind>> {
    let etc = mount_point::etc_dir(run_dir)?;
    let mut binds = etc_files(&etc, hostname, &container.confinement)?;
    for volume in &container.volumes {
        let source = volume::prepare(store, volume, rootfs)?;
        binds.retain(|bind| bind.destination != volume.destination);
        binds.push(Bind {
            source,
            destination: volume.destination.clone(),
            read_only: volume.read_only,
        });
    }
    for bind in &mut binds {
        bind.destination = volume::follow(rootfs, &bind.destination)?;
        if bind.destination == Path::new("/") {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "a volume cannot lie on the root of the container",
            ));
        }
    }
    Ok(binds)
}

/// All paths in the bundle are text.
fn check_paths(rootfs: &Path, binds: &[Bind]) -> Result<()> {
    let sources = binds.iter().map(|bind| bind.source.as_path());
    match sources.chain([rootfs]).find(|path| path.to_str().is_none()) {
        Some(path) => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: a container's description is JSON, which cannot name a path that is not \
                 UTF-8: use another --root, directory or volume",
                path.display()
            ),
        )),
        None => Ok(()),
    }
}

pub(super) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(|error| Error::internal(format!("the bundle cannot be encoded: {error}")))?;
    fs::write(path, bytes).context(|| format!("cannot write {}", path.display()))
}

/// A working directory as the runtime takes it.
pub(super) fn absolute(path: &str) -> String {
    match path.starts_with('/') {
        true => path.to_owned(),
        false => format!("/{path}"),
    }
}

/// A container's host name: what it was given, or one made of its name.
pub(super) fn host_name(container: &ContainerRecord) -> String {
    let of_name = || {
        let letters = container.name.chars();
        letters
            .map(|c| if c == '_' { '-' } else { c })
            .take(63)
            .collect()
    };
    container
        .confinement
        .hostname
        .clone()
        .unwrap_or_else(of_name)
}

/// A file of the host, of whatever bytes; empty where the host has none.
fn of_host(path: &str) -> Result<Vec<u8>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => {
            read.context(|| format!("{path}: cannot be read, and a container has a copy of it"))
        }
    }
}

/// Files that every container has of its own, so that the image's stay as they are.
fn etc_files(dir: &Path, hostname: &str, confinement: &Confinement) -> Result<Vec<Bind>> {
    let mut files = vec![("hostname", format!("{hostname}\n").into_bytes())];
    match confinement.network {
        Network::Host => {
            let mut hosts = of_host("/etc/hosts")?.trim_ascii_end().to_vec();
            hosts.extend(format!("\n127.0.1.1\t{hostname}\n").as_bytes());
            files.push(("hosts", hosts));
            files.push(("resolv.conf", of_host("/etc/resolv.conf")?));
        }
        Network::None => {
            files.push((
                "hosts",
                format!("127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t{hostname}\n")
                    .into_bytes(),
            ));
            // There as docker has it, so that a program finds no server, and not the image's.
            files.push(("resolv.conf", b"# This container has no network.\n".into()));
        }
    }
    files
        .into_iter()
        .map(|(name, content)| {
            let source = dir.join(name);
            fs::write(&source, content).context(|| format!("cannot write {}", source.display()))?;
            Ok(Bind {
                source,
                destination: Path::new("/etc").join(name),
                read_only: confinement.read_only,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_host_is_copied_whatever_its_bytes_and_one_that_cannot_be_read_is_no_empty_one()
    {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::write(path("hosts"), b"1.2.3.4 m\xfcller\n").unwrap();
        assert_eq!(of_host(&path("hosts")).unwrap(), b"1.2.3.4 m\xfcller\n");
        assert_eq!(of_host(&path("none")).unwrap(), b"");
        fs::create_dir(path("dir")).unwrap();
        let error = of_host(&path("dir")).unwrap_err();
        assert!(error.to_string().contains("dir: cannot be read"), "{error}");
    }
}
