//! TLS settings from PEM bytes, the same for nodes, Shields and clients: TLS 1.2 and 1.3 with
//! rustls over ring, no system store, no files read here.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};

/// Why TLS settings are refused. One line, names the setting.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct TlsError {
    /// `certificate`, `key` or `ca`.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

/// A certificate chain and its private key, PEM.
#[derive(Clone, Copy)]
pub struct TlsIdentity<'a> {
    /// The chain, leaf first.
    pub certificate: &'a [u8],
    /// PKCS#8, PKCS#1 or SEC1.
    pub key: &'a [u8],
}

fn refuse(field: &'static str, reason: impl ToString) -> TlsError {
    TlsError { field, reason: reason.to_string() }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certificates(field: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| refuse(field, error))?;
    if all.is_empty() { Err(refuse(field, "holds no certificate in PEM")) } else { Ok(all) }
}

fn roots(ca: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("ca", ca)? {
        roots.add(certificate).map_err(|error| refuse("ca", error))?;
    }
    Ok(roots)
}

impl TlsIdentity<'_> {
    fn parts(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let key = PrivateKeyDer::from_pem_slice(self.key).map_err(|error| refuse("key", error))?;
        Ok((certificates("certificate", self.certificate)?, key))
    }
}

/// Settings of a listening side. With `client_ca` every client must show a certificate that it
/// signed (mutual TLS).
///
/// # Errors
/// PEM that does not parse, or a key that does not fit its certificate.
pub fn tls_server(identity: TlsIdentity<'_>, client_ca: Option<&[u8]>) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| refuse("certificate", error))?;
    let builder = match client_ca {
        Some(ca) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider()).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| refuse("ca", error))?)
        }
        None => builder.with_no_client_auth(),
    };
    let (chain, key) = identity.parts()?;
    let config = builder.with_single_cert(chain, key).map_err(|error| refuse("certificate", error))?;
    Ok(Arc::new(config))
}

/// Settings of a connecting side, which trusts what `ca` signed and nothing else.
///
/// # Errors
/// As [`tls_server`].
pub fn tls_client(ca: &[u8], identity: Option<TlsIdentity<'_>>) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| refuse("ca", error))?
        .with_root_certificates(roots(ca)?);
    let config = match identity {
        Some(identity) => {
            let (chain, key) = identity.parts()?;
            builder.with_client_auth_cert(chain, key).map_err(|error| refuse("certificate", error))?
        }
        None => builder.with_no_client_auth(),
    };
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        let nothing = TlsIdentity { certificate: b"", key: b"" };
        assert!(tls_server(nothing, None).unwrap_err().to_string().starts_with("key: "));
        let error = tls_client(b"no certificate", None).unwrap_err().to_string();
        assert_eq!(error, "ca: holds no certificate in PEM");
    }
}
