//! Capabilities: docker's default set, with what `--cap-add` and `--cap-drop` make of it.

use std::collections::HashSet;

use oci_spec::runtime::{Capabilities, Capability};

use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_store::Confinement;

/// Stands for all of them.
const ALL: &str = "ALL";

/// Docker's default set.
const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// In the order of their numbers.
const EVERY: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// Its name as the kernel has it: `CAP_NET_ADMIN`.
pub(super) fn name(capability: Capability) -> String {
    format!("CAP_{capability}")
}

/// Reads a capability as users name it, with or without `CAP_`, in any case: its name, or `ALL`.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for one that there is not.
pub fn parse_capability(text: &str) -> Result<String> {
    let upper = text.trim().to_ascii_uppercase();
    if upper == ALL {
        return Ok(upper);
    }
    let full = match upper.starts_with("CAP_") {
        true => upper,
        false => format!("CAP_{upper}"),
    };
    match EVERY.into_iter().any(|one| name(one) == full) {
        true => Ok(full),
        false => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{text:?} is no capability: write one like NET_ADMIN (capabilities(7) has them), or ALL"
            ),
        )),
    }
}

/// Those that a container can get here: what this process has itself. Who is not root only notes them
/// for root, who starts the container.
fn available() -> Result<Capabilities> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(EVERY.into_iter().collect());
    }
    let path = "/proc/self/status";
    let text = std::fs::read_to_string(path).context(|| format!("cannot read {path}"))?;
    let permitted = text.lines().find_map(|line| line.strip_prefix("CapPrm:"));
    let bits = permitted.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    let bits = bits
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, format!("{path} has no line CapPrm")))?;
    let numbered = EVERY.into_iter().enumerate();
    Ok(numbered
        .filter(|(number, _)| bits >> number & 1 == 1)
        .map(|(_, one)| one)
        .collect())
}

/// The capabilities of a container's root. As docker has it: `ALL` comes first, so that
/// `--cap-drop ALL --cap-add CHOWN` leaves one, and what is dropped by name is not there. Of `ALL` and
/// of the default ones it gets those that there are here.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a name in the record that this build does not know;
/// [`ErrorKind::Unsupported`] for a capability by name that is not to be had here.
pub(super) fn of(confinement: &Confinement) -> Result<Capabilities> {
    let available = available()?;
    let find = |names: &[String]| -> Result<HashSet<Capability>> {
        let names = names.iter().filter(|wanted| *wanted != ALL);
        let known = |wanted: &String| {
            let wanted = parse_capability(wanted)?;
            let mut every = EVERY.into_iter();
            every.find(|one| name(*one) == wanted).ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, format!("no capability {wanted}"))
            })
        };
        names.map(known).collect()
    };
    let all = |names: &[String]| names.iter().any(|name| name == ALL);
    let added = find(&confinement.cap_add)?;
    if let Some(missing) = added.iter().find(|one| !available.contains(one)) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the capability {} is not to be had here: this process does not have it itself, or the \
                 kernel does not know it",
                name(*missing)
            ),
        ));
    }
    let dropped = find(&confinement.cap_drop)?;
    let mut result: Capabilities = if all(&confinement.cap_add) {
        available.clone()
    } else if all(&confinement.cap_drop) {
        Capabilities::new()
    } else {
        DEFAULT
            .into_iter()
            .filter(|one| available.contains(one))
            .collect()
    };
    result.extend(added);
    result.retain(|one| !dropped.contains(one));
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(add: &[&str], drop: &[&str]) -> Capabilities {
        let names = |texts: &[&str]| {
            let names = texts.iter().map(|text| parse_capability(text).unwrap());
            names.collect()
        };
        of(&Confinement {
            cap_add: names(add),
            cap_drop: names(drop),
            ..Confinement::default()
        })
        .unwrap()
    }

    #[test]
    fn capabilities_are_added_and_dropped_as_docker_does() {
        let default: Capabilities = DEFAULT.into_iter().collect();
        assert_eq!(after(&[], &[]), default);
        assert!(!default.contains(&Capability::SysAdmin));
        let more = after(&["net_admin", "CAP_SYS_ADMIN"], &["cap_chown"]);
        assert!(more.contains(&Capability::NetAdmin) && more.contains(&Capability::SysAdmin));
        assert!(!more.contains(&Capability::Chown));
        assert_eq!(more.len(), default.len() + 1);
        assert_eq!(after(&[], &["ALL"]).len(), 0);
        assert_eq!(after(&["CHOWN"], &["all"]), [Capability::Chown].into());
        let nearly_all = after(&["ALL"], &["SYS_ADMIN"]);
        assert!(nearly_all.len() > default.len() && !nearly_all.contains(&Capability::SysAdmin));
        // One that is added and dropped is not there.
        assert_eq!(after(&["SYS_ADMIN"], &["SYS_ADMIN"]), default);
    }

    #[test]
    fn what_is_no_capability_is_refused() {
        for bad in ["", "CAP_", "ROOT", "CAP_ALL", "NET ADMIN"] {
            let error = parse_capability(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{bad}");
        }
        for one in EVERY {
            assert_eq!(parse_capability(&name(one)).unwrap(), name(one));
        }
    }
}
