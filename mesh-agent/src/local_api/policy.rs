//! `mesh policy`: what this node can answer by itself, from what it was told.

use mesh_api::v1;
use mesh_api::v1::policy_question::{Explain, Question};
use mesh_core::policy::{
    Answer, Unanswerable, Way, explain_own, what_can_i_reach, who_can_reach_me,
};
use tonic::{Code, Status};

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

/// A refusal of the coordinator's, with what it means for somebody who asked about this very node.
pub(super) fn refused(status: Status) -> Status {
    match status.code() {
        Code::PermissionDenied => Status::permission_denied(format!(
            "this node was told nothing of what is asked about: it is other nodes' business, or \
             nothing joins it to this one, or it is not there; {}",
            status.message()
        )),
        _ => status,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_a_netmap_has_no_answer_yet() {
        let question = v1::PolicyQuestion {
            question: Some(Question::WhatCan(String::new())),
        };
        let refused = own(&Snapshot::default(), &question).unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
    }

    #[test]
    fn a_refusal_says_what_it_means_for_this_node() {
        let refused = refused(Status::permission_denied("no"));
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().ends_with("; no"));
        let other = super::refused(Status::not_found("no node is called x"));
        assert_eq!(other.message(), "no node is called x");
    }
}
