//! The commands of a container's life, whose command lines are read without those of all others.
//!
//! To describe all commands to the parser takes it some 700 KB of memory, and so a fifth of the time in which
//! this program starts; a container's life is five starts. What is no such command, and no correct line
//! of one, is left to the whole parser, which also has all help and all complaints.

use clap::{Parser, Subcommand};

use super::{Cli, Command, GlobalArgs, create, device_server, exec, mount, remove, run, start};

/// A [`Cli`] of few commands.
#[derive(Debug, Parser)]
#[command(name = "vellum")]
struct Few {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Often,
}

/// Those of [`Command`], with the same names and arguments.
#[derive(Debug, Subcommand)]
enum Often {
    Create(create::Args),
    Rm(remove::RmArgs),
    Mount(mount::MountArgs),
    Umount(mount::UmountArgs),
    Run(run::Args),
    Start(start::StartArgs),
    Stop(start::StopArgs),
    Exec(exec::Args),
    DeviceServer(device_server::Args),
}

impl From<Few> for Cli {
    fn from(few: Few) -> Cli {
        let command = match few.command {
            Often::Create(args) => Command::Create(args),
            Often::Rm(args) => Command::Rm(args),
            Often::Mount(args) => Command::Mount(args),
            Often::Umount(args) => Command::Umount(args),
            Often::Run(args) => Command::Run(args),
            Often::Start(args) => Command::Start(args),
            Often::Stop(args) => Command::Stop(args),
            Often::Exec(args) => Command::Exec(args),
            Often::DeviceServer(args) => Command::DeviceServer(args),
        };
        Cli {
            global: few.global,
            command,
        }
    }
}

/// The command line of this process; `None` where the whole parser has to look at it.
pub(super) fn try_parse() -> Option<Cli> {
    Few::try_parse().ok().map(Cli::from)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Cli, Few};

    #[test]
    fn a_command_that_is_read_alone_has_the_arguments_that_it_has_among_all() {
        let mut all = Cli::command();
        all.build();
        let mut few = Few::command();
        few.build();
        for command in few.get_subcommands() {
            let name = command.get_name();
            if name == "help" {
                continue;
            }
            let same = all.find_subcommand(name).unwrap();
            let aliases = |command: &clap::Command| -> Vec<String> {
                command.get_all_aliases().map(str::to_owned).collect()
            };
            assert_eq!(aliases(command), aliases(same), "{name}");
            let arguments = |command: &clap::Command| -> Vec<String> {
                let arguments = command.get_arguments();
                arguments.map(|argument| format!("{argument:?}")).collect()
            };
            let version = |argument: &String| argument.contains("\"version\"");
            let mut theirs = arguments(same);
            theirs.retain(|argument| !version(argument));
            assert_eq!(arguments(command), theirs, "{name}");
        }
    }

    #[test]
    fn a_command_line_is_read_alone_as_among_all_and_what_is_none_is_left_to_all() {
        let read = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            let few = Few::try_parse_from(&words).map(Cli::from);
            let all = Cli::try_parse_from(&words);
            (
                few.ok().map(|cli| format!("{cli:?}")),
                all.ok().map(|cli| format!("{cli:?}")),
            )
        };
        for line in [
            "vellum --root /r create debian --name c",
            "vellum mount c /mnt --suid --json",
            "vellum -q umount -f --all",
            "vellum rm -f a b --root /r",
            "vellum run -d debian sh -c --help",
            "vellum exec c mount --version",
            "vellum --root /r device-server --container c --id 686eae6d-1843-44e2-960f-dede394645bf --run-dir /d",
        ] {
            let (few, all) = read(line);
            assert!(few.is_some(), "{line}");
            assert_eq!(few, all, "{line}");
        }
        for line in [
            "vellum",
            "vellum --version",
            "vellum help mount",
            "vellum mount --help",
            "vellum mount",
            "vellum umount --all c",
            "vellum images",
            "vellum ps create",
        ] {
            assert_eq!(read(line).0, None, "{line}");
        }
    }
}
