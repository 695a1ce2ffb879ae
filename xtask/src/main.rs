//! The workshop: every task of the project as `cargo xtask VERB`.
//!
//! Only cargo and the system's own tools stand behind the verbs: whatever loads BPF or builds a
//! laboratory of namespaces is a binary of mesh-tests, so that xtask itself builds in seconds.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command for a terminal: what it prints is what it is for"
)]

mod bench;
mod bpf_toolchain;
mod build_and_load;
mod build_ebpf;
mod ci;
mod codegen;
mod demo;
mod mutants;
mod setup;
mod shell;
mod test;
mod tidy;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The tasks of this project", version)]
enum Verb {
    /// Check what must be there, install what is missing.
    Setup(setup::Options),
    /// Build the eBPF object into target/ebpf.
    BuildEbpf(build_ebpf::Options),
    /// Build the eBPF object, attach it to an interface, stream its log, detach on Ctrl-C.
    BuildAndLoad(build_and_load::Options),
    /// A coordinator and four nodes in namespaces, to look at (or with --check, to judge).
    Demo(demo::Options),
    /// Run all tests, or one of the five rings.
    Test(test::Options),
    /// Measure, each thing beside a peer in the same run.
    Bench(bench::Options),
    /// Regenerate what is committed and generated.
    Codegen(codegen::Options),
    /// The rules of the house.
    Tidy(tidy::Options),
    /// Exactly what CI runs, in CI's order.
    Ci(ci::Options),
}

fn main() -> std::process::ExitCode {
    let outcome = match Verb::parse() {
        Verb::Setup(options) => options.run(),
        Verb::BuildEbpf(options) => options.run(),
        Verb::BuildAndLoad(options) => options.run(),
        Verb::Demo(options) => options.run(),
        Verb::Test(options) => options.run(),
        Verb::Bench(options) => options.run(),
        Verb::Codegen(options) => options.run(),
        Verb::Tidy(options) => options.run(),
        Verb::Ci(options) => options.run(),
    };
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
