//! HuJSON: JSON (RFC 8259) with `//` and `/* */` comments and trailing commas, every value with
//! its place in the text.
//!
//! The text may come from anybody who may try a policy, so size, depth and work are bounded: one
//! pass over at most [`MAX_SIZE`] bytes, recursion of at most [`MAX_DEPTH`].

use std::collections::BTreeSet;

use super::problem::Span;

/// Policies of ten thousand rules are about half of this.
pub const MAX_SIZE: usize = 1 << 20;
/// The language itself nests five deep; app grants carry JSON of their users' own.
pub(super) const MAX_DEPTH: usize = 48;

#[derive(Clone, PartialEq, Debug)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) span: Span,
}

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    /// As written: no user of ours computes with one.
    Number(String),
    String(String),
    Array(Vec<Node>),
    Object(Vec<Member>),
}

#[derive(Clone, PartialEq, Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) name_span: Span,
    pub(super) node: Node,
}

impl Value {
    /// What a person would call it.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::String(_) => "a string",
            Self::Array(_) => "a list",
            Self::Object(_) => "an object",
        }
    }
}

impl Value {
    /// The same value as JSON without spaces, comments or trailing commas.
    pub(super) fn to_json(&self) -> String {
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        match self {
            Self::Null => "null".to_owned(),
            Self::Bool(value) => value.to_string(),
            Self::Number(text) => text.clone(),
            Self::String(text) => quoted(text),
            Self::Array(items) => {
                let items: Vec<String> = items.iter().map(|item| item.value.to_json()).collect();
                format!("[{}]", items.join(","))
            }
            Self::Object(members) => {
                let members: Vec<String> = members
                    .iter()
                    .map(|member| {
                        format!("{}:{}", quoted(&member.name), member.node.value.to_json())
                    })
                    .collect();
                format!("{{{}}}", members.join(","))
            }
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Malformed {
    pub(super) span: Span,
    pub(super) message: String,
}

/// `None` where the text holds nothing but white space and comments.
pub(super) fn parse(text: &str) -> Result<Option<Node>, Malformed> {
    if text.len() > MAX_SIZE {
        return Err(Malformed {
            span: Span::default(),
            message: format!(
                "the policy has {} bytes, at most {MAX_SIZE} are read",
                text.len()
            ),
        });
    }
    let mut parser = Parser { text, at: 0 };
    parser.space()?;
    if parser.peek().is_none() {
        return Ok(None);
    }
    let node = parser.value(0)?;
    parser.space()?;
    match parser.peek() {
        None => Ok(Some(node)),
        Some(_) => Err(parser.refuse("text after the end of the policy: remove it")),
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// A complaint about the character at hand.
    fn refuse(&self, message: impl Into<String>) -> Malformed {
        let width = self.rest().chars().next().map_or(0, char::len_utf8);
        Malformed {
            span: Span::new(self.at, self.at + width),
            message: message.into(),
        }
    }

    /// `expected X, found Y`.
    fn expected(&self, what: &str) -> Malformed {
        match self.rest().chars().next() {
            Some(found) => self.refuse(format!("expected {what}, found {found:?}")),
            None => self.refuse(format!("expected {what}, found the end of the text")),
        }
    }

    fn space(&mut self) -> Result<(), Malformed> {
        loop {
            match self.peek() {
                Some(b' ' | b'\t' | b'\n' | b'\r') => self.at += 1,
                Some(b'/') if self.rest().starts_with("//") => {
                    self.at += self.rest().find('\n').unwrap_or_else(|| self.rest().len());
                }
                Some(b'/') if self.rest().starts_with("/*") => match self.rest()[2..].find("*/") {
                    Some(end) => self.at += end + 4,
                    None => {
                        return Err(self.refuse("this comment has no end: close it with \"*/\""));
                    }
                },
                _ => return Ok(()),
            }
        }
    }

    fn value(&mut self, depth: usize) -> Result<Node, Malformed> {
        if depth > MAX_DEPTH {
            return Err(self.refuse(format!("nested deeper than {MAX_DEPTH} levels")));
        }
        let start = self.at;
        let value = match self.peek() {
            Some(b'{') => self.object(depth)?,
            Some(b'[') => self.array(depth)?,
            Some(b'"') => Value::String(self.string()?),
            Some(b'-' | b'0'..=b'9') => self.number()?,
            Some(b'a'..=b'z') => self.word()?,
            _ => return Err(self.expected("a value")),
        };
        Ok(Node {
            value,
            span: Span::new(start, self.at),
        })
    }

    fn object(&mut self, depth: usize) -> Result<Value, Malformed> {
        self.at += 1;
        let mut members = Vec::new();
        let mut seen = BTreeSet::new();
        loop {
            self.space()?;
            match self.peek() {
                Some(b'}') => {
                    self.at += 1;
                    return Ok(Value::Object(members));
                }
                Some(b'"') => {}
                _ => return Err(self.expected("a member name in quotes or '}'")),
            }
            let start = self.at;
            let name = self.string()?;
            let name_span = Span::new(start, self.at);
            if !seen.insert(name.clone()) {
                return Err(Malformed {
                    span: name_span,
                    message: format!("{name:?} stands twice in this object: merge the two"),
                });
            }
            self.space()?;
            if self.peek() != Some(b':') {
                return Err(self.expected("':'"));
            }
            self.at += 1;
            self.space()?;
            let node = self.value(depth + 1)?;
            members.push(Member {
                name,
                name_span,
                node,
            });
            self.separator(b'}')?;
        }
    }

    fn array(&mut self, depth: usize) -> Result<Value, Malformed> {
        self.at += 1;
        let mut items = Vec::new();
        loop {
            self.space()?;
            if self.peek() == Some(b']') {
                self.at += 1;
                return Ok(Value::Array(items));
            }
            items.push(self.value(depth + 1)?);
            self.separator(b']')?;
        }
    }

    /// A comma, or the closing bracket, which is left for the caller.
    fn separator(&mut self, close: u8) -> Result<(), Malformed> {
        self.space()?;
        match self.peek() {
            Some(b',') => {
                self.at += 1;
                Ok(())
            }
            Some(byte) if byte == close => Ok(()),
            _ => Err(self.expected(&format!("',' or {:?}", char::from(close)))),
        }
    }

    fn string(&mut self) -> Result<String, Malformed> {
        let start = self.at;
        self.at += 1;
        let mut value = String::new();
        loop {
            let plain = self
                .rest()
                .find(|c: char| c == '"' || c == '\\' || c < ' ')
                .unwrap_or_else(|| self.rest().len());
            value.push_str(&self.text[self.at..self.at + plain]);
            self.at += plain;
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(value);
                }
                Some(b'\\') => value.push(self.escape()?),
                Some(_) => {
                    return Err(self.refuse("a line break or control character inside a string"));
                }
                None => {
                    return Err(Malformed {
                        span: Span::new(start, start + 1),
                        message: "this string has no end: close it with '\"'".to_owned(),
                    });
                }
            }
        }
    }

    fn escape(&mut self) -> Result<char, Malformed> {
        let escape = self.refuse("not an escape that JSON knows");
        self.at += 1;
        let byte = self.peek().ok_or_else(|| escape.clone())?;
        self.at += 1;
        Ok(match byte {
            b'"' => '"',
            b'\\' => '\\',
            b'/' => '/',
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let first = self.hex4().ok_or_else(|| escape.clone())?;
                let code = match first {
                    // A surrogate pair: RFC 8259, section 7.
                    0xd800..0xdc00 => {
                        if !self.rest().starts_with("\\u") {
                            return Err(escape);
                        }
                        self.at += 2;
                        let second = self.hex4().ok_or_else(|| escape.clone())?;
                        if !(0xdc00..0xe000).contains(&second) {
                            return Err(escape);
                        }
                        0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)
                    }
                    code => code,
                };
                char::from_u32(code).ok_or(escape)?
            }
            _ => return Err(escape),
        })
    }

    fn hex4(&mut self) -> Option<u32> {
        let digits = self.rest().get(..4)?;
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let code = u32::from_str_radix(digits, 16).ok()?;
        self.at += 4;
        Some(code)
    }

    fn number(&mut self) -> Result<Value, Malformed> {
        let length = self
            .rest()
            .find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c)))
            .unwrap_or_else(|| self.rest().len());
        let digits = &self.rest()[..length];
        // serde_json decides what a JSON number is; its value is not used.
        if serde_json::from_str::<serde_json::Number>(digits).is_err() {
            return Err(self.refuse(format!("{digits:?} is not a number that JSON knows")));
        }
        let value = Value::Number(digits.to_owned());
        self.at += length;
        Ok(value)
    }

    fn word(&mut self) -> Result<Value, Malformed> {
        let length = self
            .rest()
            .find(|c: char| !c.is_ascii_alphanumeric())
            .unwrap_or_else(|| self.rest().len());
        let value = match &self.rest()[..length] {
            "null" => Value::Null,
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            _ => return Err(self.refuse("text goes in double quotes")),
        };
        self.at += length;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(text: &str) -> String {
        parse(text).unwrap_err().message
    }

    #[test]
    fn comments_and_trailing_commas_are_fine() {
        let text = "// head\n{ \"a\": [1, /* two */ 2,], }\n// tail";
        let Some(Node {
            value: Value::Object(members),
            span,
        }) = parse(text).unwrap()
        else {
            panic!("not an object");
        };
        assert_eq!(span, Span::new(8, 35));
        assert_eq!(members[0].name, "a");
        assert!(matches!(&members[0].node.value, Value::Array(items) if items.len() == 2));
    }

    #[test]
    fn nothing_but_comments_is_no_policy() {
        for text in ["", "  \n", "// only\n", "/* only */"] {
            assert_eq!(parse(text), Ok(None));
        }
    }

    #[test]
    fn broken_text_is_refused_in_words() {
        assert_eq!(
            refused("{\"a\": }"),
            "expected a value, found '}'".to_owned()
        );
        assert!(refused("{\"a\": 1 \"b\": 2}").starts_with("expected ',' or '}'"));
        assert!(refused("{\"a\": 1, \"a\": 2}").contains("stands twice"));
        assert!(refused("{} {}").starts_with("text after the end"));
        assert!(refused("[/* ]").contains("has no end"));
        assert!(refused("\"a\nb\"").contains("control character"));
        assert!(refused("[01]").contains("not a number"));
        assert!(refused("[yes]").contains("double quotes"));
        assert!(refused("[,]").starts_with("expected a value"));
        assert!(refused(r#""\ud800""#).contains("escape"));
    }

    #[test]
    fn a_megabyte_of_brackets_is_refused_at_the_depth_limit() {
        let nested = "[".repeat(MAX_SIZE);
        assert!(refused(&nested).contains("nested deeper"));
        assert!(refused(&" ".repeat(MAX_SIZE + 1)).contains("at most"));
    }

    #[test]
    fn escapes_are_decoded() {
        let node = parse(r#""\u00e9\ud83d\ude00\n\"\/""#).unwrap().unwrap();
        assert_eq!(node.value, Value::String("é😀\n\"/".to_owned()));
    }

    fn as_json(node: &Node) -> serde_json::Value {
        match &node.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Number(text) => serde_json::from_str(text).unwrap(),
            Value::String(text) => text.clone().into(),
            Value::Array(items) => items.iter().map(as_json).collect(),
            Value::Object(members) => members
                .iter()
                .map(|member| (member.name.clone(), as_json(&member.node)))
                .collect(),
        }
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<String>().prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn plain_json_means_what_serde_json_says(value in json()) {
            let text = serde_json::to_string_pretty(&value).unwrap();
            prop_assert_eq!(as_json(&parse(&text).unwrap().unwrap()), value);
        }

        #[test]
        fn no_text_panics(text in ".{0,200}", json in r#"[\[\]{}",:/*\\u0-9a ]{0,60}"#) {
            let _ = parse(&text);
            let _ = parse(&json);
        }
    }
}
