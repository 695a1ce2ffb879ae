//! What passed inside, read from what the suites print.
//!
//! libtest closes with `test result: …`, the demo with `N assertions hold`, and around each suite
//! stand init's own lines. A suite may fail without having counted anything (a crash, its limit,
//! the demo's first broken assertion): that is one failure, not none.

use mesh_tests::vm::plan;

/// How the suites of one machine fared.
#[derive(Debug, Default)]
pub(crate) struct Report {
    suites: Vec<Suite>,
}

#[derive(Debug, Default)]
struct Suite {
    name: String,
    passed: u64,
    failed: u64,
    /// What init said at the end.
    verdict: Option<String>,
}

impl Report {
    pub(crate) fn read(&mut self, line: &str) {
        if let Some(word) = line.strip_prefix(plan::PREFIX) {
            if let Some(name) = word.strip_prefix(plan::BEGIN) {
                self.suites.push(Suite {
                    name: name.to_owned(),
                    ..Suite::default()
                });
            } else if let Some((_, verdict)) = word
                .strip_prefix(plan::END)
                .and_then(|rest| rest.split_once(" ... "))
                && let Some(suite) = self.suites.last_mut()
            {
                suite.end(verdict);
            }
        } else if let Some(suite) = self.suites.last_mut() {
            suite.read(line);
        }
    }

    /// A line for each suite, and one for all, which reads as libtest's own.
    pub(crate) fn closing(&self, kernel: &str, success: bool, seconds: u64) -> Vec<String> {
        let mut lines: Vec<String> = self
            .suites
            .iter()
            .map(|suite| {
                let verdict = suite.verdict.as_deref().unwrap_or("FAIL (never ended)");
                format!(
                    "vm {kernel} {}: {} passed, {verdict}",
                    suite.name, suite.passed
                )
            })
            .collect();
        let passed: u64 = self.suites.iter().map(|suite| suite.passed).sum();
        let failed: u64 = self.suites.iter().map(|suite| suite.failed).sum();
        // A machine that failed outside of its suites has failed too.
        let failed = if success { failed } else { failed.max(1) };
        let word = if success { "ok" } else { "FAILED" };
        lines.push(format!(
            "test result: {word}. {passed} passed; {failed} failed; on {kernel} in {seconds} s"
        ));
        lines
    }
}

impl Suite {
    fn read(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.passed += before(result, "passed");
            self.failed += before(result, "failed");
        } else if line.ends_with(" assertions hold") {
            self.passed += before(line, "assertions");
        }
    }

    fn end(&mut self, verdict: &str) {
        if !verdict.starts_with("ok") {
            self.failed = self.failed.max(1);
        }
        self.verdict = Some(verdict.to_owned());
    }
}

/// The number in front of a word.
fn before(line: &str, word: &str) -> u64 {
    let words: Vec<&str> = line.split([' ', ';']).collect();
    words
        .windows(2)
        .filter(|pair| pair[1] == word)
        .find_map(|pair| pair[0].parse().ok())
        .unwrap_or(0)
}
