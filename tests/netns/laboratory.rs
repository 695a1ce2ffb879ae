//! The laboratory itself: what the scenarios rely on.
//!
//! ```text
//! left ── underlay ── right
//! ```

use std::time::Duration;

use mesh_tests::probe::{Echo, Kind, Probe, Stream, ask_all};
use mesh_tests::{Lab, User};

const LIMIT: Duration = Duration::from_secs(1);

fn lab() -> Lab {
    Lab::new(&std::env::temp_dir()).unwrap()
}

#[test]
fn hosts_reach_each_other_by_every_protocol_and_closed_ports_are_closed() {
    let lab = lab();
    let (left, right) = (lab.host("left").unwrap(), lab.host("right").unwrap());
    let open = [Kind::Icmp, Kind::Tcp(80), Kind::Udp(53)];
    let _echo = Echo::start(&right, &open).unwrap();
    let probes: Vec<_> = right
        .underlay_addresses()
        .into_iter()
        .flat_map(|to| {
            open.into_iter()
                .chain([Kind::Tcp(81), Kind::Udp(54)])
                .map(move |kind| (to, kind))
        })
        .map(|(to, kind)| Probe {
            from: &left,
            to,
            kind,
        })
        .collect();
    let answered: Vec<_> = ask_all(&probes, LIMIT)
        .unwrap()
        .into_iter()
        .map(|answer| answer.is_some())
        .collect();
    let expected = [true, true, true, false, false].repeat(2);
    assert_eq!(answered, expected);
}

#[test]
fn a_stream_counts_what_a_cut_wire_loses() {
    let lab = lab();
    let (left, right) = (lab.host("left").unwrap(), lab.host("right").unwrap());
    let _echo = Echo::start(&right, &[Kind::Udp(7)]).unwrap();
    let pace = Duration::from_millis(10);
    let stream = Stream::start(&left, right.v4().into(), Kind::Udp(7), pace).unwrap();
    mesh_tests::until("answers", LIMIT, || stream.report().received > 20).unwrap();
    assert!(stream.report().lost() <= 1, "{:?}", stream.report());
    lab.set_wire(&right, false).unwrap();
    let before = stream.report().lost();
    mesh_tests::until("losses", LIMIT, || stream.report().lost() > before + 10).unwrap();
    lab.set_wire(&right, true).unwrap();
    let received = stream.report().received;
    mesh_tests::until("answers again", LIMIT, || {
        stream.report().received > received + 10
    })
    .unwrap();
    let report = stream.finish().unwrap();
    assert!(report.lost() > 10, "{report:?}");
}

#[test]
fn an_agent_has_five_capabilities_and_no_more() {
    let lab = lab();
    let host = lab.host("alone").unwrap();
    let show = |user| {
        let mut command = host.command(user, "cat");
        command.arg("/proc/self/status");
        let status = String::from_utf8(command.output().unwrap().stdout).unwrap();
        ["Uid:", "CapEff:", "CapBnd:", "NoNewPrivs:"].map(|field| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            line.unwrap_or_default()
                .split_whitespace()
                .last()
                .unwrap_or_default()
                .to_owned()
        })
    };
    // Bits 10, 12, 13, 38 and 39 of capability.h.
    let five = "000000c000003400";
    assert_eq!(show(User::Agent), ["64321", five, five, "1"]);
    let none = "0000000000000000";
    assert_eq!(show(User::Coordinator), ["64322", none, none, "1"]);
}

#[test]
fn nothing_is_left_when_a_laboratory_goes() {
    let prefix = format!("mesh-lab-{}-", std::process::id());
    let traces = || {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mut found: Vec<_> = ["/run/netns", std::env::temp_dir().to_str().unwrap()]
            .iter()
            .flat_map(|folder| std::fs::read_dir(folder).unwrap())
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .chain(mounts.lines().map(str::to_owned))
            .filter(|name| name.contains(&prefix))
            .collect();
        found.sort();
        found
    };
    let before = traces();
    let pid = {
        let lab = lab();
        let host = lab.host("brief").unwrap();
        let mut sleep = host.command(User::Agent, "sleep");
        sleep.arg("60");
        let process = host.spawn("sleep", sleep).unwrap();
        assert!(traces().len() > before.len());
        process.pid()
    };
    assert_eq!(traces(), before);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}
