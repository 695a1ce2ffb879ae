//! Pre-auth keys: tokens that enrol a node without a person.
//!
//! The secret is 256 random bits and is shown once; what is stored is its SHA-256. A slow password
//! hash would protect nothing here (there is nothing to guess) and let strangers burn our CPU. The
//! prefix is public, so that an operator can name a key and a log line can too.

use std::collections::BTreeSet;
use std::fmt;

use mesh_core::node::{NodeId, Owner, Tag, UnixTime};
use rand_core::{OsRng, RngCore as _};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// How long a key is good for when nobody says.
pub const DEFAULT_LIFETIME: u64 = 3600;
/// A key that lives for ever is a password; ninety days is the most.
pub const MAX_LIFETIME: u64 = 90 * 24 * 3600;

const PREFIX: &str = "meshkey_";
/// Hexadecimal digits of the public part: enough that prefixes do not clash by chance.
const ID_DIGITS: usize = 12;
const SECRET_DIGITS: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeyId(pub u64);

/// A pre-auth key as it is stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PreAuthKey {
    pub id: KeyId,
    /// `meshkey_` and the public digits.
    pub prefix: String,
    pub hash: [u8; 32],
    pub reusable: bool,
    pub ephemeral: bool,
    /// Whose nodes the key makes: fixed when the key is made.
    pub owner: Owner,
    pub created: UnixTime,
    pub expires: UnixTime,
    pub revoked: bool,
    pub uses: u64,
    pub last_node: Option<NodeId>,
}

/// What is wrong with a key, in the words that the person at `mesh up` reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyRefused {
    #[error(
        "the auth key is malformed: it reads meshkey_, twelve digits, _ and 64 digits, all \
         hexadecimal; copy it whole"
    )]
    Malformed,
    #[error("the auth key is unknown here: was it made by another coordinator?")]
    Unknown,
    #[error("the auth key has expired; make another with `mesh-coordinator key create`")]
    Expired,
    #[error("the auth key was revoked; make another with `mesh-coordinator key create`")]
    Revoked,
    #[error(
        "the auth key was good for one node and is used up; make another with \
         `mesh-coordinator key create`"
    )]
    UsedUp,
}

/// A secret as somebody presents it: well formed, and nothing more is known.
#[derive(Clone)]
pub struct Presented {
    pub prefix: String,
    hash: [u8; 32],
}

impl fmt::Debug for Presented {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Presented({})", self.prefix)
    }
}

impl Presented {
    pub fn parse(text: &str) -> Result<Self, KeyRefused> {
        let text = text.trim();
        let digits = |part: &str, count| {
            part.len() == count && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let (id, secret) = text
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('_'))
            .ok_or(KeyRefused::Malformed)?;
        if !digits(id, ID_DIGITS) || !digits(secret, SECRET_DIGITS) {
            return Err(KeyRefused::Malformed);
        }
        Ok(Self {
            prefix: format!("{PREFIX}{id}"),
            hash: hash(text),
        })
    }

    /// Whether this is the secret behind `key`, in constant time.
    pub fn opens(&self, key: &PreAuthKey) -> bool {
        self.hash.ct_eq(&key.hash).into()
    }
}

impl PreAuthKey {
    /// Whether one more node may be enrolled at `now`.
    pub fn usable(&self, now: UnixTime) -> Result<(), KeyRefused> {
        if self.revoked {
            Err(KeyRefused::Revoked)
        } else if now >= self.expires {
            Err(KeyRefused::Expired)
        } else if self.uses > 0 && !self.reusable {
            Err(KeyRefused::UsedUp)
        } else {
            Ok(())
        }
    }

    pub fn tags(&self) -> BTreeSet<Tag> {
        self.owner.tags().cloned().collect()
    }
}

/// A new secret: its public prefix, its hash, and the text to be shown once.
pub fn generate() -> (String, [u8; 32], Zeroizing<String>) {
    let mut id = [0; ID_DIGITS / 2];
    let mut secret = Zeroizing::new([0; SECRET_DIGITS / 2]);
    OsRng.fill_bytes(&mut id);
    OsRng.fill_bytes(&mut *secret);
    let prefix = format!("{PREFIX}{}", hex::encode(id));
    let digits = Zeroizing::new(hex::encode(*secret));
    let text = Zeroizing::new(format!("{prefix}_{}", *digits));
    (prefix, hash(&text), text)
}

fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use mesh_core::node::UserId;

    use super::*;

    fn key(prefix: String, hash: [u8; 32]) -> PreAuthKey {
        PreAuthKey {
            id: KeyId(1),
            prefix,
            hash,
            reusable: false,
            ephemeral: false,
            owner: Owner::User(UserId(1)),
            created: UnixTime(100),
            expires: UnixTime(200),
            revoked: false,
            uses: 0,
            last_node: None,
        }
    }

    #[test]
    fn a_fresh_secret_opens_its_own_key_only() {
        let (prefix, hash, secret) = generate();
        let mine = key(prefix, hash);
        let presented = Presented::parse(&secret).unwrap();
        assert_eq!(presented.prefix, mine.prefix);
        assert!(presented.opens(&mine));
        let (prefix, hash, _) = generate();
        assert!(!presented.opens(&key(prefix, hash)));
        assert!(!format!("{presented:?}").contains(&secret[21..]));
    }

    #[test]
    fn what_is_not_a_key_is_malformed() {
        let (_, _, secret) = generate();
        let upper = secret.to_uppercase();
        for text in [
            "",
            "meshkey_",
            "hello",
            "meshkey_1_2",
            &secret[..84],
            &upper,
        ] {
            assert_eq!(
                Presented::parse(text).unwrap_err(),
                KeyRefused::Malformed,
                "{text}"
            );
        }
        assert!(Presented::parse(&format!("  {}\n", *secret)).is_ok());
    }

    #[test]
    fn a_key_stops_for_one_reason_at_a_time() {
        let good = key(String::new(), [0; 32]);
        let now = UnixTime(150);
        assert_eq!(good.usable(now), Ok(()));
        assert_eq!(good.usable(UnixTime(200)), Err(KeyRefused::Expired));
        let used = PreAuthKey { uses: 1, ..good };
        assert_eq!(used.usable(now), Err(KeyRefused::UsedUp));
        let reusable = PreAuthKey {
            reusable: true,
            ..used.clone()
        };
        assert_eq!(reusable.usable(now), Ok(()));
        let revoked = PreAuthKey {
            revoked: true,
            ..used
        };
        assert_eq!(revoked.usable(now), Err(KeyRefused::Revoked));
    }
}
