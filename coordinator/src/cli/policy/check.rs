//! `policy check`: what is wrong with a text, and what of it has no effect here.

use std::collections::BTreeMap;
use std::path::Path;

use mesh_api::v1;
use mesh_core::policy::{self, Document, Problem, Subjects};
use mesh_core::world::Pools;
use serde_json::{Value, json};

use super::read;
use crate::cli::output::Output;
use crate::cli::{Admin, Failure, client};

pub(super) async fn run(
    file: &Path,
    offline: bool,
    admin: &Admin,
    output: &Output,
) -> Result<(), Failure> {
    let text = read(file)?;
    let name = shown(file);
    let v1::CheckPolicyResponse { problems, warnings } = if offline {
        check(&text)
    } else {
        let mut client = client::connect(admin).await?;
        let request = v1::CheckPolicyRequest {
            text,
            file: name.clone(),
        };
        client.check_policy(request).await?.into_inner()
    };
    if admin.json {
        output.json(&json!({"problems": list(&problems), "warnings": list(&warnings)}));
    } else {
        for problem in &problems {
            output.line(&line(&name, "", problem));
        }
        for warning in &warnings {
            output.line(&line(&name, WARNING, warning));
        }
        if problems.is_empty() {
            output.line(&format!("{name} is good"));
        }
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Failure::Silent),
    }
}

/// What of a text that was taken has no effect here: as lines, or as JSON.
pub(super) fn warnings(file: &Path, text: &str) -> (Vec<String>, Vec<Value>) {
    let document = Document::parse(text);
    let warnings = document.as_ref().map(Document::warnings);
    let warnings: Vec<_> = warnings.iter().flatten().map(wire).collect();
    let lines = warnings.iter();
    let lines = lines.map(|warning| line(&shown(file), WARNING, warning));
    (lines.collect(), list(&warnings))
}

const WARNING: &str = "warning: ";

fn shown(file: &Path) -> String {
    match file == Path::new("-") {
        true => "standard input".to_owned(),
        false => file.display().to_string(),
    }
}

fn line(file: &str, kind: &str, problem: &v1::PolicyProblem) -> String {
    let (line, column, message) = (problem.line, problem.column, &problem.message);
    format!("{file}:{line}:{column}: {kind}{message}")
}

fn list(problems: &[v1::PolicyProblem]) -> Vec<Value> {
    problems.iter().map(json_of).collect()
}

fn json_of(problem: &v1::PolicyProblem) -> Value {
    json!({"line": problem.line, "column": problem.column, "message": problem.message})
}

/// As the coordinator would, in a mesh without users and nodes.
fn check(text: &str) -> v1::CheckPolicyResponse {
    let pools = Pools {
        v4: Pools::default_v4(),
        v6: Pools::ula([0; 5]),
    };
    let subjects = Subjects {
        users: &BTreeMap::new(),
        nodes: &BTreeMap::new(),
        pools: &pools,
    };
    let document = Document::parse(text);
    let warnings = document.as_ref().map(Document::warnings);
    let checked = document.as_ref().map_err(Clone::clone);
    let checked = checked.and_then(|document| policy::check(document, &subjects));
    let problems = checked.err();
    let problems = problems.iter().flat_map(|problems| problems.iter());
    v1::CheckPolicyResponse {
        problems: problems.map(wire).collect(),
        warnings: warnings.iter().flatten().map(wire).collect(),
    }
}

fn wire(problem: &Problem) -> v1::PolicyProblem {
    v1::PolicyProblem {
        line: problem.line,
        column: problem.column,
        message: problem.message.clone(),
    }
}
