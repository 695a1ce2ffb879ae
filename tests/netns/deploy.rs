//! What is packaged, judged by systemd's own tool and by the programs that it is for.
//!
//! ```text
//! deploy/systemd/*.service ── systemd-analyze security --offline ── exposure, 0.0 (safe) to 10.0
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;

/// The house's limit; systemd calls less than 2.5 "OK", and most daemons "UNSAFE".
const LIMIT: f64 = 2.5;

fn unit(name: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.join("../deploy/systemd").join(name)
}

#[test]
fn no_unit_is_exposed_more_than_the_house_allows() {
    for name in [
        "mesh-agent.service",
        "mesh-dns-helper.service",
        "mesh-coordinator.service",
    ] {
        let output = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager"])
            .arg(unit(name))
            .output()
            .expect("systemd-analyze runs: it is in the package systemd");
        let text = String::from_utf8_lossy(&output.stdout);
        let verdict = text.lines().find(|line| line.contains("Overall exposure"));
        let verdict = verdict.unwrap_or_else(|| panic!("{name}: no verdict in {text}"));
        let score = verdict
            .split_whitespace()
            .find_map(|word| word.parse().ok());
        let score: f64 = score.unwrap_or_else(|| panic!("no number in {verdict:?}"));
        println!("{name}: {score}");
        assert!(score <= LIMIT, "{verdict}");
    }
}

/// Every line of the examples is a setting that the programs know: those in force, and those that
/// only show a default.
#[test]
fn the_example_settings_are_understood() {
    for wanted in [Lines::InForce, Lines::All] {
        let agent = example("agent.toml", wanted);
        if let Err(error) = toml::from_str::<mesh_agent::config::Settings>(&agent) {
            panic!("agent.toml: {error}");
        }
        let settings = match toml::from_str(&example("coordinator.toml", wanted)) {
            Ok(settings) => settings,
            Err(error) => panic!("coordinator.toml: {error}"),
        };
        mesh_coordinator::config::Config::new(settings).expect("the settings agree");
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    InForce,
    All,
}

fn example(name: &str, wanted: Lines) -> String {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(tests.join("../deploy/config").join(name)).unwrap();
    let lines = text.lines().map(|line| match line.strip_prefix("# ") {
        Some(setting) if wanted == Lines::All && is_setting(setting) => setting,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// `name = value`, as against a sentence.
fn is_setting(text: &str) -> bool {
    let name = text.split_once(" = ").map_or("", |(name, _)| name);
    !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit())
}

#[test]
fn the_agent_gets_the_five_capabilities_of_the_design() {
    let text = std::fs::read_to_string(unit("mesh-agent.service")).unwrap();
    let values = |key: &str| {
        let lines = text.lines().filter_map(|line| line.strip_prefix(key));
        let mut words: Vec<_> = lines.flat_map(str::split_whitespace).collect();
        words.sort_unstable();
        words
    };
    let five = [
        "CAP_BPF",
        "CAP_NET_ADMIN",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_PERFMON",
    ];
    assert_eq!(values("AmbientCapabilities="), five);
    assert_eq!(values("CapabilityBoundingSet="), five);
    assert_eq!(values("User="), ["mesh-agent"]);
}
