//! Packets as their sender means them, and the bytes that say so.

use std::net::IpAddr;

use mesh_core::Direction;

/// One packet.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) direction: Direction,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// Bytes of IPv4 options, a multiple of four.
    pub(crate) options: usize,
    /// IPv6 extension headers, outermost first.
    pub(crate) extensions: Vec<Extension>,
    pub(crate) fragment: Option<Fragment>,
    pub(crate) body: Body,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Extension {
    HopByHop,
    Destination,
    /// Its routing type.
    Routing(u8),
    Mobility,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fragment {
    pub(crate) id: u16,
    /// In units of eight bytes.
    pub(crate) offset: u16,
    pub(crate) more: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Body {
    Tcp {
        source: u16,
        destination: u16,
        flags: u8,
    },
    Udp {
        source: u16,
        destination: u16,
    },
    Sctp {
        source: u16,
        destination: u16,
    },
    Echo {
        request: bool,
        id: u16,
    },
    /// ICMP of a type that is neither echo nor error.
    Icmp(u8),
    IcmpError {
        kind: u8,
        code: u8,
        quoted: Box<Packet>,
    },
    /// A protocol that nobody here knows.
    Other(u8),
}

impl Packet {
    pub(crate) fn new(
        direction: Direction,
        source: IpAddr,
        destination: IpAddr,
        body: Body,
    ) -> Self {
        Self {
            direction,
            source,
            destination,
            options: 0,
            extensions: Vec::new(),
            fragment: None,
            body,
        }
    }

    pub(crate) fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    /// The IP protocol number of the body.
    pub(crate) fn proto(&self) -> u8 {
        match &self.body {
            Body::Tcp { .. } => 6,
            Body::Udp { .. } => 17,
            Body::Sctp { .. } => 132,
            Body::Echo { .. } | Body::Icmp(_) | Body::IcmpError { .. } => {
                if self.is_v4() {
                    1
                } else {
                    58
                }
            }
            Body::Other(proto) => *proto,
        }
    }

    pub(crate) fn is_later_fragment(&self) -> bool {
        self.fragment.is_some_and(|fragment| fragment.offset > 0)
    }

    pub(crate) fn is_error(&self) -> bool {
        matches!(self.body, Body::IcmpError { .. }) && !self.is_later_fragment()
    }

    /// The error that tells of a path's MTU.
    pub(crate) fn is_too_big(&self) -> bool {
        match self.body {
            Body::IcmpError {
                kind: 3, code: 4, ..
            } => self.is_v4(),
            Body::IcmpError { kind: 2, .. } => !self.is_v4(),
            _ => false,
        }
    }

    /// Bytes of everything before the body.
    pub(crate) fn header(&self) -> usize {
        if self.is_v4() {
            20 + self.options
        } else {
            40 + 8 * self.extensions.len() + if self.fragment.is_some() { 8 } else { 0 }
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let body = self.body_bytes();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut bytes = vec![0; self.header()];
                bytes[0] = 0x40 | (self.header() / 4) as u8;
                let length = (bytes.len() + body.len()) as u16;
                bytes[2..4].copy_from_slice(&length.to_be_bytes());
                if let Some(fragment) = self.fragment {
                    bytes[4..6].copy_from_slice(&fragment.id.to_be_bytes());
                    let word = fragment.offset | if fragment.more { 0x2000 } else { 0 };
                    bytes[6..8].copy_from_slice(&word.to_be_bytes());
                }
                bytes[8] = 64;
                bytes[9] = self.proto();
                bytes[12..16].copy_from_slice(&source.octets());
                bytes[16..20].copy_from_slice(&destination.octets());
                bytes[20..].fill(1);
                bytes.extend(body);
                bytes
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut numbers: Vec<u8> = self.extensions.iter().map(|e| e.number()).collect();
                if self.fragment.is_some() {
                    numbers.push(44);
                }
                numbers.push(self.proto());
                let mut bytes = vec![0x60, 0, 0, 0];
                let length = (self.header() - 40 + body.len()) as u16;
                bytes.extend(length.to_be_bytes());
                bytes.extend([numbers[0], 64]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                for (extension, next) in self.extensions.iter().zip(&numbers[1..]) {
                    let kind = match extension {
                        Extension::Routing(kind) => *kind,
                        _ => 1,
                    };
                    bytes.extend([*next, 0, kind, 0, 0, 0, 0, 0]);
                }
                if let Some(fragment) = self.fragment {
                    bytes.extend([self.proto(), 0]);
                    let word = fragment.offset << 3 | u16::from(fragment.more);
                    bytes.extend(word.to_be_bytes());
                    bytes.extend([0, 0]);
                    bytes.extend(fragment.id.to_be_bytes());
                }
                bytes.extend(body);
                bytes
            }
            _ => panic!("a packet of two families: {self:?}"),
        }
    }

    fn body_bytes(&self) -> Vec<u8> {
        if self.is_later_fragment() {
            return vec![0xee; 32];
        }
        match &self.body {
            Body::Tcp {
                source,
                destination,
                flags,
            } => {
                let mut bytes = vec![0; 20];
                bytes[..2].copy_from_slice(&source.to_be_bytes());
                bytes[2..4].copy_from_slice(&destination.to_be_bytes());
                bytes[12] = 5 << 4;
                bytes[13] = *flags;
                bytes
            }
            Body::Udp {
                source,
                destination,
            }
            | Body::Sctp {
                source,
                destination,
            } => {
                let mut bytes = vec![0; 12];
                bytes[..2].copy_from_slice(&source.to_be_bytes());
                bytes[2..4].copy_from_slice(&destination.to_be_bytes());
                bytes
            }
            Body::Echo { request, id } => {
                let kind = match (self.is_v4(), request) {
                    (true, true) => 8,
                    (true, false) => 0,
                    (false, true) => 128,
                    (false, false) => 129,
                };
                let mut bytes = vec![kind, 0, 0, 0];
                bytes.extend(id.to_be_bytes());
                bytes.extend([0, 1]);
                bytes
            }
            Body::Icmp(kind) => vec![*kind, 0, 0, 0, 0, 0, 0, 0],
            Body::IcmpError { kind, code, quoted } => {
                let mut bytes = vec![*kind, *code, 0, 0, 0, 0, 0, 0];
                bytes.extend(quoted.bytes());
                bytes
            }
            Body::Other(_) => vec![0; 16],
        }
    }
}

impl Extension {
    fn number(self) -> u8 {
        match self {
            Self::HopByHop => 0,
            Self::Destination => 60,
            Self::Routing(_) => 43,
            Self::Mobility => 135,
        }
    }
}
