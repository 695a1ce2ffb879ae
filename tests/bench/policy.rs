//! What a policy of thousands of rules costs a coordinator and its nodes, and what a change to it does.
//!
//! ```text
//!   10,000 nodes of 400 tags and 100 people  ×  1,000 and 10,000 rules
//!      full compile ─► one change ─► compile from what changed ─► one node's netmap ─► bytes
//! ```
//! A figure is the median of its runs; each run changes something else. The bars stand beside what
//! they are about, and a figure that misses its own fails the program. Needs neither root nor BPF.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use ipnet::{IpNet, Ipv4Net};
use mesh_api::{update, v1};
use mesh_core::dataplane::Tables;
use mesh_core::key::{MachineKey, MachinePublic, NodePublic};
use mesh_core::netmap::{build, delta};
use mesh_core::node::{
    Addresses, Epoch, Generation, MeshId, Name, Node, NodeId, Owner, Role, Tag, UnixTime, User,
    UserId, UserName,
};
use mesh_core::policy::{CompiledPolicy, Document, Subjects, check, compile};
use mesh_core::world::{Mesh, Pools, World};
use serde_json::json;

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

// === the world ===

/// Nodes in turn of each tag and each user.
fn world(nodes: u64) -> World {
    World {
        mesh: Arc::new(Mesh {
            id: MeshId([7; 16]),
            domain: "mesh.internal".to_owned(),
            pools: Pools {
                v4: Pools::default_v4(),
                v6: Pools::ula([1; 5]),
            },
        }),
        epoch: Epoch(1),
        generation: Generation(1),
        users: (1..=USERS)
            .map(|id| (UserId(id), Arc::new(user(id))))
            .collect(),
        nodes: (1..=nodes)
            .map(|id| (NodeId(id), Arc::new(node(id))))
            .collect(),
    }
}

fn user(id: u64) -> User {
    User {
        id: UserId(id),
        name: UserName::parse(&login(id)).expect("a login without spaces"),
        display_name: String::new(),
        idp_groups: [format!("team-{}", id % 10)].into(),
        role: Role::Member,
        created: UnixTime(0),
    }
}

fn login(id: u64) -> String {
    format!("u{id}@x.org")
}

fn tagged(number: u64) -> Owner {
    let tag = Tag::parse(&tag(number)).expect("a tag that starts with a letter");
    Owner::Tags([tag].into())
}

fn tag(number: u64) -> String {
    format!("tag:g{number}")
}

fn node(id: u64) -> Node {
    let group = (id - 1) % IDENTITIES;
    let mut key = [0; 32];
    key[..8].copy_from_slice(&id.to_be_bytes());
    let [.., a, b, c] = id.to_be_bytes();
    let owner = match group.checked_sub(TAGS) {
        None => tagged(group),
        Some(user) => Owner::User(UserId(user + 1)),
    };
    let host = u16::from_be_bytes([b, c]);
    let addresses = Addresses {
        v4: [100, 64 + a, b, c].into(),
        v6: [0xfd01, 0x101, 0x101, 0, 0, 0, u16::from(a), host].into(),
    };
    let name = Name::sanitize(&format!("node-{id}"));
    Node {
        endpoints: [([192, 0, 2, c], 41641).into()].into(),
        ..Node::new(
            NodeId(id),
            name,
            MachinePublic(key),
            NodePublic(key),
            owner,
            addresses,
        )
    }
}

// === the text ===

/// Rules as a large site has them: most join a few roles by a few ports.
struct Text {
    rules: Vec<Rule>,
    random: u64,
}

struct Rule {
    section: &'static str,
    line: String,
    /// A tag that it is about.
    tag: u64,
}

impl Text {
    fn new(rules: usize) -> Self {
        let mut text = Self {
            rules: Vec::new(),
            random: 1,
        };
        for number in 0..rules {
            let rule = text.rule(number);
            text.rules.push(rule);
        }
        text
    }

    /// The same numbers in every run of the program (Knuth's MMIX generator).
    fn draw(&mut self, below: u64) -> u64 {
        let next = self.random.wrapping_mul(6_364_136_223_846_793_005);
        self.random = next.wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    fn rule(&mut self, number: usize) -> Rule {
        let dst = self.draw(TAGS);
        let src = [self.draw(TAGS), self.draw(TAGS)].map(tag);
        let [team, person] = [self.draw(20), self.draw(USERS) + 1];
        let port = 1 + self.draw(20_000);
        let to = tag(dst);
        let (section, rule) = match number % 20 {
            0 => (
                "acls",
                json!({"action": "accept", "src": [format!("group:t{team}")], "dst": [format!("{to}:22,443")]}),
            ),
            1 => (
                "acls",
                json!({"action": "accept", "src": [login(person)], "dst": [format!("{to}:{port}")]}),
            ),
            2 => (
                "grants",
                json!({"src": [format!("idp:team-{}", team % 10)], "dst": [to], "ip": ["tcp:443", format!("udp:{port}")]}),
            ),
            3 => (
                "denies",
                json!({"src": [src[0]], "dst": [format!("{to}:{port}-{}", port + 9)]}),
            ),
            4 => (
                "acls",
                json!({"action": "accept", "src": [src[0]], "dst": [format!("10.{}.0.0/16:443", number % 200)]}),
            ),
            5 if number < 20 => (
                "acls",
                json!({"action": "accept", "src": [src[0]], "dst": ["*:9100"]}),
            ),
            6 if number < 20 => (
                "acls",
                json!({"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]}),
            ),
            _ => (
                "acls",
                json!({"action": "accept", "src": src, "dst": [format!("{to}:{port},{}-{}", port + 10, port + 40)]}),
            ),
        };
        Rule {
            section,
            line: rule.to_string(),
            tag: dst,
        }
    }

    fn edit(&mut self, at: usize) -> u64 {
        let at = at % self.rules.len();
        let section = self.rules[at].section;
        let rule = (0..)
            .map(|number| self.rule(number * 20 + 19))
            .find(|rule| rule.section == section || section != "acls");
        self.rules[at] = rule.unwrap_or_else(|| unreachable!("the first of them will do"));
        self.rules[at].tag
    }

    fn add(&mut self, at: usize) -> u64 {
        let at = at % self.rules.len();
        let rule = self.rule(19);
        self.rules.insert(at, rule);
        self.rules[at].tag
    }

    fn remove(&mut self, at: usize) -> u64 {
        let at = at % self.rules.len();
        self.rules.remove(at).tag
    }

    fn write(&self) -> String {
        let section = |name: &str| {
            let rules = self.rules.iter().filter(|rule| rule.section == name);
            let lines: Vec<String> = rules.map(|rule| format!("{},", rule.line)).collect();
            format!("  \"{name}\": [\n{}\n  ],\n", lines.join("\n"))
        };
        let group = |team: u64| {
            let members = (1..=USERS).filter(|user| user % 20 == team).map(login);
            (format!("group:t{team}"), members.collect::<Vec<_>>())
        };
        let groups: BTreeMap<_, _> = (0..20).map(group).collect();
        let owners: BTreeMap<_, Vec<String>> =
            (0..TAGS).map(|number| (tag(number), vec![])).collect();
        format!(
            "{{\n  \"groups\": {},\n  \"tagOwners\": {},\n{}}}\n",
            json!(groups),
            json!(owners),
            ["acls", "grants", "denies"].map(section).concat(),
        )
    }
}

// === figures ===

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed())
}

/// The last outcome, and how long each run took.
fn times<T>(runs: usize, mut work: impl FnMut(usize) -> T) -> Result<(T, Vec<Duration>)> {
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

fn signing() -> MachineKey {
    MachineKey::from_seed([1; 32])
}

fn bytes(sent: &v1::SignedUpdate) -> usize {
    sent.update.len() + sent.signature.len()
}

/// The most that this process ever held, in MiB.
fn peak_memory() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB"));
    let Some(kilobytes) = kilobytes.and_then(|text| text.trim().parse::<f64>().ok()) else {
        bail!("/proc/self/status does not say how much memory was used");
    };
    Ok(kilobytes / 1024.0)
}

fn thousands(number: usize) -> String {
    format!("{},{:03}", number / 1000, number % 1000)
}

#[derive(Default)]
struct Report {
    figures: Vec<Figure>,
    missed: Vec<String>,
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
    fn times(&mut self, name: String, times: &[Duration], bar: Option<Duration>) {
        let milliseconds = |time: &Duration| time.as_secs_f64() * 1e3;
        let values = times.iter().map(milliseconds).collect();
        self.put(name, values, "ms", bar.as_ref().map(milliseconds));
    }

    fn many(&mut self, name: String, values: Vec<f64>, unit: &'static str) {
        self.put(name, values, unit, None);
    }

    fn one(&mut self, name: &str, value: f64, unit: &'static str, bar: Option<f64>) {
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

    fn print(&self) {
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

    fn json(&self) -> serde_json::Value {
        let one = |figure: &Figure| {
            json!({
                "name": figure.name, "median": figure.median, "min": figure.min,
                "unit": figure.unit, "runs": figure.runs,
            })
        };
        self.figures.iter().map(one).collect()
    }
}
