//! The files of the checkout.

use std::fs;
use std::path::{Path, PathBuf};

/// The top of the checkout.
pub fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file's text; the name is from the top.
pub fn read(name: impl AsRef<Path>) -> String {
    let path = top().join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below `dir` whose names end so, named from the top, in order.
pub fn files(dir: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![top().join(dir)];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            if entry.file_type().unwrap().is_dir() {
                if name != "target" {
                    left.push(entry.path());
                }
            } else if name.ends_with(ending) {
                found.push(entry.path().strip_prefix(top()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Every Rust file that is ours: program, crates, tests, benches, examples, tools.
pub fn rust_files() -> Vec<PathBuf> {
    ["src", "crates", "tests", "benches", "examples", "tools"]
        .into_iter()
        .flat_map(|dir| files(dir, ".rs"))
        .collect()
}

/// README, CHANGELOG, CONTRIBUTING and everything in docs/.
pub fn pages() -> Vec<PathBuf> {
    let mut pages = files("docs", ".md");
    for page in ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"] {
        pages.push(page.into());
    }
    pages
}
