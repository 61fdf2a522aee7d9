//! Where a device is, is a type: `RunDir` and `RunRoot` know what lies in `ROOT/run`, and nobody else joins
//! names to their paths (docs/design.md, Processes).

use crate::tree;

const KNOWS_THE_NAMES: &str = "crates/vellum-fs/src/run_dir.rs";

/// What a line looks like that takes a run directory as a path, or makes a path into one by hand.
const BY_HAND: [&str; 6] = [
    "run_dir: &Path",
    "run_dir: PathBuf",
    "run_dir: Option<PathBuf>",
    "run_dir.join(",
    "run_dir: impl AsRef<Path>",
    "join(\"run\")",
];

#[test]
fn no_code_takes_a_run_directory_for_a_path_or_joins_names_to_it() {
    let sources = ["src", "crates", "benches", "examples"].into_iter();
    let sources = sources.flat_map(|dir| tree::files(dir, ".rs"));
    let mut found = Vec::new();
    for path in sources {
        if path.ends_with(KNOWS_THE_NAMES) {
            continue;
        }
        for (number, line) in (1..).zip(tree::read(&path).lines()) {
            if BY_HAND.iter().any(|by_hand| line.contains(by_hand)) {
                found.push(format!("{}:{number}: {}", path.display(), line.trim()));
            }
        }
    }
    assert!(
        found.is_empty(),
        "a method of RunDir or RunRoot gives that:\n{}",
        found.join("\n")
    );
}
