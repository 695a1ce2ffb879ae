//! In a mesh of people: groups of the login, roles, postures, a policy's own tests, and what is refused.

use crate::support::Mesh;
use crate::tcp;

/// A mesh of three people with two nodes each, and two servers.
fn people() -> Mesh {
    let mut mesh = Mesh::default();
    for login in ["ada@example.com", "bob@example.com", "eve@example.org"] {
        mesh.user(login);
        mesh.node("desk", login);
        mesh.node("lap", login);
    }
    mesh.node("server", "tag:server");
    mesh.node("server", "tag:server");
    mesh
}

#[test]
fn groups_of_the_login_and_roles_are_selectors() {
    use mesh_core::node::Role;
    let mut mesh = people();
    let user = |mesh: &mut Mesh, id: u64, groups: &[&str], role: Role| {
        let user = mesh.users.get_mut(&mesh_core::node::UserId(id)).unwrap();
        let user = std::sync::Arc::make_mut(user);
        user.idp_groups = groups.iter().map(|group| (*group).to_owned()).collect();
        user.role = role;
    };
    user(&mut mesh, 1, &["ops", "all"], Role::Admin);
    user(&mut mesh, 2, &["all"], Role::Member);
    let text = r#"{
        "tagOwners": {"tag:server": ["autogroup:admin", "idp:ops"]},
        "acls": [
            {"action": "accept", "src": ["idp:ops"], "dst": ["tag:server:22"]},
            {"action": "accept", "src": ["autogroup:admin"], "dst": ["tag:server:80"]},
            {"action": "accept", "src": ["idp:all"], "dst": ["autogroup:self:443"]},
        ],
    }"#;
    let policy = mesh.policy(text);
    for port in [22, 80] {
        assert!(
            tcp(&policy, &mesh, 1, 7, port),
            "ada is in ops, and an admin"
        );
        assert!(!tcp(&policy, &mesh, 3, 7, port), "bob is neither");
        // No claim at all is no group at all.
        assert!(!tcp(&policy, &mesh, 5, 7, port));
    }
    assert!(tcp(&policy, &mesh, 3, 4, 443) && !tcp(&policy, &mesh, 3, 1, 443));
    assert!(!tcp(&policy, &mesh, 5, 6, 443));
    user(&mut mesh, 1, &[], Role::Member);
    let policy = mesh.policy(text);
    assert!(!tcp(&policy, &mesh, 1, 7, 22) && !tcp(&policy, &mesh, 1, 7, 80));
}

#[test]
fn postures_ask_for_what_the_coordinator_keeps() {
    use mesh_core::node::{AttributeName, AttributeValue};
    let mut mesh = people();
    let text = r#"{
        "tagOwners": {"tag:server": []},
        "postures": {"posture:good": ["custom:score >= 5", "ip:country IN ['SE', 'NO']"]},
        "acls": [{
            "action": "accept", "src": ["autogroup:member"], "srcPosture": ["posture:good"],
            "dst": ["tag:server:22"],
        }],
    }"#;
    assert!(!tcp(&mesh.policy(text), &mesh, 1, 7, 22));
    let node = mesh.nodes.get_mut(&mesh_core::node::NodeId(1)).unwrap();
    let node = std::sync::Arc::make_mut(node);
    let name = |text| AttributeName::parse(text).unwrap();
    node.attributes
        .insert(name("custom:score"), AttributeValue::Number(5));
    let country = AttributeValue::Text("SE".to_owned());
    node.attributes.insert(name("ip:country"), country);
    let policy = mesh.policy(text);
    assert!(tcp(&policy, &mesh, 1, 7, 22) && !tcp(&policy, &mesh, 2, 7, 22));
}

#[test]
fn a_test_asks_for_all_of_the_source_and_some_of_the_destination() {
    let mesh = people();
    let with = |rules: &str, test: &str| {
        let text = format!(
            r#"{{
                "groups": {{"group:both": ["ada@example.com", "bob@example.com"]}},
                "hosts": {{"one": "100.64.0.7"}},
                "tagOwners": {{"tag:server": []}},
                "acls": [{rules}], "tests": [{test}],
            }}"#
        );
        mesh.try_policy(&text)
            .map(|_| ())
            .map_err(|problems| problems.to_string())
    };
    let ada = r#"{"action": "accept", "src": ["ada@example.com"], "dst": ["tag:server:22"]}"#;
    let both = r#"{"src": "group:both", "VERB": ["tag:server:22"]}"#;
    let [accept, deny] = ["accept", "deny"].map(|verb| both.replace("VERB", verb));
    assert!(
        with(ada, &accept)
            .unwrap_err()
            .contains("not accepted from 100.64.0.3")
    );
    assert_eq!(with(ada, &deny), Ok(()));
    let group = ada.replace("ada@example.com", "group:both");
    assert_eq!(with(&group, &accept), Ok(()));
    assert!(with(&group, &deny).unwrap_err().contains("is accepted"));
    // Of two servers one will do; a family that the source's rule leaves out will not.
    let one = ada.replace("tag:server:22", "one:22");
    let tag = r#"{"src": "ada@example.com", "accept": ["tag:server:22"]}"#;
    assert_eq!(with(&one, tag), Ok(()));
    let half = ada
        .replace("ada@example.com", "100.64.0.1")
        .replace("tag:server:22", "one:22");
    assert!(with(&half, tag).is_err());
    // Without a protocol ICMP will do where a rule is about it, but not the echo of another rule.
    let icmp = r#"{"action": "accept", "proto": "icmp", "src": ["ada@example.com"], "dst": ["tag:server:*"]}"#;
    assert_eq!(with(icmp, tag), Ok(()));
    assert!(with(icmp, &tag.replace("\"src\"", "\"proto\": \"tcp\", \"src\"")).is_err());
    assert!(with(ada, &tag.replace(":22", ":8")).is_err());
}

#[test]
fn an_ssh_test_that_asks_of_nobody_fails() {
    let mesh = people();
    let with = |test: &str| {
        let text = format!(
            r#"{{
                "tagOwners": {{"tag:server": []}},
                "ssh": [{{
                    "action": "accept", "src": ["autogroup:member"],
                    "dst": ["autogroup:self", "tag:server"], "users": ["autogroup:nonroot"],
                }}],
                "sshTests": [{test}],
            }}"#
        );
        mesh.try_policy(&text)
            .map(|_| ())
            .map_err(|problems| problems.to_string())
    };
    let own =
        |src: &str| format!(r#"{{"src": "{src}", "dst": ["autogroup:self"], "accept": ["ada"]}}"#);
    assert_eq!(with(&own("ada@example.com")), Ok(()));
    assert!(
        with(&own("tag:server"))
            .unwrap_err()
            .contains("own no node")
    );
    let nameless = r#"{"src": "ada@example.com", "dst": ["tag:server"], "accept": [""]}"#;
    assert!(with(nameless).unwrap_err().contains("is not accepted"));
}

#[test]
fn what_stands_where_it_may_not_is_refused() {
    let mesh = people();
    let refused = |section: &str, fragment: &str| {
        let text = format!(r#"{{"tagOwners": {{"tag:server": []}}, {section}}}"#);
        let problems = mesh.try_policy(&text).map(|_| ()).unwrap_err().to_string();
        assert!(problems.contains(fragment), "{section}: {problems}");
    };
    let ssh = |src: &str, dst: &str| {
        format!(
            r#""ssh": [{{"action": "accept", "src": ["{src}"], "dst": ["{dst}"], "users": ["root"]}}]"#
        )
    };
    for src in [
        "*",
        "autogroup:danger-all",
        "autogroup:internet",
        "autogroup:self",
        "10.0.0.0/8",
    ] {
        refused(
            &ssh(src, "tag:server"),
            "alias not supported for SSH source",
        );
    }
    for dst in [
        "group:none",
        "autogroup:internet",
        "100.64.0.1",
        "autogroup:danger-all",
    ] {
        refused(&ssh("tag:server", dst), "not supported for SSH destination");
    }
    refused(&ssh("tag:server", "*"), "wildcard (*) is not supported");
    refused(
        &ssh("ada@example.com", "bob@example.com"),
        "only that same user",
    );
    refused(
        &ssh("tag:server", "autogroup:member"),
        "cannot access user-owned",
    );
    let grant =
        |rest: &str| format!(r#""grants": [{{"src": ["*"], "dst": ["tag:server"], {rest}}}]"#);
    refused(&grant(r#""ip": ["*:80"]"#), "not known");
    refused(&grant(r#""ip": ["icmp:8"]"#), "does not support");
    refused(&grant(r#""app": {"cap": [{}]}"#), "{domain}/{path}");
    refused(
        &grant(r#""app": {"tailscale.com/cap/drive-sharer": []}"#),
        "tailscale.com domain",
    );
    refused(
        &grant(r#""ip": ["*"], "via": ["group:a"]"#),
        "via can only be a tag",
    );
    refused(
        &grant(r#""ip": ["*"], "srcPosture": ["posture:x"]"#),
        "posture not defined",
    );
    refused(
        r#""tagOwners": {"tag:a": ["autogroup:internet"]}"#,
        "stands twice",
    );
    refused(
        r#""autoApprovers": {"exitNode": ["autogroup:self"]}"#,
        "could own or approve",
    );
    refused(
        r#""nodeAttrs": [{"target": ["*"], "ipPool": ["10.0.0.0/8"]}]"#,
        "not within 100.64.0.0/10",
    );
    refused(
        r#""nodeAttrs": [{"target": ["*"], "ipPool": ["fd7a:115c:a1e0::/64"]}]"#,
        "the mesh's IPv4 addresses",
    );
    refused(
        r#""nodeAttrs": [{"target": ["*"], "ipPool": ["100.64.0.0/10"]}]"#,
        "reserved range",
    );
}
