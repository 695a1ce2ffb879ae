//! Rules about the text of files.

use std::path::Path;

use super::File;

pub(super) fn findings(files: &[File]) -> Vec<String> {
    let mut findings = Vec::new();
    for file in files {
        let mut report = |line: usize, what: &str| {
            findings.push(format!("{}:{line}: {what}", file.path.display()));
        };
        if is_rust(&file.path) && !is_generated(&file.path) {
            opens_with_its_purpose(&file.text, &mut report);
            says_why_unsafe_is_sound(&file.text, &mut report);
        }
        if file
            .path
            .file_name()
            .is_some_and(|name| name == "Cargo.toml")
        {
            takes_the_workspace_lints(&file.text, &mut report);
        }
        if !file.path.ends_with("Cargo.lock") {
            names_no_place_of_its_making(&file.text, &mut report);
        }
    }
    findings
}

fn is_rust(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rs")
}

fn is_generated(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "gen")
}

fn opens_with_its_purpose(text: &str, report: &mut impl FnMut(usize, &str)) {
    if !text.starts_with("//!") {
        report(
            1,
            "opens without `//!`: say what the file is, then what is hard about it",
        );
    }
}

/// clippy asks for it too, but does not see the crates outside the workspace.
fn says_why_unsafe_is_sound(text: &str, report: &mut impl FnMut(usize, &str)) {
    let lines: Vec<_> = text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        if !UNSAFE.iter().any(|form| code.contains(form)) {
            continue;
        }
        let near = &lines[index.saturating_sub(SAFETY_REACH)..=index];
        if !near.iter().any(|line| line.contains("SAFETY:")) {
            report(
                index + 1,
                "unsafe without `// SAFETY:`: state the fact that makes it sound",
            );
        }
    }
}

// In pieces, so that this file keeps its own rules; so are the names further down.
const UNSAFE: &[&str] = &[concat!("unsafe", " {"), concat!("unsafe", " impl")];

/// Lines that a statement and the comment above it may take.
const SAFETY_REACH: usize = 8;

fn takes_the_workspace_lints(text: &str, report: &mut impl FnMut(usize, &str)) {
    let Ok(manifest) = text.parse::<toml::Table>() else {
        report(1, "is no TOML");
        return;
    };
    // A package with a workspace of its own (BPF, fuzz) cannot inherit.
    if !manifest.contains_key("package") || manifest.contains_key("workspace") {
        return;
    }
    let inherits = manifest
        .get("lints")
        .and_then(|lints| lints.get("workspace"))
        .and_then(toml::Value::as_bool);
    if inherits != Some(true) {
        report(
            1,
            "lacks `[lints] workspace = true`: one set of lints for all crates",
        );
    }
}

fn names_no_place_of_its_making(text: &str, report: &mut impl FnMut(usize, &str)) {
    for (index, line) in text.lines().enumerate() {
        for place in FOLDERS {
            if let Some((before, after)) = line.split_once(place)
                && !before.ends_with(|c: char| c.is_alphanumeric() || "_-.}/".contains(c))
                && after.starts_with(|c: char| c.is_alphanumeric() || c == '.')
            {
                report(
                    index + 1,
                    "names a folder of one machine: nobody else has it",
                );
            }
        }
        if REGISTRIES.iter().any(|host| line.contains(host)) {
            report(
                index + 1,
                "names a package registry's host: mirrors and offline builds exist",
            );
        }
    }
}

const FOLDERS: &[&str] = &[
    concat!("/ho", "me/"),
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
];
const REGISTRIES: &[&str] = &[concat!("crates", ".io"), concat!("static.", "crates")];

#[cfg(test)]
mod tests {
    use super::*;

    fn about(path: &str, text: &str) -> Vec<String> {
        findings(&[File {
            path: path.into(),
            text: text.into(),
        }])
    }

    #[test]
    fn a_tidy_file_gives_no_finding() {
        let text = "//! A file.\n// SAFETY: it is.\nunsafe { f() }\n";
        assert_eq!(about("a.rs", text), Vec::<String>::new());
    }

    #[test]
    fn each_rule_about_rust_is_reported_with_its_line() {
        let text = "fn f() {\n UNSAFE { g() }\n}\n";
        let lines: Vec<_> = about("a.rs", &text.replace("UNSAFE", "unsafe"))
            .iter()
            .map(|finding| finding.split(':').nth(1).unwrap().to_owned())
            .collect();
        assert_eq!(lines, ["1", "2"]);
    }

    #[test]
    fn a_manifest_without_the_workspace_lints_is_reported() {
        assert_eq!(about("a/Cargo.toml", "[package]\nname = \"a\"\n").len(), 1);
        assert!(about("a/Cargo.toml", "[package]\n[lints]\nworkspace = true\n").is_empty());
        assert!(about("fuzz/Cargo.toml", "[package]\n[workspace]\n").is_empty());
    }

    #[test]
    fn a_folder_of_one_machine_and_a_registry_are_reported() {
        let home = format!("cd {}me/me/x", "/ho");
        assert_eq!(about("README.md", &home).len(), 1);
        let registry = format!("see crates{}", ".io");
        assert_eq!(about("README.md", &registry).len(), 1);
    }
}
