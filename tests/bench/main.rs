//! `mesh-bench`: measurements that take a quiet machine, each beside a peer in the same run.

#![expect(clippy::print_stdout, reason = "a program for people")]

mod policy;
mod tunnel;

use anyhow::Result;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(about = "Measures what the project promises figures of")]
enum What {
    /// The userspace tunnel with iperf3, next to wireguard-go
    Tunnel(tunnel::Options),
    /// The policy compiler with ten thousand nodes and rules; needs no root
    Policy(policy::Options),
}

fn main() -> Result<()> {
    match What::parse() {
        What::Tunnel(options) => tunnel::run(options),
        What::Policy(options) => policy::run(options),
    }
}
