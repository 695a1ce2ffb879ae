//! Links, addresses, routes and rules by rtnetlink.
