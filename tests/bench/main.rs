//! `mesh-bench`: measurements that take a quiet machine, each beside a peer in the same run.

#![expect(clippy::print_stdout, reason = "a program for people")]

mod dataplane;
mod policy;
#[path = "../ebpf/scratch.rs"]
mod scratch;
mod tunnel;
mod tunnel_vm;

use anyhow::Result;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(about = "Measures what the project promises figures of")]
enum What {
    /// The packet path: nanoseconds per packet, alone and in a network device beside nftables
    Dataplane(dataplane::Options),
    /// The userspace tunnel with iperf3, next to wireguard-go; with --vm the kernel's, next to itself
    Tunnel(tunnel::Options),
    /// What `tunnel --vm` runs in its machine
    #[command(hide = true)]
    TunnelInside(tunnel_vm::Rounds),
    /// The policy compiler with ten thousand nodes and rules; needs no root
    Policy(policy::Options),
}

fn main() -> Result<()> {
    match What::parse() {
        What::Dataplane(options) => dataplane::run(&options),
        What::Tunnel(options) => tunnel::run(options),
        What::TunnelInside(rounds) => tunnel_vm::inside(&rounds),
        What::Policy(options) => policy::run(options),
    }
}
