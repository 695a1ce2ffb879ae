//! Which of the rows around a flow speaks: the longest, of every length that there is.

use mesh_common::event::Explanation;
use mesh_common::policy::PolicyPrefix;
use mesh_common::{PolicyEntry, PolicyKey};
use mesh_core::Direction::Ingress;
use mesh_core::{Identity, RuleId};

use crate::kernel::Kernel;
use crate::scene::*;

const PORT: u16 = 0xa5c3;

#[test]
fn the_longest_row_around_a_port_speaks() {
    for remote in [Identity(18), Identity::ANY] {
        let mut kernel = kernel();
        let mut tables = tables();
        tables.rows.clear();
        let mut row = |len, proto, port, rule| {
            let key = PolicyKey::new(remote, Identity(16), Ingress, proto, port);
            let entry = PolicyEntry::accept(RuleId(rule));
            tables.rows.insert(PolicyPrefix { len, key }, entry);
            kernel.apply(&tables);
            kernel.decides(PORT)
        };
        assert_eq!(row(PolicyPrefix::ANY_PROTO, 0, 0, 1), 1, "{remote:?}");
        let rules = 2..;
        for (len, rule) in (PolicyPrefix::ANY_PORT..=PolicyPrefix::EXACT).zip(rules.clone()) {
            let alike = 1_u32 << (PolicyPrefix::EXACT - len);
            let first = u32::from(PORT) & !(alike - 1);
            assert_eq!(row(len, 6, first as u16, rule), rule, "{remote:?}, {len}");
        }
        // Of two halves of a row, one lies in the next longer one and the other in none.
        for (bit, rule) in (0..16).rev().zip(rules) {
            assert_eq!(kernel.decides(PORT ^ 1 << bit), rule, "{remote:?}, {bit}");
        }
        for len in (PolicyPrefix::ANY_PORT..=PolicyPrefix::EXACT).rev() {
            tables.rows.retain(|prefix, _| prefix.len < len);
            kernel.apply(&tables);
            let rule = len - PolicyPrefix::ANY_PORT + 1;
            assert_eq!(kernel.decides(PORT), rule, "{remote:?}, without {len}");
        }
    }
}

/// As many as fit the table's size best, so that of some the bucket is full, and the next.
#[test]
fn each_of_many_rows_is_found() {
    let rules = 1..3_270_u16;
    let mut kernel = kernel();
    let mut tables = tables();
    tables.rows.clear();
    for rule in rules.clone() {
        let key = PolicyKey::new(Identity(18), Identity(16), Ingress, 6, rule * 20);
        let len = PolicyPrefix::EXACT;
        let entry = PolicyEntry::accept(RuleId(rule.into()));
        tables.rows.insert(PolicyPrefix { len, key }, entry);
    }
    kernel.apply(&tables);
    for rule in rules {
        assert_eq!(kernel.decides(rule * 20), u32::from(rule));
        assert_eq!(kernel.decides(rule * 20 + 1), 0, "behind {rule}");
    }
}

impl Kernel {
    /// The rule that decides over a connection from the peer to this port.
    fn decides(&mut self, port: u16) -> u32 {
        let packet = tcp_between(PEER, [40_000, port], Ingress, SYN);
        let (_, out, _) = self.explain("why_in", &packet);
        Explanation::from_bytes(&out).unwrap().rule.0
    }
}
