//! What is wrong with a policy text, said where it stands.
//!
//! People fix a file faster when they hear everything at once, so problems are collected and only
//! turned into lines and columns at the end.

use std::fmt;

/// A stretch of the policy text, in bytes from its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Span {
    pub start: u32,
    pub end: u32,
}

impl Span {
    pub(super) fn new(start: usize, end: usize) -> Self {
        let clamp = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        Self {
            start: clamp(start),
            end: clamp(end),
        }
    }
}

/// A value and where the text says it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Spanned<T> {
    pub value: T,
    pub span: Span,
}

/// One thing to put right.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// From 1.
    pub line: u32,
    /// In characters, from 1.
    pub column: u32,
    /// The text that is meant, cut to a readable length.
    pub offending: String,
    /// What is wrong with it, and what would be right.
    pub message: String,
}

/// Why a policy was refused. Never empty, in the order of the text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problems {
    file: String,
    problems: Vec<Problem>,
}

impl Problems {
    /// The name that stands before line and column, `policy` unless told.
    #[must_use]
    pub fn in_file(self, file: &str) -> Self {
        Self {
            file: file.to_owned(),
            ..self
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter()
    }
}

impl std::error::Error for Problems {}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            let Problem {
                line,
                column,
                message,
                ..
            } = problem;
            write!(f, "{}:{line}:{column}: {message}", self.file)?;
        }
        Ok(())
    }
}

/// What a text is called that was given no name.
pub(super) const UNNAMED: &str = "policy";

/// More than this many would not be read.
const MOST: usize = 50;

/// Problems on their way, known by span.
#[derive(Debug, Default)]
pub(super) struct Complaints(Vec<(Span, String)>);

impl Complaints {
    pub(super) fn add(&mut self, span: Span, message: impl Into<String>) {
        if self.0.len() < MOST {
            self.0.push((span, message.into()));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `Ok` when nothing was complained of.
    pub(super) fn settle(mut self, text: &str) -> Result<(), Problems> {
        if self.0.is_empty() {
            return Ok(());
        }
        self.0.sort();
        self.0.dedup();
        let lines = Lines::of(text);
        let problems = self
            .0
            .into_iter()
            .map(|(span, message)| {
                let (line, column) = lines.position(text, span);
                Problem {
                    line,
                    column,
                    offending: excerpt(text, span),
                    message,
                }
            })
            .collect();
        Err(Problems {
            file: UNNAMED.to_owned(),
            problems,
        })
    }
}

/// Where the lines of a text start.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Lines(Vec<u32>);

impl Lines {
    pub(super) fn of(text: &str) -> Self {
        let breaks = text.match_indices('\n').map(|(at, _)| at + 1);
        let starts = std::iter::once(0).chain(breaks);
        Self(starts.map(|at| Span::new(at, at).start).collect())
    }

    /// Line of a span's first byte, from 1.
    pub(super) fn line(&self, span: Span) -> u32 {
        let line = self.0.partition_point(|&start| start <= span.start);
        u32::try_from(line).unwrap_or(u32::MAX).max(1)
    }

    /// Line and column, both from 1.
    fn position(&self, text: &str, span: Span) -> (u32, u32) {
        let line = self.line(span);
        let start = self.0.get(line as usize - 1).copied().unwrap_or_default();
        let before = text.get(start as usize..span.start as usize);
        let column = before.unwrap_or_default().chars().count() + 1;
        (line, u32::try_from(column).unwrap_or(u32::MAX))
    }
}

/// What an error message quotes at most, in characters.
const EXCERPT: usize = 60;

fn excerpt(text: &str, span: Span) -> String {
    let meant = text
        .get(span.start as usize..span.end as usize)
        .unwrap_or_default();
    let mut short: String = meant.chars().take(EXCERPT).collect();
    if short.len() < meant.len() {
        short.push('…');
    }
    short
}
