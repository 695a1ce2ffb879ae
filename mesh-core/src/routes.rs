//! Addresses, routes and rules of the mesh device.
