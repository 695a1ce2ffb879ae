//! What the packet path costs on this host, beside what nftables costs.
//!
//! BPF_PROG_TEST_RUN measures programs alone, each net of one that does nothing, run in turns with it
//! because the machine is never quiet. It repeats one packet, so rows over many flows run programs that
//! change the packet themselves (mesh-ebpf/src/bench.rs), net of one that only does that. What a packet
//! costs in a network device is measured in [`receive`].

mod receive;
mod rows;
mod setup;

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::json;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Also writes the figures there, as an array of name, median, min, unit and runs.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Runs of each row, in five rounds of as many each; of the slow ones at most ten or fifteen.
    #[arg(long, default_value_t = 31)]
    runs: usize,
}

const ROUNDS: usize = 5;

/// One figure.
#[derive(Debug)]
struct Row {
    name: &'static str,
    unit: &'static str,
    /// Ascending.
    runs: Vec<f64>,
}

impl Row {
    fn new(name: &'static str, unit: &'static str, mut runs: Vec<f64>) -> Self {
        runs.sort_by(f64::total_cmp);
        Self { name, unit, runs }
    }

    fn add(&mut self, other: Self) {
        self.runs.extend(other.runs);
        self.runs.sort_by(f64::total_cmp);
    }

    fn median(&self) -> f64 {
        self.runs[self.runs.len() / 2]
    }

    fn min(&self) -> f64 {
        self.runs[0]
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let rows = rounds(options.runs)?;
    let broken = print(&rows);
    if let Some(path) = &options.json {
        let figures: Vec<_> = rows
            .iter()
            .map(|row| {
                json!({
                    "name": row.name,
                    "median": round(row.median()),
                    "min": round(row.min()),
                    "unit": row.unit,
                    "runs": row.runs.len(),
                })
            })
            .collect();
        std::fs::write(path, serde_json::to_string_pretty(&figures)? + "\n")
            .with_context(|| format!("write {}", path.display()))?;
    }
    ensure!(broken.is_empty(), "broken: {}", broken.join(", "));
    Ok(())
}

/// Everything several times over: what keeps the machine busy for a while is then in few of a row's runs.
fn rounds(runs: usize) -> Result<Vec<Row>> {
    let each = runs.div_ceil(ROUNDS).max(1);
    let mut all: Vec<Row> = Vec::new();
    for _ in 0..ROUNDS {
        setup::alone()?;
        let mut rows = rows::measure(each)?;
        rows.extend(receive::measure(each)?);
        for row in rows {
            match all.iter_mut().find(|known| known.name == row.name) {
                Some(known) => known.add(row),
                None => all.push(row),
            }
        }
    }
    Ok(all)
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// What a row may be at most.
fn bar(name: &str, median: impl Fn(&str) -> f64) -> Option<f64> {
    match name {
        "established_v4" | "established_v6" => Some(60.0),
        "new_allowed" => Some(800.0),
        "new_denied" => Some(350.0),
        "policy_100000" => Some(1.3 * median("policy_10")),
        "swap_10000" => Some(50.0),
        "added_mesh" => Some(median("added_nft_conntrack_map") / 2.0),
        _ => None,
    }
}

/// Returns the rows that are over their bars.
fn print(rows: &[Row]) -> Vec<&'static str> {
    let mut broken = Vec::new();
    let median = |name: &str| {
        let row = rows.iter().find(|row| row.name == name);
        row.map_or(f64::NAN, Row::median)
    };
    println!("{:28} {:>10} {:>10} {:>10}", "", "median", "min", "bar");
    for row in rows {
        let bar = bar(row.name, median).map_or_else(String::new, |bar| {
            let holds = if row.median() <= bar {
                "holds"
            } else {
                broken.push(row.name);
                "BROKEN"
            };
            format!("{bar:10.1} {holds}")
        });
        println!(
            "{:28} {:10.1} {:10.1} {bar} {}",
            row.name,
            row.median(),
            row.min(),
            row.unit
        );
    }
    broken
}
