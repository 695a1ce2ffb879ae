//! What the operators' door shows, as the wire has it.

use mesh_api::v1;
use mesh_core::node::{AttributeName, AttributeValue, Node, Owner, User};
use mesh_core::world::World;

use crate::preauth::PreAuthKey;
use crate::sessions::View;
use crate::store::PolicyText;

pub(super) fn node(node: &Node, world: &World, view: View) -> v1::Node {
    v1::Node {
        id: node.id.0,
        name: node.name.to_string(),
        key: node.key.to_string(),
        machine: node.machine.to_string(),
        addresses: node.addresses.each().map(|a| a.to_string()).to_vec(),
        tags: node.owner.tags().map(ToString::to_string).collect(),
        user: user_name(world, &node.owner),
        endpoints: node.endpoints.iter().map(ToString::to_string).collect(),
        advertised_routes: node
            .advertised_routes
            .iter()
            .map(ToString::to_string)
            .collect(),
        approved_routes: node
            .approved_routes
            .iter()
            .map(ToString::to_string)
            .collect(),
        ephemeral: node.ephemeral,
        created: node.created.0,
        expires: node.expires.map(|at| at.0),
        expired: node.expired,
        connected: view.connected,
        last_seen: view.last_seen.map(|at| at.0),
        applied_generation: view.applied.map(|generation| generation.0),
        apply_error: view.apply_error,
        host: Some((&node.host).into()),
        attributes: node.attributes.iter().map(attribute).collect(),
    }
}

pub(super) fn policy(policy: &PolicyText, generation: u64) -> v1::Policy {
    v1::Policy {
        text: policy.text.clone(),
        version: policy.version,
        generation,
        changed: policy.changed.0,
        file: policy.file.clone(),
        author: policy.author.clone(),
    }
}

fn user_name(world: &World, owner: &Owner) -> Option<String> {
    let user = world.users.get(&owner.user()?)?;
    Some(user.name.to_string())
}

pub(super) fn user(user: &User) -> v1::User {
    v1::User {
        id: user.id.0,
        name: user.name.to_string(),
        display_name: user.display_name.clone(),
        created: user.created.0,
        role: user.role.to_string(),
        idp_groups: user.idp_groups.iter().cloned().collect(),
    }
}

fn attribute((name, value): (&AttributeName, &AttributeValue)) -> v1::Attribute {
    v1::Attribute {
        name: name.to_string(),
        value: Some(match value {
            AttributeValue::Text(text) => v1::attribute::Value::Text(text.clone()),
            AttributeValue::Number(number) => v1::attribute::Value::Number(*number),
            AttributeValue::Bool(flag) => v1::attribute::Value::Flag(*flag),
        }),
    }
}

pub(super) fn key(world: &World, key: &PreAuthKey) -> v1::PreAuthKey {
    v1::PreAuthKey {
        id: key.id.0,
        prefix: key.prefix.clone(),
        reusable: key.reusable,
        ephemeral: key.ephemeral,
        tags: key.owner.tags().map(ToString::to_string).collect(),
        user: user_name(world, &key.owner),
        created: key.created.0,
        expires: key.expires.0,
        revoked: key.revoked,
        uses: key.uses,
    }
}
