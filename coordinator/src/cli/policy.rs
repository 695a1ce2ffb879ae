//! `policy`: who may reach whom.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use mesh_api::v1;
use mesh_core::policy::{self, Document, Subjects};
use mesh_core::world::Pools;
use serde_json::json;

use super::output::Output;
use super::{Admin, Failure, client};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Prints the policy in force
    Get {
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
        #[command(flatten)]
        admin: Admin,
    },
    /// Says whether a policy would be accepted, and changes nothing
    Check {
        /// HuJSON; `-` reads standard input
        file: PathBuf,
        /// Without a coordinator: as in a mesh without users and nodes
        #[arg(long)]
        offline: bool,
        #[command(flatten)]
        admin: Admin,
    },
}

pub(super) async fn run(verb: Verb, output: &Output) -> Result<(), Failure> {
    match verb {
        Verb::Get { admin } => {
            let mut client = client::connect(&admin).await?;
            let policy = client.get_policy(v1::Empty {}).await?.into_inner();
            if admin.json {
                output.json(&json!({
                    "text": policy.text,
                    "version": policy.version,
                    "generation": policy.generation,
                    "changed": policy.changed,
                }));
            } else {
                output.raw(&policy.text);
            }
            Ok(())
        }
        Verb::Set {
            file,
            expect,
            admin,
        } => {
            let text = read(&file)?;
            let mut client = client::connect(&admin).await?;
            let request = v1::SetPolicyRequest {
                text,
                file: file.display().to_string(),
                expect_version: expect,
            };
            let policy = client.set_policy(request).await?.into_inner();
            if admin.json {
                output.json(&json!({
                    "version": policy.version,
                    "generation": policy.generation,
                    "changed": policy.changed,
                }));
            } else {
                let (version, generation) = (policy.version, policy.generation);
                output.line(&format!(
                    "policy version {version} is in force since generation {generation}"
                ));
            }
            Ok(())
        }
        Verb::Check {
            file,
            offline,
            admin,
        } => check(&file, offline, &admin, output).await,
    }
}

async fn check(file: &Path, offline: bool, admin: &Admin, output: &Output) -> Result<(), Failure> {
    let text = read(file)?;
    let name = file.display().to_string();
    let problems = if offline {
        check_offline(&text)
    } else {
        let mut client = client::connect(admin).await?;
        let request = v1::CheckPolicyRequest {
            text,
            file: name.clone(),
        };
        let answer = client.check_policy(request).await?.into_inner();
        let problems = answer.problems.into_iter();
        problems.map(|p| (p.line, p.column, p.message)).collect()
    };
    if admin.json {
        let problems: Vec<_> = problems
            .iter()
            .map(|(line, column, message)| {
                json!({"line": line, "column": column, "message": message})
            })
            .collect();
        output.json(&json!({ "problems": problems }));
    } else if problems.is_empty() {
        output.line(&format!("{name} is good"));
    } else {
        for (line, column, message) in &problems {
            output.line(&format!("{name}:{line}:{column}: {message}"));
        }
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Failure::Silent)
    }
}

fn check_offline(text: &str) -> Vec<(u32, u32, String)> {
    let pools = Pools {
        v4: Pools::default_v4(),
        v6: Pools::ula([0; 5]),
    };
    let subjects = Subjects {
        users: &BTreeMap::new(),
        nodes: &BTreeMap::new(),
        pools: &pools,
    };
    let checked = Document::parse(text).and_then(|document| policy::check(&document, &subjects));
    let problems = checked.err();
    let problems = problems.iter().flat_map(|problems| problems.iter());
    problems
        .map(|p| (p.line, p.column, p.message.clone()))
        .collect()
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        return std::io::read_to_string(std::io::stdin()).context("read standard input");
    }
    std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))
}
