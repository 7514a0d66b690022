//! Where to connect, as whom, and how patiently.

use std::{fmt, time::Duration};

use arqon_proto::tls_client;
use tokio_rustls::TlsConnector;

use crate::Error;

/// How a [`crate::Client`] connects and retries. Start from [`Options::new`].
#[derive(Clone)]
pub struct Options {
    /// `host:port` of brokers (TCP), or `ws://host:port/v1/ws` of Shields (path optional); one
    /// kind only. With [`Options::ca`] also `tls://host:port`, which is the same as `host:port`
    /// then, and `wss://`. Entries may hold several addresses divided by commas.
    pub servers: Vec<String>,
    /// The token (JWT) to show.
    pub token: String,
    /// The certificates to trust (PEM). With them every connection to a broker is TLS, also to
    /// those that other brokers name, and to a Shield if its address begins with `wss://`; a
    /// server must show a certificate for the host in its address. Without: no TLS.
    pub ca: Option<Vec<u8>>,
    /// Name and version of the program, as the servers' logs and metrics show it.
    pub client_name: String,
    /// Time for one operation, all its retries included; a long-poll's wait comes on top.
    pub request_timeout: Duration,
    /// Time to reach one server, handshake included.
    pub connect_timeout: Duration,
    /// Time to wait for one answer before the request is sent again where that is safe.
    pub attempt_timeout: Duration,
    /// First pause before a retry; doubled for each further one, with jitter.
    pub backoff_min: Duration,
    /// Longest pause before a retry. Short, because most of them wait for a new leader, which
    /// comes within two seconds.
    pub backoff_max: Duration,
    /// A silent connection is pinged after this time and given up after three times as much.
    pub keepalive: Duration,
}

impl Options {
    /// The defaults: 30 s for an operation, 5 s to connect, 10 s for one answer, pauses from
    /// 50 ms to 300 ms, keepalive 3 s.
    pub fn new<S: Into<String>>(servers: impl IntoIterator<Item = S>, token: impl Into<String>) -> Self {
        Self {
            servers: servers.into_iter().map(Into::into).collect(),
            token: token.into(),
            ca: None,
            client_name: concat!("arqon-sdk/", env!("CARGO_PKG_VERSION")).to_owned(),
            request_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(5),
            attempt_timeout: Duration::from_secs(10),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_millis(300),
            keepalive: Duration::from_secs(3),
        }
    }

    /// The servers as addresses.
    ///
    /// # Errors
    /// [`Error::Invalid`]: none given, one without a port, both kinds mixed, or TLS asked for
    /// without [`Options::ca`].
    pub(crate) fn addresses(&self) -> Result<Vec<Address>, Error> {
        let mut out: Vec<Address> = Vec::new();
        let parts = self.servers.iter().flat_map(|entry| entry.split(','));
        for part in parts.map(str::trim).filter(|part| !part.is_empty()) {
            let address = Address::parse(part, self.ca.is_some())?;
            if !out.contains(&address) {
                out.push(address);
            }
        }
        let Some(first) = out.first() else {
            return Err(Error::invalid("servers", "names no server"));
        };
        if out.iter().any(|address| address.is_websocket() != first.is_websocket()) {
            return Err(Error::invalid("servers", "mixes host:port with ws:// addresses"));
        }
        Ok(out)
    }

    /// What TLS connections are made with.
    ///
    /// # Errors
    /// [`Error::Invalid`]: `ca` is no certificate in PEM.
    pub(crate) fn connector(&self) -> Result<Option<TlsConnector>, Error> {
        let Some(ca) = &self.ca else { return Ok(None) };
        let config = tls_client(ca, None).map_err(|error| Error::invalid(error.field, error.reason))?;
        Ok(Some(TlsConnector::from(config)))
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the token.
        f.debug_struct("Options")
            .field("servers", &self.servers)
            .field("client_name", &self.client_name)
            .field("request_timeout", &self.request_timeout)
            .finish_non_exhaustive()
    }
}

/// Where one server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Address {
    /// `host:port` of a broker.
    Tcp(String),
    /// `ws://host:port/path` or `wss://host:port/path` of a Shield.
    WebSocket(String),
}

impl Address {
    pub(crate) fn parse(text: &str, has_ca: bool) -> Result<Self, Error> {
        let refuse = |reason: &str| Err(Error::invalid("servers", format!("has {text:?}: {reason}")));
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        if matches!(scheme, "wss" | "tls") && !has_ca {
            return refuse("TLS needs the certificate of the CA to trust, and none is given (ca)");
        }
        if matches!(scheme, "ws" | "wss") {
            let (host, path) = rest.split_once('/').map_or((rest, "v1/ws"), |(host, path)| (host, path));
            if !has_port(host) {
                return refuse(&format!("the port is missing, as in {scheme}://host:7710"));
            }
            let path = if path.is_empty() { "v1/ws" } else { path };
            return Ok(Self::WebSocket(format!("{scheme}://{host}/{path}")));
        }
        if text.contains("://") && scheme != "tls" {
            return refuse("use host:port or ws://host:port/v1/ws");
        }
        if !has_port(rest) {
            return refuse("the port is missing, as in host:7700");
        }
        Ok(Self::Tcp(rest.to_owned()))
    }

    pub(crate) fn is_websocket(&self) -> bool {
        matches!(self, Self::WebSocket(_))
    }

    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Tcp(text) | Self::WebSocket(text) => text,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

fn has_port(host: &str) -> bool {
    host.rsplit_once(':').is_some_and(|(name, port)| !name.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(servers: &[&str]) -> Result<Vec<String>, String> {
        Options::new(servers.iter().copied(), "t")
            .addresses()
            .map(|all| all.iter().map(ToString::to_string).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn servers_are_split_at_commas_and_named_once() {
        assert_eq!(addresses(&["a:1, b:2", "a:1"]).unwrap(), ["a:1", "b:2"]);
        assert_eq!(
            addresses(&["ws://a:1", "ws://b:2/", "ws://c:3/x"]).unwrap(),
            ["ws://a:1/v1/ws", "ws://b:2/v1/ws", "ws://c:3/x"]
        );
    }

    #[test]
    fn wrong_servers_are_refused_by_name() {
        for (servers, part) in [
            (&["", " , "][..], "names no server"),
            (&["a"], "\"a\": the port is missing"),
            (&["a:0"], "the port is missing"),
            (&["ws://a"], "the port is missing"),
            (&["http://a:1"], "use host:port or ws://"),
            (&["wss://a:1"], "TLS needs"),
            (&["tls://a:1"], "TLS needs"),
            (&["://a:1"], "use host:port or ws://"),
            (&["a:1", "ws://b:2"], "mixes"),
        ] {
            let error = addresses(servers).unwrap_err();
            assert!(error.starts_with("servers ") && error.contains(part), "{servers:?}: {error}");
        }
    }

    #[test]
    fn with_a_ca_servers_may_ask_for_tls() {
        let with_ca =
            |servers: &[&str]| Options { ca: Some(b"x".to_vec()), ..Options::new(servers.iter().copied(), "t") };
        let addresses = |servers: &[&str]| {
            with_ca(servers).addresses().map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(addresses(&["tls://a:1,a:1"]).unwrap(), ["a:1"]);
        assert_eq!(addresses(&["wss://a:1"]).unwrap(), ["wss://a:1/v1/ws"]);
        assert!(addresses(&["wss://a"]).unwrap_err().to_string().contains("as in wss://host:7710"));
        let error = with_ca(&["a:1"]).connector().map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "ca holds no certificate in PEM");
    }

    #[test]
    fn the_token_is_not_printed() {
        assert!(!format!("{:?}", Options::new(["a:1"], "secret")).contains("secret"));
    }
}
