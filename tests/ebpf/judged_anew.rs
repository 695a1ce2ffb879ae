//! Flows under another policy: what is written into them, who is cut off, and what a tombstone is.

use mesh_agent::dataplane::EventKind::{Denied, Opened, Revoked};
use mesh_common::flow::{FlowState, flags};
use mesh_common::policy::PolicyPrefix;
use mesh_common::{PolicyEntry, PolicyKey};
use mesh_core::Direction::{Egress, Ingress};
use mesh_core::dataplane::{Tables, prefix};
use mesh_core::desired::MTU;
use mesh_core::{Identity, RuleId};

use crate::scene::*;

/// The same policy under other numbers: rules from 11, peers' identity 28, this node's 26.
fn renumbered() -> Tables {
    let mut netmap = netmap();
    let other = |identity: Identity| Identity(identity.0 + 10);
    for identity in netmap.policy.identities.values_mut() {
        *identity = other(*identity);
    }
    netmap.policy.entries = std::mem::take(&mut netmap.policy.entries)
        .into_iter()
        .map(|(mut key, mut entry)| {
            (key.remote, key.local) = (other(key.remote), other(key.local));
            entry.rule = RuleId(entry.rule.0 + 10);
            (key, entry)
        })
        .collect();
    let mut tables = Tables::of(&netmap, MTU);
    for entry in tables.identities.values_mut() {
        if entry.peer != 0 {
            entry.peer += 10;
        }
    }
    tables
}

#[test]
fn another_policy_is_written_into_a_flow_by_its_next_packet() {
    for steps in [1, 3] {
        let mut kernel = kernel();
        let handshake = [(Ingress, SYN), (Egress, SYN_ACK), (Ingress, ACK)];
        for (direction, flags) in &handshake[..steps] {
            assert!(passes(&kernel, *direction, *flags));
        }
        let [before] = kernel.flows()[..] else {
            panic!("one flow")
        };
        kernel.apply(&renumbered());
        // An error about it writes nothing.
        assert_eq!(kernel.outcome(Ingress, &error(PEER, 3, 4)), PASS);
        assert_eq!(kernel.flows(), [before]);
        let (direction, flags) = handshake[steps - 1];
        assert!(passes(&kernel, direction, flags));
        let [after] = kernel.flows()[..] else {
            panic!("one flow")
        };
        let state = after.entry.state;
        assert_eq!(state.generation, kernel.config().generation);
        assert_eq!(
            (state.remote, state.local, state.rule, state.peer),
            (Identity(28), Identity(26), RuleId(11), 12)
        );
        assert_eq!(state.flags, before.entry.state.flags);
        let held = u32::from(steps == 3);
        assert_eq!(kernel.load(2).added, [held, 0], "counted in once");
        assert_eq!(after.stage, before.stage);
        assert_eq!(after.entry.opened, before.entry.opened);
        assert_eq!(
            after.entry.packets[0],
            before.entry.packets[0] + 1,
            "counts go on"
        );
    }
}

#[test]
fn a_revoked_flow_leaves_a_tombstone_that_outlasts_the_policy_and_the_window() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    kernel.apply(&revoked());
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, ACK)), Err("revoked"));
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), Err("revoked"));
    assert_eq!(kernel.outcome(Ingress, &error(PEER, 3, 1)), Err("revoked"));
    kernel.pick_up(true);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), Err("revoked"));
    // A half-open flow is judged anew before it is established, too.
    kernel.pick_up(false);
    kernel.apply(&tables());
    let ports = [40_001, 22];
    for (direction, flags) in [(Ingress, SYN), (Egress, SYN_ACK)] {
        assert_eq!(
            kernel.outcome(direction, &tcp_between(PEER, ports, direction, flags)),
            PASS
        );
    }
    kernel.apply(&revoked());
    let last = tcp_between(PEER, ports, Ingress, ACK);
    assert_eq!(kernel.outcome(Ingress, &last), Err("revoked"));
    assert_eq!(flows(&kernel), (1, 1));
}

#[test]
fn a_tombstone_stays_as_it_is_until_the_policy_changes() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, RST)), PASS);
    let [before] = kernel.flows()[..] else {
        panic!("one flow")
    };
    kernel.events();
    kernel.apply(&revoked());
    assert_eq!(kernel.outcome(Ingress, &error(PEER, 3, 1)), Err("revoked"));
    assert_eq!(
        kernel.flows(),
        [before],
        "an error is not a packet of the flow"
    );
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, RST)), Err("revoked"));
    let [tombstone] = kernel.flows()[..] else {
        panic!("one flow")
    };
    let expected = FlowState {
        generation: kernel.config().generation,
        flags: before.entry.state.flags | flags::DENIED,
        rule: RuleId::NONE,
        ..before.entry.state
    };
    assert_eq!(tombstone.entry.state, expected);
    for direction in [Ingress, Egress] {
        assert_eq!(
            kernel.outcome(direction, &tcp(direction, RST)),
            Err("revoked")
        );
        assert_eq!(kernel.flows(), [tombstone]);
    }
    // Denied by the next policy too: that is no news.
    kernel.apply(&revoked());
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, RST)), Err("revoked"));
    let kinds: Vec<_> = kernel.events().iter().map(|e| e.kind().unwrap()).collect();
    assert_eq!(kinds, [Denied, Revoked, Denied, Denied, Denied]);
    // And allowed again.
    kernel.apply(&tables());
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, RST)), PASS);
    let [again] = kernel.flows()[..] else {
        panic!("one flow")
    };
    assert_eq!(again.entry.state.flags, before.entry.state.flags);
    assert_eq!(again.entry.state.rule, RuleId(1));
    let kinds: Vec<_> = kernel.events().iter().map(|e| e.kind().unwrap()).collect();
    assert_eq!(kinds, [Opened]);
}

#[test]
fn a_flow_that_was_opened_here_is_no_answer_to_one_that_was_revoked() {
    let mut kernel = kernel();
    handshake(&mut kernel);
    kernel.apply(&revoked());
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), Err("revoked"));
    // The other end asks for a flow of its own under the same key, and is judged for itself.
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, SYN)), Err("no rule"));
    let mut tables = revoked();
    let row = PolicyKey::new(Identity(18), Identity(16), Egress, 6, 40_000);
    let prefix = PolicyPrefix {
        len: PolicyPrefix::EXACT,
        key: row,
    };
    tables.rows.insert(prefix, PolicyEntry::accept(RuleId(4)));
    kernel.apply(&tables);
    assert_eq!(kernel.outcome(Egress, &tcp(Egress, SYN)), PASS);
    assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, SYN_ACK)), PASS);
}

/// Established or half-open, and whether a packet or the review finds it first: the rule that ends a flow
/// is told, and counts what it refuses.
#[test]
fn what_a_rule_ends_is_that_rules() {
    for reviewed in [false, true] {
        let mut kernel = kernel();
        handshake(&mut kernel);
        let half_open = tcp_between(PEER, [40_001, 22], Ingress, SYN);
        assert_eq!(kernel.outcome(Ingress, &half_open), PASS);
        let tables = denying(RuleId(9));
        kernel.apply(&tables);
        if reviewed {
            let ended = kernel.dataplane().review(&tables).unwrap();
            let rules: Vec<_> = ended.iter().map(|(_, entry)| entry.state.rule).collect();
            assert_eq!(rules, [RuleId(9); 2]);
        }
        for _ in 0..2 {
            assert_eq!(kernel.outcome(Ingress, &half_open), Err("revoked"));
            assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), Err("revoked"));
        }
        for (_, entry) in [kernel.established(), kernel.half_open()].concat() {
            assert_eq!(entry.state.rule, RuleId(9));
        }
        let counters = kernel.dataplane().counters().unwrap();
        assert_eq!(counters.rules[&RuleId(9)].packets, 4);
    }
}

/// Who is nobody any more is still told of as who it was.
#[test]
fn the_flows_of_one_that_is_gone_are_still_its_own() {
    for reviewed in [false, true] {
        let mut kernel = kernel();
        handshake(&mut kernel);
        let mut tables = tables();
        let peer = std::net::IpAddr::from(PEER);
        tables.identities.remove(&prefix(peer.into()));
        kernel.apply(&tables);
        if reviewed {
            assert_eq!(kernel.dataplane().review(&tables).unwrap().len(), 1);
        }
        assert_eq!(kernel.outcome(Ingress, &tcp(Ingress, ACK)), Err("revoked"));
        let state = kernel.established()[0].1.state;
        assert_eq!((state.remote, state.local), (Identity(18), Identity(16)));
        assert_eq!((state.peer, state.rule), (2, RuleId::NONE));
    }
}
