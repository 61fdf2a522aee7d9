//! The blocks of commands of a page, and the marks before them.

use std::ops::Range;

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// What is to be done with a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// Run in a fresh place.
    Alone,
    /// Run where the block before has left off.
    GoesOn,
    /// Left out, for a reason that the page says.
    NotRun,
}

/// A block of commands.
#[derive(Debug, Clone)]
pub struct Block {
    /// The line of the page, from 1.
    pub line: usize,
    /// Where it is in the page.
    pub range: Range<usize>,
    pub text: String,
    pub doing: Doing,
    pub network: bool,
    /// Commands that the page does not show, before and after it.
    pub first: String,
    pub then: String,
    /// True where commands stand behind a prompt, and other lines are output.
    pub console: bool,
    pub fenced: bool,
}

/// A command behind a prompt, and what it prints.
#[derive(Debug, PartialEq, Eq)]
pub struct Command {
    pub prompt: char,
    pub text: String,
    pub output: Vec<String>,
}

impl Block {
    /// Of a console: its commands. One that goes on in the next line ends in a backslash.
    pub fn commands(&self) -> Vec<Command> {
        let mut commands: Vec<Command> = Vec::new();
        let mut open = false;
        for line in self.text.lines() {
            let starts = line.strip_prefix("# ").or(line.strip_prefix("$ "));
            match (starts, commands.last_mut()) {
                (_, Some(last)) if open => {
                    last.text.push('\n');
                    last.text.push_str(line);
                }
                (Some(text), _) => commands.push(Command {
                    prompt: if line.starts_with('#') { '#' } else { '$' },
                    text: text.to_owned(),
                    output: Vec::new(),
                }),
                (None, Some(last)) => {
                    last.output.push(line.to_owned());
                    continue;
                }
                (None, None) => panic!("a console begins with a prompt"),
            }
            open = line.ends_with('\\');
        }
        commands
    }
}

/// The marks that were read since the last block.
#[derive(Debug, Default)]
struct Marks {
    doing: Option<Doing>,
    network: bool,
    first: String,
    then: String,
}

impl Marks {
    fn are_there(&self) -> bool {
        self.doing.is_some() || self.network || !self.first.is_empty() || !self.then.is_empty()
    }

    /// Takes the text of one comment.
    fn take(&mut self, mark: &str) -> Result<(), String> {
        let (word, rest) = mark.split_once(':').unwrap_or((mark, ""));
        match (word.trim(), rest.trim()) {
            ("not run", "") => return Err("`not run` wants a reason".to_owned()),
            ("not run", _) => self.doing = Some(Doing::NotRun),
            ("goes on", "") => self.doing = Some(Doing::GoesOn),
            ("network", "") => self.network = true,
            ("first", script) => self.first = script.to_owned(),
            ("then", script) => self.then = script.to_owned(),
            _ => return Err(format!("no mark is called so: {mark}")),
        }
        Ok(())
    }
}

/// The blocks of a page, in order.
pub fn of(page: &str) -> Result<Vec<Block>, String> {
    let mut blocks = Vec::new();
    let mut marks = Marks::default();
    let mut page_is_out = false;
    let mut html: Option<String> = None;
    let mut code: Option<(Block, bool)> = None;
    for (event, range) in Parser::new_ext(page, Options::ENABLE_TABLES).into_offset_iter() {
        let line = || page[..range.start].matches('\n').count() + 1;
        match event {
            Event::Start(Tag::HtmlBlock) => html = Some(String::new()),
            Event::Html(text) => html.get_or_insert_default().push_str(&text),
            Event::End(TagEnd::HtmlBlock) => {
                let text = html.take().unwrap_or_default();
                for comment in text.split("<!-- ").skip(1) {
                    let comment = comment.split("-->").next().unwrap_or("");
                    if let Some(mark) = comment.strip_prefix("recipe:") {
                        marks
                            .take(mark)
                            .map_err(|e| format!("line {}: {e}", line()))?;
                    } else if comment.starts_with("recipes: not run: ") {
                        page_is_out = true;
                    }
                }
            }
            Event::Start(Tag::CodeBlock(kind)) => {
                let (fenced, commands) = match &kind {
                    CodeBlockKind::Indented => (false, true),
                    CodeBlockKind::Fenced(info) => (true, matches!(&**info, "" | "sh" | "console")),
                };
                let marks = std::mem::take(&mut marks);
                if !commands && marks.are_there() {
                    return Err(format!("line {}: a mark before what is no command", line()));
                }
                let block = Block {
                    line: line(),
                    range,
                    text: String::new(),
                    doing: marks.doing.unwrap_or(Doing::Alone),
                    network: marks.network,
                    first: marks.first,
                    then: marks.then,
                    console: false,
                    fenced,
                };
                code = Some((block, commands));
            }
            Event::Text(text) if code.is_some() => {
                if let Some((block, _)) = &mut code {
                    block.text.push_str(&text);
                }
            }
            Event::End(TagEnd::CodeBlock) => {
                if let Some((mut block, true)) = code.take() {
                    block.console = ["# ", "$ "].iter().any(|p| block.text.starts_with(p));
                    if page_is_out {
                        block.doing = Doing::NotRun;
                    }
                    blocks.push(block);
                }
            }
            Event::Start(_) if marks.are_there() => {
                return Err(format!("line {}: a mark stands before no block", line()));
            }
            _ => {}
        }
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "\
# A page

    vellum ps

<!-- recipe: first: have web -->
<!-- recipe: then:
test -e x
-->

    # vellum ps
    CONTAINER
    # vellum images \\
        -q
    web

<!-- recipe: goes on -->
```sh
# a comment
vellum df
```

```toml
[no]
```

<!-- recipe: not run: needs a moon -->

    fly
";

    #[test]
    fn blocks_are_found_with_their_marks() {
        let blocks = of(PAGE).unwrap();
        let doing: Vec<Doing> = blocks.iter().map(|block| block.doing).collect();
        assert_eq!(
            doing,
            [Doing::Alone, Doing::Alone, Doing::GoesOn, Doing::NotRun]
        );
        assert_eq!(blocks[1].first, "have web");
        assert_eq!(blocks[1].then, "test -e x");
        assert_eq!(blocks[0].line, 3);
        assert!(blocks[2].fenced && blocks[1].console && !blocks[0].console);
    }

    #[test]
    fn a_console_has_commands_and_their_output() {
        let commands = of(PAGE).unwrap()[1].commands();
        assert_eq!(commands.len(), 2);
        assert_eq!(commands[0].output, ["CONTAINER"]);
        assert_eq!(commands[1].text, "vellum images \\\n    -q");
        assert_eq!(commands[1].output, ["web"]);
    }

    #[test]
    fn a_mark_without_a_reason_or_before_something_else_is_refused() {
        assert!(of("<!-- recipe: not run: -->\n\n    a\n").is_err());
        assert!(of("<!-- recipe: maybe -->\n\n    a\n").is_err());
        assert!(of("<!-- recipe: goes on -->\n\nText.\n").is_err());
        assert!(of("<!-- recipe: goes on -->\n```toml\na\n```\n").is_err());
    }
}
