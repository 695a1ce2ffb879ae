//! The demo to look at: what to try, and a table that keeps measuring.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Result;
use mesh_tests::mesh::{Mesh, ROLES};
use mesh_tests::probe::Kind;
use mesh_tests::scenario::reach::{KINDS, LIMIT, measure};

use super::expected::Expected;

/// Between two measurements.
const PAUSE: Duration = Duration::from_secs(3);

/// Measures for as long as it is let; an interrupt ends it and cleans up.
pub(super) fn run(mesh: &Mesh) -> Result<()> {
    print_commands(mesh)?;
    let mut shown = String::new();
    loop {
        let table = table(mesh)?;
        if table != shown {
            if !shown.is_empty() && std::io::stdout().is_terminal() {
                // Up over the table that stands there, and clear what is below (ECMA-48).
                print!("\x1b[{}A\x1b[J", shown.lines().count());
            }
            print!("{table}");
            shown = table;
        }
        std::thread::sleep(PAUSE);
    }
}

fn table(mesh: &Mesh) -> Result<String> {
    let expected = Expected::of(mesh)?;
    let cells = measure(mesh, &KINDS, LIMIT)?;
    let reached = |from: &str, to: &str, kind: Kind| {
        cells
            .iter()
            .filter(|cell| (cell.from, cell.to, cell.kind) == (from, to, kind))
            .all(|cell| cell.reached)
    };
    let mut text = format!("{:12}", "from \\ to");
    for to in ROLES {
        text.push_str(&format!("{to:22}"));
    }
    text.push('\n');
    let mut differ = 0;
    for from in ROLES {
        text.push_str(&format!("{from:12}"));
        for to in ROLES {
            let mut words = Vec::new();
            for kind in KINDS.into_iter().filter(|_| from != to) {
                match (expected.is_open(from, to, kind), reached(from, to, kind)) {
                    (true, true) => words.push(kind.to_string()),
                    (false, false) => {}
                    (true, false) => words.push(format!("MISSING:{kind}")),
                    (false, true) => words.push(format!("LEAKS:{kind}")),
                }
                differ += usize::from(expected.is_open(from, to, kind) != reached(from, to, kind));
            }
            if words.is_empty() {
                words.push(if from == to {
                    String::new()
                } else {
                    "-".to_owned()
                });
            }
            text.push_str(&format!("{:22}", words.join(" ")));
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text.push_str(&match differ {
        0 => "measured over IPv4 and IPv6, as the policy in force expects\n".to_owned(),
        differ => format!("{differ} answers are not what the policy in force expects\n"),
    });
    Ok(text)
}

fn print_commands(mesh: &Mesh) -> Result<()> {
    let developer = mesh.node("developer").host.entrance();
    let coordinator = mesh.coordinator.host.entrance();
    println!("Try, as root in another terminal:");
    println!("  {developer} mesh status");
    println!("  {developer} mesh ping node");
    println!("  {developer} ping -c 3 node");
    println!("  {} mesh counters", mesh.node("sandbox").host.entrance());
    println!("Edit the policy, and watch the table:");
    println!("  {coordinator} mesh-coordinator node list");
    println!("  {coordinator} mesh-coordinator policy get > policy.hujson");
    println!("  {coordinator} mesh-coordinator policy set policy.hujson");
    println!(
        "Logs are in {}. Ctrl-C removes everything.\n",
        mesh.lab.folder().display()
    );
    Ok(())
}
