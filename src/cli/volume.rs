//! `vellum volume create NAME`, `ls`, `inspect NAME…` and `rm NAME…`

use std::path::PathBuf;

use serde::Serialize;

use super::output::{Output, first_of};
use super::{Context, shown};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_store::Store;

/// Arguments of `volume`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Make an empty named volume; the first container that has it fills it with what its image has there
    Create {
        /// Its name; a volume that is there already is fine
        name: String,
        /// Where it lies on the host, a directory that is there: it is used as it is, and stays when the volume
        /// is removed [default: in the store]
        #[arg(long, value_name = "DIR")]
        path: Option<PathBuf>,
    },
    /// List named volumes
    Ls,
    /// Show where named volumes lie and which containers have them, as JSON
    Inspect {
        /// The volumes
        #[arg(required = true, add = super::completions::volumes())]
        names: Vec<String>,
    },
    /// Remove named volumes with all that is in them; of those with a path of their own the name alone
    Rm {
        /// The volumes
        #[arg(required = true, add = super::completions::volumes())]
        names: Vec<String>,
    },
}

/// What there is to know of a volume.
#[derive(Serialize)]
struct Volume {
    name: String,
    /// On the host.
    path: String,
    /// A directory that somebody named, which is no part of the store.
    elsewhere: bool,
    /// Where containers have it.
    used_by: Vec<Use>,
}

#[derive(Serialize)]
struct Use {
    container: String,
    destination: PathBuf,
    read_only: bool,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    match &args.action {
        Action::Create { name, path } => {
            let path = path.as_deref().map(|path| {
                let absolute = path.canonicalize();
                absolute.context(|| format!("the volume {name} cannot lie at {}", shown(path)))
            });
            let store = context.store_to_fill()?;
            store.create_volume(name, path.transpose()?.as_deref())?;
            context.out.print(name, |name| format!("{name}\n"))
        }
        Action::Ls => context.out.print(&context.store()?.volumes()?, |volumes| {
            volumes.iter().map(|name| format!("{name}\n")).collect()
        }),
        Action::Inspect { names } => inspect(names, context),
        Action::Rm { names } => {
            let store = context.store_to_change()?;
            super::remove::each(names, context, |name| {
                let users = users(&store, name)?.into_iter();
                let mut users: Vec<String> = users.map(|used| used.container).collect();
                users.dedup();
                store.remove_volume(name, &users)
            })
        }
    }
}

fn inspect(names: &[String], context: &Context) -> Result<()> {
    let store = context.store()?;
    let there = store.volumes()?;
    let (mut found, mut failures) = (Vec::new(), Vec::new());
    for name in names {
        if !there.contains(name) {
            failures.push(Error::new(
                ErrorKind::NotFound,
                format!("there is no volume {name}: `vellum volume ls` lists them"),
            ));
            continue;
        }
        let place = store.volume_place(name)?;
        found.push(Volume {
            name: name.clone(),
            path: place.dir.display().to_string(),
            elsewhere: place.elsewhere,
            used_by: users(&store, name)?,
        });
    }
    // JSON with or without --json, as `vellum inspect`.
    let out = Output {
        json: true,
        ..context.out
    };
    out.print(&found, |_| String::new())?;
    first_of(failures)
}

/// The containers that have a volume.
fn users(store: &Store, volume: &str) -> Result<Vec<Use>> {
    let mut users = Vec::new();
    for container in store.containers()? {
        let mounts = container
            .volumes
            .iter()
            .filter(|mount| mount.source == volume);
        users.extend(mounts.map(|mount| Use {
            container: container.name.clone(),
            destination: mount.destination.clone(),
            read_only: mount.read_only,
        }));
    }
    Ok(users)
}
