//! Which system calls a container may make: profiles in docker's form, and what becomes of them for
//! one container on one host.
//!
//! A profile of docker's says for each rule on which architectures, with which capabilities and from
//! which kernel on it holds (`includes`, `excludes`), and for each architecture which others come
//! with it (`archMap`). The OCI runtime gets what is left. A plain OCI profile is one without
//! conditions. Our own, `seccomp.json`, is in the same form.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use oci_spec::runtime::{
    Arch, Capabilities, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompBuilder,
    LinuxSeccompFilterFlag, LinuxSyscall, LinuxSyscallBuilder,
};
use serde::Deserialize;
use serde_json::Value;

use super::capabilities;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_store::Seccomp;

/// Vellum's own profile.
const DEFAULT: &str = include_str!("seccomp.json");
/// Profiles of users are not larger; they lie in the container's record.
const MAX_PROFILE: u64 = 1 << 20;

/// A profile in docker's form.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: LinuxSeccompAction,
    #[serde(default)]
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    #[serde(default)]
    arch_map: Option<Vec<ArchMap>>,
    #[serde(default)]
    flags: Option<Vec<LinuxSeccompFilterFlag>>,
    #[serde(default)]
    listener_path: Option<String>,
    #[serde(default)]
    syscalls: Option<Vec<Rule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: String,
    #[serde(default)]
    sub_architectures: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    /// Of old profiles, in place of `names`.
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    names: Option<Vec<String>>,
    action: LinuxSeccompAction,
    #[serde(default)]
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<LinuxSeccompArg>>,
    #[serde(default)]
    includes: Option<Condition>,
    #[serde(default)]
    excludes: Option<Condition>,
}

/// When a rule holds, or does not.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(default)]
    caps: Option<Vec<String>>,
    #[serde(default)]
    arches: Option<Vec<String>>,
    #[serde(default)]
    min_kernel: Option<String>,
}

/// What conditions are about: a container on a host.
struct Place {
    capabilities: HashSet<String>,
    kernel: (u32, u32),
    architecture: &'static str,
}

/// A processor's architecture as profiles have it: in conditions, and in `archMap`.
fn architecture() -> (&'static str, &'static str) {
    match std::env::consts::ARCH {
        "x86_64" => ("amd64", "SCMP_ARCH_X86_64"),
        "x86" => ("x86", "SCMP_ARCH_X86"),
        "aarch64" => ("arm64", "SCMP_ARCH_AARCH64"),
        "arm" => ("arm", "SCMP_ARCH_ARM"),
        "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", "SCMP_ARCH_PPC64LE"),
        "powerpc64" => ("ppc64", "SCMP_ARCH_PPC64"),
        "s390x" => ("s390x", "SCMP_ARCH_S390X"),
        "riscv64" => ("riscv64", "SCMP_ARCH_RISCV64"),
        "loongarch64" => ("loong64", "SCMP_ARCH_LOONGARCH64"),
        "mips64" if cfg!(target_endian = "little") => ("mipsel64", "SCMP_ARCH_MIPSEL64"),
        "mips64" => ("mips64", "SCMP_ARCH_MIPS64"),
        other => (other, ""),
    }
}

/// `4.8`, of a version like `6.1.0-18-amd64`.
fn kernel_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split('.').map(|part| {
        let digits = part
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(part.len());
        part.split_at(digits).0.parse().ok()
    });
    Some((numbers.next()??, numbers.next()??))
}

impl Place {
    fn here(capabilities: &Capabilities) -> Result<Place> {
        let host = nix::sys::utsname::uname().context(|| "uname")?;
        let release = host.release().to_string_lossy();
        Ok(Place {
            capabilities: capabilities
                .iter()
                .map(|one| capabilities::name(*one))
                .collect(),
            kernel: kernel_version(&release).ok_or_else(|| {
                Error::new(
                    ErrorKind::Unsupported,
                    format!("a kernel of version {release:?}"),
                )
            })?,
            architecture: architecture().0,
        })
    }

    fn is_new_enough(&self, wanted: &str) -> Result<bool> {
        kernel_version(wanted)
            .map(|wanted| self.kernel >= wanted)
            .ok_or_else(|| bad(format!("minKernel {wanted:?} is no version like 4.8")))
    }

    /// Whether a rule holds here. As docker has it: each of `includes` must be so, and none of
    /// `excludes`.
    fn has(&self, rule: &Rule) -> Result<bool> {
        if let Some(excludes) = &rule.excludes {
            let is = |name: &String| self.capabilities.contains(name);
            if excludes.caps.iter().flatten().any(is)
                || excludes
                    .arches
                    .iter()
                    .flatten()
                    .any(|arch| arch == self.architecture)
                || matches!(&excludes.min_kernel, Some(kernel) if self.is_new_enough(kernel)?)
            {
                return Ok(false);
            }
        }
        let Some(includes) = &rule.includes else {
            return Ok(true);
        };
        let arches = includes.arches.as_deref().unwrap_or_default();
        Ok(includes
            .caps
            .iter()
            .flatten()
            .all(|name| self.capabilities.contains(name))
            && (arches.is_empty() || arches.iter().any(|arch| arch == self.architecture))
            && match &includes.min_kernel {
                Some(kernel) => self.is_new_enough(kernel)?,
                None => true,
            })
    }
}

fn bad(why: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!("the seccomp profile cannot be used: {why}"),
    )
}

impl Rule {
    fn names(&self) -> Result<Vec<String>> {
        match (&self.name, &self.names) {
            (Some(name), None) if !name.is_empty() => Ok(vec![name.clone()]),
            (None, Some(names)) if !names.is_empty() => Ok(names.clone()),
            _ => Err(bad("each rule has `names`, or a `name`")),
        }
    }

    fn resolved(&self) -> Result<LinuxSyscall> {
        let mut syscall = LinuxSyscallBuilder::default()
            .names(self.names()?)
            .action(self.action);
        if let Some(errno) = self.errno_ret {
            syscall = syscall.errno_ret(errno);
        }
        if let Some(args) = self.args.as_ref().filter(|args| !args.is_empty()) {
            syscall = syscall.args(args.clone());
        }
        syscall.build().map_err(bad)
    }
}

impl Profile {
    fn parse(value: Value) -> Result<Profile> {
        let profile: Profile = serde_json::from_value(value).map_err(bad)?;
        let given = |list: bool| if list { 1 } else { 0 };
        if given(
            profile
                .architectures
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
        ) + given(
            profile
                .arch_map
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
        ) > 1
        {
            return Err(bad("it has both `architectures` and `archMap`"));
        }
        if profile.listener_path.is_some() {
            return Err(bad("`listenerPath` is not supported"));
        }
        Ok(profile)
    }

    /// Names of this host's architecture and those that come with it; none where the profile has
    /// none of them, which is the host's alone.
    fn architectures(&self) -> Result<Vec<Arch>> {
        let mut names: Vec<&String> = self.architectures.iter().flatten().collect();
        let host = architecture().1;
        let of_host = self
            .arch_map
            .iter()
            .flatten()
            .find(|entry| entry.architecture == host);
        if let Some(entry) = of_host {
            names.push(&entry.architecture);
            names.extend(entry.sub_architectures.iter().flatten());
        }
        let parse =
            |name: &String| serde_json::from_value(Value::String(name.clone())).map_err(bad);
        names.into_iter().map(parse).collect()
    }

    fn resolved(&self, place: &Place) -> Result<LinuxSeccomp> {
        let mut syscalls = Vec::new();
        for rule in self.syscalls.iter().flatten() {
            let resolved = rule.resolved()?;
            if place.has(rule)? {
                syscalls.push(resolved);
            }
        }
        let mut seccomp = LinuxSeccompBuilder::default()
            .default_action(self.default_action)
            .syscalls(syscalls);
        let architectures = self.architectures()?;
        if !architectures.is_empty() {
            seccomp = seccomp.architectures(architectures);
        }
        if let Some(errno) = self.default_errno_ret {
            seccomp = seccomp.default_errno_ret(errno);
        }
        if let Some(flags) = &self.flags {
            seccomp = seccomp.flags(flags.clone());
        }
        seccomp.build().map_err(bad)
    }
}

/// Reads what `--security-opt seccomp=` names: `unconfined`, or a file with a profile.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a file that is no profile, with the reason.
pub fn parse_seccomp(text: &str) -> Result<Seccomp> {
    match text {
        "unconfined" => return Ok(Seccomp::Unconfined),
        // As docker has it: its own, whatever the default is.
        "builtin" => return Ok(Seccomp::Default),
        _ => {}
    }
    let path = Path::new(text);
    let doing = || format!("cannot read the seccomp profile {}", path.display());
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_PROFILE + 1).read_to_end(&mut bytes))
        .context(doing)?;
    let reject = |error: Error| error.context(path.display().to_string());
    if bytes.len() as u64 > MAX_PROFILE {
        return Err(reject(bad(format!(
            "it is larger than {MAX_PROFILE} bytes"
        ))));
    }
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(bad)
        .map_err(reject)?;
    // So that a mistake shows before anything is made.
    let place = Place::here(&Capabilities::new())?;
    Profile::parse(value.clone())
        .and_then(|profile| profile.resolved(&place))
        .map_err(reject)?;
    Ok(Seccomp::Profile(value))
}

/// What the runtime is told, for a container with these capabilities; `None` for no filter.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a profile in a record that does not make sense.
pub(super) fn of(seccomp: &Seccomp, capabilities: &Capabilities) -> Result<Option<LinuxSeccomp>> {
    let profile = match seccomp {
        Seccomp::Unconfined => return Ok(None),
        Seccomp::Default => serde_json::from_str(DEFAULT).map_err(bad)?,
        Seccomp::Profile(value) => value.clone(),
    };
    let place = Place::here(capabilities)?;
    Profile::parse(profile)?.resolved(&place).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Capability;
    use serde_json::json;

    fn place(capabilities: &[&str], architecture: &'static str) -> Place {
        Place {
            capabilities: capabilities.iter().map(|name| (*name).to_owned()).collect(),
            kernel: (6, 1),
            architecture,
        }
    }

    /// What a profile makes of a call without looking at its arguments: `None` where that depends.
    fn action(seccomp: &LinuxSeccomp, call: &str) -> Option<LinuxSeccompAction> {
        let rules = seccomp.syscalls().as_ref().unwrap();
        let mut of_call = rules
            .iter()
            .filter(|rule| rule.names().iter().any(|name| name == call));
        match of_call.next() {
            Some(rule) if rule.args().is_some() => None,
            Some(rule) => Some(rule.action()),
            None => Some(seccomp.default_action()),
        }
    }

    fn default(place: &Place) -> LinuxSeccomp {
        let profile = Profile::parse(serde_json::from_str(DEFAULT).unwrap()).unwrap();
        profile.resolved(place).unwrap()
    }

    #[test]
    fn the_default_profile_depends_on_capabilities_and_architecture() {
        let allow = Some(LinuxSeccompAction::ScmpActAllow);
        let deny = Some(LinuxSeccompAction::ScmpActErrno);
        let plain = default(&place(&["CAP_CHOWN", "CAP_SYS_CHROOT"], "amd64"));
        for call in ["openat", "chroot", "arch_prctl", "ptrace", "futex_waitv"] {
            assert_eq!(action(&plain, call), allow, "{call}");
        }
        for call in [
            "keyctl",
            "unshare",
            "mount",
            "bpf",
            "io_uring_setup",
            "reboot",
            "settimeofday",
            "open_by_handle_at",
            "kexec_load",
            "userfaultfd",
            "perf_event_open",
            "setns",
            "iopl",
            "clone3",
            "no_such_call",
            "s390_runtime_instr",
        ] {
            assert_eq!(action(&plain, call), deny, "{call}");
        }
        assert_eq!(action(&plain, "clone"), None);
        let admin = default(&place(&["CAP_SYS_ADMIN"], "s390x"));
        for call in [
            "clone",
            "clone3",
            "mount",
            "unshare",
            "bpf",
            "s390_runtime_instr",
        ] {
            assert_eq!(action(&admin, call), allow, "{call}");
        }
        for call in ["keyctl", "chroot", "arch_prctl", "io_uring_setup"] {
            assert_eq!(action(&admin, call), deny, "{call}");
        }
        // Each of several capabilities is enough, and none of them is needed for another's call.
        let one = default(&place(&["CAP_BPF"], "arm64"));
        assert_eq!(action(&one, "bpf"), allow);
        assert_eq!(action(&one, "perf_event_open"), deny);
        assert_eq!(action(&one, "cacheflush"), allow);
    }

    #[test]
    fn no_rule_of_the_default_profile_contradicts_another() {
        for capabilities in [
            &[][..],
            &["CAP_SYS_ADMIN", "CAP_BPF"],
            &["CAP_SYSLOG", "CAP_BPF"],
        ] {
            let seccomp = default(&place(capabilities, "amd64"));
            let mut seen = std::collections::HashMap::new();
            for rule in seccomp.syscalls().iter().flatten() {
                for name in rule.names().iter().filter(|_| rule.args().is_none()) {
                    let before = seen.insert(name.clone(), rule.action());
                    assert!(
                        before.is_none_or(|before| before == rule.action()),
                        "{name}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_container_gets_the_hosts_architectures() {
        let capabilities = [Capability::Chown].into();
        let seccomp = of(&Seccomp::Default, &capabilities).unwrap().unwrap();
        let architectures = seccomp.architectures().as_ref().unwrap();
        if cfg!(target_arch = "x86_64") {
            let all = [Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];
            assert_eq!(architectures[..], all);
        }
        assert!(!architectures.is_empty());
        assert!(of(&Seccomp::Unconfined, &capabilities).unwrap().is_none());
    }

    #[test]
    fn profiles_of_dockers_and_of_the_oci_form_are_read() {
        let docker = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "archMap": null,
            "syscalls": [
                { "name": "getpid", "action": "SCMP_ACT_ALLOW", "args": [], "comment": "", "includes": {}, "excludes": {} },
                { "names": ["getuid"], "action": "SCMP_ACT_ALLOW", "args": null, "includes": { "minKernel": "4.8", "caps": ["CAP_KILL"] } },
                { "names": ["getgid"], "action": "SCMP_ACT_ALLOW", "excludes": { "minKernel": "5.10" } },
            ],
        });
        let resolved = Profile::parse(docker)
            .unwrap()
            .resolved(&place(&["CAP_KILL"], "amd64"))
            .unwrap();
        let names: Vec<_> = resolved
            .syscalls()
            .iter()
            .flatten()
            .flat_map(|rule| rule.names())
            .collect();
        assert_eq!(names, ["getpid", "getuid"]);
        assert!(resolved.architectures().is_none());
        let oci = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 2 }],
        });
        let resolved = Profile::parse(oci)
            .unwrap()
            .resolved(&place(&[], "amd64"))
            .unwrap();
        let value = serde_json::to_value(&resolved).unwrap();
        assert_eq!(value["syscalls"][0]["errnoRet"], 2);
        assert_eq!(value["architectures"], json!(["SCMP_ARCH_X86_64"]));
        assert_eq!(value["flags"], json!(["SECCOMP_FILTER_FLAG_LOG"]));
    }

    #[test]
    fn what_is_no_profile_is_refused_with_the_reason() {
        let both = json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"], "archMap": [{ "architecture": "SCMP_ARCH_X86" }] });
        for (profile, why) in [
            (json!({}), "defaultAction"),
            (json!([]), "invalid length"),
            (json!({ "defaultAction": "ALLOW" }), "ALLOW"),
            (
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{ "action": "SCMP_ACT_KILL" }] }),
                "names",
            ),
            (
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{ "names": ["a"], "action": "SCMP_ACT_KILL", "includes": { "minKernel": "new" } }] }),
                "minKernel",
            ),
            (both, "archMap"),
        ] {
            let parsed =
                Profile::parse(profile).and_then(|profile| profile.resolved(&place(&[], "amd64")));
            let error = parsed.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(why), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("profile.json");
        std::fs::write(&file, "{ broken").unwrap();
        let error = parse_seccomp(file.to_str().unwrap()).unwrap_err();
        assert!(error.to_string().contains("profile.json"), "{error}");
        let error = parse_seccomp("/no/such/file").unwrap_err();
        assert!(error.to_string().contains("/no/such/file"), "{error}");
    }
}
