//! What the pages name is there: files, headings, tests, test programs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use regex_lite::Regex;

use crate::tree;

fn events(page: &str) -> impl Iterator<Item = Event<'_>> {
    Parser::new_ext(page, Options::ENABLE_TABLES)
}

/// The anchors of a page, as GitHub and crates.io make them of its headings.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut heading: Option<(HeadingLevel, String)> = None;
    for event in events(page) {
        match event {
            Event::Start(Tag::Heading { level, .. }) => heading = Some((level, String::new())),
            Event::Text(text) | Event::Code(text) => {
                if let Some((_, so_far)) = &mut heading {
                    so_far.push_str(&text);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let (_, text) = heading.take().unwrap();
                let kept = text.to_lowercase();
                let kept = kept
                    .chars()
                    .filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
                anchors.insert(kept.map(|c| if c == ' ' { '-' } else { c }).collect());
            }
            _ => {}
        }
    }
    anchors
}

#[test]
fn links_within_the_project_lead_somewhere() {
    let mut dead = Vec::new();
    for path in tree::pages() {
        let page = tree::read(&path);
        for event in events(&page) {
            let Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) = event
            else {
                continue;
            };
            if dest_url.contains("://") || dest_url.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = dest_url.split_once('#').unwrap_or((&*dest_url, ""));
            let target: PathBuf = match file {
                "" => path.clone(),
                file => path.parent().unwrap_or(Path::new("")).join(file),
            };
            let there = tree::top().join(&target).exists();
            if !there || !anchor.is_empty() && !anchors(&tree::read(&target)).contains(anchor) {
                dead.push(format!("{}: {dest_url}", path.display()));
            }
        }
    }
    assert!(dead.is_empty(), "{dead:#?}");
}

/// The book is made of docs/ alone.
#[test]
fn pages_of_the_book_are_in_its_summary_and_link_to_each_other_alone() {
    let summary = tree::read("docs/SUMMARY.md");
    let mut wrong = Vec::new();
    for path in tree::files("docs", ".md") {
        let name = path.strip_prefix("docs").unwrap().display().to_string();
        if name != "SUMMARY.md" && !summary.contains(&format!("]({name})")) {
            wrong.push(format!("docs/SUMMARY.md does not list {name}"));
        }
        let depth = name.matches('/').count();
        for event in events(&tree::read(&path)) {
            if let Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) = event
                && (dest_url.starts_with('/') || dest_url.matches("../").count() > depth)
            {
                wrong.push(format!("{name}: {dest_url} leads out of docs/"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Everything between single backticks, and lines of code.
fn code(page: &str) -> Vec<String> {
    let mut code = Vec::new();
    let mut in_block = false;
    for event in events(page) {
        match event {
            Event::Start(Tag::CodeBlock(_)) => in_block = true,
            Event::End(TagEnd::CodeBlock) => in_block = false,
            Event::Text(text) if in_block => code.extend(text.lines().map(str::to_owned)),
            Event::Code(text) => code.push(text.into_string()),
            _ => {}
        }
    }
    code
}

fn all_sources() -> String {
    tree::rust_files().iter().map(tree::read).collect()
}

/// Names of tests are sentences, and so are told from other names.
#[test]
fn tests_that_pages_name_exist() {
    let sources = all_sources();
    let sentence = Regex::new(r"^(?:\w+::)*((?:[a-z0-9]+_){4,}[a-z0-9]+)$").unwrap();
    let mut named = 0;
    let mut missing = BTreeSet::new();
    for path in tree::pages() {
        for text in code(&tree::read(&path)) {
            let Some(found) = sentence.captures(&text) else {
                continue;
            };
            let name = found.get(1).unwrap().as_str();
            if name.starts_with("vellum_") {
                // A metric.
                continue;
            }
            named += 1;
            if !sources.contains(&format!("fn {name}(")) {
                missing.insert(format!("{}: {text}", path.display()));
            }
        }
    }
    assert!(
        named > 20,
        "only {named} names were found: is the pattern right?"
    );
    assert!(missing.is_empty(), "{missing:#?}");
}

/// `cargo nextest run -p PACKAGE --test PROGRAM FILTER…`: the package, the program and the filters'
/// modules are there.
#[test]
fn commands_that_run_tests_name_what_is_there() {
    let mut wrong = BTreeSet::new();
    let mut seen = 0;
    for path in tree::pages() {
        for text in code(&tree::read(&path)) {
            let Some(at) = text.find("cargo nextest run ") else {
                continue;
            };
            seen += 1;
            if let Some(what) = trouble(&text[at + "cargo nextest run ".len()..]) {
                wrong.insert(format!("{}: `{text}`: {what}", path.display()));
            }
        }
    }
    assert!(seen > 15, "only {seen} commands were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What is wrong with the arguments of one such command.
fn trouble(arguments: &str) -> Option<String> {
    let mut dir = PathBuf::new();
    let mut words = arguments.split(['#', '|', ';']).next()?.split_whitespace();
    let mut program = None;
    while let Some(word) = words.next() {
        match word {
            "-p" | "--package" => {
                let package = words.next()?;
                let tool = tree::files("tools", "Cargo.toml")
                    .into_iter()
                    .find(|path| tree::read(path).contains(&format!("name = \"{package}\"\n")));
                dir = match tool {
                    Some(path) => path.parent().unwrap().to_owned(),
                    None => Path::new("crates").join(package),
                };
                if !tree::top().join(&dir).join("Cargo.toml").exists() {
                    return Some(format!("no package {package}"));
                }
            }
            "--test" => {
                let name = words.next()?;
                let main = dir.join("tests").join(name).join("main.rs");
                if !tree::top().join(&main).exists() {
                    return Some(format!("no program {}", main.display()));
                }
                program = Some(main);
            }
            option if option.starts_with('-') => return Some(format!("{option}: not known here")),
            filter => {
                let Some((module, _)) = filter.rsplit_once("::") else {
                    continue;
                };
                let last = module.rsplit("::").next().unwrap();
                let declared = format!("mod {last};");
                let found = match &program {
                    Some(main) => tree::read(main).contains(&declared),
                    None => all_sources().contains(&declared),
                };
                if !found {
                    return Some(format!("no module {module}"));
                }
            }
        }
    }
    None
}
