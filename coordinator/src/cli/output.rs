//! What a verb prints.
//!
//! A reader that goes away (`| head -1`) is no error: the verb is done. And a node may call itself
//! anything, so text from nodes reaches a terminal without its control characters.

use std::io::{self, Write as _};

use serde_json::Value;

#[derive(Debug, Default)]
pub(super) struct Output;

impl Output {
    pub(super) fn line(&self, text: &str) {
        self.raw(&format!("{}\n", printable(text)));
    }

    /// Text as it is, which must be ours or the operator's own.
    pub(super) fn raw(&self, text: &str) {
        let mut stdout = io::stdout().lock();
        let written = stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush());
        if let Err(failure) = written {
            if failure.kind() == io::ErrorKind::BrokenPipe {
                std::process::exit(0);
            }
            error(&format!(
                "mesh-coordinator: write to standard output: {failure}"
            ));
            std::process::exit(1);
        }
    }

    pub(super) fn json(&self, value: &Value) {
        self.raw(&format!("{value:#}\n"));
    }

    /// Columns, each as wide as its widest cell.
    pub(super) fn table(&self, header: &[&str], rows: &[Vec<String>]) {
        let rows: Vec<Vec<String>> =
            std::iter::once(header.iter().map(ToString::to_string).collect())
                .chain(
                    rows.iter()
                        .map(|row| row.iter().map(|cell| printable(cell)).collect()),
                )
                .collect();
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row: &Vec<String>| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..header.len()).map(width).collect();
        for row in &rows {
            let cells = row.iter().zip(&widths);
            let line: Vec<String> = cells
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            self.raw(&format!("{}\n", line.join("  ").trim_end()));
        }
    }
}

/// One line to standard error; there is nobody to tell if even that fails.
pub(super) fn error(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Without control characters but line ends.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control() || *c == '\n')
        .collect()
}

/// `3m ago`, `in 2h`: a time beside now, in one unit.
pub(super) fn relative(at: u64) -> String {
    let now = now();
    if at > now {
        format!("in {}", duration(at - now))
    } else {
        format!("{} ago", duration(now - at))
    }
}

pub(super) fn is_past(at: u64) -> bool {
    at <= now()
}

fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_do_not_reach_a_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\u{9b}c\nd"), "a[31mbc\nd");
    }

    #[test]
    fn durations_are_in_one_unit() {
        let texts = [5, 119, 120, 7_200, 172_800].map(duration);
        assert_eq!(texts, ["5s", "119s", "2m", "2h", "2d"]);
    }
}
