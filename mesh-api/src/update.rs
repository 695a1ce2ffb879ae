//! Signed netmap updates: how a coordinator's word travels, and how it is kept on disk.
//!
//! An update names the map that it follows by digest and the map that it leads to, and all of that
//! is under the signature. So a stored chain can be replayed without the coordinator, and neither a
//! cut chain nor an old one put back passes for the newest ([`Verifier::accept`] refuses both).

use mesh_core::key::{MachineKey, MachinePublic, Signature};
use mesh_core::netmap::{Digest, Netmap, NetmapDelta, StaleGeneration};
use mesh_core::node::{Epoch, Generation, MeshId, NodeId};
use prost::Message as _;

use crate::convert::Invalid;
use crate::held::digest;
use crate::v1::netmap_update::Body;
use crate::{netmap, v1};

/// Keeps these signatures out of every other use of the coordinator's key.
const CONTEXT: &str = "mesh netmap update v1";

// === signing ===

/// A whole map, following nothing.
pub fn sign_full(key: &MachineKey, map: &Netmap) -> v1::SignedUpdate {
    sign_full_as(key, map, map.digest())
}

/// As [`sign_full`], where `digest` is known to be the map's.
pub fn sign_full_as(key: &MachineKey, map: &Netmap, digest: Digest) -> v1::SignedUpdate {
    sign(key, map, Digest::NONE, digest, Body::Full(map.into()))
}

/// The step from a map with digest `before` to `after`. An empty delta says "unchanged".
pub fn sign_delta(
    key: &MachineKey,
    before: Digest,
    delta: &NetmapDelta,
    after: &Netmap,
) -> v1::SignedUpdate {
    sign_delta_as(key, before, delta, after, after.digest())
}

/// As [`sign_delta`], where `digest` is known to be that of the map after.
pub fn sign_delta_as(
    key: &MachineKey,
    before: Digest,
    delta: &NetmapDelta,
    after: &Netmap,
    digest: Digest,
) -> v1::SignedUpdate {
    sign(key, after, before, digest, Body::Delta(delta.into()))
}

fn sign(
    key: &MachineKey,
    map: &Netmap,
    before: Digest,
    after: Digest,
    body: Body,
) -> v1::SignedUpdate {
    let update = v1::NetmapUpdate {
        mesh_id: map.mesh.id.0.to_vec(),
        node_id: map.me.id.0,
        epoch: map.epoch.0,
        generation: map.generation.0,
        digest_before: before.0.to_vec(),
        digest_after: after.0.to_vec(),
        body: Some(body),
    }
    .encode_to_vec();
    let signature = key.sign(CONTEXT, &update).0.to_vec();
    v1::SignedUpdate { update, signature }
}

// === verifying ===

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the coordinator's signature does not hold")]
    Signature,
    #[error("the update is malformed")]
    Malformed(#[from] Invalid),
    #[error("the update is for another node or mesh")]
    Misdirected,
    #[error("the update is older than what is held")]
    Stale(#[from] StaleGeneration),
    /// The remedy is to ask for a whole map.
    #[error("the update does not follow the map that is held")]
    Gap,
}

/// Who must have signed, and for whom. The mesh and the node are unknown until the first map.
#[derive(Clone, Copy, Debug)]
pub struct Verifier {
    pub coordinator: MachinePublic,
    pub addressee: Option<(MeshId, NodeId)>,
}

impl Verifier {
    /// The map after `signed`, given the one held. Nothing is changed on refusal.
    pub fn accept(
        &self,
        held: Option<&Netmap>,
        signed: &v1::SignedUpdate,
    ) -> Result<Netmap, Refused> {
        let signature =
            <[u8; 64]>::try_from(signed.signature.as_slice()).map_err(|_| Refused::Signature)?;
        if !self
            .coordinator
            .verify(CONTEXT, &signed.update, &Signature(signature))
        {
            return Err(Refused::Signature);
        }
        let update =
            v1::NetmapUpdate::decode(signed.update.as_slice()).map_err(|_| Invalid::Encoding)?;
        let after = digest(&update.digest_after)?;
        let (epoch, generation) = (Epoch(update.epoch), Generation(update.generation));
        let next = match update.body.as_ref().ok_or(Invalid::Missing("body"))? {
            Body::Full(map) => {
                let map = netmap::full(map, epoch, generation)?;
                not_older(held, &map)?;
                if map.digest() != after {
                    return Err(StaleGeneration::Digest.into());
                }
                map
            }
            Body::Delta(delta) => {
                let held = held.ok_or(Refused::Gap)?;
                let delta = netmap::delta(delta, epoch, generation)?;
                if digest(&update.digest_before)? != held.digest() {
                    return Err(Refused::Gap);
                }
                held.apply(delta, after)?
            }
        };
        let named =
            (update.mesh_id.as_slice(), update.node_id) == (&next.mesh.id.0[..], next.me.id.0);
        let ours = self
            .addressee
            .is_none_or(|addressee| addressee == (next.mesh.id, next.me.id));
        if named && ours {
            Ok(next)
        } else {
            Err(Refused::Misdirected)
        }
    }
}

/// A whole map may start a new epoch; within one, generations only move forward.
fn not_older(held: Option<&Netmap>, next: &Netmap) -> Result<(), StaleGeneration> {
    let Some(held) = held else { return Ok(()) };
    if next.epoch < held.epoch {
        return Err(StaleGeneration::Epoch {
            have: held.epoch,
            got: next.epoch,
        });
    }
    if next.epoch == held.epoch && next.generation < held.generation {
        return Err(StaleGeneration::Backwards {
            have: held.generation,
            got: next.generation,
        });
    }
    Ok(())
}
