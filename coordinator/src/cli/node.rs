//! `node`: who is in the mesh.

use mesh_api::v1;
use serde_json::{Value, json};

use super::output::{Output, relative};
use super::{Admin, Failure, client};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Lists every node
    List {
        #[command(flatten)]
        admin: Admin,
    },
    /// Shows all that is known of a node
    Show {
        /// Name or number
        node: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Gives a node another name
    Rename {
        /// Name or number
        node: String,
        /// Made DNS-safe; a clash gets -1
        name: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Replaces a node's tags; a node with tags belongs to no user
    Tag {
        /// Name or number
        node: String,
        #[arg(required = true, value_name = "tag:NAME")]
        tags: Vec<String>,
        #[command(flatten)]
        admin: Admin,
    },
    /// Replaces the routes that a node may serve; none: takes them all away
    Routes {
        /// Name or number
        node: String,
        #[arg(value_name = "CIDR")]
        routes: Vec<String>,
        #[command(flatten)]
        admin: Admin,
    },
    /// Sets and unsets what postures may ask of a node
    #[command(subcommand)]
    Attribute(AttributeVerb),
    /// Ends a node's key: nobody sees it until it enrols again
    Expire {
        /// Name or number
        node: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Removes a node from the mesh
    Delete {
        /// Name or number
        node: String,
        #[command(flatten)]
        admin: Admin,
    },
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum AttributeVerb {
    /// Sets an attribute; whom policy lets in is judged again at once
    Set {
        /// Name or number of the node
        node: String,
        #[arg(value_name = "custom:NAME")]
        name: String,
        /// true and false are booleans and whole numbers numbers; all else, or in quotes, is text
        #[arg(allow_hyphen_values = true)]
        value: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Takes an attribute away
    Unset {
        /// Name or number of the node
        node: String,
        #[arg(value_name = "custom:NAME")]
        name: String,
        #[command(flatten)]
        admin: Admin,
    },
}

pub(super) async fn run(verb: Verb, output: &Output) -> Result<(), Failure> {
    match verb {
        Verb::List { admin } => list(&admin, output).await,
        Verb::Show { node, admin } => {
            let mut client = client::connect(&admin).await?;
            let node = client.get_node(v1::NodeRef { node }).await?.into_inner();
            show(&admin, output, &node);
            Ok(())
        }
        Verb::Rename { node, name, admin } => {
            let mut client = client::connect(&admin).await?;
            let request = v1::RenameNodeRequest { node, name };
            let node = client.rename_node(request).await?.into_inner();
            done(&admin, output, &node, "is its name now");
            Ok(())
        }
        Verb::Tag { node, tags, admin } => {
            let mut client = client::connect(&admin).await?;
            let request = v1::TagNodeRequest { node, tags };
            let node = client.tag_node(request).await?.into_inner();
            let words = format!("has {}", node.tags.join(", "));
            done(&admin, output, &node, &words);
            Ok(())
        }
        Verb::Routes {
            node,
            routes,
            admin,
        } => {
            let mut client = client::connect(&admin).await?;
            let request = v1::ApproveRoutesRequest { node, routes };
            let node = client.approve_routes(request).await?.into_inner();
            let words = match node.approved_routes.as_slice() {
                [] => "may serve no route".to_owned(),
                routes => format!("may serve {}", routes.join(", ")),
            };
            done(&admin, output, &node, &words);
            Ok(())
        }
        Verb::Attribute(AttributeVerb::Set {
            node,
            name,
            value,
            admin,
        }) => {
            let words = format!("has {name} = {value}");
            let value = Some(attribute_value(&value));
            attribute(&admin, output, node, v1::Attribute { name, value }, &words).await
        }
        Verb::Attribute(AttributeVerb::Unset { node, name, admin }) => {
            let words = format!("has no {name} any more");
            let unset = v1::Attribute { name, value: None };
            attribute(&admin, output, node, unset, &words).await
        }
        Verb::Expire { node, admin } => {
            let mut client = client::connect(&admin).await?;
            let node = client.expire_node(v1::NodeRef { node }).await?.into_inner();
            done(&admin, output, &node, "has expired");
            Ok(())
        }
        Verb::Delete { node, admin } => {
            let mut client = client::connect(&admin).await?;
            let request = v1::NodeRef { node: node.clone() };
            client.delete_node(request).await?;
            if admin.json {
                output.json(&json!({"deleted": node}));
            } else {
                output.line(&format!("{node} is deleted"));
            }
            Ok(())
        }
    }
}

async fn attribute(
    admin: &Admin,
    output: &Output,
    node: String,
    attribute: v1::Attribute,
    words: &str,
) -> Result<(), Failure> {
    let mut client = client::connect(admin).await?;
    let request = v1::SetNodeAttributeRequest {
        node,
        attribute: Some(attribute),
    };
    let node = client.set_node_attribute(request).await?.into_inner();
    done(admin, output, &node, words);
    Ok(())
}

fn attribute_value(text: &str) -> v1::attribute::Value {
    let quoted = ['"', '\'']
        .iter()
        .find_map(|quote| text.strip_prefix(*quote)?.strip_suffix(*quote));
    match (quoted, text.parse(), text.parse()) {
        (Some(inside), ..) => v1::attribute::Value::Text(inside.to_owned()),
        (None, Ok(flag), _) => v1::attribute::Value::Flag(flag),
        (None, _, Ok(number)) => v1::attribute::Value::Number(number),
        _ => v1::attribute::Value::Text(text.to_owned()),
    }
}

fn attribute_json(attribute: &v1::Attribute) -> Value {
    match &attribute.value {
        Some(v1::attribute::Value::Text(text)) => json!(text),
        Some(v1::attribute::Value::Number(number)) => json!(number),
        Some(v1::attribute::Value::Flag(flag)) => json!(flag),
        None => Value::Null,
    }
}

async fn list(admin: &Admin, output: &Output) -> Result<(), Failure> {
    let mut client = client::connect(admin).await?;
    let list = client
        .list_nodes(v1::ListNodesRequest {})
        .await?
        .into_inner();
    if admin.json {
        let nodes: Vec<Value> = list.nodes.iter().map(json_of).collect();
        output.json(&json!({"generation": list.generation, "nodes": nodes}));
        return Ok(());
    }
    let rows: Vec<Vec<String>> = list
        .nodes
        .iter()
        .map(|node| {
            vec![
                node.id.to_string(),
                node.name.clone(),
                node.addresses.first().cloned().unwrap_or_default(),
                owner(node),
                state(node),
                node.applied_generation
                    .map_or_else(|| "-".to_owned(), |generation| generation.to_string()),
            ]
        })
        .collect();
    output.table(
        &["ID", "NAME", "ADDRESS", "OWNER", "STATE", "APPLIED"],
        &rows,
    );
    Ok(())
}

fn owner(node: &v1::Node) -> String {
    node.user.clone().unwrap_or_else(|| node.tags.join(","))
}

fn state(node: &v1::Node) -> String {
    if node.expired {
        "expired".to_owned()
    } else if node.connected {
        "connected".to_owned()
    } else {
        match node.last_seen {
            Some(at) => format!("seen {}", relative(at)),
            None => "never connected".to_owned(),
        }
    }
}

fn done(admin: &Admin, output: &Output, node: &v1::Node, words: &str) {
    if admin.json {
        output.json(&json_of(node));
    } else {
        output.line(&format!("{} {words}", node.name));
    }
}

fn show(admin: &Admin, output: &Output, node: &v1::Node) {
    if admin.json {
        output.json(&json_of(node));
        return;
    }
    let host = node.host.clone().unwrap_or_default();
    let lines = [
        ("name", node.name.clone()),
        ("id", node.id.to_string()),
        ("owner", owner(node)),
        ("state", state(node)),
        ("addresses", node.addresses.join(", ")),
        ("endpoints", node.endpoints.join(", ")),
        ("offers", node.advertised_routes.join(", ")),
        ("serves", node.approved_routes.join(", ")),
        ("key", node.key.clone()),
        ("machine", node.machine.clone()),
        ("created", relative(node.created)),
        ("expires", node.expires.map(relative).unwrap_or_default()),
        (
            "ephemeral",
            if node.ephemeral { "yes" } else { "" }.to_owned(),
        ),
        (
            "applied",
            node.applied_generation
                .map_or_else(String::new, |generation| format!("generation {generation}")),
        ),
        ("error", node.apply_error.clone()),
        (
            "host",
            format!(
                "{} {} {} {}",
                host.hostname, host.os, host.os_version, host.kernel
            ),
        ),
        (
            "attributes",
            node.attributes
                .iter()
                .map(|one| format!("{} = {}", one.name, attribute_json(one)))
                .collect::<Vec<_>>()
                .join(", "),
        ),
        ("agent", format!("{} {}", host.agent_version, host.backend)),
    ];
    for (name, value) in lines {
        if !value.trim().is_empty() {
            output.line(&format!("{name:<11} {}", value.trim()));
        }
    }
}

pub(super) fn json_of(node: &v1::Node) -> Value {
    let host = node.host.clone().unwrap_or_default();
    json!({
        "id": node.id,
        "name": node.name,
        "key": node.key,
        "machine": node.machine,
        "addresses": node.addresses,
        "tags": node.tags,
        "user": node.user,
        "endpoints": node.endpoints,
        "advertised_routes": node.advertised_routes,
        "approved_routes": node.approved_routes,
        "ephemeral": node.ephemeral,
        "created": node.created,
        "expires": node.expires,
        "expired": node.expired,
        "connected": node.connected,
        "last_seen": node.last_seen,
        "applied_generation": node.applied_generation,
        "apply_error": node.apply_error,
        "attributes": node
            .attributes
            .iter()
            .map(|one| (one.name.clone(), attribute_json(one)))
            .collect::<serde_json::Map<_, _>>(),
        "host": {
            "hostname": host.hostname,
            "os": host.os,
            "os_version": host.os_version,
            "kernel": host.kernel,
            "agent_version": host.agent_version,
            "backend": host.backend,
        },
    })
}
