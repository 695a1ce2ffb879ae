//! Why a packet was dropped, in the words of counters, logs and operators.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal, $help:literal;)*) => {
        /// Why a packet was dropped. Numbers index the kernel's counters: append, never re-use.
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum DropReason {
            $(#[doc = $help] $name = $number,)*
        }

        impl DropReason {
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// As counters and logs spell it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// One line for the operator: what it means, and what to do.
            pub const fn help(self) -> &'static str {
                match self {
                    $(Self::$name => $help,)*
                }
            }
        }
    };
}

reasons! {
    NoPolicy = 1, "no policy",
        "No policy was loaded yet: the agent is starting, or has never reached its coordinator.";
    Truncated = 2, "truncated",
        "The packet ends inside a header: broken or hostile sender.";
    NotIp = 3, "not ip",
        "Neither IPv4 nor IPv6: the mesh carries nothing else.";
    MalformedHeader = 4, "malformed header",
        "A header claims a length that it cannot have: broken or hostile sender.";
    MappedAddress = 5, "mapped address",
        "An IPv6 packet with an IPv4-mapped address, which would pass for another node's IPv4.";
    TinyFragment = 6, "tiny fragment",
        "A fragment so close to the first that it would overwrite what was judged (RFC 3128).";
    RoutingHeader = 7, "routing header",
        "IPv6 routing header of type 0, forbidden by RFC 5095.";
    UnknownExtension = 8, "unknown extension header",
        "An IPv6 extension header behind which no port can be found.";
    TooManyExtensions = 9, "too many extension headers",
        "More than four IPv6 extension headers.";
    TcpFlags = 10, "tcp flags",
        "TCP flags that no connection uses, as FIN without ACK: a port scan, as a rule.";
    IcmpRefused = 11, "icmp refused",
        "ICMP redirect, router or neighbour discovery: nothing in a mesh may send them.";
    IcmpErrorMalformed = 12, "icmp error malformed",
        "An ICMP error whose quoted packet is unreadable or was not sent by its destination.";
    IcmpErrorUnknownFlow = 13, "icmp error without flow",
        "An ICMP error about a flow that does not exist: late, or forged.";
    IcmpErrorForeign = 14, "icmp error from a third node",
        "An ICMP error about a flow with another node: forged.";
    FragmentWithoutFirst = 15, "fragment without first",
        "A fragment whose first part did not come before it: reordered, dropped, or forged.";
    NoFlow = 16, "no flow",
        "Not the start of a connection, and part of none: late, timed out, or forged.";
    TcpOutOfState = 17, "tcp out of state",
        "A TCP packet that the other end could not have sent in this state of the connection.";
    Multicast = 18, "multicast",
        "Multicast and broadcast are not carried; hosts send some by habit (mDNS, MLD).";
    UnknownIdentity = 19, "unknown identity",
        "The far address belongs to no node that policy lets this one know.";
    UnknownLocal = 20, "unknown local address",
        "The near address is neither this node's nor of a route it serves.";
    OwnAddress = 21, "own address",
        "A packet from the mesh that carries this node's own address as its source: forged.";
    DeniedByRule = 22, "denied by rule",
        "A deny rule of the policy says so: see the rule.";
    NoRule = 23, "no rule",
        "No rule of the policy allows it, and the default denies.";
    Revoked = 24, "revoked",
        "The flow was allowed once and the policy that stands now denies it.";
    Guarded = 25, "guarded",
        "A packet for this node's mesh address, or from it or a peer's, that came in outside the mesh (CVE-2019-14899).";
    IcmpErrorRate = 26, "icmp error rate",
        "More ICMP errors about standing flows than one peer may send: a flood, or a broken router.";
    SourceRoute = 27, "source route",
        "IPv4 options or an IPv6 routing header name further stops, which the policy was not asked about.";
}

impl DropReason {
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|r| *r as u8 == number)
    }
}

impl core::fmt::Display for DropReason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.pad(self.name())
    }
}
