//! The agent is not root: its five capabilities are enough.

use std::process::Command;

use super::*;
use mesh_tests::User;

/// Set for the copy of this program that runs as the agent's user.
const INSIDE: &str = "MESH_CONFORMANCE_INSIDE";

#[test]
fn a_device_needs_no_root() {
    if std::env::var_os(INSIDE).is_some() {
        return open_as_user();
    }
    let lab = lab();
    let host = lab.host("a").unwrap();
    // Where this program was built, the user may not be allowed to look.
    let program = lab.folder().join("conformance");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut command: Command = host.command(User::Agent, program.to_str().unwrap());
    command
        .args([
            "--exact",
            "wg::privileges::a_device_needs_no_root",
            "--nocapture",
        ])
        .env(INSIDE, "1");
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("as user 64321"), "{text}");
}

#[expect(clippy::print_stdout, reason = "the parent process reads it")]
fn open_as_user() {
    let uid = rustix::process::geteuid();
    assert!(!uid.is_root());
    let options = OpenOptions {
        name: INTERFACE.to_owned(),
        mtu: 1280,
        fwmark: FWMARK,
        filter: None,
        uapi_dir: Some("/run/wireguard".into()),
    };
    runtime().block_on(async {
        let backend = Backend::open(choice(), &options).await.unwrap();
        let config = DeviceConfig {
            key: Id(1).key(),
            listen_port: PORT,
            fwmark: FWMARK,
            peers: BTreeMap::new(),
        };
        let ops = reconcile(&config, &backend.status().await.unwrap());
        backend.apply(&ops).await.unwrap();
        let net = Net::new().await.unwrap();
        let interface = backend.interface();
        let routes = routes::Config {
            addresses: Id(1).addresses(),
            mtu: 1280,
            up: true,
            routes: nets(&["100.64.0.0/10", "fd00:64::/48"]),
            only_mesh: BTreeSet::new(),
            table: TABLE,
        };
        net.apply(&interface, &routes).await.unwrap();
        assert_eq!(net.local_addresses(&interface).await.unwrap().len(), 2);
    });
    println!("as user {}", uid.as_raw());
}
