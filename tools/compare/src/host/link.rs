//! A network of its own: a registry's namespace and its client's, with one link between them that can
//! be as slow as a real one.

use std::ffi::OsStr;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::{Server, run};

/// The registry's address on the link.
pub const SERVER: &str = "10.231.0.1";
const CLIENT: &str = "10.231.0.2";
/// The names of the link's two ends.
const AT_CLIENT: &str = "client0";
const AT_SERVER: &str = "server0";

/// Which end of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where the registry is.
    Server,
    /// Where images are pulled.
    Client,
}

/// Two network namespaces and a pair of virtual Ethernet devices. They live in two processes of ours that
/// do nothing else, and go with them.
#[derive(Debug)]
pub struct Link {
    server: Server,
    client: Server,
    /// As tc(8) has it, like `100mbit`.
    rate: String,
}

impl Link {
    /// A link without a limit; `rate` is what [`Link::limit`] sets.
    ///
    /// # Errors
    /// Without root, ip(8), or network namespaces and veth in the kernel.
    pub fn new(rate: &str) -> Result<Self> {
        let link = Link {
            server: namespace()?,
            client: namespace()?,
            rate: rate.to_owned(),
        };
        let other = link.server.pid().context("a namespace has ended")?;
        let ip = |end, line: &str| {
            let mut command = link.command(end, "ip");
            run(command.args(line.split(' '))).map(drop)
        };
        ip(
            End::Client,
            &format!("link add {AT_CLIENT} type veth peer name {AT_SERVER} netns {other}"),
        )?;
        for (end, device, address) in [
            (End::Client, AT_CLIENT, CLIENT),
            (End::Server, AT_SERVER, SERVER),
        ] {
            ip(end, "link set lo up")?;
            ip(end, &format!("addr add {address}/24 dev {device}"))?;
            ip(end, &format!("link set {device} up"))?;
        }
        Ok(link)
    }

    /// A command that runs at one end. What it starts is there, too.
    pub fn command(&self, end: End, program: impl AsRef<OsStr>) -> Command {
        let of = match end {
            End::Server => &self.server,
            End::Client => &self.client,
        };
        // Process 0 is nobody's: nsenter says what is wrong where the namespace has gone.
        let pid = of.pid().unwrap_or(0);
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/proc/{pid}/ns/net"))
            .arg("--")
            .arg(program);
        command
    }

    /// Sets or lifts the limit, in both directions.
    pub fn limit(&self, limited: bool) -> Result<()> {
        for (end, device) in [(End::Client, AT_CLIENT), (End::Server, AT_SERVER)] {
            let mut command = self.command(end, "tc");
            command.args(["qdisc", "replace", "dev", device, "root"]);
            if limited {
                // As much at once as a line card's buffer holds, and as long a queue as a home router has.
                let filter = ["tbf", "rate", &self.rate, "burst", "256kb"];
                command.args(filter).args(["latency", "100ms"]);
            } else {
                command.arg("pfifo_fast");
            }
            run(&mut command)?;
        }
        Ok(())
    }

    /// Bytes that have come to the client so far, with all headers.
    pub fn received(&self) -> Result<u64> {
        let pid = self
            .client
            .pid()
            .context("the client's network has ended")?;
        let table = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
        received(&table, AT_CLIENT).context("the link counts no bytes")
    }

    /// Whether somebody listens on a port at the registry's end.
    pub fn listens(&self, port: u16) -> bool {
        let Some(pid) = self.server.pid() else {
            return false;
        };
        // Addresses are hexadecimal, 0A is LISTEN (Documentation/networking/proc_net_tcp.rst of Linux).
        let port = format!(":{port:04X}");
        ["tcp", "tcp6"].iter().any(|kind| {
            let table = fs::read_to_string(format!("/proc/{pid}/net/{kind}")).unwrap_or_default();
            table.lines().any(|line| {
                let mut fields = line.split_whitespace().skip(1);
                let local = fields.next().is_some_and(|local| local.ends_with(&port));
                local && fields.nth(1) == Some("0A")
            })
        })
    }
}

/// What an interface has received, of the table of /proc/net/dev (proc_pid_net(5)).
fn received(table: &str, device: &str) -> Option<u64> {
    let mut lines = table.lines().filter_map(|line| line.split_once(':'));
    let (_, figures) = lines.find(|(name, _)| name.trim() == device)?;
    figures.split_whitespace().next()?.parse().ok()
}

/// A process in a network namespace of its own.
fn namespace() -> Result<Server> {
    let own = fs::read_link("/proc/self/ns/net")?;
    let mut command = Command::new("unshare");
    command.args(["--net", "--", "sleep", "infinity"]);
    Server::start_knowing(&mut command, Signal::SIGKILL, |started| {
        fs::read_link(format!("/proc/{started}/ns/net")).is_ok_and(|namespace| namespace != own)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_interface_and_received() {
        let table = "Inter-|   Receive | Transmit\n face |bytes packets |bytes packets\n    \
                     lo:       5       0    0\nclient0:   34239     387    0    0 40779375\n";
        assert_eq!(received(table, "client0"), Some(34_239));
        assert_eq!(received(table, "client"), None);
    }
}
