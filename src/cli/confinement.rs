//! What `run` and `create` share: the rights and limits of a container, with docker's options.

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::size::parse_size;
use vellum_engine::run::{check_confinement, parse_capability, parse_seccomp};
use vellum_store::{Confinement, Network, PidsLimit, Seccomp};

/// Each later start of the container has the same.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Rights and limits, which the container keeps")]
pub(super) struct ConfinementArgs {
    /// The network it sees: none, a loopback interface of its own alone, or host, the host's with all that
    /// listens there
    #[arg(
        long,
        visible_alias = "net",
        value_name = "NETWORK",
        default_value = "none"
    )]
    #[arg(value_parser = parse_network)]
    network: Network,
    /// The host name in the container [default: the container's name]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Add a capability, like NET_ADMIN, or ALL
    #[arg(long, value_name = "CAP", value_delimiter = ',', value_parser = capability)]
    cap_add: Vec<String>,
    /// Take a capability away, or ALL
    #[arg(long, value_name = "CAP", value_delimiter = ',', value_parser = capability)]
    cap_drop: Vec<String>,
    /// seccomp=FILE: a profile of system calls in docker's form; seccomp=unconfined: all of them;
    /// no-new-privileges: no program gains rights
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Let nothing write the root file system; volumes stay as they are
    #[arg(long)]
    read_only: bool,
    /// Memory, at least 6M [default: the host's]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Processes and threads; -1 for no limit [default: 2048]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Processors, like 1.5 [default: the host's]
    #[arg(long, value_name = "NUMBER", value_parser = parse_cpus)]
    cpus: Option<u64>,
}

fn parse_network(text: &str) -> Result<Network, String> {
    match text {
        "none" => Ok(Network::None),
        "host" => Ok(Network::Host),
        _ => Err(
            "Vellum makes no networks: there are none, a loopback alone, and host, the host's network with its ports"
                .into(),
        ),
    }
}

fn capability(text: &str) -> Result<String, String> {
    parse_capability(text).map_err(|error| error.to_string())
}

/// Thousandths of a processor.
fn parse_cpus(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(cpus) if (0.001..1e6).contains(&cpus) => Ok((cpus * 1000.0).round() as u64),
        _ => Err(format!("{text:?} is no number of processors, like 1.5")),
    }
}

fn invalid(text: String) -> Error {
    Error::new(ErrorKind::InvalidInput, text)
}

/// As the kernel and DNS have it.
fn check_hostname(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if !name.is_empty() && name.len() <= 63 && name.chars().all(allowed) {
        return Ok(());
    }
    Err(invalid(format!(
        "{name:?} is no host name: at most 63 letters, digits, '-', '.' and '_'"
    )))
}

impl ConfinementArgs {
    /// What the container's record gets.
    pub(super) fn confinement(&self) -> Result<Confinement> {
        let mut confinement = Confinement {
            network: self.network,
            hostname: self.hostname.clone(),
            cap_add: self.cap_add.clone(),
            cap_drop: self.cap_drop.clone(),
            read_only: self.read_only,
            memory: self.memory,
            pids: match self.pids_limit {
                None => PidsLimit::Default,
                // Docker has both.
                Some(-1 | 0) => PidsLimit::Unlimited,
                Some(limit) => PidsLimit::Limit(u32::try_from(limit).map_err(|_| {
                    invalid(format!(
                        "--pids-limit {limit}: a number, or -1 for no limit"
                    ))
                })?),
            },
            millicpus: self.cpus,
            ..Confinement::default()
        };
        if let Some(hostname) = &self.hostname {
            check_hostname(hostname)?;
        }
        for option in &self.security_opt {
            security_option(option, &mut confinement)?;
        }
        check_confinement(&confinement)?;
        Ok(confinement)
    }
}

fn security_option(option: &str, confinement: &mut Confinement) -> Result<()> {
    // Docker took a colon once.
    let (name, value) = match option.split_once(['=', ':']) {
        Some((name, value)) => (name, Some(value)),
        None => (option, None),
    };
    match (name, value) {
        ("seccomp", Some(value)) if confinement.seccomp == Seccomp::Default => {
            confinement.seccomp = parse_seccomp(value)?;
        }
        ("seccomp", Some(_)) => {
            return Err(invalid("--security-opt seccomp= is given twice".into()));
        }
        ("no-new-privileges", None | Some("true")) => confinement.no_new_privileges = true,
        ("no-new-privileges", Some("false")) => confinement.no_new_privileges = false,
        _ => {
            return Err(invalid(format!(
                "--security-opt {option} is not known: there are seccomp=FILE, seccomp=unconfined and no-new-privileges[=true|false]"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_options_are_read_as_docker_writes_them() {
        let after = |options: &[&str]| -> Result<Confinement> {
            let mut confinement = Confinement::default();
            for option in options {
                security_option(option, &mut confinement)?;
            }
            Ok(confinement)
        };
        assert!(after(&["no-new-privileges"]).unwrap().no_new_privileges);
        assert!(
            after(&["no-new-privileges:true"])
                .unwrap()
                .no_new_privileges
        );
        assert!(
            !after(&["no-new-privileges=false"])
                .unwrap()
                .no_new_privileges
        );
        let open = after(&["seccomp=unconfined"]).unwrap();
        assert_eq!(open.seccomp, Seccomp::Unconfined);
        for bad in [
            "seccomp",
            "apparmor=unconfined",
            "no-new-privileges=maybe",
            "",
        ] {
            assert!(after(&[bad]).is_err(), "{bad}");
        }
        assert!(after(&["seccomp=unconfined", "seccomp=unconfined"]).is_err());
    }

    #[test]
    fn processors_and_host_names_out_of_range_are_refused() {
        assert_eq!(parse_cpus("1.5"), Ok(1500));
        for bad in ["", "0", "-1", "nan", "inf", "many"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
        assert!(check_hostname("db-1.example").is_ok());
        for bad in ["", "a b", "a\nb", &"x".repeat(64)] {
            assert!(check_hostname(bad).is_err(), "{bad:?}");
        }
    }
}
