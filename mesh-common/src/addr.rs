//! Addresses and ports as packets carry them: network order in memory, IPv4 mapped into IPv6.
//!
//! Words, not bytes: a packet is read by aligned 32-bit loads, and a byte array would make the
//! compiler assemble each of them from four.

/// A 16-bit number in network order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Be16(u16);

impl Be16 {
    #[inline(always)]
    pub const fn new(value: u16) -> Self {
        Self(value.to_be())
    }

    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }

    /// As it lies in memory.
    #[inline(always)]
    pub const fn word(self) -> u16 {
        self.0
    }
}

/// A 32-bit number in network order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Be32(u32);

impl Be32 {
    #[inline(always)]
    pub const fn new(value: u32) -> Self {
        Self(value.to_be())
    }

    #[inline(always)]
    pub const fn get(self) -> u32 {
        u32::from_be(self.0)
    }
}

/// An overlay address; IPv4 as `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2), so that one key serves both.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Address([u32; 4]);

/// What precedes the IPv4 address in a mapped one.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Address {
    /// From four words as they lie in an IPv6 header.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// `==`, without a call of memcmp.
    #[inline(always)]
    pub const fn is_same(&self, other: &Self) -> bool {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, other.0);
        (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
    }

    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        self.0
    }

    /// From the word that lies in an IPv4 header.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        let (a, b, c, d) = (
            a.to_ne_bytes(),
            b.to_ne_bytes(),
            c.to_ne_bytes(),
            d.to_ne_bytes(),
        );
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// An IPv4 address, or an IPv6 packet's attempt to pass for one.
    #[inline(always)]
    pub const fn is_mapped(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// 224.0.0.0/4, the limited broadcast address, or ff00::/8: never one node's own.
    #[inline(always)]
    pub const fn is_multicast(self) -> bool {
        if self.is_mapped() {
            let v4 = u32::from_be(self.0[3]);
            v4 >> 28 == 0xe || v4 == u32::MAX
        } else {
            u32::from_be(self.0[0]) >> 24 == 0xff
        }
    }

    /// The address with every bit after the first `len` cleared.
    pub const fn masked(self, len: u8) -> Self {
        let mut words = self.0;
        let mut i = 0;
        while i < 4 {
            let before = i as u32 * 32;
            let keep = (len as u32).saturating_sub(before);
            if keep < 32 {
                let mask = if keep == 0 {
                    0
                } else {
                    u32::MAX << (32 - keep)
                };
                words[i] &= mask.to_be();
            }
            i += 1;
        }
        Self(words)
    }
}

impl From<core::net::IpAddr> for Address {
    fn from(address: core::net::IpAddr) -> Self {
        match address {
            core::net::IpAddr::V4(v4) => Self::from_v4_word(u32::from_ne_bytes(v4.octets())),
            core::net::IpAddr::V6(v6) => Self::from_octets(v6.octets()),
        }
    }
}

impl From<Address> for core::net::IpAddr {
    fn from(address: Address) -> Self {
        core::net::Ipv6Addr::from(address.octets()).to_canonical()
    }
}

impl core::fmt::Display for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::net::IpAddr::from(*self).fmt(f)
    }
}

impl core::fmt::Debug for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// A prefix of [`Address`]es, laid out as the key of an LPM trie. IPv4's lengths start at 96.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Prefix {
    /// Bits that count, 0 to 128.
    pub len: u32,
    pub address: Address,
}

const _: () = assert!(size_of::<Address>() == 16);
const _: () = assert!(size_of::<Prefix>() == 20);

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn an_address_keeps_its_octets_in_order() {
        let v4 = Address::from(IpAddr::from([100, 64, 0, 1]));
        assert_eq!(&v4.octets()[10..], &[0xff, 0xff, 100, 64, 0, 1]);
        assert!(v4.is_mapped());
        assert_eq!(IpAddr::from(v4), IpAddr::from(Ipv4Addr::new(100, 64, 0, 1)));
        let v6 = IpAddr::from(Ipv6Addr::new(0xfd00, 1, 2, 3, 4, 5, 6, 7));
        assert_eq!(IpAddr::from(Address::from(v6)), v6);
    }

    #[test]
    fn masking_clears_the_tail() {
        let address = Address::from_octets([0xff; 16]);
        assert_eq!(address.masked(0).octets(), [0; 16]);
        assert_eq!(address.masked(128), address);
        let mut octets = [0; 16];
        octets[..5].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xe0]);
        assert_eq!(address.masked(35).octets(), octets);
    }

    #[test]
    fn multicast_is_told_in_both_families() {
        let check = |text: &str, is: bool| {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(Address::from(address).is_multicast(), is, "{text}");
        };
        check("224.0.0.1", true);
        check("239.255.255.255", true);
        check("255.255.255.255", true);
        check("240.0.0.1", false);
        check("100.64.0.1", false);
        check("ff02::1", true);
        check("fd00::1", false);
        check("fe80::1", false);
    }
}
