//! `policy`: who may reach whom.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use mesh_api::v1;
use serde_json::json;

use super::output::{Output, relative};
use super::{Admin, Failure, client};

mod ask;
mod check;
mod fmt;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Prints the policy in force, or one that was
    Get {
        /// One that `policy history` shows
        #[arg(long)]
        version: Option<u64>,
        #[command(flatten)]
        admin: Admin,
    },
    /// Replaces the policy; a refused one changes nothing
    Set {
        /// HuJSON; `-` reads standard input
        file: PathBuf,
        /// Refuse when another version than this is in force
        #[arg(long, value_name = "VERSION")]
        expect: Option<u64>,
        /// Who sets it [default: the user who runs this]
        #[arg(long, value_name = "NAME")]
        author: Option<String>,
        #[command(flatten)]
        admin: Admin,
    },
    /// Says whether a policy would be accepted, and what of it has no effect here
    Check {
        /// HuJSON; `-` reads standard input
        file: PathBuf,
        /// Without a coordinator: as in a mesh without users and nodes
        #[arg(long)]
        offline: bool,
        #[command(flatten)]
        admin: Admin,
    },
    /// Lays a policy out; needs no coordinator
    Fmt(fmt::Args),
    /// Who gains and who loses what
    #[command(override_usage = "mesh-coordinator policy diff [OPTIONS] [OLD] <NEW>")]
    Diff {
        /// Two policies, or one to hold against the one in force; `-` reads standard input
        #[arg(required = true, num_args = 1..=2, value_name = "FILE")]
        files: Vec<PathBuf>,
        #[command(flatten)]
        admin: Admin,
    },
    /// Lists the policies that were set, newest first; the last hundred before the one in force
    History {
        #[command(flatten)]
        admin: Admin,
    },
    /// Sets an earlier policy again, as a new version
    Rollback {
        /// One that `policy history` shows
        version: u64,
        /// Who sets it [default: the user who runs this]
        #[arg(long, value_name = "NAME")]
        author: Option<String>,
        #[command(flatten)]
        admin: Admin,
    },
    /// Says whether a flow is allowed, by which rule, and what would turn that
    ///
    /// Ends are nodes, addresses, tags, users, groups, or hosts of the policy.
    Explain {
        src: String,
        /// Such as db-1:5432/tcp, [fd7a::1]:53/udp or web/icmp; TCP unless said
        #[arg(value_name = "DST:PORT/PROTO")]
        dst: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Lists who may open something
    WhoCan {
        /// Such as tag:db:5432, [fd7a::1]:53/udp or web/icmp; TCP unless said
        #[arg(value_name = "DST:PORT[/PROTO]")]
        dst: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Lists what somebody may open
    WhatCan {
        /// A node, an address, a tag, a user, a group, or a host of the policy
        src: String,
        #[command(flatten)]
        admin: Admin,
    },
}

pub(super) async fn run(verb: Verb, output: &Output) -> Result<(), Failure> {
    match verb {
        Verb::Get { version, admin } => get(version, &admin, output).await,
        Verb::Set {
            file,
            expect,
            author,
            admin,
        } => {
            let request = v1::SetPolicyRequest {
                text: read(&file)?,
                file: file.display().to_string(),
                expect_version: expect,
                author,
            };
            let mut client = client::connect(&admin).await?;
            let policy = client.set_policy(request).await?.into_inner();
            in_force(&policy, &file, &admin, output);
            Ok(())
        }
        Verb::Check {
            file,
            offline,
            admin,
        } => check::run(&file, offline, &admin, output).await,
        Verb::Fmt(args) => fmt::run(&args, output),
        Verb::Diff { files, admin } => ask::diff(&files, &admin, output).await,
        Verb::History { admin } => history(&admin, output).await,
        Verb::Rollback {
            version,
            author,
            admin,
        } => {
            let request = v1::RollbackPolicyRequest { version, author };
            let mut client = client::connect(&admin).await?;
            let policy = client.rollback_policy(request).await?.into_inner();
            in_force(&policy, Path::new(&policy.file), &admin, output);
            Ok(())
        }
        Verb::Explain { src, dst, admin } => {
            use v1::policy_question::{Explain, Question};
            let question = Question::Explain(Explain { src, dst });
            ask::ask(question, &admin, output).await
        }
        Verb::WhoCan { dst, admin } => {
            let question = v1::policy_question::Question::WhoCan(dst);
            ask::ask(question, &admin, output).await
        }
        Verb::WhatCan { src, admin } => {
            let question = v1::policy_question::Question::WhatCan(src);
            ask::ask(question, &admin, output).await
        }
    }
}

async fn get(version: Option<u64>, admin: &Admin, output: &Output) -> Result<(), Failure> {
    let mut client = client::connect(admin).await?;
    let request = v1::GetPolicyRequest { version };
    let policy = client.get_policy(request).await?.into_inner();
    if admin.json {
        let mut value = json_of(&policy);
        value["text"] = policy.text.into();
        value["generation"] = policy.generation.into();
        output.json(&value);
    } else {
        output.raw(&policy.text);
    }
    Ok(())
}

fn json_of(policy: &v1::Policy) -> serde_json::Value {
    json!({
        "version": policy.version,
        "changed": policy.changed,
        "file": policy.file,
        "author": policy.author,
    })
}

/// What was put in force, and what of it has no effect or opens the mesh.
fn in_force(policy: &v1::Policy, file: &Path, admin: &Admin, output: &Output) {
    let (warnings, as_json) = check::warnings(file, &policy.text);
    let (version, generation) = (policy.version, policy.generation);
    if admin.json {
        let mut value = json_of(policy);
        value["generation"] = generation.into();
        value["warnings"] = as_json.into();
        output.json(&value);
        return;
    }
    warnings.iter().for_each(|line| output.line(line));
    output.line(&format!(
        "policy version {version} is in force since generation {generation}"
    ));
}

async fn history(admin: &Admin, output: &Output) -> Result<(), Failure> {
    let mut client = client::connect(admin).await?;
    let list = client.list_policies(v1::Empty {}).await?.into_inner();
    if admin.json {
        let policies: Vec<_> = list.policies.iter().map(json_of).collect();
        output.json(&json!({ "policies": policies }));
        return Ok(());
    }
    if list.policies.is_empty() {
        output.line("no policy was ever set: every node may reach every other");
        return Ok(());
    }
    let row = |(index, policy): (usize, &v1::Policy)| {
        let said = |text: &str| if text.is_empty() { "-" } else { text }.to_owned();
        let state = if index == 0 { "in force" } else { "" };
        vec![
            policy.version.to_string(),
            relative(policy.changed),
            said(&policy.author),
            said(&policy.file),
            state.to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = list.policies.iter().enumerate().map(row).collect();
    output.table(&["VERSION", "SET", "AUTHOR", "FILE", ""], &rows);
    Ok(())
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        return std::io::read_to_string(std::io::stdin()).context("read standard input");
    }
    std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))
}
