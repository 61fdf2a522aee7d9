//! A place for commands: a store, a home, and what the host has under names that pages use.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::blocks::Block;
use crate::common::{TestStore, VELLUM};

/// What a scene can call, and how it is prepared and cleared.
const STAGE: &str = include_str!("stage.sh");
/// Seconds for all blocks of a scene.
const TIME: &str = "600";

/// Runs blocks one after the other in a fresh place. Returns what the commands of consoles printed.
pub fn play(scene: &[Block]) -> Result<Vec<(Block, Vec<String>)>, String> {
    let store = TestStore::new();
    let dir = store.dir.path().canonicalize().unwrap();
    let script = dir.join("scene.sh");
    fs::write(&script, script_of(scene)).unwrap();
    for (at, block) in scene.iter().enumerate() {
        // A file of its own, so that what follows can have it run once more.
        fs::write(dir.join(format!("block.{at}")), &block.text).unwrap();
    }
    let mut command = Command::new("timeout");
    command.args(["--kill-after=20", TIME, "unshare", "--mount"]);
    if !scene.iter().any(|block| block.network) {
        command.arg("--net");
    }
    let output = command
        .arg("bash")
        .arg(&script)
        .env("STAGE", &dir)
        .env("VELLUM", VELLUM)
        .env("VELLUM_ROOT", &store.root)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let tail: Vec<&str> = said.lines().rev().take(30).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        let console = last_output(&dir, scene);
        return Err(format!("{}\n{}\n{console}", output.status, tail.join("\n")));
    }
    store.assert_nothing_runs();
    let consoles = scene.iter().enumerate().filter(|(_, block)| block.console);
    Ok(consoles
        .map(|(at, block)| {
            let printed = (0..block.commands().len())
                .map(|n| fs::read_to_string(dir.join(format!("out.{at}.{n}"))).unwrap())
                .collect();
            (block.clone(), printed)
        })
        .collect())
}

/// The last command of a console that was begun, and what it printed.
fn last_output(dir: &Path, scene: &[Block]) -> String {
    let consoles = scene.iter().enumerate().filter(|(_, block)| block.console);
    let all = consoles.flat_map(|(at, block)| {
        let commands = block.commands().into_iter().enumerate();
        commands.map(move |(n, command)| (format!("out.{at}.{n}"), command.text))
    });
    let mut printed = all.filter_map(|(file, text)| Some((text, fs::read(dir.join(file)).ok()?)));
    printed
        .next_back()
        .map_or(String::new(), |(text, printed)| {
            format!("{text}\n{}", String::from_utf8_lossy(&printed))
        })
}

/// The script of a scene. Each command of a console prints into a file of its own; the reader of a page
/// waits for what a command in the background prints there, and so does the script.
fn script_of(scene: &[Block]) -> String {
    let mut script = STAGE.to_owned();
    for (at, block) in scene.iter().enumerate() {
        let _ = writeln!(script, "set +x\n{}", block.first);
        if block.console {
            for (n, command) in block.commands().iter().enumerate() {
                // No descriptor of ours is left open to it.
                let _ = writeln!(
                    script,
                    "set +x\nout=\"$STAGE/out.{at}.{n}\"\n{{\n{}\n}} >\"$out\" 2>&1",
                    command.text
                );
                if command.text.ends_with('&') {
                    let _ = writeln!(script, "printed {} \"$out\"", command.output.len());
                }
            }
        } else {
            let file = format!("$STAGE/block.{at}");
            let _ = writeln!(script, "BLOCK={file}\nset -x\n. \"$BLOCK\"");
        }
        let _ = writeln!(script, "set +x\n{}", block.then);
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks;

    #[test]
    fn a_command_that_fails_fails_its_block_in_the_middle_too() {
        for page in [
            "    false\n    true\n",
            "    true | false | true\n    true\n",
            "    # false\n    # true\n",
            "<!-- recipe: then: test -e nothing -->\n\n    true\n",
        ] {
            let blocks = blocks::of(page).unwrap();
            assert!(play(&blocks).is_err(), "{page}");
        }
    }

    #[test]
    fn what_the_commands_of_a_console_print_is_told_apart() {
        let page =
            "    # echo one; cd /\n    # pwd >&2\n    # (sleep 0.2; echo late) &\n    late\n";
        let blocks = blocks::of(page).unwrap();
        let (_, printed) = play(&blocks).unwrap().remove(0);
        assert_eq!(printed, ["one\n", "/\n", "late\n"]);
    }
}
