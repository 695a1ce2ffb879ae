//! `policy fmt`: one layout for policy texts, with every comment kept.
//!
//! As gofmt and hujsonfmt do, it decides about space and never about lines: what its author put on
//! one line stays on one line, what spans several lines is spread out, an item a line. Names,
//! strings and numbers stay as they are written. Formatting twice changes nothing.

use super::hujson;
use super::problem::{Complaints, Problems};

mod tree;

use tree::{Body, Comment, Item, Text};

/// The same policy, laid out. Refuses what is no HuJSON; whether it makes sense is not asked.
pub fn format(text: &str) -> Result<String, Problems> {
    let mut complaints = Complaints::default();
    if let Err(malformed) = hujson::parse(text) {
        complaints.add(malformed.span, malformed.message);
    }
    complaints.settle(text)?;
    let Text {
        leading,
        value,
        trailing,
    } = tree::read(text);
    let mut out = Writer::default();
    out.own_lines(&leading);
    if let Some(value) = value {
        out.item(&value, "");
        out.beside(&value.trailing);
        out.line();
    }
    out.own_lines(&trailing);
    Ok(out.text)
}

#[derive(Default)]
struct Writer {
    text: String,
    depth: usize,
}

impl Writer {
    fn line(&mut self) {
        self.text.push('\n');
    }

    fn indent(&mut self) {
        self.text.extend(std::iter::repeat_n('\t', self.depth));
    }

    /// An empty line, one at most.
    fn blank(&mut self) {
        if !self.text.is_empty() && !self.text.ends_with("\n\n") {
            self.line();
        }
    }

    fn own_lines(&mut self, comments: &[Comment<'_>]) {
        for comment in comments {
            if comment.blank {
                self.blank();
            }
            self.indent();
            self.text.push_str(comment.text);
            self.line();
        }
    }

    /// Comments behind what they are about, on its line.
    fn beside(&mut self, comments: &[Comment<'_>]) {
        for comment in comments {
            self.text.push(' ');
            self.text.push_str(comment.text);
        }
    }

    /// Name and value; `padding` stands between the two.
    fn item(&mut self, item: &Item<'_>, padding: &str) {
        if let Some(name) = item.name {
            self.text.push_str(name);
            self.text.push_str(": ");
            self.text.push_str(padding);
        }
        for comment in &item.before_value {
            self.text.push_str(comment.text);
            self.text.push(' ');
        }
        match &item.body {
            Body::Plain(text) => self.text.push_str(text),
            Body::Composite {
                brackets: [open, close],
                items,
                dangling,
                spread,
            } => {
                self.text.push(*open);
                if *spread {
                    self.spread(items, dangling);
                } else {
                    self.in_line(items, dangling);
                }
                self.text.push(*close);
            }
        }
    }

    fn in_line(&mut self, items: &[Item<'_>], dangling: &[Comment<'_>]) {
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.text.push_str(", ");
            }
            for comment in &item.leading {
                self.text.push_str(comment.text);
                self.text.push(' ');
            }
            self.item(item, "");
            self.beside(&item.trailing);
        }
        for (index, comment) in dangling.iter().enumerate() {
            if index > 0 || !items.is_empty() {
                self.text.push(' ');
            }
            self.text.push_str(comment.text);
        }
    }

    fn spread(&mut self, items: &[Item<'_>], dangling: &[Comment<'_>]) {
        self.line();
        self.depth += 1;
        let widths = aligned(items);
        for (item, width) in items.iter().zip(widths) {
            if item.blank {
                self.blank();
            }
            self.own_lines(&item.leading);
            if item.blank_after_leading {
                self.blank();
            }
            self.indent();
            let name = item.name.map_or(0, |name| name.chars().count());
            self.item(item, &" ".repeat(width.saturating_sub(name)));
            self.text.push(',');
            self.beside(&item.trailing);
            self.line();
        }
        self.own_lines(dangling);
        self.depth -= 1;
        self.indent();
    }
}

/// For each item the width of the names around it: values of members on lines that follow each
/// other stand in one column.
fn aligned(items: &[Item<'_>]) -> Vec<usize> {
    let mut widths = Vec::with_capacity(items.len());
    let mut run = Vec::new();
    let close = |run: &mut Vec<usize>, widths: &mut Vec<usize>| {
        let widest = run.iter().copied().max().unwrap_or_default();
        widths.extend(run.drain(..).map(|_| widest));
    };
    for item in items {
        let apart = item.blank || !item.leading.is_empty() || item.blank_after_leading;
        if apart {
            close(&mut run, &mut widths);
        }
        let name = item.name.map_or(0, |name| name.chars().count());
        if item.is_spread() {
            close(&mut run, &mut widths);
            widths.push(name);
        } else {
            run.push(name);
        }
    }
    close(&mut run, &mut widths);
    widths
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(text: &str, formatted: &str) {
        assert_eq!(format(text).unwrap(), formatted);
        assert_eq!(format(formatted).unwrap(), formatted, "a second time");
    }

    #[test]
    fn lines_stay_lines_and_space_is_put_right() {
        check("{ \"acls\":[ ],}", "{\"acls\": []}\n");
        check(
            "{\"acls\": [\n{\"action\":\"accept\",   \"src\":[\"a\",\"b\"]}\n\n\n, {}]}",
            "{\"acls\": [\n\t{\"action\": \"accept\", \"src\": [\"a\", \"b\"]},\n\t{},\n]}\n",
        );
        check("[{\r\n\"a\": 1}]\r\n", "[{\n\t\"a\": 1,\n}]\n");
    }

    #[test]
    fn values_on_lines_that_follow_each_other_stand_in_one_column() {
        check(
            "{\n\"a\": 1,\n\"long\": 2,\n\n\"b\": [\n1],\n\"cc\": 3}",
            "{\n\t\"a\":    1,\n\t\"long\": 2,\n\n\t\"b\": [\n\t\t1,\n\t],\n\t\"cc\": 3,\n}\n",
        );
    }

    #[test]
    fn every_comment_is_kept_where_it_belongs() {
        check(
            "// first\n\n{ // open\n\"a\": /* in */ 1, // beside\n\n\n// before\n\"b\" // odd\n: 2 /* x */ /* y */\n// last\n} // end\n\n// after",
            "// first\n{\n\t// open\n\t\"a\": /* in */ 1, // beside\n\n\t// before\n\t// odd\n\t\"b\": 2, /* x */ /* y */\n\t// last\n} // end\n\n// after\n",
        );
        check(
            "[1, /* two */ 2 /* three */]",
            "[1, /* two */ 2 /* three */]\n",
        );
        check("[1 // a\n// b\n, 2]", "[\n\t1, // a\n\t// b\n\t2,\n]\n");
        check("// nothing else\n", "// nothing else\n");
        check("", "");
    }

    #[test]
    fn the_example_is_laid_out_already() {
        check(crate::policy::EXAMPLE, crate::policy::EXAMPLE);
    }

    #[test]
    fn what_is_no_hujson_is_refused_with_its_place() {
        let problems = format("{\n  \"a\" 1}").unwrap_err();
        assert_eq!(problems.to_string(), "policy:2:7: expected ':', found '1'");
    }

    /// White space and comments that may stand between any two tokens.
    fn gap() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(
            &[" ", "\n", "\n\n\n", "\t", "// c\n", "/* d */", "/* e\n */"][..],
        );
        prop::collection::vec(piece, 0..3).prop_map(|pieces| pieces.concat())
    }

    /// Any text of the language, laid out in any way.
    fn text() -> impl Strategy<Value = String> {
        let word = prop::sample::select(&["1", "true", "null", "\"a // b\"", "\"\\\"/*\""][..]);
        let leaf = (gap(), word, gap()).prop_map(|(a, word, b)| format!("{a}{word}{b}"));
        let list = |inner: BoxedStrategy<String>| {
            let items = prop::collection::vec(inner, 0..4);
            (items, any::<bool>(), gap()).prop_map(|(items, comma, end)| {
                let comma = if comma && !items.is_empty() { "," } else { "" };
                format!("{}{comma}{end}", items.join(","))
            })
        };
        leaf.prop_recursive(4, 24, 4, move |inner| {
            let member = (gap(), any::<u16>(), gap(), inner.clone());
            let member = member.prop_map(|(a, name, b, value)| format!("{a}\"{name}\"{b}:{value}"));
            prop_oneof![
                (gap(), list(inner.boxed()), gap())
                    .prop_map(|(a, list, b)| format!("{a}[{list}]{b}")),
                (gap(), list(member.boxed()), gap())
                    .prop_map(|(a, list, b)| format!("{a}{{{list}}}{b}")),
            ]
        })
    }

    fn value(text: &str) -> Option<String> {
        let node = hujson::parse(text).ok()??;
        Some(node.value.to_json())
    }

    fn comments(text: &str) -> [usize; 3] {
        ["// c\n", "/* d */", "/* e\n */"].map(|comment| text.matches(comment).count())
    }

    proptest! {
        #[test]
        fn formatting_changes_space_alone_and_once(text in text()) {
            // The same name twice is no object.
            prop_assume!(hujson::parse(&text).is_ok());
            let formatted = format(&text).unwrap();
            prop_assert_eq!(value(&formatted), value(&text));
            prop_assert_eq!(comments(&formatted), comments(&text));
            prop_assert_eq!(format(&formatted).unwrap(), formatted);
        }
    }
}
