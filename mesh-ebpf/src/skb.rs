//! A socket buffer, read by direct access where the offset is constant.
//!
//! Direct access sees the linear part only. [`Linear`] is content with that, and reads nothing at a
//! variable offset: the parser, compiled for it, is what most packets need and no more. [`Skb`] reads
//! everything: it first makes sure that every header of constant offset is there, and leaves variable
//! offsets to a helper: cheaper than teaching a verifier arithmetic on packet pointers, and rare.

use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::bpf_skb_load_bytes_relative;
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
        Linear::<AT>(self.ctx).words::<OFFSET, N>()
    }

    #[inline(always)]
    fn words_at<const N: usize>(&self, at: usize) -> Option<[u32; N]> {
        self.ctx.load::<[u32; N]>(AT + at).ok()
    }

    #[inline(always)]
    fn has(&self, length: usize) -> bool {
        Linear::<AT>(self.ctx).has(length)
    }
}

pub struct Linear<'a, const AT: usize>(pub &'a TcContext);

impl<const AT: usize> Linear<'_, AT> {
    /// Start and end. Volatile, or the compiler reads them once in a caller and hands them down, and
    /// what was a packet's pointer there is a number of 32 bits here.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        let skb = self.0.skb.skb;
        // SAFETY: fields of the context.
        unsafe {
            (
                (&raw const (*skb).data).read_volatile() as usize,
                (&raw const (*skb).data_end).read_volatile() as usize,
            )
        }
    }
}

impl<const AT: usize> Bytes for Linear<'_, AT> {
    #[inline(always)]
    fn words<const OFFSET: usize, const N: usize>(&self) -> Option<[u32; N]> {
        let (data, end) = self.bounds();
        let start = data + AT + OFFSET;
        if start + N * 4 > end {
            return None;
        }
        // SAFETY: the bounds were checked above. The kernel aligns IP headers to four bytes, and
        // runs this program only where it can load unaligned words if it did not.
        Some(unsafe { *(start as *const [u32; N]) })
    }

    #[inline(always)]
    fn words_at<const N: usize>(&self, _: usize) -> Option<[u32; N]> {
        None
    }

    /// Also of what is not in the linear part.
    #[inline(always)]
    fn has(&self, length: usize) -> bool {
        self.0.len() as usize >= AT + length
    }
}

/// What lies at so many bytes from the network header, whatever the link layer is.
#[inline(always)]
pub fn load<T>(ctx: &TcContext, at: u32) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper fills exactly the bytes that it is given, or reports that it did not.
    unsafe {
        let read = bpf_skb_load_bytes_relative(
            ctx.skb.skb.cast(),
            at,
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            BPF_HDR_START_NET,
        );
        (read == 0).then(|| value.assume_init())
    }
}
