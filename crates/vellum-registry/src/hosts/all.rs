//! What all files of this host say, for who asks whether they are right.

use std::path::{Path, PathBuf};

use vellum_base::error::Result;

use super::super::tls;
use super::file::{File, Top};
use super::{DEFAULT, FILE, places, read};

/// What a `hosts.toml` says.
#[derive(Debug)]
pub struct HostsFile {
    /// Where it is.
    pub path: PathBuf,
    /// The registry, or `_default` for all others.
    pub registry: String,
    /// The addresses that are asked, in order; or what is wrong with the file, or with one that it names.
    pub hosts: Result<Vec<String>>,
    /// Keys that nobody knows.
    pub unknown: Vec<String>,
}

/// All files of this host that say which hosts are asked, sorted by their paths.
pub fn all_hosts_files() -> Vec<HostsFile> {
    let dirs = places()
        .into_iter()
        .filter_map(|place| std::fs::read_dir(place).ok());
    let mut dirs: Vec<PathBuf> = dirs.flatten().flatten().map(|entry| entry.path()).collect();
    dirs.sort();
    let there = dirs.into_iter().filter(|dir| dir.join(FILE).exists());
    there
        .filter_map(|dir| {
            let registry = registry_of(&dir.file_name()?.to_string_lossy());
            let path = dir.join(FILE);
            let looked = look(&path, &registry);
            let (hosts, unknown) = match looked {
                Ok((hosts, unknown)) => (Ok(hosts), unknown),
                Err(error) => (Err(error), Vec::new()),
            };
            Some(HostsFile {
                path,
                registry,
                hosts,
                unknown,
            })
        })
        .collect()
}

/// The registry that a directory is for: `HOST_PORT_` is `HOST:PORT`.
pub(super) fn registry_of(directory: &str) -> String {
    let port = directory
        .strip_suffix('_')
        .and_then(|rest| rest.rsplit_once('_'));
    match port {
        Some((host, port)) if port.parse::<u16>().is_ok() => format!("{host}:{port}"),
        _ => directory.to_owned(),
    }
}

fn look(path: &Path, registry: &str) -> Result<(Vec<String>, Vec<String>)> {
    let text = read(path)?;
    // What stands in no file has no address: any will do.
    let registry = if registry == DEFAULT {
        "localhost"
    } else {
        registry
    };
    let file = File { path, registry };
    let unknown = file.unknown(&text)?;
    let places = file.places(&text, false)?;
    for place in &places {
        tls::configs(&place.trust)?;
    }
    let mut hosts: Vec<String> = places.iter().map(|place| place.base.to_string()).collect();
    if registry == "localhost" && file.parse::<Top>(&text)?.server.is_none() {
        hosts.pop();
        hosts.push("the registry itself".into());
    }
    Ok((hosts, unknown))
}
