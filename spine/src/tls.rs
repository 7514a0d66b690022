//! Certificates of a node, and what its ports do with them.
//!
//! | port | with `[tls]` |
//! |---|---|
//! | client | the node shows its certificate |
//! | control | the node shows its certificate |
//! | peer | both sides show one that the CA signed |
//! | admin | plain HTTP, on loopback outside dev mode |

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use arqon_proto::{TlsError, TlsIdentity, limits, tls_client, tls_server};
use arqon_raft::PeerTls;
use serde::{Deserialize, Serialize};
use tokio_rustls::TlsAcceptor;
use tonic::transport::{Identity, Server, ServerTlsConfig};

use crate::config::ConfigError;

/// Where the certificates are, all in PEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The node's certificate and those between it and the CA, its own first. It must name the
    /// host of every address under which others reach this node, for servers and for clients.
    pub certificate_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
    /// The CA that signed the certificates of all nodes of the cluster.
    pub ca_file: PathBuf,
}

/// What each port needs, from the files.
pub(crate) struct Ports {
    pub(crate) client: TlsAcceptor,
    pub(crate) peer: PeerTls,
    pub(crate) control: Server,
}

impl Tls {
    /// The same files, relative ones from `folder`.
    pub(crate) fn below(self, folder: &Path) -> Self {
        Self {
            certificate_file: folder.join(self.certificate_file),
            key_file: folder.join(self.key_file),
            ca_file: folder.join(self.ca_file),
        }
    }

    /// Reads the files.
    ///
    /// # Errors
    /// The key whose file cannot be read or used.
    pub(crate) fn load(&self) -> Result<Ports, ConfigError> {
        let read = |field, path: &PathBuf| std::fs::read(path).map_err(|error| self.refuse(field, error));
        let certificate = read("certificate", &self.certificate_file)?;
        let key = read("key", &self.key_file)?;
        let ca = read("ca", &self.ca_file)?;
        let identity = TlsIdentity { certificate: &certificate, key: &key };
        let refuse = |error: TlsError| self.refuse(error.field, error.reason);
        let client = TlsAcceptor::from(tls_server(identity, None).map_err(refuse)?);
        let peer = PeerTls {
            server: tls_server(identity, Some(&ca)).map_err(refuse)?,
            client: tls_client(&ca, Some(identity)).map_err(refuse)?,
        };
        let control = ServerTlsConfig::new()
            .identity(Identity::from_pem(&certificate, &key))
            .timeout(Duration::from_millis(limits::HANDSHAKE_MS_MAX));
        let control = Server::builder().tls_config(control);
        let control = control.map_err(|error| self.refuse("certificate", error))?;
        Ok(Ports { client, peer, control })
    }

    fn refuse(&self, field: &str, problem: impl ToString) -> ConfigError {
        let path = match field {
            "key" => &self.key_file,
            "ca" => &self.ca_file,
            _ => &self.certificate_file,
        };
        let problem = format!("{}: {}", path.display(), problem.to_string());
        ConfigError { key: format!("tls.{field}_file"), problem }
    }
}
