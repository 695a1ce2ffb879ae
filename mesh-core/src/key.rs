//! Keys, each of a type of its own so that none can stand in for another.
//!
//! Secrets are built from seeds that the caller drew, are wiped when dropped, compare in constant
//! time by their public halves only, and print as `NodeKey(redacted)`.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ed25519_dalek::Signer as _;
use hmac::{Hmac, Mac as _};
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// DER of an Ed25519 SubjectPublicKeyInfo up to the key itself (RFC 8410, section 4).
const ED25519_SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
/// DER of an Ed25519 PKCS #8 v1 private key up to the seed (RFC 8410, section 7).
const ED25519_PKCS8_PREFIX: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    #[error("a key is 32 bytes, this is {0}")]
    Length(usize),
    #[error("a key is written in base64")]
    Encoding,
    #[error("not a point of the curve")]
    Point,
}

// === Node key: WireGuard's static key ===

/// A node's WireGuard private key. It never leaves the node.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct NodeKey([u8; 32]);

impl NodeKey {
    /// Clamps `seed`, 32 bytes of the caller's randomness, as `wg genkey` does.
    pub fn from_seed(mut seed: [u8; 32]) -> Self {
        seed[0] &= 248;
        seed[31] = (seed[31] & 127) | 64;
        Self(seed)
    }

    pub fn public(&self) -> NodePublic {
        let secret = x25519_dalek::StaticSecret::from(self.0);
        NodePublic(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }

    /// The private bytes, for the WireGuard device and the state file only.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// Answers a coordinator's challenge: only the holder of this key, on this very channel, can.
    pub fn prove(&self, challenge: &NodePublic, context: &ProofContext<'_>) -> NodeProof {
        prove_with(&self.0, challenge, context)
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeKey(redacted)")
    }
}

/// What a proof of a node key is bound to, so that it is worth nothing anywhere else.
#[derive(Debug, Clone, Copy)]
pub struct ProofContext<'a> {
    /// Keying material exported from the TLS channel (RFC 8446, section 7.5).
    pub exporter: &'a [u8; 32],
    pub machine: &'a MachinePublic,
    pub node: &'a NodePublic,
}

/// HMAC-SHA-256 over the proof context, keyed by the Diffie-Hellman result.
#[derive(Debug, Clone, Copy)]
pub struct NodeProof(pub [u8; 32]);

impl NodeProof {
    /// The coordinator's side: `secret` is the ephemeral key behind the challenge that it sent.
    pub fn verify(&self, secret: &NodeKey, context: &ProofContext<'_>) -> bool {
        use subtle::ConstantTimeEq as _;
        let expected = prove_with(&secret.0, context.node, context);
        self.0.ct_eq(&expected.0).into()
    }
}

fn prove_with(secret: &[u8; 32], other: &NodePublic, context: &ProofContext<'_>) -> NodeProof {
    let secret = x25519_dalek::StaticSecret::from(*secret);
    let shared = secret.diffie_hellman(&x25519_dalek::PublicKey::from(other.0));
    let mut mac =
        Hmac::<Sha256>::new_from_slice(shared.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(b"mesh node key proof v1\0");
    mac.update(context.exporter);
    mac.update(&context.machine.0);
    mac.update(&context.node.0);
    NodeProof(mac.finalize().into_bytes().into())
}

// === Machine key: authenticates the control channel, signs netmaps ===

/// An Ed25519 private key: who a machine (or the coordinator) is on the control channel.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct MachineKey([u8; 32]);

impl MachineKey {
    /// `seed` is 32 bytes of the caller's randomness.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(seed)
    }

    pub fn public(&self) -> MachinePublic {
        MachinePublic(self.signing().verifying_key().to_bytes())
    }

    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// Signs `message` under `context`, a constant that keeps signatures of one use out of another.
    pub fn sign(&self, context: &'static str, message: &[u8]) -> Signature {
        Signature(
            self.signing()
                .sign(&signed_bytes(context, message))
                .to_bytes(),
        )
    }

    /// The private key as PKCS #8, which is how TLS libraries take it.
    pub fn to_pkcs8(&self) -> Zeroizing<Vec<u8>> {
        let mut der = Zeroizing::new(ED25519_PKCS8_PREFIX.to_vec());
        der.extend_from_slice(&self.0);
        der
    }

    fn signing(&self) -> ed25519_dalek::SigningKey {
        ed25519_dalek::SigningKey::from_bytes(&self.0)
    }
}

impl fmt::Debug for MachineKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MachineKey(redacted)")
    }
}

/// An Ed25519 signature.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature(pub [u8; 64]);

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({}…)", hex::encode(&self.0[..4]))
    }
}

fn signed_bytes(context: &'static str, message: &[u8]) -> Vec<u8> {
    [context.as_bytes(), b"\0", message].concat()
}

macro_rules! public_key {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl TryFrom<&[u8]> for $name {
            type Error = InvalidKey;

            fn try_from(bytes: &[u8]) -> Result<Self, InvalidKey> {
                bytes.try_into().map(Self).map_err(|_| InvalidKey::Length(bytes.len()))
            }
        }

        impl FromStr for $name {
            type Err = InvalidKey;

            fn from_str(text: &str) -> Result<Self, InvalidKey> {
                let bytes = BASE64_STANDARD.decode(text).map_err(|_| InvalidKey::Encoding)?;
                Self::try_from(bytes.as_slice())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&BASE64_STANDARD.encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

public_key! {
    /// A node's WireGuard public key, written as `wg` writes it.
    NodePublic
}

public_key! {
    /// The public half of a [`MachineKey`].
    MachinePublic
}

impl MachinePublic {
    /// The key as a DER SubjectPublicKeyInfo: what a TLS raw public key is (RFC 7250).
    pub fn to_spki(&self) -> Vec<u8> {
        [&ED25519_SPKI_PREFIX[..], &self.0].concat()
    }

    pub fn from_spki(der: &[u8]) -> Result<Self, InvalidKey> {
        let key = der
            .strip_prefix(&ED25519_SPKI_PREFIX[..])
            .ok_or(InvalidKey::Encoding)?;
        Self::try_from(key)
    }

    /// What a join string pins: the SHA-256 of the key's SubjectPublicKeyInfo.
    pub fn pin(&self) -> [u8; 32] {
        Sha256::digest(self.to_spki()).into()
    }

    /// Strict verification: small-order keys and malleable signatures are refused.
    pub fn verify(&self, context: &'static str, message: &[u8], signature: &Signature) -> bool {
        let Ok(key) = ed25519_dalek::VerifyingKey::from_bytes(&self.0) else {
            return false;
        };
        let signature = ed25519_dalek::Signature::from_bytes(&signature.0);
        key.verify_strict(&signed_bytes(context, message), &signature)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_on_its_own_channel_only() {
        let node = NodeKey::from_seed([7; 32]);
        let machine = MachineKey::from_seed([8; 32]).public();
        let challenge = NodeKey::from_seed([9; 32]);
        let public = node.public();
        let here = ProofContext {
            exporter: &[1; 32],
            machine: &machine,
            node: &public,
        };
        let there = ProofContext {
            exporter: &[2; 32],
            ..here
        };
        let proof = node.prove(&challenge.public(), &here);
        assert!(proof.verify(&challenge, &here));
        assert!(!proof.verify(&challenge, &there));
    }

    #[test]
    fn a_signature_of_one_context_is_refused_in_another() {
        let key = MachineKey::from_seed([1; 32]);
        let signature = key.sign("netmap", b"bytes");
        assert!(key.public().verify("netmap", b"bytes", &signature));
        assert!(!key.public().verify("ticket", b"bytes", &signature));
        assert!(!key.public().verify("netmap", b"other", &signature));
    }

    #[test]
    fn secrets_do_not_print() {
        let text = format!(
            "{:?} {:?}",
            NodeKey::from_seed([1; 32]),
            MachineKey::from_seed([1; 32])
        );
        assert_eq!(text, "NodeKey(redacted) MachineKey(redacted)");
    }

    #[test]
    fn public_keys_survive_text_and_spki() {
        let key = MachineKey::from_seed([3; 32]).public();
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!(MachinePublic::from_spki(&key.to_spki()), Ok(key));
        assert_eq!("short".parse::<NodePublic>(), Err(InvalidKey::Encoding));
    }
}
