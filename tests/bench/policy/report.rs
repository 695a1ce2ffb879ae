//! Times and other figures, and the bars that they are held against.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

pub(super) fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed())
}

/// The last outcome, and how long each run took.
pub(super) fn times<T>(
    runs: usize,
    mut work: impl FnMut(usize) -> T,
) -> Result<(T, Vec<Duration>)> {
    let mut last = None;
    let mut took = Vec::new();
    for run in 0..runs {
        // Nobody waits for what is thrown away.
        drop(last.take());
        let (done, time) = timed(|| work(run));
        took.push(time);
        last = Some(done);
    }
    Ok((last.context("at least one run")?, took))
}

/// The most that this process ever held, in MiB.
pub(super) fn peak_memory() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB"));
    let Some(kilobytes) = kilobytes.and_then(|text| text.trim().parse::<f64>().ok()) else {
        bail!("/proc/self/status does not say how much memory was used");
    };
    Ok(kilobytes / 1024.0)
}

#[derive(Default)]
pub(super) struct Report {
    figures: Vec<Figure>,
    pub(super) missed: Vec<String>,
}

struct Figure {
    name: String,
    median: f64,
    min: f64,
    unit: &'static str,
    runs: usize,
    bar: Option<f64>,
}

impl Report {
    pub(super) fn times(&mut self, name: String, times: &[Duration], bar: Option<Duration>) {
        let milliseconds = |time: &Duration| time.as_secs_f64() * 1e3;
        let values = times.iter().map(milliseconds).collect();
        self.put(name, values, "ms", bar.as_ref().map(milliseconds));
    }

    pub(super) fn many(&mut self, name: String, values: Vec<f64>, unit: &'static str) {
        self.put(name, values, unit, None);
    }

    pub(super) fn one(&mut self, name: &str, value: f64, unit: &'static str, bar: Option<f64>) {
        self.put(name.to_owned(), vec![value], unit, bar);
    }

    fn put(&mut self, name: String, mut values: Vec<f64>, unit: &'static str, bar: Option<f64>) {
        values.sort_by(f64::total_cmp);
        let Some(median) = values.get(values.len() / 2).copied() else {
            return;
        };
        if let Some(bar) = bar.filter(|bar| median > *bar) {
            self.missed
                .push(format!("{name}: {median:.1} {unit}, at most {bar} {unit}"));
        }
        self.figures.push(Figure {
            name,
            median,
            min: values[0],
            unit,
            runs: values.len(),
            bar,
        });
    }

    pub(super) fn print(&self) {
        println!(
            "{:<66} {:>12} {:>12}  {:<5} {:>4}  bar",
            "", "median", "min", "", "runs"
        );
        for figure in &self.figures {
            let Figure {
                name,
                median,
                min,
                unit,
                runs,
                bar,
            } = figure;
            let bar = bar.map_or_else(String::new, |bar| format!("≤ {bar}"));
            println!("{name:<66} {median:>12.2} {min:>12.2}  {unit:<5} {runs:>4}  {bar}");
        }
    }

    pub(super) fn json(&self) -> serde_json::Value {
        let one = |figure: &Figure| {
            json!({
                "name": figure.name, "median": figure.median, "min": figure.min,
                "unit": figure.unit, "runs": figure.runs,
            })
        };
        self.figures.iter().map(one).collect()
    }
}
