//! `policy explain`, `who-can`, `what-can`, `diff`: questions that the coordinator answers in words.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use mesh_api::v1;

use super::read;
use crate::cli::output::Output;
use crate::cli::{Admin, Failure, client};

pub(super) async fn ask(
    question: v1::policy_question::Question,
    admin: &Admin,
    output: &Output,
) -> Result<(), Failure> {
    let question = v1::PolicyQuestion {
        question: Some(question),
    };
    let mut client = client::connect(admin).await?;
    let answer = client.ask_policy(question).await?.into_inner();
    print(&answer, admin, output)
}

pub(super) async fn diff(files: &[PathBuf], admin: &Admin, output: &Output) -> Result<(), Failure> {
    if files.iter().filter(|file| *file == Path::new("-")).count() > 1 {
        return Err(anyhow!("standard input can be read once: name one of the two files").into());
    }
    let file = |path: &PathBuf| -> anyhow::Result<v1::PolicyFile> {
        Ok(v1::PolicyFile {
            text: read(path)?,
            file: path.display().to_string(),
        })
    };
    let mut named = files.iter().map(file).collect::<anyhow::Result<Vec<_>>>()?;
    let request = v1::DiffPolicyRequest {
        new: named.pop(),
        old: named.pop(),
    };
    let mut client = client::connect(admin).await?;
    let answer = client.diff_policy(request).await?.into_inner();
    if answer.lines.is_empty() && !admin.json {
        output.line("nothing changes for anybody in this mesh as it is");
        return Ok(());
    }
    print(&answer, admin, output)
}

fn print(answer: &v1::PolicyAnswer, admin: &Admin, output: &Output) -> Result<(), Failure> {
    if admin.json {
        let value = serde_json::from_str(&answer.json);
        output.json(&value.context("read the coordinator's answer")?);
    } else {
        for line in &answer.lines {
            output.line(line);
        }
    }
    Ok(())
}
