//! Which containers `ps` lists, and how, with docker's `--filter` and `--format`.

use std::fmt::Write;
use std::str::FromStr;

use super::output::{human_size, table};
use vellum_engine::status::ContainerStatus;

/// One `KEY=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    key: Key,
    value: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Status,
    Exited,
    Name,
    Ancestor,
    Volume,
}

const STATES: [&str; 5] = ["created", "running", "exited", "mounted", "served"];

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        let key = match key {
            "status" => Key::Status,
            "exited" => Key::Exited,
            "name" => Key::Name,
            "ancestor" => Key::Ancestor,
            "volume" => Key::Volume,
            _ => return Err("there are status=, exited=, name=, ancestor= and volume=".into()),
        };
        if key == Key::Status && !STATES.contains(&value) {
            return Err(format!("a status is one of {}", STATES.join(", ")));
        }
        if key == Key::Exited && value.parse::<u8>().is_err() {
            return Err("an exit status is a number from 0 to 255".into());
        }
        Ok(Filter {
            key,
            value: value.to_owned(),
        })
    }
}

impl Filter {
    /// Of several with one key one has to hold, and so of each key.
    pub(super) fn all_hold(filters: &[Filter], row: &ContainerStatus) -> bool {
        filters.iter().all(|filter| {
            let mut same = filters.iter().filter(|other| other.key == filter.key);
            same.any(|filter| filter.holds(row))
        })
    }

    fn holds(&self, row: &ContainerStatus) -> bool {
        let value = self.value.as_str();
        let ended = row
            .record
            .last_run
            .as_ref()
            .and_then(|run| run.ended.as_ref());
        match self.key {
            Key::Status => state(row) == value,
            Key::Exited => {
                state(row) == "exited" && ended.is_some_and(|end| end.status.to_string() == value)
            }
            Key::Name => row.record.name.contains(value),
            Key::Ancestor => row.record.image == value,
            Key::Volume => row
                .record
                .volumes
                .iter()
                .any(|volume| volume.source == value || volume.destination.as_os_str() == value),
        }
    }
}

/// One word for how a container is.
fn state(row: &ContainerStatus) -> &'static str {
    if row.pid.is_some() {
        "running"
    } else if row.serving.is_some() {
        "served"
    } else if row.mounted.is_some() || row.device.is_some() {
        "mounted"
    } else if row.record.last_run.is_some() {
        "exited"
    } else {
        "created"
    }
}

/// What each container is printed as: the part of Go's templates that people use with docker, text and
/// fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Template {
    /// As `--json`.
    Json,
    Text {
        /// In columns, under a header.
        table: bool,
        parts: Vec<Part>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Text(String),
    Field(&'static str),
}

const FIELDS: [&str; 10] = [
    "Names",
    "ID",
    "Image",
    "Command",
    "CreatedAt",
    "Status",
    "State",
    "Size",
    "Mounts",
    "Ports",
];

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "json" || text == "{{json .}}" {
            return Ok(Template::Json);
        }
        let (table, text) = match text.strip_prefix("table ") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        let mut parts = Vec::new();
        let mut left = text.as_str();
        while let Some((before, rest)) = left.split_once("{{") {
            let (name, rest) = rest.split_once("}}").ok_or("{{ without }}")?;
            let name = name.trim();
            let field = FIELDS
                .iter()
                .find(|field| name.strip_prefix('.') == Some(field));
            let field = field.ok_or_else(|| {
                format!(
                    "there is no {{{{{name}}}}}: fields are .{}",
                    FIELDS.join(", .")
                )
            })?;
            parts.extend([Part::Text(before.to_owned()), Part::Field(field)]);
            left = rest;
        }
        parts.push(Part::Text(left.to_owned()));
        Ok(Template::Text { table, parts })
    }
}

impl Template {
    /// Whether JSON is wanted.
    pub(super) fn is_json(&self) -> bool {
        *self == Template::Json
    }

    /// Whether blocks have to be counted for it.
    pub(super) fn wants_size(&self) -> bool {
        match self {
            Template::Json => false,
            Template::Text { parts, .. } => parts.contains(&Part::Field("Size")),
        }
    }

    /// What is printed.
    pub(super) fn fill<'a>(&self, rows: impl Iterator<Item = &'a ContainerStatus>) -> String {
        let Template::Text {
            table: is_table,
            parts,
        } = self
        else {
            return String::new();
        };
        let filled = |field: &dyn Fn(&str) -> String| {
            let parts = parts.iter().map(|part| match part {
                Part::Text(text) => text.clone(),
                Part::Field(name) => field(name),
            });
            parts.collect::<String>()
        };
        let lines = rows.map(|row| filled(&|name| value(row, name)));
        if !is_table {
            return lines.fold(String::new(), |mut all, line| {
                // Writing to a string cannot fail.
                let _ = writeln!(all, "{line}");
                all
            });
        }
        let header = filled(&|name| name.to_uppercase());
        let header: Vec<&str> = header.split('\t').collect();
        let cells = |line: String| line.split('\t').map(str::to_owned).collect();
        table(&header, &lines.map(cells).collect::<Vec<_>>())
    }
}

fn value(row: &ContainerStatus, field: &str) -> String {
    let record = &row.record;
    let text = match field {
        "Names" => record.name.clone(),
        "ID" => record.id.to_string(),
        "Image" => record.image.clone(),
        "Command" => {
            let config = &record.config.config;
            let words = config.entrypoint.iter().chain(&config.cmd);
            words.cloned().collect::<Vec<_>>().join(" ")
        }
        "CreatedAt" => record.created.clone(),
        "Status" => row.status.clone(),
        "State" => state(row).to_owned(),
        "Size" => row.size.map_or("?".to_owned(), human_size),
        "Mounts" => {
            let volumes = record.volumes.iter().map(|volume| volume.source.clone());
            volumes.collect::<Vec<_>>().join(",")
        }
        // No ports are mapped.
        _ => String::new(),
    };
    text.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_and_filters_that_are_none_say_what_there_is() {
        for (text, says) in [
            ("{{.Nam}}", ".Names, .ID"),
            ("{{.Names", "{{ without }}"),
            ("{{range .}}", ".Names"),
        ] {
            let error = text.parse::<Template>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        for (text, says) in [
            ("label=x", "ancestor="),
            ("status=up", "created, running"),
            ("exited=no", "a number"),
        ] {
            let error = text.parse::<Filter>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!("{{json .}}".parse::<Template>().unwrap().is_json());
        assert!(
            "table {{.Names}}\t{{ .Size }}"
                .parse::<Template>()
                .unwrap()
                .wants_size()
        );
    }
}
