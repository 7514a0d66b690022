//! Where the servers are and as whom to speak to them.

use std::path::PathBuf;
use std::time::Duration;

use arqon_proto::{tls_client, wire};
use arqon_sdk::{Client, Options};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use wire::control_client::ControlClient;

use crate::Failure;
use crate::ports::CONTROL_STEP;

const SERVER_DEFAULT: &str = "127.0.0.1:7700";
const CONTROL_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const CONTROL_TIMEOUT: Duration = Duration::from_secs(30);

/// The servers to speak to. The token comes from the environment alone, because a command line
/// can be read by every user of the machine.
#[derive(Clone, Debug, clap::Args)]
pub struct Connect {
    /// Nodes as host:port, or Shields as ws://host:port, divided by commas [env: ARQON_SERVER or ARQONBUS_URL] [default: 127.0.0.1:7700]
    ///
    /// The token is read from ARQON_TOKEN or ARQONBUS_TOKEN.
    #[arg(long, value_name = "ADDRESS")]
    server: Option<String>,
    /// CA to trust (PEM); nodes are spoken to with TLS then, and Shields are wss://host:port
    #[arg(long, value_name = "FILE", env = "ARQON_CA")]
    ca: Option<PathBuf>,
}

/// Where the control plane is.
#[derive(Clone, Debug, clap::Args)]
pub struct ConnectControl {
    #[command(flatten)]
    connect: Connect,
    /// Control plane of the nodes as host:port [default: port + 5 of --server]
    #[arg(long, value_name = "ADDRESS", env = "ARQON_CONTROL")]
    control: Option<String>,
}

fn variable(names: [&str; 2]) -> Option<String> {
    names.iter().filter_map(|name| std::env::var(name).ok()).find(|value| !value.is_empty())
}

/// The token in the environment.
pub(crate) fn token() -> Result<String, Failure> {
    variable(["ARQON_TOKEN", "ARQONBUS_TOKEN"])
        .map(|token| token.trim().to_owned())
        .ok_or_else(|| Failure::usage("no token: set ARQON_TOKEN (arqon up prints one, arqon token makes one)"))
}

impl Connect {
    fn servers(&self) -> String {
        let environment = || variable(["ARQON_SERVER", "ARQONBUS_URL"]);
        self.server.clone().or_else(environment).unwrap_or_else(|| SERVER_DEFAULT.to_owned())
    }

    fn ca(&self) -> Result<Option<Vec<u8>>, Failure> {
        // An empty ARQON_CA is none, as with the other variables.
        let Some(file) = self.ca.as_ref().filter(|file| !file.as_os_str().is_empty()) else { return Ok(None) };
        let problem = |problem: String| Failure::usage(format!("--ca {}: {problem}", file.display()));
        let ca = std::fs::read(file).map_err(|error| problem(error.to_string()))?;
        tls_client(&ca, None).map_err(|error| problem(error.reason))?;
        Ok(Some(ca))
    }

    /// Connects.
    ///
    /// # Errors
    /// No token, a CA that cannot be used, no server that can be reached, or one that refuses the
    /// token.
    pub async fn client(&self) -> Result<Client, Failure> {
        client_trusting(self.ca()?, &self.servers(), &token()?).await
    }
}

/// Connects to `servers` with `token`, without TLS.
pub(crate) async fn client(servers: &str, token: &str) -> Result<Client, Failure> {
    client_trusting(None, servers, token).await
}

async fn client_trusting(ca: Option<Vec<u8>>, servers: &str, token: &str) -> Result<Client, Failure> {
    let mut options = Options::new([servers], token);
    options.ca = ca;
    options.client_name = concat!("arqon/", env!("CARGO_PKG_VERSION")).to_owned();
    Ok(Client::connect(options).await?)
}

impl ConnectControl {
    /// Connects to the clients' side of the same servers.
    ///
    /// # Errors
    /// As [`Connect::client`].
    pub async fn client(&self) -> Result<Client, Failure> {
        self.connect.client().await
    }

    /// Connects to the control plane of the first node that can be reached.
    ///
    /// # Errors
    /// No token, a CA that cannot be used, or no node that can be reached.
    pub async fn control(&self) -> Result<Control, Failure> {
        let addresses = match &self.control {
            Some(addresses) => addresses.clone(),
            None => control_addresses(&self.connect.servers())?,
        };
        Control::connect_trusting(self.connect.ca()?, &addresses, &token()?).await
    }
}

/// The control plane beside the client ports `servers`.
fn control_addresses(servers: &str) -> Result<String, Failure> {
    let mut out = Vec::new();
    for server in servers.split(',').map(str::trim).filter(|server| !server.is_empty()) {
        let server = server.strip_prefix("tls://").unwrap_or(server);
        if server.contains("://") {
            let why = "the control plane is not behind the Shield: give a node as --server, or --control";
            return Err(Failure::usage(format!("{server}: {why}")));
        }
        let address = server.rsplit_once(':').and_then(|(host, port)| {
            let port = port.parse::<u16>().ok()?.checked_add(CONTROL_STEP)?;
            Some(format!("{host}:{port}"))
        });
        out.push(address.ok_or_else(|| Failure::usage(format!("--server {server:?} is not a host:port")))?);
    }
    Ok(out.join(","))
}

/// A connection to the control plane that shows its token with every call.
#[derive(Clone, Debug)]
pub struct Control {
    client: ControlClient<Channel>,
    authorization: MetadataValue<Ascii>,
}

impl Control {
    /// Connects to the first of `addresses` (`host:port`, divided by commas) that answers, without
    /// TLS.
    ///
    /// # Errors
    /// Why each address failed.
    pub async fn connect(addresses: &str, token: &str) -> Result<Self, Failure> {
        Self::connect_trusting(None, addresses, token).await
    }

    // With TLS when there is a `ca` to trust.
    async fn connect_trusting(ca: Option<Vec<u8>>, addresses: &str, token: &str) -> Result<Self, Failure> {
        let tls = ca.map(|ca| ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)));
        let scheme = if tls.is_some() { "https" } else { "http" };
        let authorization = format!("Bearer {token}").parse();
        let authorization = authorization.map_err(|_| Failure::usage("the token is not one line of ASCII"))?;
        let mut problems = Vec::new();
        for address in addresses.split(',').map(str::trim).filter(|address| !address.is_empty()) {
            let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"));
            let endpoint = endpoint.and_then(|endpoint| match &tls {
                Some(tls) => endpoint.tls_config(tls.clone()),
                None => Ok(endpoint),
            });
            let endpoint = endpoint
                .map_err(|error| Failure::usage(error).at(address))?
                .connect_timeout(CONTROL_CONNECT_TIMEOUT)
                .timeout(CONTROL_TIMEOUT);
            match endpoint.connect().await {
                Ok(channel) => return Ok(Self { client: ControlClient::new(channel), authorization }),
                Err(error) => problems.push(format!("{address} ({})", innermost(&error))),
            }
        }
        Err(Failure::failed(format!("cannot reach the control plane at {}", problems.join(", "))))
    }

    /// The generated client.
    pub fn client(&mut self) -> &mut ControlClient<Channel> {
        &mut self.client
    }

    /// A request with the token.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert("authorization", self.authorization.clone());
        request
    }
}

// tonic says "transport error" and keeps the reason inside.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_plane_is_five_ports_above() {
        assert_eq!(control_addresses("a:7700, tls://b:7730").unwrap(), "a:7705,b:7735");
        for wrong in ["ws://a:7710", "a", "a:65535", "a:x"] {
            assert!(control_addresses(wrong).unwrap_err().to_string().contains(wrong), "{wrong}");
        }
    }
}
