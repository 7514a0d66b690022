//! The bytes to and from one server, with or without TLS.

use tokio::{
    io::{AsyncRead, AsyncWrite, split},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream, rustls::pki_types::ServerName};

/// Both directions in one.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

pub(crate) type Reader = Box<dyn AsyncRead + Send + Unpin>;
pub(crate) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// Connects to `host` (`name:port`).
///
/// # Errors
/// Why not, one line; what TLS found wrong is named as such.
pub(crate) async fn open(host: &str, tls: Option<&TlsConnector>) -> Result<Box<dyn Stream>, String> {
    let stream = connect(host).await?;
    match tls {
        Some(tls) => Ok(Box::new(secure(host, stream, tls).await?)),
        None => Ok(Box::new(stream)),
    }
}

/// As [`open`], in two halves.
pub(crate) async fn open_halves(host: &str, tls: Option<&TlsConnector>) -> Result<(Reader, Writer), String> {
    let stream = connect(host).await?;
    let Some(tls) = tls else {
        // The halves of a socket share no lock.
        let (reader, writer) = stream.into_split();
        return Ok((Box::new(reader), Box::new(writer)));
    };
    let (reader, writer) = split(secure(host, stream, tls).await?);
    Ok((Box::new(reader), Box::new(writer)))
}

async fn connect(host: &str) -> Result<TcpStream, String> {
    let stream = TcpStream::connect(host).await.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    Ok(stream)
}

async fn secure(host: &str, stream: TcpStream, tls: &TlsConnector) -> Result<TlsStream<TcpStream>, String> {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
    let name = ServerName::try_from(name.to_owned()).map_err(|error| format!("TLS handshake: {error}"))?;
    tls.connect(name, stream).await.map_err(|error| format!("TLS handshake: {error}"))
}

/// Whether `received`, in place of a frame, is how a server that expects TLS complains: a record
/// of the type alert.
pub(crate) fn is_tls_alert(received: &[u8]) -> bool {
    received.starts_with(&[0x15, 0x03])
}
