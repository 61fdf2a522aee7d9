//! Docker's habits that Vellum does not have: each gets one sentence that says what to do instead.

use vellum_base::error::{Error, ErrorKind, Result};

/// Options of docker's `run` and `create`.
#[derive(Debug, clap::Args)]
pub(super) struct DockerArgs {
    #[arg(short, long, hide = true)]
    publish: Vec<String>,
    #[arg(short = 'P', long, hide = true)]
    publish_all: bool,
    #[arg(long, hide = true, value_name = "POLICY")]
    restart: Option<String>,
    #[arg(long, hide = true)]
    privileged: bool,
    #[arg(short, long, hide = true)]
    label: Vec<String>,
    #[arg(long, hide = true)]
    tmpfs: Vec<String>,
}

impl DockerArgs {
    /// Refuses what was given of them.
    pub(super) fn check(&self) -> Result<()> {
        let restart = self.restart.as_deref().is_some_and(|policy| policy != "no");
        let refused = [
            (
                !self.publish.is_empty() || self.publish_all,
                "-p: Vellum maps no ports, since it makes no networks: --network host gives the container the \
                 host's network, where its ports are",
            ),
            (
                restart,
                "--restart: Vellum has no daemon that could start it again: have systemd do it, with \
                 `ExecStart=vellum start -a C` and Restart= (docs/operations.md)",
            ),
            (
                self.privileged,
                "--privileged: say what it needs: --cap-add ALL --security-opt seccomp=unconfined gives all \
                 capabilities and system calls, and host devices stay out",
            ),
            (
                !self.label.is_empty(),
                "-l: containers have no labels: tell them apart by their names (--name)",
            ),
            (
                !self.tmpfs.is_empty(),
                "--tmpfs: Vellum mounts none: mount one on the host, and give it with -v",
            ),
        ];
        match refused.into_iter().find(|(given, _)| *given) {
            Some((_, sentence)) => Err(Error::new(ErrorKind::InvalidInput, sentence)),
            None => Ok(()),
        }
    }
}

/// What to do instead of a command of docker's, or of another program's, that is none here.
pub(super) fn instead_of(command: &str) -> Option<&'static str> {
    instead_of_dockers(command).or_else(|| called_otherwise(command))
}

fn instead_of_dockers(command: &str) -> Option<&'static str> {
    Some(match command {
        "build" | "buildx" | "bake" => {
            "Vellum builds no images: build with docker or buildah and take the result with `vellum import` or \
             `vellum pull`, or run the steps in a container and `vellum commit` it"
        }
        "network" | "port" => {
            "Vellum makes no networks and maps no ports: `vellum run --network host` gives a container the host's \
             network"
        }
        "compose" | "stack" | "swarm" | "service" => {
            "Vellum runs one container at a time: `vellum run -d` each, or use it under containerd \
             (docs/containerd.md)"
        }
        "attach" => {
            "there is no attach: `vellum logs -f C` shows what it writes, `vellum exec -it C sh` goes in"
        }
        "restart" => "there is no restart: `vellum stop C && vellum start C`",
        "pause" | "unpause" | "freeze" => {
            "there is no pause: `vellum kill -s STOP C` and `vellum kill -s CONT C` stop its first process and let it \
             go on"
        }
        "top" => "there is no top: `vellum exec C ps` lists its processes",
        "dump" => {
            "images are written by `vellum export IMAGE FILE --format docker` (or oci, layer)"
        }
        "search" => "Vellum does not search registries: look there, then `vellum pull REF`",
        "info" | "system" | "status" => {
            "there are `vellum doctor` (the host), `vellum df` (what takes the space), `vellum ps` and `vellum check`"
        }
        "version" => "that is `vellum --version`",
        "update" => {
            "limits are given by `run` and `create`; `vellum resize` makes a container larger"
        }
        "container" => {
            "containers are what commands are about: `vellum ps`, `start`, `stop`, `rm`, `inspect`, without `container`"
        }
        "image" => {
            "for images there are `vellum images`, `pull`, `push`, `rmi`, `tag`, `history`, `inspect`, without `image`"
        }
        _ => return None,
    })
}

/// Of what is there under another name.
fn called_otherwise(command: &str) -> Option<&'static str> {
    Some(match command {
        "list" | "ls" => {
            "`vellum ps` lists containers, `vellum images` images, `vellum volume ls` volumes"
        }
        "delete" | "remove" | "del" => {
            "`vellum rm` removes containers and snapshots, `vellum rmi` images"
        }
        "du" | "usage" => "that is `vellum df`: what images and containers take, and share",
        "unmount" => "that is `vellum umount`",
        "log" => "that is `vellum logs`",
        "snap" | "checkpoint" => {
            "that is `vellum snapshot C [NAME]`; `vellum snapshots C` lists them"
        }
        "clone" | "branch" => "that is `vellum fork C NEW`",
        "revert" | "undo" | "reset" => "that is `vellum rollback C SNAPSHOT`",
        "copy" => "that is `vellum cp`",
        "shell" | "enter" | "ssh" | "sh" => "that is `vellum exec -it C sh`",
        "gc" | "clean" | "cleanup" => "that is `vellum prune`",
        "fsck" | "scrub" | "verify" | "repair" => {
            "that is `vellum check`, with --scrub and --repair"
        }
        "squash" => "that is `vellum flatten IMAGE NEW`",
        "grow" | "extend" | "shrink" => "that is `vellum resize C SIZE`",
        "new" | "add" | "make" => {
            "`vellum create IMAGE` makes a container, `vellum import NAME SOURCE` and `vellum commit C NAME` an image"
        }
        "events" | "monitor" => {
            "there are no events: `vellum stats --watch` shows what containers do"
        }
        "serve" | "daemon" => {
            "there is no daemon: `vellum nbd`, `vellum vhost` and `vellum snapshotter` serve containers"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::super::Cli;
    use super::instead_of;

    #[test]
    fn what_is_suggested_is_there_and_what_is_there_gets_no_suggestion() {
        let cli = Cli::command();
        let names: Vec<&str> = cli.get_subcommands().map(clap::Command::get_name).collect();
        for name in &names {
            assert_eq!(instead_of(name), None, "{name}");
        }
        let wrong = [
            "build",
            "restart",
            "du",
            "snap",
            "container",
            "fsck",
            "ls",
            "attach",
        ];
        for sentence in wrong.iter().map(|wrong| instead_of(wrong).unwrap()) {
            for word in sentence.split("vellum ").skip(1) {
                let name: String = word
                    .chars()
                    .take_while(|c| c.is_ascii_lowercase())
                    .collect();
                assert!(names.contains(&&*name) || name.is_empty(), "{sentence}");
            }
        }
    }
}
