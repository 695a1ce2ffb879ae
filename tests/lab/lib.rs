//! Laboratory for the test rings.
