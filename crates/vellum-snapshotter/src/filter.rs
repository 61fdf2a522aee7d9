//! containerd's language for choosing from a list, as its `filters` package defines it:
//!
//! ```text
//! selectors := selector ("," selector)*
//! selector  := fieldpath (operator value)?
//! fieldpath := field ("." field)*
//! field     := quoted | [A-Za-z0-9_]+
//! operator  := "==" | "!=" | "~="
//! value     := quoted | [^\s,]+
//! ```
//!
//! All selectors of a filter must match, and any of several filters.

use regex_lite::Regex;

use vellum_base::error::{Error, ErrorKind, Result};
use vellum_store::{SnapshotKind, SnapshotRecord};

/// Filters of which any one is enough; without any, everything matches.
#[derive(Debug)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    /// `None` for an expression that makes no sense: it matches nothing.
    Matches(Option<Regex>),
}

impl Filters {
    /// Parses each of `texts`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`], with the place in the text.
    pub fn parse(texts: &[String]) -> Result<Self> {
        let filters = texts.iter().map(|text| Parser::new(text).selectors());
        Ok(Filters(filters.collect::<Result<_>>()?))
    }

    /// True when the snapshot is chosen.
    pub fn matches(&self, record: &SnapshotRecord) -> bool {
        self.0.is_empty()
            || self
                .0
                .iter()
                .any(|all| all.iter().all(|selector| selector.matches(record)))
    }
}

impl Selector {
    fn matches(&self, record: &SnapshotRecord) -> bool {
        let value = field(record, &self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(wanted) => value.unwrap_or_default() != wanted,
            Test::Matches(regex) => regex
                .as_ref()
                .is_some_and(|regex| regex.is_match(value.unwrap_or_default())),
        }
    }
}

fn field<'a>(record: &'a SnapshotRecord, path: &[String]) -> Option<&'a str> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "kind" => Some(match record.kind {
            SnapshotKind::View => "view",
            SnapshotKind::Active => "active",
            SnapshotKind::Committed => "committed",
        }),
        "name" => Some(&record.key),
        "parent" => Some(record.parent.as_deref().unwrap_or_default()),
        "labels" => record.labels.get(&rest.join(".")).map(String::as_str),
        _ => None,
    }
}

/// Goes through the text character by character, as containerd's scanner does.
struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Parser { text, at: 0 }
    }

    fn rest(&self) -> &'a str {
        self.text.split_at(self.at).1
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.next();
        }
    }

    fn wrong<T>(&self, what: &str) -> Result<T> {
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!("filter {:?}, at byte {}: {what}", self.text, self.at),
        ))
    }

    fn selectors(mut self) -> Result<Vec<Selector>> {
        // An empty filter matches everything.
        if self.text.is_empty() {
            return Ok(Vec::new());
        }
        let mut selectors = vec![self.selector()?];
        loop {
            match self.peek() {
                None => return Ok(selectors),
                Some(',') => {
                    self.next();
                    selectors.push(self.selector()?);
                }
                Some(_) => return self.wrong("unexpected input"),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.next();
            path.push(self.field()?);
        }
        if matches!(self.peek(), None | Some(',')) {
            let test = Test::Present;
            return Ok(Selector { path, test });
        }
        self.skip_space();
        let operator = self.take_while(|c| matches!(c, '=' | '!' | '~'));
        let test = match operator {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => {
                let text = self.value(true)?;
                let regex = Regex::new(&text);
                if let Err(error) = &regex {
                    tracing::warn!(%error, filter = self.text, "matches nothing");
                }
                Test::Matches(regex.ok())
            }
            _ => return self.wrong(r#"expected an operator ("=="|"!="|"~=")"#),
        };
        Ok(Selector { path, test })
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !wanted(c)).unwrap_or(rest.len());
        self.at += end;
        rest.split_at(end).0
    }

    fn field(&mut self) -> Result<String> {
        self.skip_space();
        if self.peek().is_some_and(is_quote) {
            return self.quoted(false);
        }
        let field = self.take_while(|c| c == '_' || c.is_ascii_alphanumeric());
        if field.is_empty() {
            return self.wrong("expected field or quoted");
        }
        Ok(field.to_owned())
    }

    fn value(&mut self, other_quotes: bool) -> Result<String> {
        self.skip_space();
        match self.peek() {
            Some(quote) if is_quote(quote) => self.quoted(other_quotes),
            Some('.' | ',' | '=' | '!' | '~') | None => self.wrong("expected value or quoted"),
            Some(_) => Ok(self
                .take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control())
                .to_owned()),
        }
    }

    /// A string in Go's syntax. `/` and `|` quote as well where `other_quotes` says so.
    fn quoted(&mut self, other_quotes: bool) -> Result<String> {
        let quote = match self.next() {
            Some(quote) if quote == '"' || other_quotes => quote,
            _ => return self.wrong("invalid quote encountered"),
        };
        let mut bytes = Vec::new();
        loop {
            match self.next() {
                None | Some('\n') => return self.wrong("quoted literal not terminated"),
                Some('\\') => self.escape(quote, &mut bytes)?,
                Some(c) if c == quote => break,
                Some(c) => push_char(&mut bytes, c),
            }
        }
        String::from_utf8(bytes).or_else(|_| self.wrong("the quoted text is not UTF-8"))
    }

    fn escape(&mut self, quote: char, bytes: &mut Vec<u8>) -> Result<()> {
        let byte = match self.next() {
            Some('a') => 7,
            Some('b') => 8,
            Some('f') => 12,
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('v') => 11,
            Some('\\') => b'\\',
            Some(c) if c == quote => {
                push_char(bytes, c);
                return Ok(());
            }
            Some(digit @ '0'..='7') => {
                self.at -= digit.len_utf8();
                match u8::try_from(self.number(8, 3)?) {
                    Ok(byte) => byte,
                    Err(_) => return self.wrong("illegal numeric escape sequence"),
                }
            }
            Some('x') => self.number(16, 2)? as u8,
            Some('u') => return self.unicode(4, bytes),
            Some('U') => return self.unicode(8, bytes),
            _ => return self.wrong("illegal escape sequence"),
        };
        bytes.push(byte);
        Ok(())
    }

    fn number(&mut self, base: u32, digits: usize) -> Result<u32> {
        let text = self.rest().get(..digits);
        let Some(text) = text.filter(|text| text.chars().all(|c| c.is_digit(base))) else {
            return self.wrong("illegal numeric escape sequence");
        };
        self.at += digits;
        u32::from_str_radix(text, base).or_else(|_| self.wrong("illegal numeric escape sequence"))
    }

    fn unicode(&mut self, digits: usize, bytes: &mut Vec<u8>) -> Result<()> {
        match char::from_u32(self.number(16, digits)?) {
            Some(c) => {
                push_char(bytes, c);
                Ok(())
            }
            None => self.wrong("no such character"),
        }
    }
}

fn is_quote(c: char) -> bool {
    matches!(c, '"' | '/' | '|')
}

fn push_char(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> SnapshotRecord {
        SnapshotRecord {
            key: "default/12/extract-1 sha256:ab".into(),
            id: uuid::Uuid::nil(),
            kind: SnapshotKind::Active,
            parent: Some("p".into()),
            base: uuid::Uuid::nil(),
            layers: Vec::new(),
            virtual_size: 0,
            bytes: 0,
            base_inodes: None,
            inodes: None,
            device: false,
            labels: [("a.b/c", "x,y"), ("plain", "1")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            created: std::time::UNIX_EPOCH,
            updated: std::time::UNIX_EPOCH,
        }
    }

    fn matches(texts: &[&str]) -> bool {
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        Filters::parse(&texts).unwrap().matches(&record())
    }

    #[test]
    fn each_operator_chooses_as_containerd_does() {
        for yes in [
            "",
            "name",
            "kind==active",
            "kind == active",
            "kind!=view",
            "parent==p,kind==active",
            "labels.plain",
            "labels.plain==1",
            r#"labels."a.b/c"=="x,y""#,
            r#"labels."a.b/c""#,
            "labels.missing!=1",
            "name~=/extract-[0-9]+/",
            "name~=^default",
            r#"name=="default\x2f12/extract-1 sha256:\141b""#,
            "nosuchfield!=x",
            r"labels.plain~=|^\\d$|",
        ] {
            assert!(matches(&[yes]), "{yes}");
        }
        for no in [
            "kind==committed",
            "kind==active,parent==q",
            "labels.missing",
            "labels.missing==1",
            "nosuchfield",
            "name~=^extract",
            "name~=(",
        ] {
            assert!(!matches(&[no]), "{no}");
        }
    }

    #[test]
    fn one_of_several_filters_is_enough_and_none_matches_all() {
        assert!(matches(&["kind==view", "parent==p"]));
        assert!(!matches(&["kind==view", "parent==q"]));
        assert!(matches(&[]));
    }

    #[test]
    fn what_is_no_filter_is_refused_with_its_place() {
        for bad in [
            "name=",
            "name===x",
            "name==",
            ",",
            "name==a b",
            "name==a,",
            "name.",
            "/name/==a",
            "name==/a/",
            r#"name=="a"#,
            r#"name=="\q""#,
            // A backslash before anything but an escape, as in Go.
            r"name~=/\d/",
        ] {
            let error = Filters::parse(&[bad.to_owned()]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{bad}");
            assert!(error.to_string().contains("at byte"), "{error}");
        }
    }
}
