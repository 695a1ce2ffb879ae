//! Every turn of an agent's life, under traffic.

use std::time::{Duration, Instant};

use mesh_agent::dataplane::probe;
use mesh_common::maps::LAYOUT_VERSION;
use mesh_tests::mesh::Node;
use mesh_tests::{scaled, until};

use super::field::{Field, SOON};
use super::foreign::Stranger;

/// How long a foreign program may go unnoticed.
const NOTICED: Duration = Duration::from_secs(1);

#[test]
fn restarts_deliver_nothing_that_is_denied_and_with_a_kernel_device_lose_nothing() {
    let mut field = Field::new();
    let kernel = field.is_kernel();
    let restarts = if kernel { 50 } else { 5 };
    for _ in 0..restarts {
        field.node_mut().kill().unwrap();
        field.node_mut().restart().unwrap();
        if !kernel {
            field.wait_for_traffic();
        }
    }
    field.wait_for_traffic();
    let (sent, lost) = (field.delivered(), field.lost());
    println!("{restarts} restarts: {sent} allowed packets delivered, {lost:?} lost there and back");
    assert_eq!(field.trespassed(), 0);
    assert!(
        !kernel || lost == [0, 0],
        "{lost:?} allowed packets were lost"
    );
}

#[test]
fn an_upgrade_to_another_layout_under_traffic() {
    let mut field = Field::new();
    let kernel = field.is_kernel();
    field.node_mut().kill().unwrap();
    let pins = field.node().host.path("/sys/fs/bpf/mesh-agent");
    let layout = pins.join(format!("v{LAYOUT_VERSION}"));
    std::fs::rename(&layout, pins.join("v0")).unwrap();
    field.node_mut().restart().unwrap();
    field.wait_for_traffic();
    until("the other layout's pins are gone", SOON, || {
        !pins.join("v0").exists()
    })
    .unwrap();
    assert!(layout.exists());
    field.wait_for_traffic();
    let lost = field.lost();
    assert_eq!(field.trespassed(), 0);
    assert!(
        !kernel || lost == [0, 0],
        "{lost:?} allowed packets were lost"
    );
}

/// The device is never up without programs and a policy.
#[test]
fn a_device_comes_up_last() {
    let field = Field::new();
    let join = field.mesh.coordinator.join().to_owned();
    // `mesh down` takes the device away, `mesh up` makes it again; look all the time.
    let node = field.node();
    node.mesh(&["down"]).unwrap();
    let seen = node
        .host
        .inside(|| {
            std::thread::scope(|scope| {
                let up = scope.spawn(|| node.mesh(&["up", "--join", &join]));
                let mut seen = Vec::new();
                while !up.is_finished() {
                    seen.extend(look());
                }
                up.join().unwrap().unwrap();
                seen.extend(look());
                seen
            })
        })
        .unwrap();
    assert!(seen.contains(&Seen::Filtered), "it was never up");
    assert!(!seen.contains(&Seen::Bare), "it was up without programs");
    field.wait_for_traffic();
    assert_eq!(field.trespassed(), 0);
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seen {
    Down,
    /// Up, and no program at one of its hooks.
    Bare,
    Filtered,
}

/// The device of this thread's network, if there is one.
fn look() -> Option<Seen> {
    use aya::programs::{SchedClassifier, TcAttachType};
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").ok()?;
    let hooks = [TcAttachType::Ingress, TcAttachType::Egress];
    let filtered = || {
        if probe::has_tcx() {
            hooks.iter().all(|hook| {
                SchedClassifier::query_tcx("mesh0", *hook).is_ok_and(|(_, found)| !found.is_empty())
            })
        } else {
            ["ingress", "egress"].iter().all(|hook| {
                let shown = std::process::Command::new("tc")
                    .args(["filter", "show", "dev", "mesh0", hook])
                    .output();
                shown.is_ok_and(|shown| String::from_utf8_lossy(&shown.stdout).contains("mesh_"))
            })
        }
    };
    rustix::net::netdevice::name_to_index(&socket, "mesh0").ok()?;
    // An interface has IPv6 addresses only while it is up.
    let addresses = std::fs::read_to_string("/proc/thread-self/net/if_inet6").ok()?;
    let up = addresses.lines().any(|line| line.ends_with(" mesh0"));
    // Asked after it was up: it must not have come up before.
    Some(match up {
        false => Seen::Down,
        true if filtered() => Seen::Filtered,
        true => Seen::Bare,
    })
}

#[test]
fn a_device_that_somebody_removes_and_makes_anew_is_filtered_again() {
    let field = Field::new();
    let host = &field.node().host;
    let kernel = field.is_kernel();
    host.run("ip", &["link", "del", "mesh0"]).unwrap();
    // Who comes first, the agent or this one, does not matter.
    let _ = if kernel {
        host.run("ip", &["link", "add", "mesh0", "type", "wireguard"])
    } else {
        host.run(
            "ip",
            &["tuntap", "add", "mesh0", "mode", "tun", "user", "64321"],
        )
    };
    let _ = host.run("ip", &["link", "set", "mesh0", "up"]);
    field.wait_for_traffic();
    until("denied packets are dropped again", SOON, || {
        let before = field.refused();
        std::thread::sleep(Duration::from_millis(100));
        field.refused() > before
    })
    .unwrap();
    assert_eq!(field.trespassed(), 0);
}

#[test]
fn a_foreign_program_before_ours_closes_the_device_within_a_second() {
    let field = Field::new();
    let stranger = Stranger::before(&field.node().host);
    let begun = Instant::now();
    let condition = field.wait_for_condition("FilterBypassed");
    until("the device is down", SOON, || !is_up(field.node())).unwrap();
    // Long enough for whatever still passes.
    std::thread::sleep(scaled(NOTICED));
    let exposed = field
        .last_trespass()
        .map(|last| last.saturating_duration_since(begun));
    println!(
        "denied packets passed for {exposed:?} ({}): {condition}",
        field.trespassed()
    );
    let exposed = exposed.expect("the stranger lets everything pass");
    assert!(exposed <= scaled(NOTICED), "open for {exposed:?}");
    assert_eq!(condition["severity"], "error");

    let before = field.trespassed();
    drop(stranger);
    field.wait_for_traffic();
    let told = field.wait_for_condition("FilterWasBypassed");
    assert!(
        told["text"].as_str().unwrap().contains("for at most"),
        "{told}"
    );
    assert!(field.condition("FilterBypassed").is_none());
    assert_eq!(field.trespassed(), before);

    // A new device does not make it forgotten.
    let host = &field.node().host;
    host.run("ip", &["link", "del", "mesh0"]).unwrap();
    field.wait_for_traffic();
    std::thread::sleep(scaled(NOTICED));
    assert_eq!(field.condition("FilterWasBypassed"), Some(told));
}

#[test]
fn a_foreign_program_that_goes_before_anybody_looks_is_told_of() {
    let field = Field::new();
    drop(Stranger::before(&field.node().host));
    let told = field.wait_for_condition("FilterWasBypassed");
    assert!(
        told["text"].as_str().unwrap().contains("for at most"),
        "{told}"
    );
    drop(Stranger::before(&field.node().host));
    until("both are told of", SOON, || {
        let told = field.condition("FilterWasBypassed");
        told.is_some_and(|told| told["text"].as_str().unwrap().contains("2 times"))
    })
    .unwrap();
    field.wait_for_traffic();
    assert!(field.condition("FilterBypassed").is_none());
}

fn is_up(node: &Node) -> bool {
    let link = node
        .host
        .run("ip", &["-o", "link", "show", "mesh0"])
        .unwrap();
    link.contains(",UP")
}

#[test]
fn a_foreign_program_behind_ours_is_no_matter() {
    let field = Field::new();
    let _stranger = Stranger::behind(&field.node().host);
    let refused = field.refused();
    std::thread::sleep(scaled(2 * NOTICED));
    assert!(field.refused() > refused);
    assert!(field.condition("FilterBypassed").is_none());
    assert_eq!((field.trespassed(), field.lost()), (0, [0, 0]));
}

#[test]
fn programs_that_somebody_takes_off_are_put_back_behind_a_closed_device() {
    let field = Field::new();
    if !probe::has_tcx() {
        field
            .node()
            .host
            .run("tc", &["qdisc", "del", "dev", "mesh0", "clsact"])
            .unwrap();
    } else {
        // An agent of another mind: takes ours off by the rights of root.
        let host = &field.node().host;
        let pins = host.path(&format!("/sys/fs/bpf/mesh-agent/v{LAYOUT_VERSION}"));
        let options = mesh_agent::dataplane::Options {
            pin_dir: pins.parent().unwrap().to_owned(),
            ..Default::default()
        };
        host.inside(|| {
            let thief = mesh_agent::dataplane::Dataplane::attach("mesh0", &options).unwrap();
            // The agent may have made pins again before the last one is gone.
            if let Err(error) = thief.detach() {
                let kind = error.downcast_ref().map(std::io::Error::kind);
                assert_eq!(kind, Some(std::io::ErrorKind::DirectoryNotEmpty));
            }
        })
        .unwrap();
    }
    field.wait_for_condition("FilterWasBypassed");
    field.wait_for_traffic();
    let trespassed = field.trespassed();
    println!("{trespassed} denied packets passed");
    std::thread::sleep(scaled(NOTICED));
    assert_eq!(field.trespassed(), trespassed);
}

#[test]
fn without_its_bpf_file_system_the_filter_stands_and_says_so() {
    let mut field = Field::new();
    let kernel = field.is_kernel();
    let host = &field.node().host;
    host.run("umount", &["-l", "/sys/fs/bpf"]).unwrap();
    let condition = field.wait_for_condition("FilterNotPinned");
    assert_eq!(condition["severity"], "warning");
    field.wait_for_traffic();

    // Nor does the agent's death open anything.
    field.node_mut().kill().unwrap();
    std::thread::sleep(scaled(NOTICED));
    assert_eq!(field.trespassed(), 0);
    if kernel {
        field.wait_for_traffic();
    }

    let host = &field.node().host;
    host.run(
        "mount",
        &["-t", "bpf", "-o", "mode=0711", "bpf", "/sys/fs/bpf"],
    )
    .unwrap();
    host.run("mkdir", &["/sys/fs/bpf/mesh-agent"]).unwrap();
    host.run("chown", &["64321:64321", "/sys/fs/bpf/mesh-agent"])
        .unwrap();
    field.node_mut().restart().unwrap();
    field.wait_for_traffic();
    assert_eq!(field.trespassed(), 0);
}

#[test]
fn a_mounted_file_system_gets_the_pins_back() {
    let field = Field::new();
    let host = &field.node().host;
    host.run("umount", &["-l", "/sys/fs/bpf"]).unwrap();
    field.wait_for_condition("FilterNotPinned");
    host.run(
        "mount",
        &["-t", "bpf", "-o", "mode=0711", "bpf", "/sys/fs/bpf"],
    )
    .unwrap();
    host.run("mkdir", &["/sys/fs/bpf/mesh-agent"]).unwrap();
    host.run("chown", &["64321:64321", "/sys/fs/bpf/mesh-agent"])
        .unwrap();
    until("the condition is cleared", SOON, || {
        field.condition("FilterNotPinned").is_none()
    })
    .unwrap();
    let pins = host.path(&format!("/sys/fs/bpf/mesh-agent/v{LAYOUT_VERSION}/ct_est"));
    assert!(pins.exists());
}
