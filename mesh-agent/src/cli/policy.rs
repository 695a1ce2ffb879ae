//! `mesh policy`: who may open what, and which rule says so.

use mesh_api::v1;
use mesh_api::v1::policy_question::{Explain, Question};

use super::client::Client;
use super::{Failed, render, safe, say};

/// A node answers for flows that it is an end of; about others it asks the coordinator, which
/// answers the nodes of administrators.
#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Says whether a flow is allowed, by which rule, and what would turn that
    Explain {
        /// A node, an address, a tag, a user, a group, or a host of the policy
        src: String,
        /// Such as db-1:5432/tcp, [fd7a::1]:53/udp or web/icmp; TCP unless said
        #[arg(value_name = "DST:PORT/PROTO")]
        dst: String,
    },
    /// Lists who may open something
    WhoCan {
        /// Such as db-1:5432, [fd7a::1]:53/udp or web/icmp; TCP unless said
        #[arg(value_name = "DST:PORT[/PROTO]")]
        dst: String,
    },
    /// Lists what a node, a tag, a user, a group may open
    WhatCan {
        /// This node unless said
        #[arg(default_value = "", hide_default_value = true)]
        src: String,
    },
}

pub(super) async fn run(agent: &mut Client, verb: Verb, json: bool) -> Result<(), Failed> {
    let question = match verb {
        Verb::Explain { src, dst } => Question::Explain(Explain { src, dst }),
        Verb::WhoCan { dst } => Question::WhoCan(dst),
        Verb::WhatCan { src } => Question::WhatCan(src),
    };
    let question = v1::PolicyQuestion {
        question: Some(question),
    };
    let answer = agent.ask_policy(question).await?.into_inner();
    if json {
        let value: serde_json::Value = serde_json::from_str(&answer.json).map_err(|error| {
            Failed::new(Failed::REFUSED, format!("read the agent's answer: {error}"))
        })?;
        return say(&render::pretty(&value));
    }
    for line in &answer.lines {
        say(&safe(line))?;
    }
    Ok(())
}
