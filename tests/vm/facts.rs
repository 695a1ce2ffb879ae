//! Facts about the kernel under the agent, measured inside the virtual machine.
//!
//! docs/kernel-support.md says what agents count on; here the kernel is asked. What newer kernels
//! add is asserted to be absent before, so that the table cannot rot.

use std::{
    env,
    fs::{self, OpenOptions},
    process::Command,
};

use aya::{
    maps::MapType,
    programs::{ProgramType, SchedClassifier, TcAttachType},
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};

/// The verifier gives up after a million, and how many it needs differs between kernels: half of
/// that leaves room for the next kernel and the next compiler.
const VERIFIED_LIMIT: u32 = 500_000;

/// The first kernel with tcx links.
const TCX_SINCE: (u32, u32) = (6, 6);

#[test]
fn modules_that_agents_need_are_there() {
    for module in ["wireguard", "tun", "veth", "cls_bpf", "sch_ingress"] {
        assert!(
            fs::exists(format!("/sys/module/{module}")).unwrap(),
            "{module} is not loaded"
        );
    }
}

#[test]
fn wireguard_answers_generic_netlink() {
    ip("link add wgtest type wireguard");
    let listed = run("wg", &["show", "interfaces"]);
    ip("link del wgtest");
    assert_eq!(listed.trim(), "wgtest");
}

#[test]
fn a_tun_device_opens() {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    ip("tuntap add mode tun name tuntest");
    ip("link del tuntest");
}

#[test]
fn programs_maps_and_helpers_of_the_dataplane_load() {
    for kind in [ProgramType::SchedClassifier, ProgramType::Xdp] {
        assert!(is_program_supported(kind).unwrap(), "{kind:?}");
    }
    for kind in [
        MapType::Hash,
        MapType::LruHash,
        MapType::LpmTrie,
        MapType::PerCpuArray,
        MapType::RingBuf,
        MapType::HashOfMaps,
    ] {
        assert!(is_map_supported(kind).unwrap(), "{kind:?}");
    }
    for helper in [
        BpfHelper::BPF_FUNC_ktime_get_coarse_ns,
        BpfHelper::BPF_FUNC_ringbuf_output,
        BpfHelper::BPF_FUNC_skb_load_bytes,
        BpfHelper::BPF_FUNC_sk_assign,
    ] {
        assert!(
            is_helper_supported(ProgramType::SchedClassifier, helper).unwrap(),
            "{helper:?}"
        );
    }
}

#[test]
fn the_kernel_describes_its_types() {
    let types = fs::metadata("/sys/kernel/btf/vmlinux").unwrap();
    assert!(types.len() > 0);
}

#[test]
fn tcx_exists_since_its_release_and_not_before() {
    let answer = SchedClassifier::query_tcx("lo", TcAttachType::Ingress);
    let expected = release() >= TCX_SINCE;
    assert_eq!(answer.is_ok(), expected, "{answer:?} on {:?}", release());
}

#[test]
fn clsact_attaches_to_a_wireguard_device() {
    ip("link add clsacttest type wireguard");
    let attached = aya::programs::tc::qdisc_add_clsact("clsacttest");
    let shown = run("tc", &["qdisc", "show", "dev", "clsacttest"]);
    ip("link del clsacttest");
    attached.unwrap();
    assert!(shown.contains("clsact"), "{shown}");
}

#[test]
fn every_program_passes_the_verifier_well_below_its_limit() {
    let path = env::var("MESH_EBPF_OBJECT").unwrap();
    let mut object = aya::Ebpf::load(&fs::read(path).unwrap()).unwrap();
    let mut most = 0;
    for (name, program) in object.programs_mut() {
        let program: &mut SchedClassifier = program.try_into().unwrap();
        program.load().unwrap();
        let info = program.info().unwrap();
        let verified = info.verified_instruction_count().unwrap();
        println!("{name}: {verified} instructions verified");
        most = most.max(verified);
    }
    assert!(most < VERIFIED_LIMIT, "{most}");
}

// 100.64.7.1                                  100.64.7.2
//   wg0 ┐ vm-a                          vm-b ┌ wg0
//       └ left 192.0.2.1 ──── 192.0.2.2 right┘
#[test]
fn two_namespaces_talk_over_kernel_wireguard() {
    let lab = Namespaces::new(["vm-a", "vm-b"]);
    ip("link add left netns vm-a type veth peer name right netns vm-b");
    let folder = tempfile::tempdir().unwrap();
    let keys = ["a", "b"].map(|name| {
        let private = run("wg", &["genkey"]);
        let file = folder.path().join(name);
        fs::write(&file, &private).unwrap();
        let file = file.to_str().unwrap().to_owned();
        let public = run("bash", &["-c", &format!("wg pubkey < {file}")]);
        (file, public.trim().to_owned())
    });
    for (own, other, device, private, public) in [
        (1, 2, "left", &keys[0].0, &keys[1].1),
        (2, 1, "right", &keys[1].0, &keys[0].1),
    ] {
        let namespace = lab.names[own - 1];
        ip(&format!("-n {namespace} link add wg0 type wireguard"));
        ip(&format!(
            "-n {namespace} addr add 192.0.2.{own}/24 dev {device}"
        ));
        ip(&format!(
            "-n {namespace} addr add 100.64.7.{own}/24 dev wg0"
        ));
        ip(&format!("-n {namespace} link set {device} up"));
        ip(&format!(
            "netns exec {namespace} wg set wg0 private-key {private} listen-port 51820 \
             peer {public} allowed-ips 100.64.7.{other}/32 endpoint 192.0.2.{other}:51820"
        ));
    }
    for namespace in lab.names {
        ip(&format!("-n {namespace} link set wg0 up"));
    }
    let answer = ip("netns exec vm-a ping -c 3 -i 0.2 -W 10 100.64.7.2");
    assert!(answer.contains(" 0% packet loss"), "{answer}");
    let handshakes = ip("netns exec vm-b wg show wg0 latest-handshakes");
    assert!(!handshakes.trim().ends_with("\t0"), "{handshakes}");
}

struct Namespaces<const N: usize> {
    names: [&'static str; N],
}

impl<const N: usize> Namespaces<N> {
    fn new(names: [&'static str; N]) -> Self {
        for name in names {
            ip(&format!("netns add {name}"));
        }
        Self { names }
    }
}

impl<const N: usize> Drop for Namespaces<N> {
    fn drop(&mut self) {
        for name in self.names {
            ip(&format!("netns del {name}"));
        }
    }
}

fn release() -> (u32, u32) {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = text.split('.').map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

fn ip(arguments: &str) -> String {
    run("ip", &arguments.split_whitespace().collect::<Vec<_>>())
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
