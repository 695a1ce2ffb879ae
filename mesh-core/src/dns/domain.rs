//! The mesh's domain: a name that may stand in a zone and in resolv.conf.
//!
//! It comes from the coordinator and ends in a file that root writes, so what it may hold is
//! decided here, once: labels of letters, digits and hyphens, and nothing that breaks a line.

use std::fmt;

use hickory_proto::rr::Name as DnsName;

use crate::node::Name;

/// The suffix of every node's name, lower case, without dots at its ends: `mesh.internal`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDomain {
    #[error(
        "a mesh domain is labels of a-z, 0-9 and \'-\', joined by dots, 189 characters at most: {0:?}"
    )]
    Syntax(String),
    #[error("{0:?} belongs to the internet's own machinery and cannot be a mesh domain")]
    Reserved(String),
}

impl Domain {
    /// What leaves room for a label in front within the 253 characters of a name
    /// (RFC 1035, section 2.3.4).
    pub const MAX: usize = 253 - Name::MAX - 1;

    pub fn parse(text: &str) -> Result<Self, InvalidDomain> {
        let fits = text.len() <= Self::MAX && text.split('.').all(|l| Name::parse(l).is_ok());
        if !fits {
            return Err(InvalidDomain::Syntax(text.chars().take(64).collect()));
        }
        let last = text.rsplit('.').next();
        if last.is_some_and(|label| ["arpa", "localhost"].contains(&label)) {
            return Err(InvalidDomain::Reserved(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn apex(&self) -> DnsName {
        DnsName::from_labels(self.0.split('.').map(str::as_bytes))
            .expect("a parsed domain is a DNS name")
    }

    pub(super) fn host(&self, name: &Name) -> DnsName {
        self.apex()
            .prepend_label(name.as_str())
            .expect("a parsed domain leaves room for a label")
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain({:?})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains_that_could_leave_their_place_are_refused() {
        for bad in [
            "",
            ".",
            "a..b",
            ".a",
            "a.",
            "a b",
            "mesh.internal\nnameserver 6.6.6.6",
            "mesh.internal #",
            "../evil",
            "Mesh.internal",
            "arpa",
            "64.100.in-addr.arpa",
            "localhost",
            "a\u{e9}.b",
            &["a"; 120].join("."),
        ] {
            assert!(Domain::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_longest_domain_still_has_room_for_the_longest_name() {
        let label = "a".repeat(63);
        let domain = format!("{label}.{label}.{}", "a".repeat(61));
        assert_eq!(domain.len(), Domain::MAX);
        let domain = Domain::parse(&domain).unwrap();
        let host = domain.host(&Name::parse(&label).unwrap());
        assert_eq!(host.iter().count(), 4);
    }
}
