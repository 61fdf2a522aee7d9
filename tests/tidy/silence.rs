//! Bytes from outside become errors, our own arithmetic is asserted: nothing is defaulted away
//! (CONTRIBUTING.md). A default that is meant stands in this list, with its number of places.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::tree;

/// Calls that turn a missing value into an empty or zero one.
const SILENT: [&str; 3] = ["unwrap_or_default()", "unwrap_or(0)", "unwrap_or(&[])"];

/// File, number of places, and why the default is the value that is meant.
const MEANT: &[(&str, usize, &str)] = &[];

/// The lines of a file before its tests.
fn silent_places(path: &PathBuf) -> usize {
    let text = tree::read(path);
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let code = code.lines().map(|line| line.split("//").next().unwrap());
    code.flat_map(|line| SILENT.map(|call| line.matches(call).count()))
        .sum()
}

#[test]
fn a_default_in_place_of_a_value_is_meant_or_not_there() {
    let sources = ["src", "crates"]
        .into_iter()
        .flat_map(|dir| tree::files(dir, ".rs"));
    let sources = sources.filter(|path| {
        let text = path.to_str().unwrap();
        !text.contains("/tests/") && !text.ends_with("/tests.rs") && !text.ends_with("build.rs")
    });
    let found: BTreeMap<String, usize> = sources
        .map(|path| (path.to_str().unwrap().to_owned(), silent_places(&path)))
        .filter(|(_, places)| *places > 0)
        .collect();
    let meant: BTreeMap<String, usize> = MEANT
        .iter()
        .map(|(path, places, _)| ((*path).to_owned(), *places))
        .collect();
    let differ: Vec<_> = found
        .iter()
        .filter(|(path, places)| meant.get(*path) != Some(places))
        .chain(meant.iter().filter(|(path, _)| !found.contains_key(*path)))
        .collect();
    assert!(
        differ.is_empty(),
        "assert what cannot be missing, or say in tests/tidy/silence.rs why the default is meant: \
         {differ:#?}"
    );
}
