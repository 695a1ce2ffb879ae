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
    let name = match file == Path::new("-") {
        true => "standard input".to_owned(),
        false => file.display().to_string(),
    };
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
        let list = |list: &[v1::PolicyProblem]| list.iter().map(json_of).collect::<Vec<_>>();
        output.json(&json!({"problems": list(&problems), "warnings": list(&warnings)}));
    } else {
        let said = |kind: &str, problem: &v1::PolicyProblem| {
            let v1::PolicyProblem {
                line,
                column,
                message,
            } = problem;
            output.line(&format!("{name}:{line}:{column}: {kind}{message}"));
        };
        for problem in &problems {
            said("", problem);
        }
        for warning in &warnings {
            said("warning: ", warning);
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
