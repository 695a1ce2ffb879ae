//! `tests`: what a policy's author says must, and must not, be possible.
//!
//! Texts are kept as written: a test that names somebody who does not exist fails as a test, it
//! does not make the policy malformed.

use super::super::hujson::Node;
use super::super::ports::{self, Protocol};
use super::super::problem::{Complaints, Span, Spanned};
use super::decode::{self, Fields};

#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::policy) struct Test {
    pub(in crate::policy) span: Span,
    pub(in crate::policy) src: Spanned<String>,
    pub(in crate::policy) protocol: Protocol,
    pub(in crate::policy) accept: Vec<Spanned<String>>,
    pub(in crate::policy) deny: Vec<Spanned<String>>,
}

pub(super) fn tests(node: &Node, complaints: &mut Complaints) -> Vec<Test> {
    let items = decode::list(node, "\"tests\"", complaints);
    items
        .iter()
        .filter_map(|item| test(item, complaints))
        .collect()
}

fn test(node: &Node, complaints: &mut Complaints) -> Option<Test> {
    let mut fields = Fields::of(node, "an entry of \"tests\"", complaints)?;
    let src = decode::text(&mut fields, "src", complaints);
    let protocol = fields
        .take("proto", complaints)
        .and_then(|node| decode::string(node, "\"proto\"", complaints))
        .and_then(|text| match ports::parse_protocol(text.value) {
            Ok(protocol) if ports::has_ports(protocol) => protocol,
            Ok(_) => {
                complaints.add(text.span, "a test's proto is tcp, udp or sctp");
                None
            }
            Err(message) => {
                complaints.add(text.span, message);
                None
            }
        });
    let mut texts = |name: &str, what: &str, complaints: &mut Complaints| {
        decode::parsed(fields.take(name, complaints), what, complaints, |text| {
            Ok(text.to_owned())
        })
    };
    let accept = texts("accept", "\"accept\"", complaints);
    let deny = texts("deny", "\"deny\"", complaints);
    fields.finish(&["src", "proto", "accept", "deny"], complaints);
    Some(Test {
        span: node.span,
        src,
        protocol,
        accept,
        deny,
    })
}
