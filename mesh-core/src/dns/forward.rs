//! The pure half of asking upstream: what to send, and whether an answer is one to it.
//!
//! A forger who cannot see our packets must guess what they hold, so each holds a fresh
//! transaction number and the name in a random mix of cases (RFC 5452, section 9; "0x20"), beside
//! the random port that the socket adds. Records are passed on unread: a stub that does not
//! decode an answer cannot be crashed by one, and knows no types that it would have to learn.

use super::wire::HEADER;

/// A query on its way upstream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outgoing {
    asked: Vec<u8>,
    sent: Vec<u8>,
    /// Where the one question ends.
    question_end: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a query with one plainly written question")]
pub struct Malformed;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    #[error("not a DNS answer")]
    Malformed,
    #[error("the answer to another question")]
    NotOurs,
    /// A server that does not preserve case, or a forger. Over TCP the latter is out of the game.
    #[error("the question came back in other letters")]
    OtherCase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Spelling {
    AsSent,
    Any,
}

impl Outgoing {
    /// `id` and `cases` are the caller's randomness.
    pub fn new(query: &[u8], id: u16, cases: [u8; 32]) -> Result<Self, Malformed> {
        let question_end = question_end(query).ok_or(Malformed)?;
        let mut sent = query.to_vec();
        sent[..2].copy_from_slice(&id.to_be_bytes());
        // A length octet is below 64 and no letter, so the whole name can be walked as bytes.
        for (at, byte) in sent[HEADER..question_end - 4].iter_mut().enumerate() {
            let flip = cases[at / 8 % cases.len()] & (1 << (at % 8)) != 0;
            if flip && byte.is_ascii_alphabetic() {
                *byte ^= 0x20;
            }
        }
        Ok(Self {
            asked: query.to_vec(),
            sent,
            question_end,
        })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.sent
    }

    /// The answer as the asker must see it, with its own number and spelling, in at most `limit`
    /// octets: an answer that is longer is cut behind the question and marked as truncated.
    pub fn accept(&self, answer: &[u8], limit: u16) -> Result<Vec<u8>, Rejected> {
        self.accept_spelt(answer, limit, Spelling::AsSent)
    }

    /// As [`accept`](Self::accept), where the transport itself keeps forgers out, so that the
    /// spelling need not: some servers answer in lower case whatever they are asked.
    pub fn accept_any_case(&self, answer: &[u8], limit: u16) -> Result<Vec<u8>, Rejected> {
        self.accept_spelt(answer, limit, Spelling::Any)
    }

    fn accept_spelt(
        &self,
        answer: &[u8],
        limit: u16,
        spelling: Spelling,
    ) -> Result<Vec<u8>, Rejected> {
        let header = answer.first_chunk::<HEADER>().ok_or(Rejected::Malformed)?;
        let is_response = header[2] & 0x80 != 0;
        let opcode = header[2] & 0x78;
        if !is_response || opcode != 0 {
            return Err(Rejected::Malformed);
        }
        if header[..2] != self.sent[..2] {
            return Err(Rejected::NotOurs);
        }
        let question = &self.sent[HEADER..self.question_end];
        let mut reply = match header[4..6] {
            // Servers that do not understand a query may send its head alone back.
            [0, 0] if header[3] & 0x0f != 0 => header.to_vec(),
            [0, 1] => {
                let echoed = answer
                    .get(HEADER..self.question_end)
                    .ok_or(Rejected::NotOurs)?;
                if !echoed.eq_ignore_ascii_case(question) {
                    return Err(Rejected::NotOurs);
                }
                if spelling == Spelling::AsSent && echoed != question {
                    return Err(Rejected::OtherCase);
                }
                answer.to_vec()
            }
            _ => return Err(Rejected::NotOurs),
        };

        let too_long = reply.len() > usize::from(limit);
        if reply.len() == HEADER || too_long {
            reply.truncate(HEADER);
            reply.resize(self.question_end, 0);
            reply[4..HEADER].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
        }
        if too_long {
            reply[2] |= 0x02;
        }
        reply[..2].copy_from_slice(&self.asked[..2]);
        reply[HEADER..self.question_end].copy_from_slice(&self.asked[HEADER..self.question_end]);
        Ok(reply)
    }
}

/// The one question of a query: name, type and class as they were written.
pub fn question(query: &[u8]) -> Option<&[u8]> {
    query.get(HEADER..question_end(query)?)
}

/// Where the question of a query ends. Its name stands first in the message, so there is nothing
/// that a compression pointer in it could point to.
fn question_end(query: &[u8]) -> Option<usize> {
    if query.get(2)? & 0x80 != 0 || query.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = HEADER;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1 + length;
        match length {
            0 => break,
            1..=63 => {}
            _ => return None,
        }
    }
    let end = at + 4;
    // 255 octets of name (RFC 1035, section 2.3.4), type and class.
    (end <= query.len() && at - HEADER <= 255).then_some(end)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::op::{Message, ResponseCode};
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{RData, Record, RecordType};
    use proptest::prelude::*;

    use super::super::tests::query;
    use super::*;

    fn asked() -> Vec<u8> {
        let mut message = query("wWw.Example.org.", RecordType::A);
        message.metadata.id = 7;
        message.to_vec().unwrap()
    }

    fn outgoing() -> Outgoing {
        Outgoing::new(&asked(), 0xbeef, [0b1010_1010; 32]).unwrap()
    }

    fn upstream(edit: impl FnOnce(&mut Message)) -> Vec<u8> {
        let mut answer = Message::from_vec(outgoing().bytes())
            .unwrap()
            .into_response();
        let name = answer.queries[0].name.clone();
        let data = RData::A(A(Ipv4Addr::new(192, 0, 2, 1)));
        answer.add_answer(Record::from_rdata(name, 300, data));
        edit(&mut answer);
        answer.to_vec().unwrap()
    }

    #[test]
    fn an_answer_comes_back_as_if_asked_directly() {
        let sent = Message::from_vec(outgoing().bytes()).unwrap();
        assert_eq!(sent.metadata.id, 0xbeef);
        assert_eq!(sent.queries[0].name.to_ascii(), "WWW.exAmPlE.OrG.");

        let reply = outgoing().accept(&upstream(|_| {}), 512).unwrap();
        let reply = Message::from_vec(&reply).unwrap();
        assert_eq!(reply.metadata.id, 7);
        assert_eq!(reply.queries[0].name.to_ascii(), "wWw.Example.org.");
        assert_eq!(reply.answers[0].name.to_ascii(), "wWw.Example.org.");
    }

    #[test]
    fn what_is_no_answer_to_this_query_is_rejected() {
        let check = |bytes: &[u8], why| assert_eq!(outgoing().accept(bytes, 512), Err(why));
        check(&upstream(|m| m.metadata.id ^= 1), Rejected::NotOurs);
        check(outgoing().bytes(), Rejected::Malformed);
        check(&[0; 11], Rejected::Malformed);
        check(&upstream(|m| m.queries.clear()), Rejected::NotOurs);
        check(
            &upstream(|m| {
                m.queries[0].query_type = RecordType::AAAA;
            }),
            Rejected::NotOurs,
        );
        check(
            &upstream(|m| m.queries[0].name = m.queries[0].name.to_lowercase()),
            Rejected::OtherCase,
        );
    }

    #[test]
    fn a_server_without_cases_is_believed_where_the_transport_is() {
        let lower = upstream(|m| m.queries[0].name = m.queries[0].name.to_lowercase());
        let reply = outgoing().accept_any_case(&lower, 512).unwrap();
        let reply = Message::from_vec(&reply).unwrap();
        assert_eq!(reply.queries[0].name.to_ascii(), "wWw.Example.org.");
    }

    #[test]
    fn a_long_answer_is_cut_behind_the_question() {
        let long = upstream(|m| {
            for n in 0..100 {
                let data = RData::A(A(Ipv4Addr::new(192, 0, 2, n)));
                let name = m.queries[0].name.clone();
                m.add_answer(Record::from_rdata(name, 300, data));
            }
        });
        let reply = outgoing().accept(&long, 512).unwrap();
        let reply = Message::from_vec(&reply).unwrap();
        assert!(reply.metadata.truncation && reply.answers.is_empty());
        assert_eq!(
            outgoing().accept(&long, u16::MAX).unwrap().len(),
            long.len()
        );
    }

    #[test]
    fn a_bare_refusal_gets_its_question_back() {
        let bare = upstream(|m| {
            m.queries.clear();
            m.answers.clear();
            m.metadata.response_code = ResponseCode::FormErr;
        });
        let reply = outgoing().accept(&bare, 512).unwrap();
        let reply = Message::from_vec(&reply).unwrap();
        assert_eq!(reply.metadata.response_code, ResponseCode::FormErr);
        assert_eq!(reply.queries.len(), 1);
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(query: Vec<u8>, answer: Vec<u8>, cases: [u8; 32]) {
            if let Ok(outgoing) = Outgoing::new(&query, 1, cases) {
                let _ = outgoing.accept(&answer, 512);
            }
            let _ = outgoing().accept(&answer, 512);
        }

        #[test]
        fn no_damage_to_an_answer_breaks_it(at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let mut answer = upstream(|_| {});
            let at = at.index(answer.len());
            answer[at] = byte;
            answer.truncate(cut.index(answer.len() + 1));
            if let Ok(reply) = outgoing().accept(&answer, 512) {
                prop_assert_eq!(&reply[..2], &asked()[..2]);
                prop_assert_eq!(&reply[12..], [&asked()[12..], &answer[asked().len()..]].concat());
            }
        }
    }
}
