//! The tables against the netmap that they were made of.

use std::net::{Ipv4Addr, Ipv6Addr};

use mesh_common::flow::{FlowKey, FlowState, flags};
use mesh_common::policy::{Row, RowKey};
use mesh_common::verdict::{outcome, prevailing};
use mesh_common::{Be16, DropReason, PolicyKey, Sides, next_generation, policy};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;
use crate::Direction;
use crate::netmap::{Action, Entry, EntryKey, NodePolicy, PortRange, Rule};

fn identity() -> impl Strategy<Value = Identity> {
    (16_u32..20).prop_map(Identity)
}

fn remote() -> impl Strategy<Value = Identity> {
    prop_oneof![1 => Just(Identity::ANY), 3 => identity()]
}

fn ports() -> impl Strategy<Value = PortRange> {
    let port = prop_oneof![
        Just(0),
        Just(22),
        Just(1023),
        Just(1024),
        Just(65_535),
        any::<u16>()
    ];
    prop_oneof![
        1 => Just(PortRange::ALL),
        3 => (port.clone(), port).prop_map(|(a, b)| PortRange { first: a.min(b), last: a.max(b) }),
    ]
}

fn entry() -> impl Strategy<Value = (EntryKey, Entry)> {
    let proto = prop_oneof![Just(None), Just(Some(6)), Just(Some(17))];
    let action = prop_oneof![3 => Just(Action::Accept), 1 => Just(Action::Deny)];
    (
        remote(),
        16_u32..18,
        any::<bool>(),
        proto,
        ports(),
        action,
        1_u32..9,
    )
        .prop_map(|(remote, local, ingress, proto, ports, action, rule)| {
            let key = EntryKey {
                remote,
                local: Identity(local),
                direction: if ingress {
                    Direction::Ingress
                } else {
                    Direction::Egress
                },
                proto,
                ports: if proto.is_some() {
                    ports
                } else {
                    PortRange::ALL
                },
            };
            (
                key,
                Entry {
                    action,
                    rule: RuleId(rule),
                },
            )
        })
}

fn policy() -> impl Strategy<Value = NodePolicy> {
    let net = prop_oneof![
        (0_u8..6)
            .prop_map(|n| Ipv4Addr::new(100, 64, 0, n).into())
            .prop_map(|a: IpAddr| IpNet::from(a)),
        (0_u8..3).prop_map(|n| IpNet::new(Ipv4Addr::new(10, n, 0, 0).into(), 16).unwrap()),
        Just("100.64.0.0/29".parse().unwrap()),
        (0_u16..4).prop_map(|n| format!("fd00::{n}/128").parse().unwrap()),
    ];
    let rules: BTreeMap<RuleId, Rule> = (1..9)
        .map(|n| {
            // Lines in another order than numbers: the text decides, not the number.
            let rule = Rule {
                file: "policy".into(),
                line: 100 - n,
                summary: String::new(),
            };
            (RuleId(n), rule)
        })
        .collect();
    (btree_map(net, identity(), 0..8), vec(entry(), 0..12)).prop_map(
        move |(identities, entries)| NodePolicy {
            identities,
            entries: entries.into_iter().collect(),
            rules: rules.clone(),
        },
    )
}

fn tables(policy: &NodePolicy) -> Tables {
    let rows = rows::compile(policy);
    Tables {
        identities: policy
            .identities
            .iter()
            .map(|(net, identity)| {
                let entry = IdentityEntry {
                    identity: *identity,
                    ..IdentityEntry::UNKNOWN
                };
                (prefix(*net), entry)
            })
            .collect(),
        rules: rows.values().map(|entry| entry.rule).collect(),
        rows,
        settings: Settings::default(),
    }
}

#[derive(Clone, Copy, Debug)]
struct Flow {
    remote: Identity,
    local: Identity,
    direction: Direction,
    proto: u8,
    port: u16,
}

fn flow() -> impl Strategy<Value = Flow> {
    let port = prop_oneof![
        Just(0),
        Just(22),
        Just(1023),
        Just(1024),
        Just(65_535),
        any::<u16>()
    ];
    let proto = prop_oneof![Just(6), Just(17), Just(47)];
    (identity(), 16_u32..18, any::<bool>(), proto, port).prop_map(
        |(remote, local, ingress, proto, port)| Flow {
            remote,
            local: Identity(local),
            direction: if ingress {
                Direction::Ingress
            } else {
                Direction::Egress
            },
            proto,
            port,
        },
    )
}

/// Read straight from the entries: a deny wins, then the entries for this very remote, then the text.
fn read(policy: &NodePolicy, flow: &Flow) -> Option<(Action, RuleId)> {
    let mut matching: Vec<(&EntryKey, &Entry)> = policy
        .entries
        .iter()
        .filter(|(key, _)| {
            (key.remote == flow.remote || key.remote == Identity::ANY)
                && key.local == flow.local
                && key.direction == flow.direction
                && key.proto.is_none_or(|proto| proto == flow.proto)
                && key.ports.contains(flow.port)
        })
        .collect();
    if matching
        .iter()
        .any(|(_, entry)| entry.action == Action::Deny)
    {
        matching.retain(|(_, entry)| entry.action == Action::Deny);
    }
    if matching.iter().any(|(key, _)| key.remote == flow.remote) {
        matching.retain(|(key, _)| key.remote == flow.remote);
    }
    let (_, entry) = matching
        .into_iter()
        .min_by_key(|(_, e)| (policy.rules[&e.rule].line, e.rule))?;
    Some((entry.action, entry.rule))
}

/// Asked of the rows, as the packet path does.
fn ask(tables: &Tables, flow: &Flow) -> Option<(Action, RuleId)> {
    let key = PolicyKey::new(
        flow.remote,
        flow.local,
        flow.direction,
        flow.proto,
        flow.port,
    );
    let (exact, any) = (tables.row(&key), tables.row(&key.of_anybody()));
    match outcome(prevailing(exact, any)) {
        (None, rule) => Some((Action::Accept, rule)),
        (Some(DropReason::DeniedByRule), rule) => Some((Action::Deny, rule)),
        (Some(_), _) => None,
    }
}

/// Both sides, as the kernel holds them.
#[derive(Debug)]
struct Kernel {
    generation: u32,
    identities: BTreeMap<Prefix, Sides>,
    rows: [BTreeMap<PolicyPrefix, PolicyEntry>; 2],
    rules: BTreeSet<RuleId>,
    settings: Settings,
}

impl Kernel {
    fn of(tables: &Tables, generation: u32) -> Self {
        let identities = tables.identities.iter();
        Self {
            generation,
            identities: identities
                .map(|(prefix, entry)| (*prefix, Sides::both(*entry)))
                .collect(),
            rows: [tables.rows.clone(), tables.rows.clone()],
            rules: tables.rules.clone(),
            settings: tables.settings,
        }
    }

    /// What a packet finds that has read this generation.
    fn at(&self, generation: u32) -> Tables {
        let identities = self.identities.iter();
        Tables {
            identities: identities
                .map(|(prefix, sides)| (*prefix, *sides.at(generation)))
                .collect(),
            rows: self.rows[generation as usize % 2].clone(),
            rules: self.rules.clone(),
            settings: self.settings,
        }
    }

    /// Before the generation is raised.
    fn execute(&mut self, op: &TableOp) {
        let next = next_generation(self.generation);
        let rows = &mut self.rows[next as usize % 2];
        match op {
            TableOp::SetRow(prefix, entry) => {
                rows.insert(*prefix, *entry);
            }
            TableOp::RemoveRow(prefix) => {
                rows.remove(prefix);
            }
            TableOp::Identify(prefix, turn) => {
                let sides = Sides::turn(next, turn.before, turn.after);
                self.identities.insert(*prefix, sides);
            }
            TableOp::CountRule(rule) => {
                self.rules.insert(*rule);
            }
            TableOp::ForgetRule(rule) => {
                self.rules.remove(rule);
            }
            TableOp::Set(settings) => self.settings = *settings,
        }
    }

    /// The same on the other side, once the generation is raised.
    fn repeat(&mut self, op: &TableOp, content: &Tables) {
        match op {
            TableOp::Identify(prefix, _) => match content.identities.get(prefix) {
                Some(entry) => {
                    self.identities.insert(*prefix, Sides::both(*entry));
                }
                None => {
                    self.identities.remove(prefix);
                }
            },
            TableOp::SetRow(..) | TableOp::RemoveRow(_) => self.execute(op),
            TableOp::CountRule(_) | TableOp::ForgetRule(_) | TableOp::Set(_) => {}
        }
    }
}

/// Every address that one of [`policy`]'s networks may hold, and some that none does.
fn addresses() -> impl Iterator<Item = IpAddr> {
    let nodes = (0..9).map(|n| Ipv4Addr::new(100, 64, 0, n).into());
    let routed = (0..4).map(|n| Ipv4Addr::new(10, n, 0, 1).into());
    let v6 = (0..5).map(|n| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n).into());
    nodes.chain(routed).chain(v6)
}

/// May a packet pass between those behind two addresses? If not, is one of them nobody?
fn passes(tables: &Tables, remote: Identity, local: Identity, flow: &Flow) -> Option<bool> {
    if remote == Identity::UNKNOWN || local == Identity::UNKNOWN {
        return None;
    }
    let flow = Flow {
        remote,
        local,
        ..*flow
    };
    Some(matches!(ask(tables, &flow), Some((Action::Accept, _))))
}

/// What the kernel holds of the rows after these writes.
fn write(kernel: &mut BTreeMap<RowKey, Row>, writes: Vec<RowWrite>) {
    for write in writes {
        match write.row {
            Some(row) => kernel.insert(write.at, row),
            None => kernel.remove(&write.at),
        };
    }
}

/// An address that one of [`policy`]'s networks may hold.
fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0_u8..9).prop_map(|n| Ipv4Addr::new(100, 64, 0, n).into()),
        (0_u8..4).prop_map(|n| Ipv4Addr::new(10, n, 0, 1).into()),
        (0_u16..5).prop_map(|n| format!("fd00::{n}").parse().unwrap()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// However many it has seen before.
    #[test]
    fn a_review_ends_what_the_packet_path_would_not_let_pass(
        policy in policy(),
        own in address(),
        flows in vec((address(), address(), flow()), 1..20),
    ) {
        let mut tables = tables(&policy);
        let own = tables.identities.get_mut(&prefix(own.into()));
        if let Some(own) = own {
            own.flags = IdentityEntry::LOCAL;
        }
        let mut review = Review::new(&tables, 7);
        for (remote, local, flow) in &flows {
            let [near, far] = [local, remote].map(|address| tables.identity(*address));
            let allowed = !far.is_local()
                && passes(&tables, far.identity, near.identity, flow) == Some(true);
            let (mine, theirs) = match flow.direction {
                Direction::Ingress => (flow.port, 40_000),
                Direction::Egress => (40_000, flow.port),
            };
            let key = FlowKey {
                remote: (*remote).into(),
                local: (*local).into(),
                remote_port: Be16::new(theirs),
                local_port: Be16::new(mine),
                proto: flow.proto,
                ..FlowKey::NONE
            };
            let state = FlowState {
                generation: 6,
                flags: match flow.direction {
                    Direction::Ingress => 0,
                    Direction::Egress => flags::OPENED_EGRESS,
                },
                remote: Identity(90),
                rule: RuleId(91),
                peer: 92,
                ..FlowState::default()
            };
            let tombstone = review.tombstone(&key, &state);
            prop_assert_eq!(tombstone.is_none(), allowed);
            let Some(tombstone) = tombstone else { continue };
            let is_known = near.is_known() && far.is_known() && !far.is_local();
            let between = Flow { remote: far.identity, local: near.identity, ..*flow };
            let rule = match ask(&tables, &between) {
                Some((_, rule)) if is_known => rule,
                _ => RuleId::NONE,
            };
            let expected = FlowState {
                generation: 7,
                flags: state.flags | flags::DENIED,
                rule,
                ..state
            };
            let expected = match is_known {
                true => FlowState { remote: far.identity, local: near.identity, peer: far.peer, ..expected },
                false => expected,
            };
            prop_assert_eq!(tombstone, expected);
            prop_assert_eq!(review.tombstone(&key, &tombstone), None);
        }
    }

    #[test]
    fn the_kernels_rows_answer_as_ours_do(from in policy(), to in policy(), flows in vec(flow(), 1..40)) {
        let (from, to) = (tables(&from), tables(&to));
        let (mut kernel, mut afresh) = (BTreeMap::new(), BTreeMap::new());
        write(&mut kernel, layout(from.rows.keys(), &from.rows));
        let ops = reconcile(&from, &to);
        let changed = ops.iter().filter_map(|op| match op {
            TableOp::SetRow(prefix, _) | TableOp::RemoveRow(prefix) => Some(prefix),
            _ => None,
        });
        write(&mut kernel, layout(changed, &to.rows));
        write(&mut afresh, layout(to.rows.keys(), &to.rows));
        prop_assert_eq!(&kernel, &afresh);
        for flow in flows {
            for remote in [flow.remote, Identity::ANY] {
                let key = PolicyKey::new(remote, flow.local, flow.direction, flow.proto, flow.port);
                let row = |at: &RowKey| kernel.get(at).copied().unwrap_or(Row::NOTHING);
                let found = policy::longest(&key, row, row);
                prop_assert_eq!(found, to.row(&key), "{:?}", key);
            }
        }
    }

    #[test]
    fn rows_answer_as_the_entries_read(policy in policy(), flows in vec(flow(), 1..40)) {
        let tables = tables(&policy);
        for flow in flows {
            prop_assert_eq!(ask(&tables, &flow), read(&policy, &flow), "{:?}", flow);
        }
    }

    /// A packet keeps to the generation that it has read, so it may still be asking by the one before when the
    /// next is in use; and then by no other.
    #[test]
    fn every_packet_meets_one_content_as_a_whole(
        from in policy(), to in policy(),
        generation in prop_oneof![Just(1), Just(2), Just(u32::MAX)],
    ) {
        let (from, to) = (tables(&from), tables(&to));
        let mut kernel = Kernel::of(&from, generation);
        let is = |kernel: &Kernel, generation, content: &Tables| {
            let now = kernel.at(generation);
            now.rows == content.rows
                && addresses().all(|address| now.identity(address) == content.identity(address))
        };
        let ops = reconcile(&from, &to);
        for op in &ops {
            kernel.execute(op);
            prop_assert!(is(&kernel, generation, &from), "after {:?}", op);
        }
        kernel.generation = next_generation(generation);
        prop_assert!(is(&kernel, generation, &from));
        prop_assert!(is(&kernel, kernel.generation, &to));
        for op in &ops {
            kernel.repeat(op, &to);
            prop_assert!(is(&kernel, kernel.generation, &to), "after {:?} again", op);
        }
        for generation in [generation, kernel.generation] {
            let now = kernel.at(generation);
            prop_assert_eq!(&now, &to);
            prop_assert_eq!(reconcile(&now, &to), vec![]);
        }
    }
}

#[test]
fn a_port_range_becomes_the_fewest_prefixes() {
    let rows_of = |first, last| {
        let key = EntryKey {
            remote: Identity(16),
            local: Identity(17),
            direction: Direction::Ingress,
            proto: Some(6),
            ports: PortRange { first, last },
        };
        let entry = Entry {
            action: Action::Accept,
            rule: RuleId(1),
        };
        let entries = BTreeMap::from([(key, entry)]);
        rows::compile(&NodePolicy {
            entries,
            ..NodePolicy::default()
        })
        .len()
    };
    assert_eq!(rows_of(22, 22), 1);
    assert_eq!(rows_of(0, 65_535), 1);
    assert_eq!(rows_of(1024, 65_535), 6);
    assert_eq!(rows_of(1, 65_534), 30);
}

#[test]
fn every_drop_reason_has_its_row_in_the_documentation() {
    let text = include_str!("../../../docs/dataplane.md");
    for reason in DropReason::ALL {
        let row = format!("| `{}` | {} | ", reason.name(), reason.help());
        let advice = text.lines().find_map(|line| line.strip_prefix(&row));
        assert!(
            advice.is_some_and(|advice| advice.len() > 4),
            "docs/dataplane.md has no row {row}"
        );
    }
}
