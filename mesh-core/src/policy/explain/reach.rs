//! Who can open something, and what somebody can open.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::ends::{End, Explainer, MOST_PAIRS, Service, Unanswerable};
use super::words;
use crate::netmap::{Action, PortRange, Rule};
use crate::policy::classes::ClassId;

/// What one rule opens between a subject and some others.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Row {
    /// `tcp/22,443`.
    pub services: String,
    pub rule: Rule,
    /// Nodes by name, with their owner.
    pub others: Vec<String>,
    /// All of their names, and the prefixes of what is no node.
    pub names: Vec<String>,
}

/// The answer to `who-can` and `what-can`: subjects with the same answer stand together.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Reach {
    pub subjects: Vec<(Vec<String>, Vec<Row>)>,
}

/// What each rule opens.
pub(in crate::policy) type Opened = BTreeMap<Rule, BTreeSet<(u8, PortRange)>>;

impl Explainer<'_> {
    /// Everybody who may open what is written `DST:PORT/PROTO`.
    pub fn who_can(&self, dst: &str) -> Result<Reach, Unanswerable> {
        let service = Service::parse(dst)?;
        let asked = |v4: bool, protocol: u8, ports: &PortRange| {
            let asked = service.in_family(v4);
            asked.is_some_and(|(wanted, port)| wanted == protocol && ports.contains(port))
        };
        let (subjects, others) = (self.ends(service.host)?, self.others());
        self.reach(&subjects, &others, |subject, other| {
            self.towards(other, subject, asked)
        })
    }

    /// Everything that `src` may open.
    pub fn what_can(&self, src: &str) -> Result<Reach, Unanswerable> {
        let (subjects, others) = (self.ends(src)?, self.others());
        self.reach(&subjects, &others, |subject, other| {
            self.towards(subject, other, |_, _, _| true)
        })
    }

    fn reach(
        &self,
        subjects: &[End],
        others: &[End],
        between: impl Fn(&End, &End) -> Opened,
    ) -> Result<Reach, Unanswerable> {
        if subjects.len().saturating_mul(others.len()) > 64 * MOST_PAIRS {
            return Err(Unanswerable::Malformed(format!(
                "that is {} kinds of nodes: name something narrower",
                subjects.len()
            )));
        }
        let mut reach = Reach::default();
        for subject in subjects {
            let mut found: BTreeMap<(Rule, String), Vec<&End>> = BTreeMap::new();
            for other in others {
                for (rule, services) in between(subject, other) {
                    let services = words::services(services.into_iter());
                    found.entry((rule, services)).or_default().push(other);
                }
            }
            let rows = found.into_iter();
            let rows = rows.map(|((rule, services), ends)| self.row(rule, services, &ends));
            reach.add(self.label(subject), rows.collect());
        }
        Ok(reach)
    }

    /// Nodes, what lies behind routers, and the world where a rule lets it in.
    fn others(&self) -> Vec<End> {
        let mut others = self.everybody();
        let world = [IpNet::from(Ipv4Net::default()), Ipv6Net::default().into()];
        let nets = self.pieces().into_keys().chain(world).collect();
        others.extend(End::behind(&nets));
        others
    }

    /// All that `src` may open to `dst`.
    pub(in crate::policy) fn opened(&self, src: &End, dst: &End) -> Opened {
        self.towards(src, dst, |_, _, _| true)
    }

    /// What `src` may open to `dst`, as far as it is `asked`.
    fn towards(
        &self,
        src: &End,
        dst: &End,
        asked: impl Fn(bool, u8, &PortRange) -> bool,
    ) -> Opened {
        let mut opened = Opened::new();
        for (from, to) in self.flows(src, dst) {
            let Some((from_class, to_class)) = self.classes(src, dst, from, to) else {
                continue;
            };
            let classes = &self.compiled.classes;
            let (from_class, to_class) = (&classes[from_class], &classes[to_class]);
            for answer in self.compiled.rules.answers(from_class, to_class) {
                let service = (answer.protocol, answer.ports);
                if answer.action == Action::Accept
                    && asked(from.is_ipv4(), answer.protocol, &answer.ports)
                {
                    let rule = self.rule_at(answer.rule);
                    opened.entry(rule).or_default().insert(service);
                }
            }
        }
        opened
    }

    /// The addresses of the two ends between which a flow can be, in one family each.
    pub(in crate::policy) fn flows(&self, src: &End, dst: &End) -> Vec<(IpAddr, IpAddr)> {
        let targets = match src.nodes == dst.nodes && !src.nodes.is_empty() {
            false => dst.addresses.clone(),
            // Among nodes of one kind another one is the destination.
            true => match dst.nodes.get(1).and_then(|id| self.node(*id)) {
                Some(other) => other.addresses.each().to_vec(),
                None => Vec::new(),
            },
        };
        let sources = src.addresses.iter();
        let pairs = sources.flat_map(|from| targets.iter().map(|to| (*from, *to)));
        pairs
            .filter(|(from, to)| from.is_ipv4() == to.is_ipv4())
            .collect()
    }

    /// The classes of two addresses, as the end that has a node knows them.
    pub(in crate::policy) fn classes(
        &self,
        src: &End,
        dst: &End,
        from: IpAddr,
        to: IpAddr,
    ) -> Option<(ClassId, ClassId)> {
        let compiled = self.compiled;
        match (src.nodes.first(), dst.nodes.first()) {
            (Some(sender), _) => Some((
                compiled.own_class(*sender, from)?,
                compiled.known(*sender, to)?,
            )),
            (None, Some(receiver)) => Some((
                compiled.known(*receiver, from)?,
                compiled.own_class(*receiver, to)?,
            )),
            (None, None) => {
                let sender = compiled.sender(from)?;
                Some((
                    compiled.own_class(sender, from)?,
                    compiled.known(sender, to)?,
                ))
            }
        }
    }

    fn row(&self, rule: Rule, services: String, ends: &[&End]) -> Row {
        let names = |end: &&End| match end.net {
            Some(net) => vec![net.to_string()],
            None => self.names(end),
        };
        Row {
            services,
            rule,
            others: ends.iter().map(|end| self.label(end)).collect(),
            names: ends.iter().flat_map(names).collect(),
        }
    }
}

impl Reach {
    pub(super) fn add(&mut self, subject: String, rows: Vec<Row>) {
        match self.subjects.iter_mut().find(|(_, known)| *known == rows) {
            Some((subjects, _)) => subjects.push(subject),
            None => self.subjects.push((vec![subject], rows)),
        }
    }
}
