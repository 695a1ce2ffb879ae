//! Which node is calling, and which of its keys it has proven to hold.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use mesh_api::v1;
use mesh_core::key::{MachinePublic, NodeKey, NodeProof, NodePublic, ProofContext};
use tonic::{Request, Status};

/// What the channel proves of its other end.
#[derive(Clone, Debug)]
pub struct Caller {
    pub machine: MachinePublic,
    pub remote: SocketAddr,
    /// Keying material of this very channel.
    pub exporter: [u8; 32],
    /// Whose public half is this channel's challenge.
    pub challenge: Arc<NodeKey>,
    pub enrolments: Arc<AtomicU32>,
}

impl Caller {
    pub(super) fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        let caller = request.extensions().get::<Self>().cloned();
        caller.ok_or_else(|| Status::internal("a connection without a caller"))
    }

    /// The WireGuard key that the caller holds the private half of.
    pub fn proven_key(&self, proof: Option<&v1::NodeProof>) -> Result<NodePublic, Status> {
        let proof =
            proof.ok_or_else(|| Status::invalid_argument("the node key's proof is missing"))?;
        let key = NodePublic::try_from(proof.key.as_slice())
            .map_err(|invalid| Status::invalid_argument(format!("the node key: {invalid}")))?;
        let bytes = <[u8; 32]>::try_from(proof.proof.as_slice())
            .map_err(|_| Status::invalid_argument("a proof is 32 bytes"))?;
        let context = ProofContext {
            exporter: &self.exporter,
            machine: &self.machine,
            node: &key,
        };
        if NodeProof(bytes).verify(&self.challenge, &context) {
            Ok(key)
        } else {
            Err(Status::unauthenticated(
                "the proof of the node key does not hold on this channel",
            ))
        }
    }
}
