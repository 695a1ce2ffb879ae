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
            admin,
        } => {
            let mut client = client::connect(&admin).await?;
            let request = v1::CreateUserRequest { name, display_name };
            let user = client.create_user(request).await?.into_inner();
            done(&admin, output, &user, "is a user now");
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
                    relative(user.created),
                ]
            };
            let rows: Vec<Vec<String>> = users.iter().map(row).collect();
            output.table(&["ID", "NAME", "DISPLAY NAME", "CREATED"], &rows);
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
        "created": user.created,
    })
}
