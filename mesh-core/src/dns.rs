//! MagicDNS: zone and query in, answer out.
