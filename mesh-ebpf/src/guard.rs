//! The other interfaces: nobody outside the mesh talks to this node's mesh addresses, or as they.
//!
//! Without this a neighbour on the LAN can send to the address behind the tunnel and learn from the
//! answers who talks in it (CVE-2019-14899). The tunnel's own outer packets are addressed to the
//! underlay and pass; what the host sends to itself goes over loopback, which carries no guard.

use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::bpf_skb_load_bytes_relative;
use aya_ebpf::programs::TcContext;
use mesh_common::flow::FlowKey;
use mesh_common::{Address, Direction, DropReason, Verdict};

use crate::entry::{DROP, NEXT};
use crate::maps::CFG;
use crate::meta::{self, Meta};
use crate::{events, stats};

#[inline(always)]
pub fn run(ctx: &TcContext) -> i32 {
    // SAFETY: a field of the context that the kernel lets classifiers read.
    let protocol = unsafe { (*ctx.skb.skb).protocol } as u16;
    // Relative to the network header: this serves Ethernet, PPP and tunnels alike.
    let (source, destination, proto, length) = match u16::from_be(protocol) {
        0x0800 => match load::<[u32; 5]>(ctx) {
            Some(h) => (
                Address::from_v4_word(h[3]),
                Address::from_v4_word(h[4]),
                u32::from_be(h[2]) >> 16,
                u32::from_be(h[0]) & 0xffff,
            ),
            None => return NEXT,
        },
        0x86dd => match load::<[u32; 10]>(ctx) {
            Some(h) => (
                Address::from_words([h[2], h[3], h[4], h[5]]),
                Address::from_words([h[6], h[7], h[8], h[9]]),
                u32::from_be(h[1]) >> 8,
                (u32::from_be(h[1]) >> 16) + 40,
            ),
            None => return NEXT,
        },
        _ => return NEXT,
    };
    let Some(config) = CFG.get(0) else {
        return DROP;
    };
    // Two addresses and no table of them: whatever else the host receives pays for this too.
    let is_ours = |address: &Address| {
        let own = if address.is_mapped() {
            &config.own_v4
        } else {
            &config.own_v6
        };
        address.is_same(own)
    };
    // Nor does anybody send as this node: what the host forwards into the mesh would pass for its own. The
    // unspecified address is nobody's, even while we know none of ours (RFC 4862, 5.4.2).
    let forged = is_ours(&source) && !source.is_same(&Address::default());
    if !forged && !is_ours(&destination) {
        return NEXT;
    }
    let verdict = Verdict::refused(DropReason::Guarded);
    let key = FlowKey {
        remote: source,
        local: destination,
        proto: proto as u8,
        ..FlowKey::NONE
    };
    let meta = Meta::new(ctx, length, Direction::Ingress, meta::now(config));
    stats::count(&verdict, &meta);
    events::deny(&key, 0, 0, &verdict, &meta);
    DROP
}

#[inline(always)]
fn load<T>(ctx: &TcContext) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper fills exactly the bytes that it is given, or reports that it did not.
    unsafe {
        let read = bpf_skb_load_bytes_relative(
            ctx.skb.skb.cast(),
            0,
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            BPF_HDR_START_NET,
        );
        (read == 0).then(|| value.assume_init())
    }
}
