//! Two sessions that exchange messages by hand.

use super::*;

struct End {
    peer: Peer,
    identity: Identity,
    outbox: Outbox,
    scratch: Vec<u8>,
    address: Endpoint,
}

impl End {
    /// `me` and `other` are seeds of keys, and last digits of addresses.
    fn new(me: u8, other: u8) -> Self {
        let identity = Identity::new([me; 32]);
        let key = NodePublic(*Identity::new([other; 32]).public.as_bytes());
        let peer = Peer::new(key, u32::from(me), &identity).unwrap();
        let address = |n| SocketAddr::from(([192, 0, 2, n], 51820));
        peer.lock().as_mut().unwrap().write_endpoint(address(other));
        Self {
            peer,
            identity,
            outbox: Outbox::new(),
            scratch: vec![0; 4096],
            address: Endpoint::new(address(me)),
        }
    }

    fn send(&mut self, packet: &[u8]) {
        let mut session = self.peer.lock();
        session.as_mut().unwrap().encrypt(packet, &mut self.outbox);
    }

    fn tick(&mut self) {
        let mut session = self.peer.lock();
        let session = session.as_mut().unwrap();
        session.tick(&self.identity, &mut self.outbox).unwrap();
    }

    /// Takes everything that `other` has sent, and returns the inner packets.
    fn take(&mut self, other: &mut Self) -> Vec<Vec<u8>> {
        let messages = other.outbox.take_messages();
        let mut packets = Vec::new();
        for (message, _) in messages {
            let mut session = self.peer.lock();
            let decrypted = session.as_mut().unwrap().decrypt(
                &message,
                other.address,
                &mut self.scratch,
                &mut self.outbox,
            );
            packets.extend(decrypted.map(|d| d.packet.to_vec()));
        }
        packets
    }

    fn handshake_age(&self) -> Option<Duration> {
        self.peer.lock().as_ref().unwrap().handshake_age()
    }
}

/// An IPv4 header and nothing else.
fn packet(tag: u8) -> Vec<u8> {
    let mut packet = vec![0; 20];
    (packet[0], packet[3], packet[8]) = (0x45, 20, tag);
    packet
}

fn tags(packets: &[Vec<u8>]) -> Vec<u8> {
    packets.iter().map(|packet| packet[8]).collect()
}

#[test]
fn queued_packets_arrive_in_order_after_the_handshake() {
    let (mut a, mut b) = (End::new(1, 2), End::new(2, 1));
    for tag in 1..=3 {
        a.send(&packet(tag));
    }
    assert!(b.take(&mut a).is_empty());
    assert!(a.take(&mut b).is_empty());
    assert_eq!(tags(&b.take(&mut a)), [1, 2, 3]);
    assert!(a.handshake_age().is_some() && b.handshake_age().is_some());
}

#[test]
fn a_peer_is_greeted_once_so_that_it_drops_the_session_of_before_a_restart() {
    let (mut a, mut b) = (End::new(1, 2), End::new(2, 1));
    a.tick();
    assert!(b.take(&mut a).is_empty());
    assert!(a.take(&mut b).is_empty());
    assert!(a.handshake_age().is_some());
    b.send(&packet(1));
    assert!(b.take(&mut a).is_empty());
    assert_eq!(tags(&a.take(&mut b)), [1]);
    let mut silent = End::new(3, 1);
    silent.tick();
    assert_eq!(silent.outbox.take_messages().len(), 1);
    silent.tick();
    assert_eq!(silent.outbox.take_messages().len(), 0);
}

#[test]
fn packets_queued_at_the_responder_arrive_as_well() {
    let (mut a, mut b) = (End::new(1, 2), End::new(2, 1));
    // Both want to talk: b's initiation is lost, a's gets through.
    b.send(&packet(7));
    b.send(&packet(8));
    b.outbox.take_messages();
    a.send(&packet(1));
    b.take(&mut a);
    a.take(&mut b);
    b.take(&mut a);
    assert_eq!(tags(&a.take(&mut b)), [7, 8]);
}

#[test]
fn a_responder_counts_a_handshake_when_the_session_is_used() {
    let (mut a, mut b) = (End::new(1, 2), End::new(2, 1));
    a.send(&packet(1));
    b.take(&mut a);
    assert_eq!(b.handshake_age(), None, "the answer may be lost");
    a.take(&mut b);
    b.take(&mut a);
    assert!(b.handshake_age().is_some());
}

#[test]
fn the_queue_of_an_absent_peer_is_bounded() {
    let mut a = End::new(1, 2);
    for _ in 0..10 * MAX_STAGED {
        a.send(&packet(1));
        a.outbox.take_messages();
    }
    assert_eq!(a.peer.lock().as_ref().unwrap().staged, MAX_STAGED);
}

#[test]
fn only_authenticated_messages_move_the_endpoint() {
    let (mut a, mut b) = (End::new(1, 2), End::new(2, 1));
    a.send(&packet(1));
    b.take(&mut a);
    a.take(&mut b);
    b.take(&mut a);

    a.send(&packet(2));
    let moved = Endpoint::new("198.51.100.9:9".parse().unwrap());
    a.address = moved;
    let mut forged = a.outbox.take_messages();
    let genuine = forged[0].0.clone();
    *forged[0].0.last_mut().unwrap() ^= 1;
    let endpoint = |b: &End| b.peer.lock().as_ref().unwrap().endpoint;
    for (message, moves) in [(&forged[0].0, false), (&genuine, true)] {
        let mut session = b.peer.lock();
        let session_ = session.as_mut().unwrap();
        session_.decrypt(message, moved, &mut b.scratch, &mut b.outbox);
        drop(session);
        assert_eq!(endpoint(&b) == Some(moved), moves);
    }
}

#[test]
fn a_replayed_message_is_delivered_once() {
    let (mut a, mut b) = (End::new(1, 2), End::new(2, 1));
    a.send(&packet(1));
    b.take(&mut a);
    a.take(&mut b);
    b.take(&mut a);
    a.send(&packet(5));
    let message = a.outbox.take_messages().remove(0).0;
    let mut deliver = || {
        let mut session = b.peer.lock();
        let from = a.address;
        let decrypted =
            session
                .as_mut()
                .unwrap()
                .decrypt(&message, from, &mut b.scratch, &mut b.outbox);
        decrypted.is_some()
    };
    assert!(deliver());
    assert!(!deliver());
}

#[test]
fn messages_of_every_length_and_type_are_survived() {
    let mut a = End::new(1, 2);
    for kind in 0..=5_u8 {
        for len in 0..200 {
            let mut message = vec![0xff; len];
            if let Some(first) = message.first_mut() {
                *first = kind;
            }
            if let Some(zero) = message.get_mut(1..4) {
                zero.fill(0);
            }
            let from = a.address;
            let mut session = a.peer.lock();
            let session = session.as_mut().unwrap();
            let decrypted = session.decrypt(&message, from, &mut a.scratch, &mut a.outbox);
            assert!(decrypted.is_none());
        }
    }
    assert!(a.outbox.take_messages().is_empty(), "silence");
}

#[test]
fn a_keepalive_starts_a_session_by_itself() {
    let (mut a, mut b) = (End::new(1, 2), End::new(2, 1));
    a.peer.lock().as_mut().unwrap().set_keepalive(Some(25));
    a.tick();
    b.take(&mut a);
    a.take(&mut b);
    assert!(a.handshake_age().is_some());
    a.tick();
    assert!(a.outbox.take_messages().len() <= 1, "not before 25 s");
}

#[test]
fn without_an_endpoint_nothing_is_queued() {
    let mut a = End::new(1, 2);
    a.peer.lock().as_mut().unwrap().endpoint = None;
    a.send(&packet(1));
    assert!(a.outbox.take_messages().is_empty());
    assert_eq!(a.peer.lock().as_ref().unwrap().staged, 0);
}
