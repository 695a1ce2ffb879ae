//! The text of a large policy, and small edits of it.

use std::collections::BTreeMap;

use serde_json::json;

use super::world::{login, tag};
use super::{TAGS, USERS};

/// Rules as a large site has them: most join a few roles by a few ports.
pub(super) struct Text {
    pub(super) rules: Vec<Rule>,
    random: u64,
}

pub(super) struct Rule {
    section: &'static str,
    line: String,
    /// A tag that it is about.
    tag: u64,
}

impl Text {
    pub(super) fn new(rules: usize) -> Self {
        let mut text = Self {
            rules: Vec::new(),
            random: 1,
        };
        for number in 0..rules {
            let rule = text.rule(number);
            text.rules.push(rule);
        }
        text
    }

    /// The same numbers in every run of the program (Knuth's MMIX generator).
    fn draw(&mut self, below: u64) -> u64 {
        let next = self.random.wrapping_mul(6_364_136_223_846_793_005);
        self.random = next.wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    fn rule(&mut self, number: usize) -> Rule {
        let dst = self.draw(TAGS);
        let src = [self.draw(TAGS), self.draw(TAGS)].map(tag);
        let [team, person] = [self.draw(20), self.draw(USERS) + 1];
        let port = 1 + self.draw(20_000);
        let to = tag(dst);
        let (section, rule) = match number % 20 {
            0 => (
                "acls",
                json!({"action": "accept", "src": [format!("group:t{team}")], "dst": [format!("{to}:22,443")]}),
            ),
            1 => (
                "acls",
                json!({"action": "accept", "src": [login(person)], "dst": [format!("{to}:{port}")]}),
            ),
            2 => (
                "grants",
                json!({"src": [format!("idp:team-{}", team % 10)], "dst": [to], "ip": ["tcp:443", format!("udp:{port}")]}),
            ),
            3 => (
                "denies",
                json!({"src": [src[0]], "dst": [format!("{to}:{port}-{}", port + 9)]}),
            ),
            4 => (
                "acls",
                json!({"action": "accept", "src": [src[0]], "dst": [format!("10.{}.0.0/16:443", number % 200)]}),
            ),
            5 if number < 20 => (
                "acls",
                json!({"action": "accept", "src": [src[0]], "dst": ["*:9100"]}),
            ),
            6 if number < 20 => (
                "acls",
                json!({"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]}),
            ),
            _ => (
                "acls",
                json!({"action": "accept", "src": src, "dst": [format!("{to}:{port},{}-{}", port + 10, port + 40)]}),
            ),
        };
        Rule {
            section,
            line: rule.to_string(),
            tag: dst,
        }
    }

    pub(super) fn edit(&mut self, at: usize) -> u64 {
        let at = at % self.rules.len();
        let section = self.rules[at].section;
        let rule = (0..)
            .map(|number| self.rule(number * 20 + 19))
            .find(|rule| rule.section == section || section != "acls");
        self.rules[at] = rule.unwrap_or_else(|| unreachable!("the first of them will do"));
        self.rules[at].tag
    }

    pub(super) fn add(&mut self, at: usize) -> u64 {
        let at = at % self.rules.len();
        let rule = self.rule(19);
        self.rules.insert(at, rule);
        self.rules[at].tag
    }

    pub(super) fn remove(&mut self, at: usize) -> u64 {
        let at = at % self.rules.len();
        self.rules.remove(at).tag
    }

    pub(super) fn write(&self) -> String {
        let section = |name: &str| {
            let rules = self.rules.iter().filter(|rule| rule.section == name);
            let lines: Vec<String> = rules.map(|rule| format!("{},", rule.line)).collect();
            format!("  \"{name}\": [\n{}\n  ],\n", lines.join("\n"))
        };
        let group = |team: u64| {
            let members = (1..=USERS).filter(|user| user % 20 == team).map(login);
            (format!("group:t{team}"), members.collect::<Vec<_>>())
        };
        let groups: BTreeMap<_, _> = (0..20).map(group).collect();
        let owners: BTreeMap<_, Vec<String>> =
            (0..TAGS).map(|number| (tag(number), vec![])).collect();
        format!(
            "{{\n  \"groups\": {},\n  \"tagOwners\": {},\n{}}}\n",
            json!(groups),
            json!(owners),
            ["acls", "grants", "denies"].map(section).concat(),
        )
    }
}
