//! What commands print, beside what a page says that they print.

use std::sync::LazyLock;

use regex_lite::Regex;

use crate::blocks::Block;

/// What is another each time, and what stands for it.
static VOLATILE: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    [
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
        (r"\d{8}T\d{6}Z", "TIME"),
        (r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID"),
        (r"\b[0-9a-f]{12}\b", "ID"),
        (r"\b\d+(\.\d+)? ?([kMGT]i?B|B)\b", "SIZE"),
        (r"\b\d+(\.\d+)?[KMGT]\b", "SIZE"),
        (r"\b\d+(\.\d+)? (ms|s)\b", "DURATION"),
        (r"/dev/loop\d+|/dev/ublkb\d+", "DEVICE"),
        (r"\b\d+%", "PART"),
        (r"\bpid \d+", "pid PID"),
        (r"\b12\.\d+\b", "RELEASE"),
        // Columns are as wide as what they hold.
        (r" +", " "),
    ]
    .into_iter()
    .map(|(pattern, word)| (Regex::new(pattern).unwrap(), word))
    .collect()
});

fn steady(line: &str) -> String {
    let mut line = line.to_owned();
    for (pattern, word) in VOLATILE.iter() {
        line = pattern.replace_all(&line, *word).into_owned();
    }
    line.trim_end().to_owned()
}

/// Where a page says something else than what its commands printed: of each command, one text.
pub fn differences(block: &Block, printed: &[String]) -> impl Iterator<Item = String> {
    let commands = block.commands();
    assert_eq!(commands.len(), printed.len());
    commands
        .into_iter()
        .zip(printed)
        .filter_map(|(command, printed)| {
            let said: Vec<String> = command.output.iter().map(|line| steady(line)).collect();
            let is: Vec<String> = printed.lines().map(steady).collect();
            (said != is).then(|| {
            format!(
                "`{}` prints something else than the page says (RECIPES_WRITE=1 writes it there):\n\
                 --- page\n{}\n--- printed\n{}",
                command.text,
                command.output.join("\n"),
                printed.trim_end()
            )
        })
        })
}

/// The page with what was printed in place of what it says.
pub fn rewritten(page: &str, printed: &[(Block, Vec<String>)]) -> String {
    let mut page = page.to_owned();
    for (block, printed) in printed.iter().rev() {
        let mut text = String::new();
        for (command, printed) in block.commands().iter().zip(printed) {
            text.push_str(&format!("{} {}\n", command.prompt, command.text));
            for line in printed.lines() {
                text.push_str(line.trim_end());
                text.push('\n');
            }
        }
        let old = &page[block.range.clone()];
        let new = if block.fenced {
            let fence = old.lines().next().unwrap();
            format!(
                "{fence}\n{text}```{}",
                if old.ends_with('\n') { "\n" } else { "" }
            )
        } else {
            // The range begins behind the first line's indentation.
            let lines: Vec<&str> = text.lines().collect();
            lines.join("\n    ") + if old.ends_with('\n') { "\n" } else { "" }
        };
        page.replace_range(block.range.clone(), &new);
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks;

    const PAGE: &str = "\
Text.

    # vellum ps
    NAME  SIZE     CREATED
    web   774kB    2026-11-22T02:01:01Z
    # vellum rm web
    web

End.
";

    fn printed(text: &[&str]) -> Vec<String> {
        text.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn times_and_sizes_may_differ_and_names_may_not() {
        let block = &blocks::of(PAGE).unwrap()[0];
        let same = printed(&[
            "NAME SIZE CREATED\nweb 1.2MB 2027-01-01T00:00:00Z\n",
            "web\n",
        ]);
        assert_eq!(differences(block, &same).count(), 0);
        let other = printed(&[
            "NAME SIZE CREATED\ndb 1.2MB 2027-01-01T00:00:00Z\n",
            "web\n",
        ]);
        assert_eq!(differences(block, &other).count(), 1);
        let more = printed(&["NAME SIZE CREATED\nweb 1.2MB 2027-01-01T00:00:00Z\n", ""]);
        assert_eq!(differences(block, &more).count(), 1);
    }

    #[test]
    fn what_was_printed_is_written_into_the_page() {
        let block = blocks::of(PAGE).unwrap().remove(0);
        let new = rewritten(PAGE, &[(block, printed(&["NAME\nnew\n", ""]))]);
        assert_eq!(
            new,
            "Text.\n\n    # vellum ps\n    NAME\n    new\n    # vellum rm web\n\nEnd.\n"
        );
    }
}
