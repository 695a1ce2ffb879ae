//! In a mesh with every kind of owner, a router and an exit node: denies, sets, postures, routes and SSH.

use mesh_core::policy::{CompiledPolicy, Document};

use crate::support::Mesh;
use crate::{TCP, tcp};

const ICMP: u8 = 1;

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
