//! The other interfaces: nobody outside the mesh talks to this node's mesh addresses, or as a node.
//!
//! Without this a neighbour on the LAN can send to the address behind the tunnel and learn from the answers who
//! talks in it (CVE-2019-14899), or write to the LAN address as a peer, whom the listener believes. The tunnel's
//! own outer packets are addressed to the underlay and pass; what the host sends to itself goes over loopback,
//! which carries no guard.
//!
//! Not all that the kernel delivers looks like IP when it passes here: it may be in tags yet. Nor is all that it
//! delivers to an address sent there: see [`detour`].

use aya_ebpf::programs::TcContext;
use mesh_common::flow::FlowKey;
use mesh_common::{Address, Direction, DropReason, Verdict};

use crate::maps::{CFG, ID_EXACT};
use crate::meta::{self, Meta};
use crate::skb::load;
use crate::tc::{DROP, NEXT};
use crate::{detour, events, stats};

/// VLAN tags that are read through; nobody stacks more.
const TAGS: usize = 4;

/// What a packet says of itself.
struct Header {
    source: Address,
    destination: Address,
    proto: u8,
    /// Of the packet, by its IP header.
    length: u32,
    /// Words of options, of IPv4.
    options: u32,
}

#[inline(always)]
pub fn run(ctx: &TcContext) -> i32 {
    // SAFETY: a field of the context that the kernel lets classifiers read.
    let protocol = unsafe { (*ctx.skb.skb).protocol } as u16;
    let mut protocol = u16::from_be(protocol);
    // Relative to the network header: this serves Ethernet, PPP and tunnels alike.
    let mut at = 0;
    // The kernel has taken one tag off. It takes off the next, of the VLAN 0 (IEEE 802.1Q, a priority and no
    // network), only behind this program, and delivers what is in them all.
    for _ in 0..TAGS {
        if !is_tag(protocol) {
            break;
        }
        let Some([_, next]) = load::<[u16; 2]>(ctx, at) else {
            return NEXT;
        };
        protocol = u16::from_be(next);
        at += size_of::<[u16; 2]>() as u32;
    }
    let header = match protocol {
        0x0800 => load::<[u32; 5]>(ctx, at).map(|h| Header {
            source: Address::from_v4_word(h[3]),
            destination: Address::from_v4_word(h[4]),
            proto: (u32::from_be(h[2]) >> 16) as u8,
            length: u32::from_be(h[0]) & 0xffff,
            options: (u32::from_be(h[0]) >> 24 & 15).saturating_sub(5),
        }),
        0x86dd => load::<[u32; 10]>(ctx, at).map(|h| Header {
            source: Address::from_words([h[2], h[3], h[4], h[5]]),
            destination: Address::from_words([h[6], h[7], h[8], h[9]]),
            proto: (u32::from_be(h[1]) >> 8) as u8,
            length: (u32::from_be(h[1]) >> 16) + 40,
            options: 0,
        }),
        // What is in so many tags we cannot say, and the kernel would look.
        tag if is_tag(tag) => Some(Header {
            source: Address::default(),
            destination: Address::default(),
            proto: 0,
            length: ctx.len(),
            options: 0,
        }),
        _ => None,
    };
    let Some(header) = header else {
        return NEXT;
    };
    let Some(config) = CFG.get(0) else {
        return DROP;
    };
    // Two addresses, and a table only of what is from the mesh's pool: whatever else the host receives pays for this
    // too.
    let is_ours = |address: &Address| {
        let own = if address.is_mapped() {
            &config.own_v4
        } else {
            &config.own_v6
        };
        address.is_same(own)
    };
    // Nor does anybody send as this node: what the host forwards into the mesh would pass for its own. The
    // unspecified address is nobody's, even while we know none of ours (RFC 4862, 5.4.2). Nor as another: who
    // listens on the host takes a mesh address for what WireGuard has proved. The pool may be somebody else's too
    // (RFC 6598), so only an address that a node has is one.
    let forged = if is_ours(&header.source) {
        !header.source.is_same(&Address::default())
    } else {
        config.is_in_pool(&header.source) && is_peer(&header.source, config.generation)
    };
    if !is_tag(protocol) && !forged && !is_ours(&header.destination) {
        let comes_here = if header.options != 0 {
            detour::options_name(ctx, at + 20, header.options, &config.own_v4)
        } else {
            protocol == 0x86dd && detour::routes_to(ctx, header.proto, at + 40, &config.own_v6)
        };
        if !comes_here {
            return NEXT;
        }
    }
    let verdict = Verdict::refused(DropReason::Guarded);
    let key = FlowKey {
        remote: header.source,
        local: header.destination,
        proto: header.proto,
        ..FlowKey::NONE
    };
    let meta = Meta::new(ctx, header.length, Direction::Ingress, meta::now(config));
    stats::count(&verdict, &meta);
    events::deny(&key, 0, 0, &verdict, &meta);
    DROP
}

/// Whether another node has this very address of the pool.
#[inline(always)]
fn is_peer(address: &Address, generation: u32) -> bool {
    // SAFETY: the entry is read at once.
    unsafe { ID_EXACT.get(address) }.is_some_and(|sides| sides.at(generation).peer != 0)
}

/// IEEE 802.1Q and 802.1ad, as the kernel takes them off.
#[inline(always)]
const fn is_tag(protocol: u16) -> bool {
    matches!(protocol, 0x8100 | 0x88a8)
}
