//! What containerd's configuration says of us, and whether we answer.

use std::fs;
use std::os::unix::net::UnixStream;

use super::{Look, Options, State};

impl Look {
    pub(super) fn containerd(&mut self, options: &Options) {
        let Some(config) = self.containerd_config(options) else {
            return;
        };
        let address = options.address.display().to_string();
        let Some((name, entry)) = plugin(&config, &address) else {
            self.no_plugin(options, &config, &address);
            return;
        };
        let path = options.containerd_config.display();
        self.ok("containerd", format!("{path} has proxy_plugins.{name}"));
        self.exported_root(options, name, entry);
        if options.remote {
            self.annotations(&config, name, entry);
        }
        match UnixStream::connect(&options.address) {
            Ok(_) => self.ok("snapshotter", format!("answers on {address}")),
            Err(error) => self.add(
                "snapshotter",
                State::Warning,
                format!("{address}: {error}"),
                Some("start it before containerd: systemctl enable --now vellum-snapshotter"),
            ),
        }
    }

    /// containerd's configuration, where it is there and can be read.
    fn containerd_config(&mut self, options: &Options) -> Option<toml::Table> {
        let path = options.containerd_config.display();
        let text = match fs::read_to_string(&options.containerd_config) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.add(
                    "containerd",
                    State::Note,
                    format!("{path} is not there: it is needed under containerd alone"),
                    Some("docs/containerd.md says what belongs into it"),
                );
                return None;
            }
            Err(error) => {
                let found = format!("{path}: {error}");
                self.add("containerd", State::Warning, found, None);
                return None;
            }
        };
        match text.parse() {
            Ok(config) => Some(config),
            Err(error) => {
                let found = format!("{path}: {}", error.to_string().replace('\n', " "));
                let advice = Some("containerd would not start: correct it");
                self.add("containerd", State::Warning, found, advice);
                None
            }
        }
    }

    /// Says what containerd's configuration lacks.
    fn no_plugin(&mut self, options: &Options, config: &toml::Table, address: &str) {
        let path = options.containerd_config.display();
        let wanted = format!(
            "add to {path} and restart containerd:\n\
             [proxy_plugins.vellum]\n  type = \"snapshot\"\n  address = \"{address}\"\n\
             [proxy_plugins.vellum.exports]\n  root = \"{}\"",
            options.root.display()
        );
        let more = if config.contains_key("imports") {
            "; its imports were not looked at"
        } else {
            ""
        };
        self.add(
            "containerd",
            State::Warning,
            format!("{path} has no snapshot plugin with the address {address}{more}"),
            Some(&wanted),
        );
    }

    /// Looks whether the kubelet is told where to count free space.
    fn exported_root(&mut self, options: &Options, name: &str, entry: &toml::Table) {
        let exported = entry
            .get("exports")
            .and_then(|exports| exports.get("root"))
            .and_then(toml::Value::as_str);
        if exported != options.root.to_str() {
            let found = match exported {
                None => format!("proxy_plugins.{name}.exports has no root"),
                Some(other) => format!("proxy_plugins.{name}.exports.root is {other}"),
            };
            let advice = format!(
                "the kubelet counts free space there: [proxy_plugins.{name}.exports] root = \"{}\"",
                options.root.display()
            );
            self.add("exports.root", State::Warning, found, Some(&advice));
        } else {
            self.ok("exports.root", options.root.display().to_string());
        }
    }
}

/// The snapshot plugin with this address, and its name.
fn plugin<'a>(config: &'a toml::Table, address: &str) -> Option<(&'a str, &'a toml::Table)> {
    let plugins = config.get("proxy_plugins")?.as_table()?;
    plugins.iter().find_map(|(name, entry)| {
        let entry = entry.as_table()?;
        let is =
            |key: &str, value: &str| entry.get(key).and_then(toml::Value::as_str) == Some(value);
        (is("type", "snapshot") && is("address", address)).then_some((name.as_str(), entry))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_is_found_by_type_and_address_whatever_its_name() {
        let config: toml::Table = "[proxy_plugins.v]\ntype = 'snapshot'\naddress = '/s'\n"
            .parse()
            .unwrap();
        assert_eq!(plugin(&config, "/s").map(|(name, _)| name), Some("v"));
        assert!(plugin(&config, "/t").is_none());
    }
}
