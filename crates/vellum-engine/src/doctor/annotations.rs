//! Whether containerd says of which image a layer is that it is about to unpack: without that no layer is taken from a
//! registry's blocks. docs/containerd.md, "Remote snapshots".

use toml::{Table, Value};

use super::{Look, State};

const CHECK: &str = "annotations";
/// Where the CRI plugin has its options: in files of version 2 (containerd 1.5 to 1.7, and newer ones that read such a
/// file), and of version 3.
const CRI_OLD: [&str; 3] = ["plugins", "io.containerd.grpc.v1.cri", "containerd"];
const CRI_NEW: [&str; 2] = ["plugins", "io.containerd.cri.v1.images"];
/// What the transfer service of containerd 2.1 and newer goes by, a text.
const EXPORT: &str = "enable_remote_snapshot_annotations";

impl Look {
    /// Looks whether annotations are handed on to the plugin `name`, whose section is `entry`.
    pub(super) fn annotations(&mut self, config: &Table, name: &str, entry: &Table) {
        let is_new = config.get("version").and_then(Value::as_integer) >= Some(3);
        let path: &[&str] = if is_new { &CRI_NEW } else { &CRI_OLD };
        let cri = section(config, path);
        let of_cri = |key: &str| cri.and_then(|cri| cri.get(key));
        let by_cri = of_cri("disable_snapshot_annotations") == Some(&Value::Boolean(false));
        let exported = entry.get("exports").and_then(|exports| exports.get(EXPORT));
        let by_transfer = exported.and_then(Value::as_str) == Some("true");
        let is_cris = of_cri("snapshotter").and_then(Value::as_str) == Some(name);
        let (to_cri, to_transfer) = (cri_advice(path), transfer_advice(name));
        match (is_cris, by_cri, by_transfer) {
            (true, false, false) => self.add(
                CHECK,
                State::Warning,
                "the CRI plugin does not hand them on, so pods wait until their images are unpacked",
                Some(&format!("{to_cri}\nor, with containerd 2.1 and newer:\n{to_transfer}")),
            ),
            (false, _, false) => self.add(
                CHECK,
                State::Note,
                "Docker hands them on by itself; ctr and others that use the transfer service do not",
                Some(&format!("with containerd 2.1 and newer:\n{to_transfer}")),
            ),
            (_, true, _) => self.ok(CHECK, "the CRI plugin hands them on"),
            (_, false, true) => self.ok(CHECK, "the transfer service hands them on"),
        }
    }
}

fn section<'a>(config: &'a Table, path: &[&str]) -> Option<&'a Table> {
    let mut at = config;
    for key in path {
        at = at.get(*key)?.as_table()?;
    }
    Some(at)
}

fn cri_advice(path: &[&str]) -> String {
    let quoted = path.iter().map(|key| match key.contains('.') {
        true => format!("\"{key}\""),
        false => (*key).to_owned(),
    });
    let table = quoted.collect::<Vec<_>>().join(".");
    format!("[{table}]\n  disable_snapshot_annotations = false")
}

fn transfer_advice(name: &str) -> String {
    format!("[proxy_plugins.{name}.exports]\n  {EXPORT} = \"true\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(text: &str) -> (State, Option<String>) {
        let config: Table = text.parse().unwrap();
        let entry = section(&config, &["proxy_plugins", "v"]).unwrap();
        let mut look = Look::default();
        look.annotations(&config, "v", entry);
        let finding = look.findings.pop().unwrap();
        (finding.state, finding.advice)
    }

    const PLUGIN: &str = "[proxy_plugins.v]\ntype = 'snapshot'\n";
    const OLD: &str = "[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'v'\n";
    const NEW: &str = "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'v'\n";

    #[test]
    fn a_cri_plugin_that_keeps_annotations_to_itself_is_told_in_the_words_of_its_version() {
        for (version, cri, key) in [
            (2, OLD, "[plugins.\"io.containerd.grpc.v1.cri\".containerd]"),
            (3, NEW, "[plugins.\"io.containerd.cri.v1.images\"]"),
        ] {
            let file = |more: &str| format!("version = {version}\n{PLUGIN}{cri}{more}");
            let (state, advice) = look(&file(""));
            assert_eq!(state, State::Warning);
            assert!(advice.unwrap().starts_with(key));
            assert_eq!(
                look(&file("disable_snapshot_annotations = true")).0,
                State::Warning
            );
            assert_eq!(
                look(&file("disable_snapshot_annotations = false")).0,
                State::Ok
            );
            let exports = format!("[proxy_plugins.v.exports]\n{EXPORT} = 'true'");
            assert_eq!(look(&file(&exports)).0, State::Ok);
        }
        // What stands where another version looks for it is not read.
        let wrong = format!("version = 3\n{PLUGIN}{OLD}disable_snapshot_annotations = false");
        assert_eq!(look(&wrong).0, State::Note);
    }

    #[test]
    fn where_another_snapshotter_has_the_pods_it_is_good_to_know_who_hands_them_on() {
        let (state, advice) = look(&format!("version = 3\n{PLUGIN}"));
        assert_eq!(state, State::Note);
        // What it advises is what it wants, to the letter.
        let advice = advice.unwrap();
        let (_, add) = advice.split_once('\n').unwrap();
        assert_eq!(look(&format!("version = 3\n{PLUGIN}{add}")).0, State::Ok);
    }
}
