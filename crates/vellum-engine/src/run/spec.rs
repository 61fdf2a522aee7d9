//! What an OCI runtime is told: the bundle's `config.json`, to the OCI runtime specification, with
//! docker's defaults for capabilities, devices and hidden paths.

use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};
use oci_spec::runtime::{
    Capabilities, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDeviceCgroup,
    LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResourcesBuilder, LinuxSeccomp, Mount, MountBuilder, PosixRlimit, PosixRlimitBuilder,
    PosixRlimitType, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
    get_default_maskedpaths, get_default_mounts, get_default_readonly_paths,
};

use super::limits::Limits;
use super::refused::failure;
use super::user::Who;
use vellum_base::error::Result;
use vellum_store::Network;

/// Where programs are looked for unless the image says otherwise.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Open files of a process unless it asks for more.
const OPEN_FILES: u64 = 1024;
/// The file mode mask of a container's processes, whatever the caller's is.
const UMASK: u32 = 0o022;

/// A process to start.
#[derive(Debug)]
pub(super) struct ProcessPlan {
    pub(super) args: Vec<String>,
    pub(super) env: Vec<String>,
    pub(super) cwd: String,
    pub(super) who: Who,
    pub(super) terminal: bool,
    /// Those of root; other users get them by programs that have them.
    pub(super) capabilities: Capabilities,
    pub(super) no_new_privileges: bool,
}

/// A file or directory of the host that appears in the container.
#[derive(Debug)]
pub(super) struct Bind {
    pub(super) source: PathBuf,
    pub(super) destination: PathBuf,
    pub(super) read_only: bool,
}

/// A container to start.
#[derive(Debug)]
pub(super) struct ContainerPlan {
    pub(super) rootfs: PathBuf,
    pub(super) process: ProcessPlan,
    pub(super) hostname: String,
    pub(super) network: Network,
    pub(super) binds: Vec<Bind>,
    /// The root file system cannot be written.
    pub(super) read_only: bool,
    pub(super) limits: Limits,
    pub(super) seccomp: Option<LinuxSeccomp>,
    /// One path component, so that no directory above it is left in the cgroup tree.
    pub(super) cgroup: String,
}

/// `base` with `more` on top: a variable that is there already gets the new value in its place.
pub(super) fn merge_env(base: &mut Vec<String>, more: &[String]) {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    for entry in more {
        match base.iter_mut().find(|old| name(old) == name(entry)) {
            Some(old) => old.clone_from(entry),
            None => base.push(entry.clone()),
        }
    }
}

/// The environment of a container's processes.
pub(super) fn environment(
    hostname: &str,
    terminal: bool,
    home: &str,
    image: &[String],
    given: &[String],
) -> Vec<String> {
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if terminal {
        env.push("TERM=xterm".into());
    }
    env.push(format!("HOME={home}"));
    // Images have entries that name nothing, or give no value: docker leaves them out as well.
    let whole = |entry: &&String| entry.find('=').is_some_and(|at| at > 0);
    let image: Vec<String> = image.iter().filter(whole).cloned().collect();
    merge_env(&mut env, &image);
    merge_env(&mut env, given);
    env
}

fn open_files() -> Result<PosixRlimit> {
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(OPEN_FILES, |(_, hard)| hard);
    PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .soft(hard.min(OPEN_FILES))
        .hard(hard)
        .build()
        .map_err(failure)
}

/// The process as the runtime wants it, for `run` and for `exec`.
pub(super) fn process(plan: &ProcessPlan) -> Result<Process> {
    let capabilities = || plan.capabilities.clone();
    let caps = LinuxCapabilitiesBuilder::default().bounding(capabilities());
    // As an execve would have it: only root holds them at once.
    let caps = match plan.who.uid {
        0 => caps.effective(capabilities()).permitted(capabilities()),
        _ => caps
            .effective(Capabilities::new())
            .permitted(Capabilities::new()),
    };
    let caps = caps
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new());
    let user = UserBuilder::default()
        .uid(plan.who.uid)
        .gid(plan.who.gid)
        .umask(UMASK)
        .additional_gids(plan.who.groups.clone())
        .build()
        .map_err(failure)?;
    ProcessBuilder::default()
        .terminal(plan.terminal)
        .user(user)
        .args(plan.args.clone())
        .env(plan.env.clone())
        .cwd(&plan.cwd)
        .capabilities(caps.build().map_err(failure)?)
        .rlimits([open_files()?])
        .no_new_privileges(plan.no_new_privileges)
        .build()
        .map_err(failure)
}

fn device(
    allow: bool,
    typ: LinuxDeviceType,
    numbers: (Option<i64>, Option<i64>),
    access: &str,
) -> Result<LinuxDeviceCgroup> {
    let mut rule = LinuxDeviceCgroupBuilder::default()
        .allow(allow)
        .typ(typ)
        .access(access);
    if let Some(major) = numbers.0 {
        rule = rule.major(major);
    }
    if let Some(minor) = numbers.1 {
        rule = rule.minor(minor);
    }
    rule.build().map_err(failure)
}

/// No device but those that every container has; nodes may be made, not opened.
fn devices() -> Result<Vec<LinuxDeviceCgroup>> {
    let mut rules = vec![
        device(false, LinuxDeviceType::A, (None, None), "rwm")?,
        device(true, LinuxDeviceType::C, (None, None), "m")?,
        device(true, LinuxDeviceType::B, (None, None), "m")?,
    ];
    // null, zero, full, random, urandom, tty, console, ptmx, pts.
    for (major, minor) in [
        (1, Some(3)),
        (1, Some(5)),
        (1, Some(7)),
        (1, Some(8)),
        (1, Some(9)),
        (5, Some(0)),
        (5, Some(1)),
        (5, Some(2)),
        (136, None),
    ] {
        rules.push(device(
            true,
            LinuxDeviceType::C,
            (Some(major), minor),
            "rwm",
        )?);
    }
    Ok(rules)
}

fn bind(bind: &Bind) -> Result<Mount> {
    let access = if bind.read_only { "ro" } else { "rw" };
    MountBuilder::default()
        .destination(&bind.destination)
        .typ("bind")
        .source(&bind.source)
        .options(["rbind", "rprivate", access].map(str::to_owned))
        .build()
        .map_err(failure)
}

fn mounts(plan: &ContainerPlan) -> Result<Vec<Mount>> {
    let mut mounts = get_default_mounts();
    for mount in &mut mounts {
        // Without a hold on suid programs and devices, as everywhere else.
        if mount.destination() == Path::new("/proc") {
            mount.set_options(Some(
                ["nosuid", "noexec", "nodev"].map(str::to_owned).to_vec(),
            ));
        }
    }
    let mut binds: Vec<&Bind> = plan.binds.iter().collect();
    // One that lies in another comes after it.
    binds.sort_by_key(|bind| bind.destination.components().count());
    for one in binds {
        mounts.push(bind(one)?);
    }
    Ok(mounts)
}

fn namespaces(network: Network) -> Vec<LinuxNamespaceType> {
    let mut namespaces = vec![
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
    ];
    if network == Network::None {
        namespaces.push(LinuxNamespaceType::Network);
    }
    if Path::new("/proc/self/ns/cgroup").exists() {
        namespaces.push(LinuxNamespaceType::Cgroup);
    }
    namespaces
}

/// The whole `config.json`.
pub(super) fn container(plan: &ContainerPlan) -> Result<Spec> {
    let root = RootBuilder::default()
        .path(&plan.rootfs)
        .readonly(plan.read_only)
        .build()
        .map_err(failure)?;
    let mut resources = LinuxResourcesBuilder::default().devices(devices()?);
    if let Some(memory) = plan.limits.memory {
        resources = resources.memory(memory);
    }
    if let Some(pids) = plan.limits.pids {
        resources = resources.pids(pids);
    }
    if let Some(cpu) = plan.limits.cpu.clone() {
        resources = resources.cpu(cpu);
    }
    let resources = resources.build().map_err(failure)?;
    let namespaces = namespaces(plan.network)
        .into_iter()
        .map(|typ| LinuxNamespaceBuilder::default().typ(typ).build())
        .collect::<Result<Vec<_>, _>>()
        .map_err(failure)?;
    let mut masked = get_default_maskedpaths();
    masked.push("/sys/devices/virtual/powercap".into());
    let mut linux = LinuxBuilder::default()
        .resources(resources)
        .namespaces(namespaces)
        .masked_paths(masked)
        .readonly_paths(get_default_readonly_paths())
        .cgroups_path(format!("/{}", plan.cgroup));
    if let Some(seccomp) = plan.seccomp.clone() {
        linux = linux.seccomp(seccomp);
    }
    let linux = linux.build().map_err(failure)?;
    SpecBuilder::default()
        .version("1.0.2")
        .root(root)
        .process(process(&plan.process)?)
        .hostname(&plan.hostname)
        .mounts(mounts(plan)?)
        .linux(linux)
        .build()
        .map_err(failure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Capability;

    #[test]
    fn a_later_variable_replaces_an_earlier_one_in_its_place() {
        let env = environment(
            "box",
            false,
            "/root",
            &[
                "A=1".into(),
                "PATH=/bin".into(),
                "C".into(),
                "".into(),
                "=x".into(),
            ],
            &["A=2".into(), "B=x=y".into(), "HOME=/h".into()],
        );
        assert_eq!(
            env,
            ["PATH=/bin", "HOSTNAME=box", "HOME=/h", "A=2", "B=x=y"]
        );
    }

    #[test]
    fn only_root_starts_with_capabilities() {
        let mut plan = ProcessPlan {
            args: vec!["true".into()],
            env: Vec::new(),
            cwd: "/".into(),
            who: Who {
                uid: 0,
                gid: 0,
                groups: Vec::new(),
                home: "/".into(),
            },
            terminal: false,
            capabilities: [Capability::Chown].into(),
            no_new_privileges: false,
        };
        let effective = |plan: &ProcessPlan| {
            let process = process(plan).unwrap();
            let caps = process.capabilities().clone().unwrap();
            caps.effective().clone().unwrap()
        };
        assert_eq!(effective(&plan), plan.capabilities);
        plan.who.uid = 7;
        assert!(effective(&plan).is_empty());
    }
}
