//! Datagrams and streams of bytes: what arrived, from whom, and what goes back.
//!
//! The decoder allocates by the counts in a header, so counts are judged before it sees a byte:
//! twelve octets from a stranger must not cost us a megabyte. Whoever is not this host learns no
//! name here, since what this node may know of the mesh is not what its peers may know.

use std::net::IpAddr;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};

use super::{Answer, Zone, error};

/// What we say we take, and the most that we send by UDP: fits every path that IPv6 allows
/// (RFC 9715, and the "DNS flag day" of 2020).
pub const UDP_PAYLOAD: u16 = 1232;

/// The most that a forwarded answer may fill, for a client that says it takes more than we send
/// by ourselves. The way to it is loopback, which fragments nothing.
pub const FORWARDED_PAYLOAD: u16 = 4096;

/// The longest query we read. A question is at most 271 bytes; the rest is room for EDNS options.
pub const MAX_QUERY: usize = 4096;

/// Octets of a header (RFC 1035, section 4.1.1).
pub const HEADER: usize = 12;

/// OPT, and a TSIG or SIG(0): nothing else has a place behind a question.
const MAX_ADDITIONALS: u16 = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    Udp,
    Tcp,
}

/// Who asks, judged by the source address alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asker {
    /// This very host, from an address of its own.
    Host,
    /// Another node. It has an agent of its own to ask, which knows what it may see.
    Peer,
    Stranger,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Reply(Vec<u8>),
    /// To be asked upstream. The answer may fill this many octets, more is to be truncated.
    Forward {
        limit: u16,
    },
    Drop,
}

impl Zone {
    pub fn asker(&self, source: IpAddr) -> Asker {
        let source = source.to_canonical();
        if source.is_loopback() || self.own.contains(source) {
            Asker::Host
        } else if self.pools.contains(source) {
            Asker::Peer
        } else {
            Asker::Stranger
        }
    }

    /// Decides one query as it came off a socket. Total: every input has an outcome.
    pub fn respond(&self, asker: Asker, transport: Transport, query: &[u8]) -> Outcome {
        let Some(header) = Header::read(query) else {
            return Outcome::Drop;
        };
        if header.is_response() || asker == Asker::Stranger {
            return Outcome::Drop;
        }
        if !header.is_standard_query() {
            return Outcome::Reply(header.error(ResponseCode::NotImp));
        }
        if header.is_oversized() || query.len() > MAX_QUERY {
            return Outcome::Reply(header.error(ResponseCode::FormErr));
        }
        let Ok(request) = Message::from_vec(query) else {
            return Outcome::Reply(header.error(ResponseCode::FormErr));
        };
        let answer = match asker {
            Asker::Host => self.answer(&request),
            Asker::Peer | Asker::Stranger => Answer::Reply(error(&request, ResponseCode::Refused)),
        };
        match answer {
            Answer::Drop => Outcome::Drop,
            Answer::Forward => Outcome::Forward {
                limit: limit(&request, transport, FORWARDED_PAYLOAD),
            },
            Answer::Reply(reply) => encode(&reply, limit(&request, transport, UDP_PAYLOAD))
                .map_or(Outcome::Drop, Outcome::Reply),
        }
    }
}

/// The reply to a query that could not be forwarded.
pub fn server_failure(query: &[u8]) -> Option<Vec<u8>> {
    let request = Message::from_vec(query).ok()?;
    encode(&error(&request, ResponseCode::ServFail), UDP_PAYLOAD)
}

/// Octets of `message`, at most `limit`: beyond it only header, question and EDNS, marked as
/// truncated, so that the asker comes back by TCP (RFC 2181, section 9).
fn encode(message: &Message, limit: u16) -> Option<Vec<u8>> {
    let whole = |message: &Message| {
        let mut bytes = Vec::with_capacity(512);
        let mut encoder = BinEncoder::new(&mut bytes);
        message.emit(&mut encoder).ok()?;
        Some(bytes)
    };
    let bytes = whole(message)?;
    if bytes.len() <= usize::from(limit) {
        Some(bytes)
    } else {
        whole(&message.truncate())
    }
}

fn limit(request: &Message, transport: Transport, most: u16) -> u16 {
    match transport {
        Transport::Tcp => u16::MAX,
        Transport::Udp => request.max_payload().clamp(512, most),
    }
}

/// The part of a message that can be read without trusting any of it.
#[derive(Clone, Copy, Debug)]
struct Header {
    id: [u8; 2],
    flags: [u8; 2],
    counts: [u16; 4],
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Self> {
        let [a, b, c, d, counts @ ..] = bytes.first_chunk::<HEADER>()?;
        let mut pairs = counts.chunks_exact(2);
        let mut next = || pairs.next().map_or(0, |p| u16::from_be_bytes([p[0], p[1]]));
        Some(Self {
            id: [*a, *b],
            flags: [*c, *d],
            counts: [next(), next(), next(), next()],
        })
    }

    fn is_response(&self) -> bool {
        self.flags[0] & 0x80 != 0
    }

    fn is_standard_query(&self) -> bool {
        self.flags[0] & 0x78 == 0
    }

    /// Holds more than a question and what may stand behind one.
    fn is_oversized(&self) -> bool {
        let [questions, answers, authorities, additionals] = self.counts;
        questions != 1 || answers != 0 || authorities != 0 || additionals > MAX_ADDITIONALS
    }

    /// A reply that holds nothing, to what we did not read further.
    fn error(&self, code: ResponseCode) -> Vec<u8> {
        let mut reply = vec![0; HEADER];
        reply[..2].copy_from_slice(&self.id);
        // QR, the opcode and RD as asked; RA.
        reply[2] = 0x80 | (self.flags[0] & 0x79);
        reply[3] = 0x80 | code.low();
        reply
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Edns, MessageType, OpCode, Query};
    use hickory_proto::rr::{Name as DnsName, RecordType};

    use super::super::tests::{query, zone};
    use super::*;

    fn ask(asker: Asker, bytes: &[u8]) -> Outcome {
        zone().respond(asker, Transport::Udp, bytes)
    }

    fn reply(bytes: &[u8]) -> Message {
        match ask(Asker::Host, bytes) {
            Outcome::Reply(reply) => Message::from_vec(&reply).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn sources_are_told_apart() {
        let check = |source: &str, asker| {
            assert_eq!(zone().asker(source.parse().unwrap()), asker, "{source}");
        };
        check("100.64.0.1", Asker::Host);
        check("::ffff:100.64.0.1", Asker::Host);
        check("fd01:203:405::6440:1", Asker::Host);
        check("127.0.0.1", Asker::Host);
        check("100.64.0.2", Asker::Peer);
        check("fd01:203:405::6440:2", Asker::Peer);
        check("192.0.2.7", Asker::Stranger);
        check("fe80::1", Asker::Stranger);
    }

    #[test]
    fn peers_are_refused_and_strangers_hear_nothing() {
        let bytes = query("db.mesh.internal.", RecordType::A).to_vec().unwrap();
        let Outcome::Reply(refusal) = ask(Asker::Peer, &bytes) else {
            panic!("a peer is told so");
        };
        let refusal = Message::from_vec(&refusal).unwrap();
        assert_eq!(refusal.metadata.response_code, ResponseCode::Refused);
        assert!(refusal.answers.is_empty());
        assert_eq!(ask(Asker::Stranger, &bytes), Outcome::Drop);
        let foreign = query("example.org.", RecordType::A).to_vec().unwrap();
        assert!(matches!(ask(Asker::Peer, &foreign), Outcome::Reply(_)));
    }

    #[test]
    fn answers_are_never_answered() {
        let mut message = query("db.mesh.internal.", RecordType::A);
        message.metadata.message_type = MessageType::Response;
        assert_eq!(ask(Asker::Host, &message.to_vec().unwrap()), Outcome::Drop);
        assert_eq!(ask(Asker::Host, &[0xff; 11]), Outcome::Drop);
    }

    #[test]
    fn counts_are_judged_before_anything_is_read() {
        for counts in [
            [0xffff, 0, 0, 0],
            [0, 0, 0, 0],
            [2, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 0, 0xffff, 0],
            [1, 0, 0, 3],
        ] {
            let mut bytes = vec![0xab, 0xcd, 1, 0];
            bytes.extend(counts.iter().flat_map(|n: &u16| n.to_be_bytes()));
            let reply = reply(&bytes);
            assert_eq!(reply.metadata.id, 0xabcd);
            assert_eq!(reply.metadata.response_code, ResponseCode::FormErr);
        }
    }

    #[test]
    fn other_opcodes_are_not_implemented() {
        let mut message = query("db.mesh.internal.", RecordType::A);
        message.metadata.op_code = OpCode::Update;
        let reply = reply(&message.to_vec().unwrap());
        assert_eq!(reply.metadata.response_code, ResponseCode::NotImp);
        assert_eq!(reply.metadata.op_code, OpCode::Update);
    }

    #[test]
    fn compression_loops_and_torn_names_are_format_errors() {
        let header = [0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for name in [
            // A pointer to itself, a pointer forward, a label without an end, a reserved kind.
            &[0xc0, 12, 0, 1, 0, 1][..],
            &[0xc0, 14, 0xc0, 12, 0, 1, 0, 1],
            &[63, b'a'],
            &[0x80, 0, 0, 1, 0, 1],
        ] {
            let bytes = [&header[..], name].concat();
            let reply = reply(&bytes);
            assert_eq!(reply.metadata.response_code, ResponseCode::FormErr);
        }
        let mut long = header.to_vec();
        for _ in 0..5 {
            long.push(63);
            long.extend([b'a'; 63]);
        }
        long.extend([0, 0, 1, 0, 1]);
        assert_eq!(reply(&long).metadata.response_code, ResponseCode::FormErr);
    }

    #[test]
    fn an_answer_that_does_not_fit_is_cut_and_says_so() {
        let label = "a".repeat(63);
        let name = DnsName::from_ascii(format!("{label}.{label}.{label}.mesh.internal.")).unwrap();
        let mut message = query("x.", RecordType::SOA);
        message.queries[0] = Query::query(name, RecordType::A);
        let Answer::Reply(whole) = zone().answer(&message) else {
            panic!("the mesh answers its own names");
        };
        assert!(!whole.authorities.is_empty());
        let bytes = encode(&whole, 230).unwrap();
        let cut = Message::from_vec(&bytes).unwrap();
        assert!(bytes.len() <= 230);
        assert!(cut.metadata.truncation && cut.authorities.is_empty());
        assert_eq!(cut.queries, message.queries);
        assert_eq!(encode(&whole, u16::MAX), Some(whole.to_vec().unwrap()));
    }

    #[test]
    fn a_forwarded_answer_may_fill_what_the_asker_takes() {
        let check = |transport, payload: Option<u16>, limit| {
            let mut message = query("example.org.", RecordType::A);
            if let Some(payload) = payload {
                let mut edns = Edns::new();
                edns.set_max_payload(payload);
                message.set_edns(edns);
            }
            let outcome = zone().respond(Asker::Host, transport, &message.to_vec().unwrap());
            assert_eq!(outcome, Outcome::Forward { limit });
        };
        check(Transport::Udp, None, 512);
        check(Transport::Udp, Some(1400), 1400);
        check(Transport::Udp, Some(u16::MAX), FORWARDED_PAYLOAD);
        check(Transport::Tcp, None, u16::MAX);
    }
}
