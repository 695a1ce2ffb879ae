//! TLS 1.3 with raw public keys (RFC 7250): both ends are an Ed25519 key and nothing else.
//!
//! No certificate authority, no names, no expiry: the client knows the server's key by its pin, the
//! server looks the client's key up. What is left to get right is to accept *only* that: no
//! TLS 1.2, no X.509, no session tickets (a resumed session would outlive a revoked key).

use std::sync::Arc;

use mesh_core::key::{InvalidKey, MachineKey, MachinePublic};
use rustls::client::AlwaysResolvesClientRawPublicKeys;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, CommonState, ConnectionCommon, DigitallySignedStruct,
    DistinguishedName, Error, PeerIncompatible, ServerConfig, SideData, SignatureScheme,
};

/// What both ends say they speak inside the channel.
pub const ALPN: &[u8] = b"mesh/1";
/// Label of the keying material that binds a node-key proof to its channel (RFC 5705, section 4).
const EXPORTER_LABEL: &[u8] = b"EXPORTER-mesh-node-key-proof";

/// Which server key a client accepts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trust {
    /// SHA-256 of the key's SubjectPublicKeyInfo, from a join string.
    Pin([u8; 32]),
    /// The key itself, remembered from an earlier contact.
    Key(MachinePublic),
}

impl Trust {
    fn accepts(&self, key: &MachinePublic) -> bool {
        match self {
            Self::Pin(pin) => key.pin() == *pin,
            Self::Key(known) => key == known,
        }
    }
}

/// The agent's end.
pub fn client(key: &MachineKey, trust: Trust) -> Result<ClientConfig, Error> {
    let provider = provider();
    let verifier = Arc::new(Verifier {
        trust: Some(trust),
        algorithms: provider.signature_verification_algorithms,
    });
    let own = Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified(key)?));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(own);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// The coordinator's end. Any client key is let in; who it is, is asked afterwards.
pub fn server(key: &MachineKey) -> Result<ServerConfig, Error> {
    let provider = provider();
    let verifier = Arc::new(Verifier {
        trust: None,
        algorithms: provider.signature_verification_algorithms,
    });
    let own = Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified(key)?));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(own);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The other end's key, once the handshake is done.
pub fn peer_key(connection: &CommonState) -> Result<MachinePublic, InvalidKey> {
    match connection.peer_certificates() {
        Some([key]) => MachinePublic::from_spki(key),
        _ => Err(InvalidKey::Encoding),
    }
}

/// Thirty-two bytes that only the two ends of this very channel know.
pub fn exporter<Side: SideData>(connection: &ConnectionCommon<Side>) -> Result<[u8; 32], Error> {
    connection.export_keying_material([0; 32], EXPORTER_LABEL, None)
}

/// The name a client must give in TLS and nobody reads.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("coordinator.mesh").expect("a DNS name")
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certified(key: &MachineKey) -> Result<Arc<CertifiedKey>, Error> {
    let pkcs8 = key.to_pkcs8();
    let signer =
        rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8.as_slice()))?;
    // With raw public keys the "certificate" is the SubjectPublicKeyInfo itself.
    let spki = CertificateDer::from(key.public().to_spki());
    Ok(Arc::new(CertifiedKey::new(vec![spki], signer)))
}

/// Verifies either end: the key's form, whether it is trusted, and the handshake's signature.
#[derive(Debug)]
struct Verifier {
    /// `None`: any key may come.
    trust: Option<Trust>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn verify(&self, end_entity: &CertificateDer<'_>) -> Result<(), Error> {
        let key = MachinePublic::from_spki(end_entity)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        match self.trust {
            Some(trust) if !trust.accepts(&key) => Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
            _ => Ok(()),
        }
    }

    fn verify_signature(
        &self,
        message: &[u8],
        spki: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let spki = SubjectPublicKeyInfoDer::from(spki.as_ref());
        verify_tls13_signature_with_raw_key(message, &spki, signed, &self.algorithms)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, key, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_signature(message, key, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use rustls::{ClientConnection, ServerConnection};

    use super::*;

    /// Runs a handshake in memory, moving at most `chunk` bytes at a time.
    fn handshake(
        client: ClientConfig,
        server: ServerConfig,
        chunk: usize,
    ) -> Result<(ClientConnection, ServerConnection), Error> {
        let mut client = ClientConnection::new(Arc::new(client), server_name())?;
        let mut server = ServerConnection::new(Arc::new(server))?;
        for _ in 0..10_000 {
            if !client.is_handshaking()
                && !server.is_handshaking()
                && !client.wants_write()
                && !server.wants_write()
            {
                break;
            }
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            for part in wire.chunks(chunk) {
                server.read_tls(&mut &part[..]).unwrap();
                server.process_new_packets()?;
            }
            let mut wire = Vec::new();
            server.write_tls(&mut wire).unwrap();
            for part in wire.chunks(chunk) {
                client.read_tls(&mut &part[..]).unwrap();
                client.process_new_packets()?;
            }
        }
        Ok((client, server))
    }

    fn keys() -> (MachineKey, MachineKey) {
        (
            MachineKey::from_seed([1; 32]),
            MachineKey::from_seed([2; 32]),
        )
    }

    #[test]
    fn both_ends_learn_each_others_key_and_share_an_exporter() {
        let (node, coordinator) = keys();
        let trust = Trust::Pin(coordinator.public().pin());
        for chunk in [1, 17, 4096] {
            let ends = handshake(
                client(&node, trust).unwrap(),
                server(&coordinator).unwrap(),
                chunk,
            );
            let (mut node_end, mut coordinator_end) = ends.unwrap();
            assert_eq!(peer_key(&node_end), Ok(coordinator.public()));
            assert_eq!(peer_key(&coordinator_end), Ok(node.public()));
            assert_eq!(exporter(&node_end), exporter(&coordinator_end));

            node_end.writer().write_all(b"hello").unwrap();
            let mut wire = Vec::new();
            node_end.write_tls(&mut wire).unwrap();
            coordinator_end.read_tls(&mut wire.as_slice()).unwrap();
            coordinator_end.process_new_packets().unwrap();
            let mut heard = [0; 5];
            coordinator_end.reader().read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"hello");
        }
    }

    #[test]
    fn a_server_of_another_key_is_refused() {
        let (node, coordinator) = keys();
        let other = MachineKey::from_seed([3; 32]).public();
        for trust in [Trust::Pin(other.pin()), Trust::Key(other)] {
            let ends = handshake(
                client(&node, trust).unwrap(),
                server(&coordinator).unwrap(),
                4096,
            );
            assert!(matches!(ends, Err(Error::InvalidCertificate(_))));
        }
    }
}
