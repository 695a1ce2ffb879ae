//! The netmap held, and the signed updates that prove it: one full map and the deltas after it.
//!
//! Signatures, addressees and digests are checked where the bytes are parsed; what is kept here is
//! the order. Within an epoch generations only move forward, and a lower epoch is refused however
//! well it is signed: a replayed map is a signed map too.

use std::sync::Arc;

use crate::netmap::Netmap;
use crate::node::{Epoch, Generation};

/// Beyond this many deltas a full map is asked for, so that a start stays quick.
const LONGEST: usize = 256;
/// Beyond this many bytes of deltas likewise, unless the full map has more: the chain is rewritten with each one.
const LARGEST: usize = 1 << 20;

/// An update that holds: its signature, its addressee, and the map that it leads to.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// The map after the update.
    pub netmap: Netmap,
    pub kind: Kind,
    /// The update as it travelled, signature and all.
    pub signed: Arc<[u8]>,
}

/// Whether an update stands alone or leans on the map before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Full,
    Delta,
}

/// Why an update was not taken. Nothing held has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Signed by somebody else, for somebody else, or not readable.
    #[error("{0}")]
    Untrusted(String),
    #[error("epoch {epoch}, generation {generation} is older than what is held")]
    Stale {
        epoch: Epoch,
        generation: Generation,
    },
    /// Does not lead on from the map held: only a full map helps.
    #[error("the update does not follow the map that is held")]
    Gap,
}

/// A netmap and its proof.
#[derive(Clone, Debug)]
pub struct Chain {
    netmap: Arc<Netmap>,
    /// The full map first, then every delta.
    links: Vec<Arc<[u8]>>,
    /// Of the deltas.
    bytes: usize,
}

impl Chain {
    /// The chain after `accepted`, given the one `held`.
    pub fn after(held: Option<&Self>, accepted: Accepted) -> Result<Self, Refused> {
        let Accepted {
            netmap,
            kind,
            signed,
        } = accepted;
        let (epoch, generation) = (netmap.epoch, netmap.generation);
        if held.is_some_and(|held| held.position() > (epoch, generation)) {
            return Err(Refused::Stale { epoch, generation });
        }
        let mut next = match (kind, held) {
            (Kind::Full, _) => Self {
                netmap: netmap.into(),
                links: Vec::new(),
                bytes: 0,
            },
            (Kind::Delta, None) => return Err(Refused::Gap),
            (Kind::Delta, Some(held)) if *held.netmap == netmap => return Ok(held.clone()),
            (Kind::Delta, Some(held)) => Self {
                netmap: netmap.into(),
                links: held.links.clone(),
                bytes: held.bytes + signed.len(),
            },
        };
        next.links.push(signed);
        Ok(next)
    }

    pub fn netmap(&self) -> &Arc<Netmap> {
        &self.netmap
    }

    pub fn position(&self) -> (Epoch, Generation) {
        (self.netmap.epoch, self.netmap.generation)
    }

    /// The signed updates in order, a full map first.
    pub fn links(&self) -> &[Arc<[u8]>] {
        &self.links
    }

    /// So long that a full map is better.
    pub fn is_long(&self) -> bool {
        let full = self.links.first().map_or(0, |link| link.len());
        self.links.len() > LONGEST || self.bytes > LARGEST.max(full)
    }
}
