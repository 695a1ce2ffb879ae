//! `mesh ping`: real echoes through the mesh, one call each.

use std::process::ExitCode;
use std::time::Duration;

use mesh_api::v1;
use serde_json::json;

use super::client::Client;
use super::{Failed, Ping, render, safe, say};

const INTERVAL: Duration = Duration::from_secs(1);

pub(super) async fn run(agent: &mut Client, args: &Ping, json: bool) -> Result<ExitCode, Failed> {
    let mut replies = Vec::new();
    let mut received = 0;
    let mut last = None;
    for number in 0..args.count {
        if number > 0 {
            tokio::time::sleep(INTERVAL).await;
        }
        let request = v1::PingRequest {
            target: args.target.clone(),
            timeout_ms: args.timeout,
            v6: args.v6,
        };
        match agent.ping(request).await {
            Ok(pong) => {
                let pong = pong.into_inner();
                received += 1;
                if json {
                    replies.push(json!({
                        "name": pong.name,
                        "address": pong.address,
                        "rtt_us": pong.rtt_us,
                        "path": pong.path,
                    }));
                } else {
                    say(&format!(
                        "{} ({}) answered in {} by {}",
                        safe(&pong.name),
                        safe(&pong.address),
                        milliseconds(pong.rtt_us),
                        safe(&pong.path)
                    ))?;
                }
            }
            Err(status) => {
                let failed = Failed::from(status);
                // Only silence may end; an unknown name is unknown the next time too.
                if failed.code != Failed::NOT_IN_TIME {
                    return Err(failed);
                }
                if json {
                    replies.push(json!({"error": failed.text}));
                } else if args.count > 1 {
                    say(&failed.text)?;
                }
                last = Some(failed);
            }
        }
    }
    if json {
        say(&render::pretty(&json!({
            "sent": args.count,
            "received": received,
            "replies": replies,
        })))?;
    } else if args.count > 1 {
        say(&format!("{} sent, {received} received", args.count))?;
    }
    match last {
        Some(failed) if received == 0 => Err(failed),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn milliseconds(microseconds: u64) -> String {
    format!("{}.{:03} ms", microseconds / 1000, microseconds % 1000)
}
