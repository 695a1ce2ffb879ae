//! MagicDNS on the node's own mesh address, and the host's resolver pointed at it.
