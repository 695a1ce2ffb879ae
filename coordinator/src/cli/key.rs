//! `key`: pre-auth keys.

use mesh_api::v1;
use serde_json::{Value, json};

use super::output::{Output, is_past, relative};
use super::{Admin, Failure, client};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Makes a key and prints its secret, this once
    Create {
        /// Good for any number of nodes; otherwise for one
        #[arg(long)]
        reusable: bool,
        /// Nodes that it makes are deleted soon after they are gone
        #[arg(long)]
        ephemeral: bool,
        /// How long the key is good for: 90s, 30m, 1h, 7d; 90 days at most
        #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = lifetime)]
        expires: u64,
        /// Tag of the nodes that it makes; may be given more than once
        #[arg(long = "tag", value_name = "tag:NAME")]
        tags: Vec<String>,
        /// User who owns the nodes that it makes
        #[arg(long)]
        user: Option<String>,
        #[command(flatten)]
        admin: Admin,
    },
    /// Lists every key, without secrets
    List {
        #[command(flatten)]
        admin: Admin,
    },
    /// Makes a key useless; nodes that it enrolled stay
    Revoke {
        /// Number, as `key list` shows it
        id: u64,
        #[command(flatten)]
        admin: Admin,
    },
}

/// `90s`, `30m`, `1h`, `7d`, or seconds.
fn lifetime(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err("a duration is a number and s, m, h or d".to_owned()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "a duration is a number and s, m, h or d".to_owned())?;
    number
        .checked_mul(unit)
        .ok_or_else(|| "that is too long".to_owned())
}

pub(super) async fn run(verb: Verb, output: &Output) -> Result<(), Failure> {
    match verb {
        Verb::Create {
            reusable,
            ephemeral,
            expires,
            tags,
            user,
            admin,
        } => {
            let mut client = client::connect(&admin).await?;
            let request = v1::CreateKeyRequest {
                reusable,
                ephemeral,
                expires_in_seconds: Some(expires),
                tags,
                user,
            };
            let made = client.create_key(request).await?.into_inner();
            if admin.json {
                let mut json = json_of(&made.key.unwrap_or_default());
                json["secret"] = Value::String(made.secret);
                output.json(&json);
            } else {
                // Alone on its line, so that a script can take it.
                output.line(&made.secret);
            }
        }
        Verb::List { admin } => {
            let mut client = client::connect(&admin).await?;
            let keys = client.list_keys(v1::Empty {}).await?.into_inner().keys;
            if admin.json {
                let keys: Vec<Value> = keys.iter().map(json_of).collect();
                output.json(&json!({ "keys": keys }));
                return Ok(());
            }
            let rows: Vec<Vec<String>> = keys.iter().map(row).collect();
            output.table(&["ID", "PREFIX", "OWNER", "KIND", "USES", "STATE"], &rows);
        }
        Verb::Revoke { id, admin } => {
            let mut client = client::connect(&admin).await?;
            let key = client.revoke_key(v1::KeyRef { id }).await?.into_inner();
            if admin.json {
                output.json(&json_of(&key));
            } else {
                output.line(&format!("{} is revoked", key.prefix));
            }
        }
    }
    Ok(())
}

fn row(key: &v1::PreAuthKey) -> Vec<String> {
    let kind = match (key.reusable, key.ephemeral) {
        (false, false) => "one-off",
        (false, true) => "one-off, ephemeral",
        (true, false) => "reusable",
        (true, true) => "reusable, ephemeral",
    };
    let state = if key.revoked {
        "revoked".to_owned()
    } else if key.uses > 0 && !key.reusable {
        "used up".to_owned()
    } else if is_past(key.expires) {
        format!("expired {}", relative(key.expires))
    } else {
        format!("expires {}", relative(key.expires))
    };
    vec![
        key.id.to_string(),
        key.prefix.clone(),
        key.user.clone().unwrap_or_else(|| key.tags.join(",")),
        kind.to_owned(),
        key.uses.to_string(),
        state,
    ]
}

fn json_of(key: &v1::PreAuthKey) -> Value {
    json!({
        "id": key.id,
        "prefix": key.prefix,
        "reusable": key.reusable,
        "ephemeral": key.ephemeral,
        "tags": key.tags,
        "user": key.user,
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
        "uses": key.uses,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_are_numbers_with_a_unit() {
        let read = ["90s", "30m", "1h", "7d", "5"].map(|text| lifetime(text).unwrap());
        assert_eq!(read, [90, 1_800, 3_600, 604_800, 5]);
        for bad in ["", "h", "1w", "-1h", "1.5h", "99999999999999999999d", "é"] {
            assert!(lifetime(bad).is_err(), "{bad}");
        }
    }
}
