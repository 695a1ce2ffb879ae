//! MagicDNS: zone and query in, answer out.
//!
//! What is hard is to be authoritative for exactly what is ours. A name of the mesh must never
//! leave it, or upstream learns who our nodes are and answers "no such name"; a name that is not
//! ours must never be answered here, or we have broken somebody's internet. So every query ends
//! in one [`Answer`], and the properties at the bottom hold that line.
//!
//! [`wire`] turns datagrams into answers, [`forward`] is the pure half of asking upstream.

use std::collections::BTreeMap;
use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, NS, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name as DnsName, RData, Record, RecordType};

use crate::netmap::Netmap;
use crate::node::{Addresses, Name};
use crate::world::Pools;

mod domain;
pub mod forward;
mod reverse;
pub mod wire;

pub use domain::{Domain, InvalidDomain};
use reverse::Reverse;

/// Everything the DNS actuator is told: what to serve, where, and what the host should ask us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    pub zone: Zone,
    /// This node's own addresses: the server listens on port 53 of each, and the host asks there.
    pub servers: [IpAddr; 2],
    /// Goes into the host's search list, so that short names resolve.
    pub domain: Domain,
    /// Names under which a resolver with routing, as systemd-resolved, must ask us and nobody
    /// else: the mesh domain and the reverse zones. The latter may be wider than the pools, since
    /// DNS cuts at whole bytes; what is not ours we forward.
    pub routing: Vec<String>,
}

impl Config {
    pub fn of(netmap: &Netmap) -> Result<Self, InvalidDomain> {
        let domain = Domain::parse(&netmap.mesh.domain)?;
        let mut routing = vec![domain.as_str().to_owned()];
        routing.extend(reverse::enclosing_zones(&netmap.mesh.pools));
        Ok(Self {
            zone: Zone::of(netmap)?,
            servers: netmap.me.addresses.each(),
            domain,
            routing,
        })
    }
}

/// All that this node answers by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Zone {
    apex: DnsName,
    /// The node itself, which is the zone's only name server as far as anyone here can tell.
    me: DnsName,
    own: Addresses,
    pools: Pools,
    serial: u32,
    hosts: BTreeMap<Name, Addresses>,
    names: BTreeMap<IpAddr, DnsName>,
}

/// What becomes of a query.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Ours to answer, or wrong and told so.
    Reply(Message),
    /// Not ours: whoever answered the host before us may know.
    Forward,
    /// Not a query. An answer to it would be an answer to an answer, for ever.
    Drop,
}

/// How long others may remember an address. Short, since a node may be renamed or removed, and
/// since asking again costs one packet over loopback.
pub const TTL: u32 = 60;

/// How long others may remember that there is nothing (RFC 2308, section 5). Shorter still: people
/// look a node up, find it missing, and enroll it.
pub const NEGATIVE_TTL: u32 = 5;

/// Names that programs look up unasked, through the search list, and obey the answer. A node that
/// gives itself one of them gets no DNS name: web proxy and tunnel discovery are not its to serve.
const UNASKED: [&str; 3] = ["isatap", "localhost", "wpad"];

impl Zone {
    /// The zone of one netmap: this node and its peers, forwards and backwards.
    pub fn of(netmap: &Netmap) -> Result<Self, InvalidDomain> {
        let domain = Domain::parse(&netmap.mesh.domain)?;
        let me = (&netmap.me.name, netmap.me.addresses);
        let peers = netmap.peers.values().map(|p| (&p.name, p.addresses));

        let mut hosts = BTreeMap::new();
        let mut names = BTreeMap::new();
        // This node comes last: nobody takes its name from it.
        for (name, addresses) in peers.chain([me]) {
            if UNASKED.contains(&name.as_str()) {
                continue;
            }
            hosts.insert(name.clone(), addresses);
            for address in addresses.each() {
                names.insert(address, domain.host(name));
            }
        }
        Ok(Self {
            apex: domain.apex(),
            me: domain.host(&netmap.me.name),
            own: netmap.me.addresses,
            pools: netmap.mesh.pools,
            // RFC 1982 compares serials modulo 2^32: the low half of the generation is enough.
            serial: (netmap.generation.0 & u64::from(u32::MAX)) as u32,
            hosts,
            names,
        })
    }

    /// Whether `address` belongs to the mesh, this node's own included.
    pub fn is_mesh(&self, address: IpAddr) -> bool {
        self.pools.contains(address) || self.own.contains(address)
    }

    /// Decides one query. Never panics, whatever the message holds.
    pub fn answer(&self, request: &Message) -> Answer {
        if request.metadata.message_type == MessageType::Response {
            return Answer::Drop;
        }
        let refuse = |code| Answer::Reply(error(request, code));
        if request.metadata.op_code != OpCode::Query {
            return refuse(ResponseCode::NotImp);
        }
        // More than one question has no meaning that anyone agrees on (RFC 9619).
        let [query] = request.queries.as_slice() else {
            return refuse(ResponseCode::FormErr);
        };
        if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return refuse(ResponseCode::BADVERS);
        }
        // Zone transfers would list every node in one packet; other classes are not in use.
        if query.query_class != DNSClass::IN
            || matches!(query.query_type, RecordType::AXFR | RecordType::IXFR)
        {
            return refuse(ResponseCode::Refused);
        }
        match self.find(query) {
            Some(found) => Answer::Reply(self.reply(request, query, found)),
            None if request.metadata.recursion_desired => Answer::Forward,
            None => refuse(ResponseCode::Refused),
        }
    }

    fn find(&self, query: &Query) -> Option<Found> {
        let name = &query.name;
        if self.apex.zone_of(name) {
            let below = name.iter().count() - self.apex.iter().count();
            return Some(match below {
                0 => self.at_apex(&self.apex, query),
                1 => match self.host(name) {
                    Some(addresses) => self.host_records(addresses, query),
                    None => Found::nothing(ResponseCode::NXDomain, &self.apex),
                },
                _ => Found::nothing(ResponseCode::NXDomain, &self.apex),
            });
        }
        if let Some(reverse) = Reverse::parse(name) {
            return self.find_reverse(query, &reverse);
        }
        self.find_short(query)
    }

    fn find_reverse(&self, query: &Query, reverse: &Reverse) -> Option<Found> {
        let zone = reverse.zone_within(&self.pools)?;
        if zone == query.name {
            let mut found = self.at_apex(&zone, query);
            if let Some(name) = reverse.address().and_then(|a| self.names.get(&a)) {
                found.push(query, &[RecordType::PTR], [RData::PTR(PTR(name.clone()))]);
            }
            return Some(found);
        }
        let below = reverse.range().and_then(|r| self.names.range(r).next());
        let Some((_, name)) = below else {
            return Some(Found::nothing(ResponseCode::NXDomain, &zone));
        };
        let mut found = Found::nothing(ResponseCode::NoError, &zone);
        if reverse.address().is_some() {
            found.push(query, &[RecordType::PTR], [RData::PTR(PTR(name.clone()))]);
        }
        Some(found)
    }

    /// A single label that names a node, for resolvers that append no search list. Types by which
    /// the root delegates are left to the root: a node may be called like a top-level domain.
    fn find_short(&self, query: &Query) -> Option<Found> {
        let delegates = matches!(
            query.query_type,
            RecordType::NS | RecordType::SOA | RecordType::DS | RecordType::DNSKEY
        );
        if delegates || query.name.iter().count() != 1 {
            return None;
        }
        let addresses = self.host(&query.name)?;
        let mut found = self.host_records(addresses, query);
        // No zone of ours holds this name, so no SOA of ours can say how long it is missing.
        found.zone = None;
        Some(found)
    }

    /// The node that the first label of `name` names, in any mix of cases.
    fn host(&self, name: &DnsName) -> Option<Addresses> {
        let label = std::str::from_utf8(name.iter().next()?).ok()?;
        let name = Name::parse(&label.to_ascii_lowercase()).ok()?;
        self.hosts.get(&name).copied()
    }

    fn host_records(&self, addresses: Addresses, query: &Query) -> Found {
        let mut found = Found::nothing(ResponseCode::NoError, &self.apex);
        found.push(query, &[RecordType::A], [RData::A(A(addresses.v4))]);
        found.push(
            query,
            &[RecordType::AAAA],
            [RData::AAAA(AAAA(addresses.v6))],
        );
        found
    }

    fn at_apex(&self, zone: &DnsName, query: &Query) -> Found {
        let mut found = Found::nothing(ResponseCode::NoError, zone);
        found.push(query, &[RecordType::SOA], [self.soa()]);
        found.push(query, &[RecordType::NS], [RData::NS(NS(self.me.clone()))]);
        found
    }

    fn soa(&self) -> RData {
        let contact = self
            .apex
            .prepend_label("hostmaster")
            .unwrap_or_else(|_| self.apex.clone());
        // Nobody transfers this zone; the figures are those that RFC 1912 section 2.2 calls sane.
        let (refresh, retry, expire) = (3600, 900, 1_209_600);
        RData::SOA(SOA::new(
            self.me.clone(),
            contact,
            self.serial,
            refresh,
            retry,
            expire,
            NEGATIVE_TTL,
        ))
    }

    fn reply(&self, request: &Message, query: &Query, found: Found) -> Message {
        let mut reply = error(request, found.code);
        reply.metadata.authoritative = found.zone.is_some();
        for data in found.records {
            // The owner is the name as it was asked, so that 0x20 case games come out even.
            reply.add_answer(Record::from_rdata(query.name.clone(), TTL, data));
        }
        if let (Some(zone), true) = (found.zone, reply.answers.is_empty()) {
            reply.add_authority(Record::from_rdata(zone, NEGATIVE_TTL, self.soa()));
        }
        reply
    }
}

/// What a zone holds for one query.
struct Found {
    code: ResponseCode,
    records: Vec<RData>,
    /// The apex of the zone that says so.
    zone: Option<DnsName>,
}

impl Found {
    fn nothing(code: ResponseCode, zone: &DnsName) -> Self {
        Self {
            code,
            records: Vec::new(),
            zone: Some(zone.clone()),
        }
    }

    fn push(
        &mut self,
        query: &Query,
        types: &[RecordType],
        records: impl IntoIterator<Item = RData>,
    ) {
        if query.query_type == RecordType::ANY || types.contains(&query.query_type) {
            self.records.extend(records);
        }
    }
}

/// A reply without records: the head of every answer, and all of a refusal.
pub fn error(request: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::response(request.metadata.id, request.metadata.op_code);
    reply.metadata = Metadata::response_from_request(&request.metadata);
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    if let [query] = request.queries.as_slice() {
        reply.add_query(query.clone());
    }
    if let Some(asked) = &request.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(wire::UDP_PAYLOAD)
            .set_dnssec_ok(asked.flags().dnssec_ok);
        reply.set_edns(edns);
    }
    reply
}

#[cfg(test)]
mod tests;
