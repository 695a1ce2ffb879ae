//! The policy language: text to rules to identities to entries.
