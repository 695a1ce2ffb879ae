//! A megabyte of anything is answered soon, and costs little memory.
//!
//! Whoever may try a policy can send any text. What is measured is the most that this process ever
//! held, so nothing else runs beside it.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use std::time::Duration;

use mesh_core::policy::{Document, MAX_SIZE, check, compile};

mod support;

use support::Mesh;

/// Of this thread's own time, not optimised. With optimisation it is a tenth of that.
const LONGEST: Duration = Duration::from_secs(20);

/// What this whole process holds at most while a megabyte is read, checked and compiled.
const MOST: u64 = 256 << 20;

/// Bytes of this process in memory at most, since [`forget`].
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.unwrap().trim().trim_end_matches("kB").trim();
    kilobytes.parse::<u64>().unwrap() << 10
}

/// How long this thread has run: what others do on the machine meanwhile is not counted.
fn own_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// Linux since 4.0: proc(5), `/proc/pid/clear_refs`.
fn forget() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

fn mesh() -> Mesh {
    let mut mesh = Mesh::default();
    mesh.user("ada@example.com");
    for number in 0..40 {
        let owner = ["tag:a", "tag:b", "ada@example.com"][number % 3];
        let node = mesh.node("n", owner);
        match number % 10 {
            0 => mesh.route(node, "0.0.0.0/0"),
            1 => mesh.route(node, "10.0.0.0/8"),
            _ => {}
        }
    }
    mesh
}

/// As much of `item` as fits between the two.
fn fill(head: &str, item: &str, tail: &str) -> String {
    let room = MAX_SIZE - head.len() - tail.len();
    format!("{head}{}{tail}", item.repeat(room / item.len()))
}

/// As [`fill`], each item another.
fn count(head: &str, item: impl Fn(usize) -> String, tail: &str) -> String {
    let mut text = head.to_owned();
    for number in 0.. {
        let item = item(number);
        if text.len() + item.len() + tail.len() > MAX_SIZE {
            break;
        }
        text += &item;
    }
    text + tail
}

const TAGS: &str = r#""tagOwners": {"tag:a": [], "tag:b": []}"#;

/// What is refused, by what it is.
fn refused() -> Vec<(&'static str, String)> {
    let nested = format!("{}{},", "[".repeat(40), "]".repeat(40));
    vec![
        ("brackets", "[".repeat(MAX_SIZE)),
        ("objects", fill("", "{\"a\":", "")),
        ("comments", fill("", "/*", "")),
        ("quotes", fill("[\"", "\\\"", "")),
        (
            "nesting that is allowed",
            fill("{\"acls\":[", &nested, "]}"),
        ),
        ("numbers", fill("{\"acls\":[", "1,", "]}")),
        ("empty rules", fill("{\"acls\":[", "{},", "]}")),
        (
            "members",
            count("{\"acls\":[{", |n| format!("\"m{n}\":0,"), "}]}"),
        ),
        (
            "names",
            count("{\"groups\":{", |n| format!("\"g{n}\":[],"), "}}"),
        ),
        (
            "ports",
            fill(
                "{\"acls\":[{\"action\":\"accept\",\"dst\":[\"*:1",
                ",0",
                "\"]}]}",
            ),
        ),
        (
            "ip sets of themselves",
            count(
                "{\"ipsets\":{",
                |n| format!("\"ipset:{n}\":[\"ipset:{}\"],", n + 1),
                "}}",
            ),
        ),
        (
            "nobody's tags",
            count(
                "{\"grants\":[{\"ip\":[\"*\"],\"dst\":[\"*\"],\"src\":[",
                |n| format!("\"tag:t{n}\","),
                "]}]}",
            ),
        ),
    ]
}

/// What makes sense, and as much of it as possible.
fn accepted() -> Vec<(&'static str, String)> {
    let rules = format!("{{{TAGS},\"acls\":[");
    vec![
        ("white space", fill("", " \n", "")),
        (
            "rules for everybody",
            fill(
                &rules,
                r#"{"action":"accept","src":["*"],"dst":["*:22"]},"#,
                "]}",
            ),
        ),
        (
            "rules for anybody",
            count(
                &rules,
                |n| {
                    format!(
                        r#"{{"action":"accept","src":["tag:a","tag:b"],"dst":["tag:b:{}"]}},"#,
                        1 + n % 65_000
                    )
                },
                "]}",
            ),
        ),
        (
            "denies",
            count(
                &format!("{{{TAGS},\"denies\":["),
                |n| format!(r#"{{"src":["*"],"dst":["*:{}"]}},"#, 1 + n % 65_000),
                "]}",
            ),
        ),
        (
            "prefixes behind a router",
            count(
                &rules,
                |n| {
                    format!(
                        r#"{{"action":"accept","src":["tag:a"],"dst":["10.{}.{}.0/24:80"]}},"#,
                        n % 16_000 / 256,
                        n % 16_000 % 256
                    )
                },
                "]}",
            ),
        ),
        (
            "sources",
            count(
                &format!("{rules}{{\"action\":\"accept\",\"dst\":[\"*:*\"],\"src\":["),
                |n| format!(r#""user{n}@example.com","#),
                "]}]}",
            ),
        ),
        (
            "ports",
            count(
                &format!("{rules}{{\"action\":\"accept\",\"src\":[\"*\"],\"dst\":[\"tag:a:1"),
                |n| format!(",{}", 3 + 2 * n % 65_000),
                "\"]}]}",
            ),
        ),
        (
            "postures",
            fill(
                "{\"postures\":{\"posture:p\":[",
                "\"node:os == 'linux'\",",
                "]}}",
            ),
        ),
        (
            "logins",
            count(
                &format!("{{{TAGS},\"ssh\":["),
                |n| {
                    format!(
                        r#"{{"action":"accept","src":["tag:a"],"dst":["tag:b"],"users":["u{n}"]}},"#
                    )
                },
                "]}",
            ),
        ),
    ]
}

#[test]
fn a_megabyte_of_anything_is_answered_soon_and_in_bounded_memory() {
    let mesh = mesh();
    let subjects = mesh.subjects();
    let mut report = Vec::new();
    let mut measure = |name: &str, text: &str, makes_sense: bool| {
        forget();
        let start = own_time();
        let document = Document::parse(text);
        let checked = document.and_then(|document| check(&document, &subjects).map(|()| document));
        let ok = checked.is_ok();
        let refusal = checked
            .as_ref()
            .err()
            .map_or_else(String::new, ToString::to_string);
        let refusal: String = refusal.chars().take(300).collect();
        if let Ok(document) = checked {
            compile(&document, &subjects, None);
        }
        let (took, held) = (own_time() - start, peak());
        report.push(format!(
            "{name}: {} ms, {} MiB",
            took.as_millis(),
            held >> 20
        ));
        assert_eq!(ok, makes_sense, "{name}: {refusal}");
        assert!(took < LONGEST, "{name} took {took:?}");
        assert!(held < MOST, "{name} held {} MiB", held >> 20);
    };
    for (name, text) in refused() {
        measure(name, &text, false);
    }
    for (name, text) in accepted() {
        measure(name, &text, true);
    }
    println!("{}", report.join("\n"));
}
