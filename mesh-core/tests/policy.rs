//! The policy language through its public door: what is refused, who reaches whom, who sees whom.
#![expect(clippy::unwrap_used, reason = "tests panic freely")]

use mesh_core::netmap::Action;
use mesh_core::policy::{ALLOW_ALL, CompiledPolicy, Document, EXAMPLE};

mod support;

use support::Mesh;

const TCP: u8 = 6;

/// One node of each of the example's roles, two where they talk to each other.
fn roles() -> Mesh {
    let mut mesh = Mesh::default();
    mesh.node("operator", "tag:operator");
    mesh.node("node-a", "tag:node");
    mesh.node("node-b", "tag:node");
    mesh.node("sandbox", "tag:sandbox");
    mesh.node("developer", "tag:developer");
    mesh
}

fn tcp(policy: &CompiledPolicy, mesh: &Mesh, src: u64, dst: u64, port: u16) -> bool {
    let [src, dst] = [src, dst].map(mesh_core::node::NodeId);
    let v4 = policy.evaluate(mesh.v4(src), mesh.v4(dst), TCP, port);
    let v6 = policy.evaluate(mesh.v6(src), mesh.v6(dst), TCP, port);
    assert_eq!(v4, v6);
    v4.action == Action::Accept
}

#[test]
fn the_example_passes_its_own_tests() {
    let mesh = roles();
    let policy = mesh.policy(EXAMPLE);
    assert!(tcp(&policy, &mesh, 1, 2, 22), "operator to node by SSH");
    assert!(tcp(&policy, &mesh, 2, 3, 4000), "node to node");
    assert!(tcp(&policy, &mesh, 4, 2, 443), "sandbox to the API");
    assert!(!tcp(&policy, &mesh, 4, 2, 22), "sandbox to SSH");
    assert!(!tcp(&policy, &mesh, 5, 4, 22), "developer to sandbox");
}

#[test]
fn nodes_that_no_rule_joins_do_not_know_each_other() {
    let mesh = roles();
    let policy = mesh.policy(EXAMPLE);
    let [sandbox, developer, node] = [4, 5, 2].map(mesh_core::node::NodeId);
    assert!(!policy.peers(sandbox).contains(&developer));
    assert!(!policy.peers(developer).contains(&sandbox));
    assert!(policy.peers(sandbox).contains(&node) && policy.peers(node).contains(&sandbox));
    let told = policy.node(sandbox);
    assert!(
        told.identities
            .keys()
            .all(|net| !net.contains(&mesh.v4(developer)))
    );
}

#[test]
fn whom_a_deny_hides_is_not_taken_for_the_world() {
    let mesh = roles();
    let text = r#"{
        "tagOwners": {"tag:node": [], "tag:sandbox": []},
        "acls": [{"action": "accept", "src": ["autogroup:danger-all"], "dst": ["tag:node:*"]}],
        "denies": [{"src": ["tag:sandbox"], "dst": ["tag:node:*"]}],
    }"#;
    let policy = mesh.policy(text);
    let [node, sandbox] = [2, 4].map(mesh_core::node::NodeId);
    assert!(!policy.sees(node, sandbox));
    assert!(tcp(&policy, &mesh, 1, 2, 22) && !tcp(&policy, &mesh, 4, 2, 22));
    // Nor by the table: the longest prefix around the hidden address is nobody's.
    let told = policy.node(node);
    let around = |address| {
        let around = told
            .identities
            .iter()
            .filter(|(net, _)| net.contains(&address));
        around
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, identity)| *identity)
    };
    let hidden = around(mesh.v4(sandbox));
    assert_ne!(hidden, around("198.51.100.1".parse().unwrap()));
    assert!(told.entries.keys().all(|key| Some(key.remote) != hidden));
}

#[test]
fn the_default_allows_everything() {
    let mesh = roles();
    for text in [ALLOW_ALL, "", "{}", "// nothing\n"] {
        let policy = mesh.policy(text);
        assert!(tcp(&policy, &mesh, 4, 5, 22), "{text:?}");
    }
    for text in [r#"{"acls": []}"#, r#"{"grants": []}"#] {
        let policy = mesh.policy(text);
        assert!(!tcp(&policy, &mesh, 4, 5, 22), "{text:?}");
    }
}

#[test]
fn every_problem_is_named_with_line_and_column() {
    let text = r#"{
  "acls": [
    {"action": "drop", "src": ["tag:a"], "dst": ["tag:b:ssh"]},
    {"action": "accept", "scr": ["*"], "dst": ["web"]},
  ],
}"#;
    let problems = Document::parse(text).unwrap_err().in_file("p.hujson");
    let shown = problems.to_string();
    let expected = [
        "p.hujson:3:16: action=\"drop\" is not supported",
        "p.hujson:3:50: dst=\"tag:b:ssh\": port range \"ssh\": invalid first integer",
        "p.hujson:4:26: unknown field: \"scr\"",
        "p.hujson:4:48: hostport must contain a colon",
    ];
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), expected.len(), "{shown}");
    for (line, start) in lines.iter().zip(expected) {
        assert!(line.starts_with(start), "{line}\nshould start with {start}");
    }
    let first = problems.iter().next().unwrap();
    assert_eq!((first.line, first.offending.as_str()), (3, "\"drop\""));
}

#[test]
fn rules_may_use_the_old_names_and_say_nothing() {
    let mesh = roles();
    let tags = r#""tagOwners": {"tag:node": [], "tag:operator": []}"#;
    let rule = |rule: &str| format!("{{{tags}, {rule}}}");
    let old =
        r#""acls": [{"action": "accept", "users": ["tag:operator"], "ports": ["tag:node:22"]}]"#;
    assert!(tcp(&mesh.policy(&rule(old)), &mesh, 1, 2, 22));
    let both = r#""acls": [{"action": "accept", "users": ["*"], "src": ["*"], "dst": ["*:*"]}]"#;
    assert!(mesh.try_policy(&rule(both)).is_err());
    let nobody = r#""acls": [{"action": "accept", "dst": ["*:*"]}]"#;
    assert!(!tcp(&mesh.policy(&rule(nobody)), &mesh, 1, 2, 22));
    let deny = r#""denies": [{"dst": ["*:*"]}]"#;
    let problems = mesh.try_policy(&rule(deny)).unwrap_err().to_string();
    assert!(problems.contains("must be specified"), "{problems}");
}

#[test]
fn names_that_nobody_defined_are_refused() {
    let mesh = roles();
    let refused = |text: &str| mesh.try_policy(text).unwrap_err().to_string();
    let acl = |src: &str, dst: &str| {
        format!(r#"{{"acls": [{{"action": "accept", "src": ["{src}"], "dst": ["{dst}:22"]}}]}}"#)
    };
    assert!(refused(&acl("tag:x", "*")).contains("src=tag not found: \"tag:x\""));
    assert!(refused(&acl("*", "tag:x")).contains("dst=\"tag:x\": tag not found"));
    assert!(refused(&acl("group:x", "*")).contains("group not defined in policy"));
    assert!(refused(&acl("*", "web")).contains("host not defined in policy"));
    assert!(refused(&acl("autogroup:self", "*")).contains("not valid on the src side"));
}

#[test]
fn an_expired_node_is_nobody() {
    let mut mesh = roles();
    let node = mesh_core::node::NodeId(2);
    mesh.expire(node);
    let policy = mesh.policy(ALLOW_ALL);
    assert!(policy.peers(node).is_empty());
    assert_eq!(policy.node(node), Default::default());
    assert!(
        mesh.nodes
            .keys()
            .all(|id| !policy.peers(*id).contains(&node))
    );
    assert!(!tcp(&policy, &mesh, 1, 2, 22));
}

const ICMP: u8 = 1;

/// A mesh with every kind of owner, a router and an exit node.
fn town() -> Mesh {
    let mut mesh = Mesh::default();
    mesh.user("ada@example.com");
    mesh.user("bob@example.org");
    mesh.node("ada-laptop", "ada@example.com");
    mesh.node("ada-phone", "ada@example.com");
    mesh.node("bob-laptop", "bob@example.org");
    mesh.node("web", "tag:web");
    mesh.node("db", "tag:db");
    let router = mesh.node("router", "tag:router");
    mesh.route(router, "10.7.0.0/16");
    let exit = mesh.node("exit", "tag:exit");
    mesh.route(exit, "0.0.0.0/0");
    mesh.route(exit, "::/0");
    mesh
}

const TAGS: &str =
    r#""tagOwners": {"tag:web": [], "tag:db": [], "tag:router": [], "tag:exit": []}"#;
const ADA: u64 = 1;
const PHONE: u64 = 2;
const BOB: u64 = 3;
const WEB: u64 = 4;
const DB: u64 = 5;

fn in_town(sections: &str) -> (Mesh, CompiledPolicy) {
    let mesh = town();
    let policy = mesh.policy(&format!("{{{TAGS}, {sections}}}"));
    (mesh, policy)
}

fn refused_in_town(sections: &str) -> String {
    let problems = town().try_policy(&format!("{{{TAGS}, {sections}}}"));
    problems.unwrap_err().to_string()
}

#[test]
fn a_deny_beats_every_accept_and_is_named() {
    let (mesh, policy) = in_town(
        r#"
        "denies": [{"src": ["tag:web"], "dst": ["tag:db:22"], "comment": "no shells"}],
        "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]"#,
    );
    assert!(!tcp(&policy, &mesh, WEB, DB, 22));
    assert!(tcp(&policy, &mesh, WEB, DB, 5432));
    assert!(tcp(&policy, &mesh, DB, WEB, 22), "a deny has a direction");
    let [web, db] = [WEB, DB].map(|id| mesh.v4(mesh_core::node::NodeId(id)));
    let decision = policy.evaluate(web, db, TCP, 22);
    let rule = policy.rule(decision.rule.unwrap()).unwrap();
    assert_eq!(
        (rule.line, rule.summary.as_str()),
        (2, "deny tag:web -> tag:db:22")
    );
    // The port says nothing of what has no ports.
    assert!(policy.evaluate(web, db, ICMP, 8).is_accept());
}

#[test]
fn strict_icmp_needs_a_rule_about_icmp() {
    let ping = |options: &str, proto: &str| {
        let (mesh, policy) = in_town(&format!(
            r#""options": {{{options}}}, "acls": [{{"action": "accept", {proto} "src": ["tag:web"], "dst": ["tag:db:*"]}}]"#
        ));
        let [web, db] = [WEB, DB].map(|id| mesh.v4(mesh_core::node::NodeId(id)));
        policy.evaluate(web, db, ICMP, 8).is_accept()
    };
    assert!(ping("", r#""proto": "tcp","#));
    assert!(!ping(r#""icmp": "strict""#, r#""proto": "tcp","#));
    assert!(ping(r#""icmp": "strict""#, r#""proto": "icmp","#));
    assert!(ping(r#""icmp": "strict""#, ""));
}

#[test]
fn self_means_ones_own_nodes_and_nobody_elses() {
    let (mesh, policy) = in_town(
        r#""acls": [{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:22"]}]"#,
    );
    assert!(tcp(&policy, &mesh, ADA, PHONE, 22));
    assert!(!tcp(&policy, &mesh, ADA, BOB, 22));
    assert!(!tcp(&policy, &mesh, ADA, WEB, 22));
    assert!(!policy.sees(mesh_core::node::NodeId(ADA), mesh_core::node::NodeId(BOB)));
}

#[test]
fn ip_sets_are_built_step_by_step() {
    let sections = |steps: &str| {
        format!(
            r#""hosts": {{"web": "100.64.0.4"}},
            "ipsets": {{"ipset:all": ["100.64.0.0/24"], "ipset:some": [{steps}]}},
            "acls": [{{"action": "accept", "src": ["tag:router"], "dst": ["ipset:some:80"]}}]"#
        )
    };
    let reaches = |steps: &str, dst: u64| {
        let (mesh, policy) = in_town(&sections(steps));
        let [router, dst] = [6, dst].map(|id| mesh.v4(mesh_core::node::NodeId(id)));
        policy.evaluate(router, dst, TCP, 80).is_accept()
    };
    assert!(reaches(r#""ipset:all""#, WEB) && reaches(r#""ipset:all""#, DB));
    assert!(!reaches(r#""ipset:all", "remove web""#, WEB));
    assert!(reaches(r#""ipset:all", "remove web""#, DB));
    assert!(reaches(r#""remove ipset:all", "add web""#, WEB));
    assert!(!reaches(r#""remove ipset:all", "add web""#, DB));
    let circle = r#""ipsets": {"ipset:a": ["ipset:b"], "ipset:b": ["ipset:a"]}, "acls": []"#;
    assert!(refused_in_town(circle).contains("made of itself"));
    assert!(refused_in_town(r#""ipsets": {"ipset:a": ["tag:web"]}"#).contains("made of addresses"));
    let unknown = r#""acls": [{"action": "accept", "src": ["ipset:x"], "dst": ["*:*"]}]"#;
    assert!(refused_in_town(unknown).contains("ip set not defined"));
}

#[test]
fn a_source_must_have_one_of_the_postures() {
    let reaches = |os: &str, posture: &str| {
        let mut mesh = town();
        let node = mesh.nodes.get_mut(&mesh_core::node::NodeId(WEB)).unwrap();
        std::sync::Arc::make_mut(node).host.os = os.to_owned();
        let policy = mesh.policy(&format!(
            r#"{{{TAGS},
            "postures": {{"posture:linux": ["node:os == 'linux'"], "posture:mac": ["node:os == 'macos'"]}},
            "defaultSrcPosture": ["posture:mac"],
            "acls": [{{"action": "accept", {posture} "src": ["tag:web"], "dst": ["tag:db:80"]}}]}}"#
        ));
        tcp(&policy, &mesh, WEB, DB, 80)
    };
    assert!(reaches("macos", ""), "the default holds");
    assert!(!reaches("linux", ""));
    assert!(!reaches("", ""), "nothing reported is no posture");
    assert!(reaches("linux", r#""srcPosture": ["posture:linux"],"#));
    assert!(!reaches("macos", r#""srcPosture": ["posture:linux"],"#));
    assert!(reaches(
        "macos",
        r#""srcPosture": ["posture:linux", "posture:mac"],"#
    ));
    assert!(
        reaches("", r#""srcPosture": [],"#),
        "an own list replaces the default"
    );
    let unknown = r#""acls": [], "defaultSrcPosture": ["posture:x"]"#;
    assert!(refused_in_town(unknown).contains("posture not defined"));
}

#[test]
fn routes_go_to_those_who_may_use_them() {
    let (mesh, policy) =
        in_town(r#""grants": [{"src": ["tag:web"], "dst": ["10.7.1.0/24"], "ip": ["tcp:443"]}]"#);
    let [web, db, router] = [WEB, DB, 6].map(mesh_core::node::NodeId);
    let shown: Vec<String> = policy
        .routes(web, router)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(shown, ["10.7.0.0/16"]);
    assert!(policy.routes(db, router).is_empty());
    let to = |text: &str| policy.evaluate(mesh.v4(web), text.parse().unwrap(), TCP, 443);
    assert!(to("10.7.1.9").is_accept());
    assert!(!to("10.7.2.9").is_accept());
    assert!(!to("8.8.8.8").is_accept());
}

#[test]
fn the_internet_lies_behind_exit_nodes() {
    let (mesh, policy) = in_town(
        r#""acls": [{"action": "accept", "src": ["ada@example.com"], "dst": ["autogroup:internet:443"]}]"#,
    );
    let [ada, exit] = [ADA, 7].map(mesh_core::node::NodeId);
    assert_eq!(policy.routes(ada, exit).len(), 2);
    let to = |text: &str| policy.evaluate(mesh.v4(ada), text.parse().unwrap(), TCP, 443);
    assert!(to("8.8.8.8").is_accept());
    assert!(
        !to("192.168.1.1").is_accept(),
        "private addresses are no internet"
    );
    assert!(!to("100.64.0.7").is_accept(), "nor is the exit node itself");
}

#[test]
fn routes_are_approved_by_those_whom_the_policy_names() {
    let mut mesh = town();
    let router = mesh_core::node::NodeId(6);
    for route in ["10.8.0.0/16", "10.9.9.0/24", "172.16.0.0/12", "0.0.0.0/0"] {
        mesh.advertise(router, route);
    }
    let text = format!(
        r#"{{{TAGS}, "autoApprovers": {{
            "routes": {{"10.8.0.0/16": ["tag:router"], "10.9.0.0/16": ["tag:router"], "172.16.0.0/13": ["tag:router"], "0.0.0.0/0": ["tag:web"]}},
            "exitNode": ["tag:exit"]}}}}"#
    );
    let document = Document::parse(&text).unwrap();
    let approved = |id| {
        let node = &mesh.nodes[&mesh_core::node::NodeId(id)];
        let approved = mesh_core::policy::auto_approved(&document, &mesh.subjects(), node);
        approved.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(approved(6), ["10.8.0.0/16", "10.9.9.0/24"]);
    assert_eq!(approved(7), ["0.0.0.0/0", "::/0"]);
}

#[test]
fn ssh_says_who_logs_in_as_whom() {
    use mesh_core::policy::SshAction;
    let (_, policy) = in_town(
        r#""ssh": [
            {"action": "accept", "src": ["autogroup:member"], "dst": ["tag:web"], "users": ["autogroup:nonroot"], "acceptEnv": ["LANG"]},
            {"action": "check", "checkPeriod": "1h", "src": ["ada@example.com"], "dst": ["tag:web"], "users": ["root"]},
            {"action": "accept", "src": ["ada@example.com"], "dst": ["tag:web"], "users": ["root"]},
            {"action": "accept", "src": ["autogroup:member"], "dst": ["tag:db"], "users": ["localpart:*@example.com"]}]"#,
    );
    let login = |src: u64, dst: u64, login: &str| {
        let [src, dst] = [src, dst].map(mesh_core::node::NodeId);
        policy.ssh_login(src, dst, login).map(|rule| rule.action)
    };
    assert_eq!(login(BOB, WEB, "www"), Some(SshAction::Accept));
    assert_eq!(login(BOB, WEB, "root"), None);
    assert_eq!(
        login(ADA, WEB, "root"),
        Some(SshAction::Check { period: Some(3600) }),
        "a check comes first"
    );
    assert_eq!(login(ADA, DB, "ada"), Some(SshAction::Accept));
    assert_eq!(login(BOB, DB, "bob"), None, "another domain");
    assert_eq!(login(DB, WEB, "www"), None);
    let rule = |rule: &str| refused_in_town(&format!(r#""ssh": [{{{rule}}}]"#));
    let tagged =
        r#""action": "accept", "src": ["tag:web"], "dst": ["autogroup:self"], "users": ["root"]"#;
    assert!(rule(tagged).contains("cannot access user-owned"));
    let star = r#""action": "accept", "src": ["ada@example.com"], "dst": ["*"], "users": ["root"]"#;
    assert!(rule(star).contains("wildcard (*) is not supported"));
    let other = r#""action": "accept", "src": ["ada@example.com"], "dst": ["bob@example.org"], "users": ["root"]"#;
    assert!(rule(other).contains("only that same user"));
}

#[test]
fn a_rules_summary_names_no_address_of_a_node() {
    let (mesh, policy) = in_town(
        r#""acls": [{"action": "accept", "src": ["100.64.0.3", "100.64.0.4", "10.7.0.0/16", "tag:web", "tag:exit"], "dst": ["tag:db:80"]}]"#,
    );
    let told = policy.node(mesh_core::node::NodeId(DB));
    let summaries: Vec<&str> = told
        .rules
        .values()
        .map(|rule| rule.summary.as_str())
        .collect();
    assert_eq!(
        summaries,
        ["accept (an address),(an address),10.7.0.0/16,tag:web and 1 more -> tag:db:80"]
    );
    assert!(tcp(&policy, &mesh, 7, DB, 80));
}

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
