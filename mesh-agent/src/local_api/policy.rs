//! `mesh policy`: what this node can answer by itself, from what it was told.

use mesh_api::v1;
use mesh_api::v1::policy_question::{Explain, Question};
use mesh_core::policy::{
    Answer, Unanswerable, Way, explain_own, what_can_i_reach, who_can_reach_me,
};
use tonic::Status;

use crate::snapshot::Snapshot;

/// `None`: the question is about other nodes, which only the coordinator knows.
pub(super) fn own(
    look: &Snapshot,
    question: &v1::PolicyQuestion,
) -> Result<Option<v1::PolicyAnswer>, Status> {
    let netmap = look.netmap.as_deref().ok_or_else(|| {
        Status::failed_precondition("this node has no netmap yet; see `mesh status`")
    })?;
    let malformed = |error: Unanswerable| match error {
        Unanswerable::Malformed(words) => Status::invalid_argument(words),
        Unanswerable::Unknown(words) => Status::not_found(words),
    };
    let question = question.question.as_ref();
    let answer = match question {
        Some(Question::Explain(Explain { src, dst })) => explain_own(netmap, src, dst)
            .map_err(malformed)?
            .map(Answer::from),
        Some(Question::WhoCan(dst)) => who_can_reach_me(netmap, dst)
            .map_err(malformed)?
            .map(|reach| reach.answer(Way::WhoCan)),
        Some(Question::WhatCan(src)) => {
            let me = netmap.me.name.as_str();
            let src = if src.is_empty() { me } else { src };
            what_can_i_reach(netmap, src).map(|reach| reach.answer(Way::WhatCan))
        }
        None => {
            let words = "a question that this agent does not know: update it";
            return Err(Status::invalid_argument(words));
        }
    };
    Ok(answer.map(|answer| v1::PolicyAnswer {
        lines: answer.lines,
        json: answer.json.to_string(),
    }))
}
