//! TLS under the peer frames, when certificates are configured.

use std::{io, sync::Arc};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    rustls::{ClientConfig, ServerConfig, pki_types::ServerName},
};

/// Mutual TLS of the peer port: both sides show a certificate of the cluster's CA.
#[derive(Clone)]
pub struct PeerTls {
    /// For connections from other nodes; must ask for client certificates.
    pub server: Arc<ServerConfig>,
    /// For connections to other nodes; must carry this node's certificate.
    pub client: Arc<ClientConfig>,
}

pub(crate) type Reader = Box<dyn AsyncRead + Send + Unpin>;
pub(crate) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// The two halves of a fresh connection to `address` (`host:port`).
pub(crate) async fn connect(stream: TcpStream, address: &str, tls: Option<&PeerTls>) -> io::Result<(Reader, Writer)> {
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(plain(stream)) };
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let stream = TlsConnector::from(tls.client.clone()).connect(name, stream).await?;
    let (reader, writer) = tokio::io::split(stream);
    Ok((Box::new(reader), Box::new(writer)))
}

/// The two halves of an accepted connection.
pub(crate) async fn accept(stream: TcpStream, tls: Option<&PeerTls>) -> io::Result<(Reader, Writer)> {
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(plain(stream)) };
    let stream = TlsAcceptor::from(tls.server.clone()).accept(stream).await?;
    let (reader, writer) = tokio::io::split(stream);
    Ok((Box::new(reader), Box::new(writer)))
}

fn plain(stream: TcpStream) -> (Reader, Writer) {
    let (reader, writer) = stream.into_split();
    (Box::new(reader), Box::new(writer))
}
