//! Each verb: one call, one rendering.

use std::io::Read as _;
use std::process::ExitCode;

use mesh_api::v1;
use serde_json::json;

use super::{
    Args, DebugVerb, Failed, Up, Verb, client, flows, ping, policy, render, safe, say, top, why,
};

pub(super) async fn run(args: Args) -> Result<ExitCode, Failed> {
    let json = args.json;
    if let Verb::Version = args.verb {
        return version(&args).await;
    }
    let mut agent = client::connect(&args.socket).await?;
    match args.verb {
        Verb::Up(up) => {
            let response = agent.up(request(up)?).await?.into_inner();
            if json {
                let value = json!({"name": response.name, "addresses": response.addresses});
                say(&render::pretty(&value))?;
            } else {
                let (name, addresses) = (safe(&response.name), response.addresses.join(", "));
                say(&format!("up as {name} ({})", safe(&addresses)))?;
            }
        }
        Verb::Down { logout } => {
            agent.down(v1::DownRequest { logout }).await?;
            match (json, logout) {
                (true, _) => say("{}")?,
                (false, false) => say("down; `mesh up` connects again")?,
                (false, true) => say("down, and no longer a node of the mesh")?,
            }
        }
        Verb::Status => {
            let status = agent.status(v1::LocalStatusRequest {}).await?.into_inner();
            if json {
                say(&render::pretty(&render::status_json(&status)))?;
            } else {
                for line in render::status(&status) {
                    say(&line)?;
                }
            }
        }
        Verb::Ping(args) => return ping::run(&mut agent, &args, json).await,
        Verb::Whois { address } => {
            let found = agent
                .whois(v1::WhoisRequest { address })
                .await?
                .into_inner();
            if json {
                say(&render::pretty(&render::whois_json(&found)))?;
            } else {
                for line in render::whois(&found) {
                    say(&line)?;
                }
            }
        }
        Verb::Counters => {
            let counters = agent.counters(v1::CountersRequest {}).await?.into_inner();
            if json {
                say(&render::pretty(&render::counters_json(&counters)))?;
            } else {
                for line in render::counters(&counters) {
                    say(&line)?;
                }
            }
        }
        Verb::Policy { verb } => policy::run(&mut agent, verb, json).await?,
        Verb::Flows(args) => return flows::run(&mut agent, args, json).await,
        Verb::Why(args) => return why::run(&mut agent, &args, json).await,
        Verb::Top(args) => return top::run(&mut agent, &args, json).await,
        Verb::Debug {
            verb: DebugVerb::Maps,
        } => top::maps(&mut agent, json).await?,
        Verb::Debug {
            verb: DebugVerb::Bundle,
        } => {
            let bundle = agent.debug_bundle(v1::DebugBundleRequest {}).await?;
            say(&bundle.into_inner().json)?;
        }
        // Answered above, without needing an agent.
        Verb::Version => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn request(up: Up) -> Result<v1::UpRequest, Failed> {
    let auth_key = if up.auth_key == "-" {
        let mut text = String::new();
        // A key is some fifty bytes; whatever is longer is not one.
        std::io::stdin()
            .take(4096)
            .read_to_string(&mut text)
            .map_err(|error| {
                Failed::new(
                    Failed::USAGE,
                    format!("read the key from standard input: {error}"),
                )
            })?;
        text.trim().to_owned()
    } else {
        up.auth_key
    };
    Ok(v1::UpRequest {
        join: up.join,
        auth_key,
        name: up.name,
        advertise_routes: up.advertise_routes.into_iter().map(Into::into).collect(),
    })
}

/// Works without an agent too: that is when people ask.
async fn version(args: &Args) -> Result<ExitCode, Failed> {
    let own = env!("CARGO_PKG_VERSION");
    let agent = match client::connect(&args.socket).await {
        Ok(mut agent) => agent
            .status(v1::LocalStatusRequest {})
            .await
            .ok()
            .map(|status| safe(&status.into_inner().version)),
        Err(_) => None,
    };
    if args.json {
        say(&render::pretty(&json!({"mesh": own, "agent": agent})))?;
    } else {
        say(&format!("mesh {own}"))?;
        match agent {
            Some(agent) => say(&format!("mesh-agent {agent}"))?,
            None => say("mesh-agent: not reachable")?,
        }
    }
    Ok(ExitCode::SUCCESS)
}
