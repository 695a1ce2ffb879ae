//! `user`: the people whom policy means by `user@…` and `group:`.

use mesh_api::v1;
use serde_json::{Value, json};

use super::output::{Output, relative};
use super::{Admin, Failure, client};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Makes a user
    Create {
        /// Login name, as a rule an e-mail address
        name: String,
        /// Name to show
        #[arg(long, default_value = "")]
        display_name: String,
        /// owner, admin, network-admin, it-admin, billing-admin, auditor or member
        #[arg(long, default_value = "member")]
        role: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Changes a user's role, groups or shown name
    Set {
        /// Name or number
        user: String,
        /// owner, admin, network-admin, it-admin, billing-admin, auditor or member; owners, admins
        /// and network admins may ask about the whole policy from their nodes
        #[arg(long)]
        role: Option<String>,
        /// Replaces the groups that policy means by idp:NAME; may be given more than once
        #[arg(long = "idp-group", value_name = "NAME")]
        idp_groups: Vec<String>,
        /// Takes the user out of all groups
        #[arg(long, conflicts_with = "idp_groups")]
        no_idp_groups: bool,
        /// Name to show
        #[arg(long)]
        display_name: Option<String>,
        #[command(flatten)]
        admin: Admin,
    },
    /// Lists every user
    List {
        #[command(flatten)]
        admin: Admin,
    },
    /// Gives a user another login name
    Rename {
        /// Name or number
        user: String,
        name: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Removes a user who owns no node, and the user's pre-auth keys
    Delete {
        /// Name or number
        user: String,
        #[command(flatten)]
        admin: Admin,
    },
}

pub(super) async fn run(verb: Verb, output: &Output) -> Result<(), Failure> {
    match verb {
        Verb::Create {
            name,
            display_name,
            role,
            admin,
        } => {
            let mut client = client::connect(&admin).await?;
            let request = v1::CreateUserRequest {
                name,
                display_name,
                role,
            };
            let user = client.create_user(request).await?.into_inner();
            done(&admin, output, &user, "is a user now");
        }
        Verb::Set {
            user,
            role,
            idp_groups,
            no_idp_groups,
            display_name,
            admin,
        } => {
            let groups = no_idp_groups || !idp_groups.is_empty();
            if role.is_none() && !groups && display_name.is_none() {
                let words = "nothing to set: give --role, --idp-group or --display-name";
                return Err(anyhow::anyhow!(words).into());
            }
            let request = v1::SetUserRequest {
                user,
                role,
                idp_groups: groups.then_some(v1::IdpGroups { names: idp_groups }),
                display_name,
            };
            let mut client = client::connect(&admin).await?;
            let user = client.set_user(request).await?.into_inner();
            let words = match user.idp_groups.as_slice() {
                [] => format!("has role {}", user.role),
                groups => format!("has role {}, groups {}", user.role, groups.join(", ")),
            };
            done(&admin, output, &user, &words);
        }
        Verb::List { admin } => {
            let mut client = client::connect(&admin).await?;
            let users = client.list_users(v1::Empty {}).await?.into_inner().users;
            if admin.json {
                let users: Vec<Value> = users.iter().map(json_of).collect();
                output.json(&json!({ "users": users }));
                return Ok(());
            }
            let row = |user: &v1::User| {
                vec![
                    user.id.to_string(),
                    user.name.clone(),
                    user.display_name.clone(),
                    user.role.clone(),
                    user.idp_groups.join(","),
                    relative(user.created),
                ]
            };
            let rows: Vec<Vec<String>> = users.iter().map(row).collect();
            output.table(
                &["ID", "NAME", "DISPLAY NAME", "ROLE", "GROUPS", "CREATED"],
                &rows,
            );
        }
        Verb::Rename { user, name, admin } => {
            let mut client = client::connect(&admin).await?;
            let request = v1::RenameUserRequest { user, name };
            let user = client.rename_user(request).await?.into_inner();
            done(&admin, output, &user, "is the user's name now");
        }
        Verb::Delete { user, admin } => {
            let mut client = client::connect(&admin).await?;
            let request = v1::UserRef { user: user.clone() };
            client.delete_user(request).await?;
            if admin.json {
                output.json(&json!({"deleted": user}));
            } else {
                output.line(&format!("{user} is deleted"));
            }
        }
    }
    Ok(())
}

fn done(admin: &Admin, output: &Output, user: &v1::User, words: &str) {
    if admin.json {
        output.json(&json_of(user));
    } else {
        output.line(&format!("{} {words}", user.name));
    }
}

fn json_of(user: &v1::User) -> Value {
    json!({
        "id": user.id,
        "name": user.name,
        "display_name": user.display_name,
        "role": user.role,
        "idp_groups": user.idp_groups,
        "created": user.created,
    })
}
