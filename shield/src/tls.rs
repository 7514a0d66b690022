//! Certificates of a Shield, towards its clients and towards the brokers.

use std::{
    io,
    path::{Path, PathBuf},
};

use arqon_proto::{TlsError, TlsIdentity, tls_client, tls_server};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsAcceptor;

use crate::ConfigError;

/// Where the certificates are, all in PEM. Both sides are optional, each by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// The certificate that clients are shown, and those between it and its CA, its own first.
    /// With it `listen` speaks TLS (`wss://`).
    pub certificate_file: Option<PathBuf>,
    /// Its private key.
    pub key_file: Option<PathBuf>,
    /// The CA that signed the brokers' certificates. With it the brokers are spoken to with TLS.
    pub ca_file: Option<PathBuf>,
}

/// What was read from the files.
#[derive(Default)]
pub(crate) struct Loaded {
    pub(crate) acceptor: Option<TlsAcceptor>,
    pub(crate) ca: Option<Vec<u8>>,
}

/// A client's connection, with or without TLS.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

fn refuse(field: &str, path: &Path, problem: impl ToString) -> ConfigError {
    let problem = format!("{}: {}", path.display(), problem.to_string());
    ConfigError { key: format!("tls.{field}_file"), problem }
}

fn read(field: &str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    std::fs::read(path).map_err(|error| refuse(field, path, error))
}

impl Tls {
    /// Whether clients are spoken to with TLS.
    pub(crate) fn is_listening(&self) -> bool {
        self.certificate_file.is_some()
    }

    /// The same files, relative ones from `folder`.
    pub(crate) fn below(self, folder: &Path) -> Self {
        let below = |file: Option<PathBuf>| file.map(|file| folder.join(file));
        Self {
            certificate_file: below(self.certificate_file),
            key_file: below(self.key_file),
            ca_file: below(self.ca_file),
        }
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let missing = match (&self.certificate_file, &self.key_file) {
            (Some(_), None) => "tls.key_file",
            (None, Some(_)) => "tls.certificate_file",
            _ => return Ok(()),
        };
        let problem = "it is missing; a certificate and its key go together";
        Err(ConfigError { key: missing.to_owned(), problem: problem.to_owned() })
    }

    /// Reads the files.
    ///
    /// # Errors
    /// The key whose file cannot be read or used.
    pub(crate) fn load(&self) -> Result<Loaded, ConfigError> {
        self.check()?;
        let mut loaded = Loaded::default();
        if let (Some(certificate_file), Some(key_file)) = (&self.certificate_file, &self.key_file) {
            let (certificate, key) = (read("certificate", certificate_file)?, read("key", key_file)?);
            let identity = TlsIdentity { certificate: &certificate, key: &key };
            let file = |field| if field == "key" { key_file } else { certificate_file };
            let config =
                tls_server(identity, None).map_err(|TlsError { field, reason }| refuse(field, file(field), reason))?;
            loaded.acceptor = Some(TlsAcceptor::from(config));
        }
        if let Some(ca_file) = &self.ca_file {
            let ca = read("ca", ca_file)?;
            tls_client(&ca, None).map_err(|error| refuse(error.field, ca_file, error.reason))?;
            loaded.ca = Some(ca);
        }
        Ok(loaded)
    }
}

impl Loaded {
    /// An accepted connection, past its TLS handshake if there is to be one.
    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<Box<dyn Stream>> {
        match &self.acceptor {
            Some(acceptor) => Ok(Box::new(acceptor.accept(stream).await?)),
            None => Ok(Box::new(stream)),
        }
    }
}
