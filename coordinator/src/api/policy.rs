//! Questions about the policy, answered from the world as it is, for both doors.
//!
//! Looking at every pair of kinds of nodes is arithmetic that can take a second: it runs beside the
//! threads that serve sockets, on a world that nobody changes meanwhile.

use std::sync::Arc;

use mesh_api::v1;
use mesh_api::v1::policy_question::Explain;
use mesh_core::policy::{
    self, Answer, CompiledPolicy, Document, Problem, Problems, Question, Subjects, Unanswerable,
};
use tonic::Status;

use super::text::file_name;
use crate::registry::admin;
use crate::world::Current;

/// Answers one question about who may open what.
pub async fn ask(
    current: Arc<Current>,
    question: v1::PolicyQuestion,
) -> Result<v1::PolicyAnswer, Status> {
    let answer = move || -> Result<Answer, Unanswerable> {
        use v1::policy_question::Question as Asked;
        let question = match &question.question {
            Some(Asked::Explain(Explain { src, dst })) => Question::Explain { src, dst },
            Some(Asked::WhoCan(dst)) => Question::WhoCan { dst },
            Some(Asked::WhatCan(src)) => Question::WhatCan { src },
            None => {
                let words = "a question that this coordinator does not know: update it";
                return Err(Unanswerable::Malformed(words.to_owned()));
            }
        };
        let Current {
            world,
            document,
            compiled,
            ..
        } = current.as_ref();
        policy::ask(world, document, compiled, question)
    };
    let answer = beside(answer).await?.map_err(|error| match error {
        Unanswerable::Malformed(words) => Status::invalid_argument(words),
        Unanswerable::Unknown(words) => Status::not_found(words),
    })?;
    Ok(wire(&answer))
}

/// What is wrong with a text, and what of it has no effect.
pub fn check(current: &Current, text: &str, file: &str) -> v1::CheckPolicyResponse {
    let problem = |problem: &Problem| v1::PolicyProblem {
        line: problem.line,
        column: problem.column,
        message: problem.message.clone(),
    };
    let checked = admin::check_policy(&current.world, text, file);
    let checked = checked.and_then(|document| room(current, &document).map(|()| document));
    let (problems, warnings) = match checked {
        Ok(document) => (Vec::new(), document.warnings()),
        Err(problems) => (problems.iter().cloned().collect(), Vec::new()),
    };
    v1::CheckPolicyResponse {
        problems: problems.iter().map(problem).collect(),
        warnings: warnings.iter().map(problem).collect(),
    }
}

/// Whether every node's packet filter has room for its part.
fn room(current: &Current, document: &Document) -> Result<(), Problems> {
    let prev = Some(current.compiled.as_ref());
    policy::compile(document, &Subjects::from(&current.world), prev).room(document)
}

/// Refuses what some node could not load. It is not asked while the writer decides, which would keep
/// all others waiting; a node that comes in between and has no room says so itself.
pub async fn fits(current: Arc<Current>, text: String, file: String) -> Result<(), Status> {
    let look = move || match Document::parse(&text) {
        Ok(document) => room(&current, &document).map_err(|problems| problems.in_file(&file)),
        // Refused by the writer, with all else that is wrong with it.
        Err(_) => Ok(()),
    };
    let fits = beside(look).await?;
    fits.map_err(|problems| Status::invalid_argument(problems.to_string()))
}

/// Who gains and who loses what by a new policy, which need not be the one to be set.
pub async fn diff(
    current: Arc<Current>,
    request: v1::DiffPolicyRequest,
) -> Result<v1::PolicyAnswer, Status> {
    let compare = move || -> Result<Answer, Problems> {
        let compiled = |file: v1::PolicyFile| -> Result<(Document, CompiledPolicy), Problems> {
            let name = file_name(&file.file);
            let document = admin::check_policy(&current.world, &file.text, &name)?.in_file(&name);
            let compiled = policy::compile(&document, &Subjects::from(&current.world), None);
            Ok((document, compiled))
        };
        let old = request.old.map(&compiled).transpose()?;
        let new = compiled(request.new.unwrap_or_default())?;
        let old = match &old {
            Some((document, compiled)) => (document, compiled),
            None => (&*current.document, &*current.compiled),
        };
        let changes = policy::diff(&current.world, old, (&new.0, &new.1));
        Ok(policy::diff_answer(&changes))
    };
    let answer = beside(compare).await?;
    let answer = answer.map_err(|problems| Status::invalid_argument(problems.to_string()))?;
    Ok(wire(&answer))
}

async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Status::internal("the answer could not be worked out"))
}

fn wire(answer: &Answer) -> v1::PolicyAnswer {
    v1::PolicyAnswer {
        lines: answer.lines.clone(),
        json: answer.json.to_string(),
    }
}
