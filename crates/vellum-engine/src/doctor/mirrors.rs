//! Which hosts are asked for what is in registries, and which files that say so are wrong.

use vellum_registry::all_hosts_files;

use super::{Look, State};

const CHECK: &str = "mirrors";

impl Look {
    /// Says nothing where there is no such file.
    pub(super) fn mirrors(&mut self) {
        for file in all_hosts_files() {
            let path = file.path.display();
            match file.hosts {
                Ok(hosts) => {
                    let registry = match &*file.registry {
                        "_default" => "every other registry",
                        registry => registry,
                    };
                    let found = format!("{registry}: {} ({path})", hosts.join(", then "));
                    self.ok(CHECK, found);
                }
                Err(error) => self.add(
                    CHECK,
                    State::Warning,
                    error.to_string(),
                    Some("nothing is pulled from the registries that it is for until it is mended or moved away"),
                ),
            }
            if !file.unknown.is_empty() {
                let keys = file.unknown.join(", ");
                self.add(
                    CHECK,
                    State::Warning,
                    format!("{path}: not known here, and ignored: {keys}"),
                    Some("docs/registry.md, \"Mirrors: hosts.toml\", has the keys that are known"),
                );
            }
        }
    }
}
