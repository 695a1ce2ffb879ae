//! What an operator reads of a drop reason: the counter's name and meaning are written in the code, and what
//! to do about it in a document, which must not fall behind.

use std::path::Path;

use super::File;

const CODE: &str = "mesh-common/src/reason.rs";
const DOCUMENT: &str = "docs/dataplane.md";

pub(super) fn findings(files: &[File]) -> Vec<String> {
    let text = |path: &str| {
        let file = files.iter().find(|file| file.path == Path::new(path));
        file.map_or("", |file| &file.text)
    };
    let document = text(DOCUMENT);
    let reasons = reasons(text(CODE));
    if reasons.is_empty() {
        return vec![format!(
            "{CODE}: no drop reasons found: is this rule still right?"
        )];
    }
    let undocumented = reasons.iter().filter(|(name, help)| {
        let row = format!("| `{name}` | {help} | ");
        !document
            .lines()
            .any(|line| line.starts_with(&row) && line.len() > row.len() + 2)
    });
    undocumented
        .map(|(name, help)| {
            format!("{DOCUMENT}: add `| `{name}` | {help} | what to do |`: an operator looks for it there")
        })
        .collect()
}

/// Names and meanings, from lines such as `NoRule = 23, "no rule",` and the one that follows.
fn reasons(code: &str) -> Vec<(&str, &str)> {
    let mut lines = code.lines().map(str::trim);
    let mut reasons = Vec::new();
    while let Some(line) = lines.next() {
        let Some((_, rest)) = line.split_once(" = ") else {
            continue;
        };
        if let Some((number, name)) = rest.split_once(", \"")
            && number.bytes().all(|byte| byte.is_ascii_digit())
            && let Some(name) = name.strip_suffix("\",")
            && let Some(help) = lines.next()
        {
            reasons.push((name, help.trim_start_matches('"').trim_end_matches("\";")));
        }
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(document: &str) -> Vec<String> {
        let code = "reasons! {\n    NoRule = 23, \"no rule\",\n        \"None allows it.\";\n}\n";
        let file = |path: &str, text: &str| File {
            path: path.into(),
            text: text.to_owned(),
        };
        findings(&[file(CODE, code), file(DOCUMENT, document)])
    }

    #[test]
    fn a_reason_has_a_row_with_its_own_words_and_a_remedy() {
        assert_eq!(
            about("| `no rule` | None allows it. | add one |\n"),
            [""; 0]
        );
        for document in [
            "",
            "| `no rule` | None allows it. | |\n",
            "| `no rule` | Another meaning. | add one |\n",
        ] {
            let findings = about(document);
            assert!(
                findings[0].contains("`no rule` | None allows it."),
                "{document}: {findings:?}"
            );
        }
    }
}
