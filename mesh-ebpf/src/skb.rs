//! A socket buffer, read by direct access where the offset is constant.
//!
//! Direct access sees the linear part only, so [`Skb::new`] first makes sure that every header of
//! constant offset lies in it. Variable offsets go through a helper: cheaper than teaching a verifier
//! arithmetic on packet pointers, and rare.

use aya_ebpf::programs::TcContext;
use mesh_common::packet::Bytes;

/// What the parser reads at constant offsets: IPv6 and the first 16 bytes of TCP, and four spare.
const HEADERS: usize = 60;

pub struct Skb<'a, const AT: usize> {
    ctx: &'a TcContext,
}

impl<'a, const AT: usize> Skb<'a, AT> {
    #[inline(always)]
    pub fn new(ctx: &'a TcContext) -> Self {
        let linear = ctx.data_end() - ctx.data();
        let length = ctx.len() as usize;
        if linear < AT + HEADERS && linear < length {
            let wanted = if length < AT + HEADERS {
                length
            } else {
                AT + HEADERS
            };
            // On failure the headers read as truncated.
            let _ = ctx.pull_data(wanted as u32);
        }
        Self { ctx }
    }
}

impl<const AT: usize> Bytes for Skb<'_, AT> {
    #[inline(always)]
    fn words<const OFFSET: usize, const N: usize>(&self) -> Option<[u32; N]> {
        let start = self.ctx.data() + AT + OFFSET;
        if start + N * 4 > self.ctx.data_end() {
            return None;
        }
        // SAFETY: the bounds were checked above. The kernel aligns IP headers to four bytes, and
        // runs this program only where it can load unaligned words if it did not.
        Some(unsafe { *(start as *const [u32; N]) })
    }

    #[inline(always)]
    fn words_at<const N: usize>(&self, at: usize) -> Option<[u32; N]> {
        self.ctx.load::<[u32; N]>(AT + at).ok()
    }
}
