//! docs/policy.md: every example on the page, against the mesh that the page describes.
//!
//! A block of HuJSON is followed by a block of claims, and both are read from the page itself, so
//! the page cannot say what is not so. A claim that this file does not understand fails.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use std::sync::Arc;

use mesh_core::ipam;
use mesh_core::node::{AttributeName, AttributeValue, NodeId, Role};
use mesh_core::policy::{
    CompiledPolicy, Document, Explainer, Problem, SshAction, allotment, auto_approved, check,
    compile, format,
};
use mesh_core::world::World;

mod support;

use support::Mesh;

const PAGE: &str = include_str!("../../docs/policy.md");

/// Cells of the table under a header that starts so.
fn table(header: &str) -> Vec<Vec<String>> {
    let mut lines = PAGE.lines().skip_while(|line| !line.starts_with(header));
    lines.next();
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    let cells = |line: &str| {
        let inner = line.trim_matches('|');
        inner
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect()
    };
    rows.map(cells).collect()
}

fn mesh() -> Mesh {
    let mut mesh = Mesh::default();
    for row in table("| user |") {
        let id = mesh.user(&row[0]);
        let user = Arc::make_mut(mesh.users.get_mut(&id).unwrap());
        user.role = Role::parse(&row[1]).unwrap();
        user.idp_groups = row[2].split_whitespace().map(str::to_owned).collect();
    }
    for row in table("| node |") {
        let id = mesh.node(&row[0], &row[1]);
        for route in row[2].split_whitespace() {
            mesh.route(id, route);
        }
        let node = Arc::make_mut(mesh.nodes.get_mut(&id).unwrap());
        for attribute in row[3].split_whitespace() {
            let (name, value) = attribute.split_once('=').unwrap();
            match name {
                "node:os" => node.host.os = value.to_owned(),
                "node:kernel" => node.host.kernel = value.to_owned(),
                name => {
                    let name = AttributeName::parse(name).unwrap();
                    let value = AttributeValue::Bool(value == "true");
                    node.attributes.insert(name, value);
                }
            }
        }
    }
    assert!(mesh.nodes.len() >= 8 && mesh.users.len() >= 2);
    mesh
}

/// Fenced blocks: language, first line, text.
fn blocks() -> Vec<(&'static str, usize, String)> {
    let mut blocks: Vec<(&str, usize, String)> = Vec::new();
    let mut open = false;
    for (number, line) in PAGE.lines().enumerate() {
        match line.strip_prefix("```") {
            Some(_) if open => open = false,
            Some(language) => {
                open = true;
                blocks.push((language, number + 2, String::new()));
            }
            None if open => {
                let (_, _, text) = blocks.last_mut().unwrap();
                text.push_str(line);
                text.push('\n');
            }
            None => {}
        }
    }
    assert!(!open, "a block is not closed");
    blocks
}

struct Example<'a> {
    mesh: &'a Mesh,
    world: World,
    document: Document,
    compiled: CompiledPolicy,
    warnings: Vec<Problem>,
}

impl Example<'_> {
    fn node(&self, name: &str) -> NodeId {
        let mut nodes = self.mesh.nodes.values();
        let node = nodes.find(|node| node.name.as_str() == name);
        node.unwrap_or_else(|| panic!("no node is called {name}"))
            .id
    }

    fn allowed(&self, src: &str, dst: &str) -> bool {
        let explainer = Explainer::new(&self.world, &self.document, &self.compiled);
        let explanation = explainer.explain(src, dst);
        let flows = explanation.unwrap_or_else(|error| panic!("{error}")).flows;
        let accepted = flows.iter().filter(|flow| flow.accepted).count();
        assert!(
            accepted == 0 || accepted == flows.len(),
            "only some: {flows:?}"
        );
        accepted > 0
    }

    /// Whether a claim is so.
    fn holds(&self, claim: &str) -> bool {
        let words: Vec<&str> = claim.split_whitespace().collect();
        match words[..] {
            [src, "->", dst, "allowed"] => self.allowed(src, dst),
            [src, "->", dst, "denied"] => !self.allowed(src, dst),
            [a, "and", b, "see", "each", "other"] => self.compiled.sees(self.node(a), self.node(b)),
            [a, "and", b, "do", "not", "see", "each", "other"] => {
                !self.compiled.sees(self.node(a), self.node(b))
            }
            [node, "has", "attribute", name] => {
                self.compiled.attributes(self.node(node)).contains(name)
            }
            [node, "has", "no", "attribute", name] => {
                !self.compiled.attributes(self.node(node)).contains(name)
            }
            [src, "at", dst, "has", "capability", name] => self.capable(src, dst, name),
            [src, "at", dst, "has", "no", "capability", name] => !self.capable(src, dst, name),
            [node, "is", "approved", ref routes @ ..] => {
                let node = &self.mesh.nodes[&self.node(node)];
                let approved = auto_approved(&self.document, &self.mesh.subjects(), node);
                let approved: Vec<String> = approved.iter().map(ToString::to_string).collect();
                match routes {
                    ["nothing"] => approved.is_empty(),
                    routes => approved == routes,
                }
            }
            ["a", "node", "of", owner, "gets", address] => {
                let owner = self.mesh.owner(owner);
                let from = allotment(&self.document, &self.mesh.subjects(), &owner);
                let taken = self.mesh.nodes.values().map(|node| node.addresses.v4);
                let given = ipam::allocate(&self.mesh.pools, &from.nets, &taken.collect());
                given.unwrap().v4.to_string() == address
            }
            [src, "ssh", dst, "as", login, verdict] => {
                let rule = self
                    .compiled
                    .ssh_login(self.node(src), self.node(dst), login);
                match verdict {
                    "accepted" => rule.is_some_and(|rule| rule.action == SshAction::Accept),
                    "checked" => {
                        rule.is_some_and(|rule| matches!(rule.action, SshAction::Check { .. }))
                    }
                    "denied" => rule.is_none(),
                    _ => panic!("{claim}: no verdict of ssh"),
                }
            }
            ["warns", place, ..] => self.warnings.iter().any(|one| says(one, claim, place)),
            _ => panic!("{claim}: not a claim"),
        }
    }

    fn capable(&self, src: &str, dst: &str, name: &str) -> bool {
        let capabilities = self
            .compiled
            .capabilities(self.node(dst), self.mesh.v4(self.node(src)));
        capabilities.contains_key(name)
    }
}

/// `KIND LINE:COLUMN WORDS`.
fn says(problem: &Problem, claim: &str, place: &str) -> bool {
    let words = claim.split_once(place).unwrap().1.trim();
    format!("{}:{}", problem.line, problem.column) == place && problem.message.contains(words)
}

#[test]
fn every_example_of_the_page_is_so() {
    let mesh = mesh();
    let blocks = blocks();
    let mut examples = 0;
    let mut wrong = Vec::new();
    for (index, (language, line, text)) in blocks.iter().enumerate() {
        match *language {
            "hujson" => {}
            "claims" => {
                assert_eq!(
                    blocks[index - 1].0,
                    "hujson",
                    "line {line}: claims about nothing"
                );
                continue;
            }
            "console" => continue,
            other => panic!("line {line}: a block of {other:?} is not tested"),
        }
        let Some(("claims", _, claims)) = blocks.get(index + 1).map(|(l, n, t)| (*l, n, t)) else {
            panic!("line {line}: an example without claims");
        };
        examples += 1;
        assert!(!claims.is_empty(), "line {line}: an example claims nothing");
        let document = Document::parse(text);
        let checked = document.as_ref().map_err(Clone::clone);
        let checked = checked.and_then(|document| check(document, &mesh.subjects()));
        let refusals: Vec<&str> = claims
            .lines()
            .filter(|c| c.starts_with("refused"))
            .collect();
        if let Err(problems) = &checked {
            let problems: Vec<&Problem> = problems.iter().collect();
            let claimed = |claim: &&str| {
                let place = claim.split_whitespace().nth(1).unwrap();
                problems.iter().any(|one| says(one, claim, place))
            };
            if problems.len() != refusals.len() || !refusals.iter().all(claimed) {
                wrong.push(format!("line {line}: refused otherwise: {problems:#?}"));
            }
            continue;
        }
        if !refusals.is_empty() {
            wrong.push(format!("line {line}: is accepted"));
            continue;
        }
        let document = document.unwrap();
        if format(text).unwrap() != *text {
            wrong.push(format!("line {line}: not laid out as by policy fmt"));
        }
        let example = Example {
            mesh: &mesh,
            world: mesh.world(),
            compiled: compile(&document, &mesh.subjects(), None),
            warnings: document.warnings(),
            document,
        };
        for claim in claims.lines().filter(|claim| !example.holds(claim)) {
            wrong.push(format!("line {line}: not so: {claim}"));
        }
        let warned = claims.lines().filter(|c| c.starts_with("warns")).count();
        if warned != example.warnings.len() {
            wrong.push(format!("line {line}: warned of {:#?}", example.warnings));
        }
    }
    assert!(examples >= 20, "only {examples} examples were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
