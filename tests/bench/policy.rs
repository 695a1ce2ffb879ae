//! What a policy of thousands of rules costs a coordinator and its nodes, and what a change to it does.
//!
//! ```text
//!   10,000 nodes of 400 tags and 100 people  ×  1,000 and 10,000 rules
//!      full compile ─► one change ─► compile from what changed ─► one node's netmap ─► bytes
//! ```
//! A figure is the median of its runs; each run changes something else. The bars stand beside what
//! they are about, and a figure that misses its own fails the program. Needs neither root nor BPF.

mod report;
mod text;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::report::{Report, peak_memory, timed, times};
use self::text::Text;
use self::world::{node, tagged, world};
use anyhow::{Context as _, Result, ensure};
use clap::Args;
use ipnet::{IpNet, Ipv4Net};
use mesh_api::{update, v1};
use mesh_core::dataplane::Tables;
use mesh_core::key::MachineKey;
use mesh_core::netmap::{build, delta};
use mesh_core::node::{Node, NodeId, Role, UserId};
use mesh_core::policy::{CompiledPolicy, Document, Subjects, check, compile};
use mesh_core::world::World;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Runs of a full compile.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Runs of each change.
    #[arg(long, default_value_t = 25)]
    changes: usize,
    /// Also writes the figures there, as an array of name, median, min, unit and runs.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Two cores, ten thousand nodes, ten thousand rules.
const FULL_BAR: Duration = Duration::from_secs(2);
const CHANGE_BAR: Duration = Duration::from_millis(20);
/// The whole program, which holds two worlds and their policies at a time.
const MEMORY_BAR: f64 = 1024.0;

const NODES: u64 = 10_000;
const TAGS: u64 = 400;
const USERS: u64 = 100;
const IDENTITIES: u64 = TAGS + USERS;

pub(crate) fn run(options: Options) -> Result<()> {
    let mut report = Report::default();
    for rules in [1_000, 10_000] {
        measure(rules, &options, &mut report)?;
    }
    report.one(
        "memory: most of the whole program",
        peak_memory()?,
        "MiB",
        Some(MEMORY_BAR),
    );
    report.print();
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report.json())?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    ensure!(
        report.missed.is_empty(),
        "missed: {}",
        report.missed.join("; ")
    );
    Ok(())
}

fn measure(rules: usize, options: &Options, report: &mut Report) -> Result<()> {
    let name = |what: &str| format!("{} rules: {what}", thousands(rules));
    let mut world = world(NODES);
    let mut text = Text::new(rules);
    let large = rules == 10_000;

    let read = times(options.runs, |_| Document::parse(&text.write()))?;
    report.times(name("read the text"), &read.1, None);
    let document = read.0?;
    check(&document, &Subjects::from(&world))?;
    let (policy, full) = times(options.runs, |_| {
        compile(&document, &Subjects::from(&world), None)
    })?;
    report.times(name("full compile"), &full, large.then_some(FULL_BAR));
    // Entries are made when first asked for: the whole of the work is this.
    let (loaded, full) = times(options.runs, |_| {
        let policy = compile(&document, &Subjects::from(&world), None);
        load(&policy);
        policy
    })?;
    report.times(
        name("full compile, with all entries"),
        &full,
        large.then_some(FULL_BAR),
    );
    drop(policy);
    let (room, took) = times(options.runs, |_| loaded.room(&document))?;
    report.times(name("look whether every node has room"), &took, None);
    room?;

    entries(&document, &world, &loaded, &name, report)?;
    let changed = Changes {
        world: &mut world,
        text: &mut text,
        document,
        policy: loaded,
    };
    changed.measure(options.changes, &name, report)
}

/// Asks for the entries of one node of each identity.
fn load(policy: &CompiledPolicy) {
    for id in 1..=IDENTITIES {
        std::hint::black_box(policy.node(NodeId(id)));
    }
}

/// What one node is told, over one node of each identity.
fn entries(
    document: &Document,
    world: &World,
    policy: &CompiledPolicy,
    name: &dyn Fn(&str) -> String,
    report: &mut Report,
) -> Result<()> {
    let few = self::world(IDENTITIES * 2);
    let with_few = compile(document, &Subjects::from(&few), None);
    let mut figures: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut put = |what, value: usize| figures.entry(what).or_default().push(value as f64);
    let mut known = BTreeSet::new();
    for id in (1..=IDENTITIES).map(NodeId) {
        let (map, took) = timed(|| build::build(world, policy, id));
        let map = map.context("a node of the world")?;
        let remotes: BTreeSet<_> = map.policy.entries.keys().map(|key| key.remote).collect();
        let ranges = map.policy.entries.len();
        known.extend(map.policy.identities.values().copied());
        put("peers of a node", map.peers.len());
        put("identities that a node may talk to", remotes.len());
        put("entries of a node", ranges);
        put("rows of a node's map", Tables::of(&map, 1280).rows.len());
        put(
            "entries of a node for each identity",
            ranges / remotes.len().max(1),
        );
        put(
            "bytes of a whole netmap",
            bytes(&update::sign_full(&signing(), &map)),
        );
        put("netmap of a node, microseconds", took.as_micros() as usize);
        // A twentieth of the nodes, the same identities: the same entries.
        let same = with_few.node(id).entries == map.policy.entries;
        ensure!(
            same,
            "{id} has other entries where fewer nodes are of the same identities"
        );
    }
    report.one(&name("identities"), known.len() as f64, "", None);
    for (what, mut values) in figures {
        values.sort_by(f64::total_cmp);
        report.one(
            &name(&format!("{what}, median")),
            values[values.len() / 2],
            "",
            None,
        );
        report.one(
            &name(&format!("{what}, most")),
            values[values.len() - 1],
            "",
            None,
        );
    }
    Ok(())
}

/// A compiled world, and what happens to it.
struct Changes<'a> {
    world: &'a mut World,
    text: &'a mut Text,
    document: Document,
    policy: CompiledPolicy,
}

impl Changes<'_> {
    fn measure(
        mut self,
        runs: usize,
        name: &dyn Fn(&str) -> String,
        report: &mut Report,
    ) -> Result<()> {
        type Change = fn(&mut Changes<'_>, u64) -> Result<NodeId>;
        let changes: [(&str, Change); 9] = [
            ("a node joins", |it, run| {
                let id = NodeId(NODES + 1 + run);
                it.world.nodes.insert(id, Arc::new(node(id.0)));
                Ok(id)
            }),
            ("a tag moves", |it, run| {
                it.node(run * 7 + 3, |node| {
                    node.owner = tagged((run * 31 + 11) % TAGS);
                })
            }),
            ("a node serves a subnet", |it, run| {
                it.node(run * 5 + 1, |node| {
                    let third = u8::try_from(run % 250).unwrap_or_default();
                    let route = Ipv4Net::new_assert([10, 200, third, 0].into(), 24);
                    let route = IpNet::from(route);
                    node.advertised_routes.insert(route);
                    node.approved_routes.insert(route);
                })
            }),
            ("a node expires", |it, run| {
                it.node(run * 3 + 2, |node| node.expired = true)
            }),
            ("a node leaves", |it, run| {
                let id = NodeId(NODES + 1 + run);
                it.world.nodes.remove(&id);
                Ok(NodeId(id.0 % IDENTITIES + 1))
            }),
            ("a user gets a role", |it, run| {
                let id = UserId(run % USERS + 1);
                let user = it.world.users.get_mut(&id).context("a user")?;
                Arc::make_mut(user).role = Role::Auditor;
                Ok(NodeId(TAGS + id.0))
            }),
            ("a rule is edited", |it, run| {
                it.rule(|text| text.edit(run as usize * 37 + 5))
            }),
            ("a rule is added", |it, run| {
                it.rule(|text| text.add(run as usize * 41 + 3))
            }),
            ("a rule is removed", |it, run| {
                it.rule(|text| text.remove(run as usize * 43 + 1))
            }),
        ];
        for (what, change) in changes {
            let mut compiles = Vec::new();
            let mut netmaps = Vec::new();
            let mut deltas = Vec::new();
            for run in 0..runs {
                let before = self.world.clone();
                let witness = change(&mut self, run as u64)?;
                self.world.generation.0 += 1;
                let subjects = Subjects::from(&*self.world);
                let (next, took) = timed(|| compile(&self.document, &subjects, Some(&self.policy)));
                compiles.push(took);
                let old = build::build(&before, &self.policy, witness);
                let (new, took) = timed(|| build::build(self.world, &next, witness));
                netmaps.push(took);
                if let (Some(old), Some(new)) = (old, new) {
                    let delta = delta::diff(&old, &new);
                    let signed = update::sign_delta(&signing(), old.digest(), &delta, &new);
                    deltas.push(bytes(&signed) as f64);
                }
                self.policy = next;
            }
            report.times(name(what), &compiles, Some(CHANGE_BAR));
            report.times(
                name(&format!("{what}: netmap of a node concerned")),
                &netmaps,
                None,
            );
            report.many(name(&format!("{what}: bytes to it")), deltas, "bytes");
        }
        // However one got here.
        let anew = compile(&self.document, &Subjects::from(&*self.world), None);
        for id in (1..=IDENTITIES).map(NodeId) {
            ensure!(
                anew.node(id) == self.policy.node(id),
                "{id}: changed is not what is made anew"
            );
        }
        Ok(())
    }

    fn node(&mut self, number: u64, change: impl FnOnce(&mut Node)) -> Result<NodeId> {
        let id = NodeId(number % NODES + 1);
        let node = self
            .world
            .nodes
            .get_mut(&id)
            .context("a node of the world")?;
        change(Arc::make_mut(node));
        Ok(id)
    }

    /// Somebody whom the rule is about stands for all of them.
    fn rule(&mut self, change: impl FnOnce(&mut Text) -> u64) -> Result<NodeId> {
        let tag = change(self.text);
        self.document = Document::parse(&self.text.write())?;
        Ok(NodeId(tag % TAGS + 1))
    }
}

fn signing() -> MachineKey {
    MachineKey::from_seed([1; 32])
}

fn bytes(sent: &v1::SignedUpdate) -> usize {
    sent.update.len() + sent.signature.len()
}

fn thousands(number: usize) -> String {
    format!("{},{:03}", number / 1000, number % 1000)
}
