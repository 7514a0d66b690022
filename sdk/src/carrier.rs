//! The two carriers of frames, with or without TLS: a TCP stream, or one binary WebSocket message
//! per frame.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io::IoSlice,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use arqon_proto::{CLIENT_VERSIONS, FrameBuffer, decode_frame, encode_frame, limits, wire};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{self, Message, client::IntoClientRequest, http::HeaderValue, protocol::WebSocketConfig},
};
use wire::{ErrorCode, frame::Body};

use crate::{
    Error, Options,
    options::Address,
    stream::{Reader, Stream, Writer, is_tls_alert, open, open_halves},
};

const SLICE_COUNT_MAX: usize = 64;
const SUBPROTOCOL: &str = "arqonbus.v1";

type Socket = WebSocketStream<Box<dyn Stream>>;

/// The receiving half of a connection.
pub(crate) enum FrameReader {
    Tcp(Reader, FrameBuffer),
    WebSocket(SplitStream<Socket>),
}

/// The sending half of a connection, with what is to be written.
pub(crate) enum FrameWriter {
    Tcp(Writer, VecDeque<Bytes>),
    WebSocket(SplitSink<Socket, Message>, VecDeque<Message>),
}

impl FrameReader {
    /// The next whole frame, or why there is none any more.
    pub(crate) async fn next(&mut self) -> Result<Bytes, String> {
        match self {
            Self::Tcp(stream, buffer) => loop {
                if let Some(frame) = buffer.next(limits::FRAME_SIZE_MAX).map_err(|error| error.to_string())? {
                    return Ok(frame);
                }
                if stream.read_buf(&mut buffer.room()).await.map_err(|error| error.to_string())? == 0 {
                    return Err("the server closed it".to_owned());
                }
            },
            Self::WebSocket(stream) => loop {
                match stream.next().await {
                    Some(Ok(Message::Binary(frame))) => return Ok(frame),
                    Some(Ok(Message::Close(Some(close)))) => {
                        return Err(format!("closed with code {}: {}", u16::from(close.code), close.reason));
                    }
                    Some(Ok(Message::Text(_))) => return Err("the server sent text".to_owned()),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error.to_string()),
                    None => return Err("the server closed it".to_owned()),
                }
            },
        }
    }

    // Why the handshake got no answer.
    fn explain(&self, reason: String) -> String {
        match self {
            Self::Tcp(_, received) if is_tls_alert(received.pending()) => {
                "the server expects a TLS handshake, and no CA to trust is given (ca)".to_owned()
            }
            _ => reason,
        }
    }
}

impl FrameWriter {
    /// Takes a whole frame, given as its pieces, to be written by [`FrameWriter::poll_write`].
    pub(crate) fn push(&mut self, frame: Vec<Bytes>) {
        match self {
            Self::Tcp(_, pieces) => pieces.extend(frame.into_iter().filter(|piece| !piece.is_empty())),
            Self::WebSocket(_, messages) => messages.push_back(Message::Binary(join(frame))),
        }
    }

    /// Writes and flushes what was pushed; ready when all of it is with the system.
    pub(crate) fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<Result<(), String>> {
        match self {
            Self::Tcp(stream, pieces) => poll_pieces(stream, pieces, context).map_err(|error| error.to_string()),
            Self::WebSocket(sink, messages) => {
                poll_messages(sink, messages, context).map_err(|error| error.to_string())
            }
        }
    }

    /// Says goodbye, as far as the carrier has a word for it.
    pub(crate) async fn close(&mut self) {
        // The other side may be gone already: there is nothing left to do about it.
        let _ = match self {
            Self::Tcp(stream, _) => stream.shutdown().await.map_err(|error| error.to_string()),
            Self::WebSocket(sink, _) => sink.close().await.map_err(|error| error.to_string()),
        };
    }
}

fn join(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1 {
        return pieces.remove(0);
    }
    let mut out = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
    for piece in &pieces {
        out.extend_from_slice(piece);
    }
    out.freeze()
}

fn poll_pieces(
    stream: &mut Writer,
    pieces: &mut VecDeque<Bytes>,
    context: &mut Context<'_>,
) -> Poll<std::io::Result<()>> {
    while !pieces.is_empty() {
        let mut slices = [IoSlice::new(&[]); SLICE_COUNT_MAX];
        let count = pieces.len().min(SLICE_COUNT_MAX);
        for (slice, piece) in slices.iter_mut().zip(pieces.iter()) {
            *slice = IoSlice::new(piece);
        }
        let mut written = ready!(Pin::new(&mut *stream).poll_write_vectored(context, &slices[..count]))?;
        if written == 0 {
            return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
        }
        while let Some(first) = pieces.front_mut().filter(|_| written > 0) {
            let step = written.min(first.len());
            first.advance(step);
            written -= step;
            if first.is_empty() {
                pieces.pop_front();
            }
        }
    }
    // TLS may hold back what the socket had no room for.
    Pin::new(stream).poll_flush(context)
}

fn poll_messages(
    sink: &mut SplitSink<Socket, Message>,
    messages: &mut VecDeque<Message>,
    context: &mut Context<'_>,
) -> Poll<Result<(), tungstenite::Error>> {
    while !messages.is_empty() {
        ready!(sink.poll_ready_unpin(context))?;
        if let Some(message) = messages.pop_front() {
            sink.start_send_unpin(message)?;
        }
    }
    sink.poll_flush_unpin(context)
}

/// Connects to `address` and shakes hands.
///
/// # Errors
/// `Error::Server` when the server refuses the client, else `Error::Unreachable`.
pub(crate) async fn dial(
    address: &Address,
    options: &Options,
    tls: Option<&TlsConnector>,
) -> Result<(FrameReader, FrameWriter, wire::Welcome), Error> {
    let unreachable = |reason: String| Error::Unreachable { servers: address.to_string(), reason };
    let attempt = async {
        let (mut reader, mut writer) = match address {
            Address::Tcp(host) => {
                let (reader, writer) = open_halves(host, tls).await.map_err(unreachable)?;
                (FrameReader::Tcp(reader, FrameBuffer::default()), FrameWriter::Tcp(writer, VecDeque::new()))
            }
            Address::WebSocket(url) => open_websocket(url, options, tls).await?,
        };
        let hello = wire::Hello {
            version: CLIENT_VERSIONS.min(),
            version_max: CLIENT_VERSIONS.max(),
            // On WebSocket the token came with the handshake.
            token: if address.is_websocket() { String::new() } else { options.token.clone() },
            client: options.client_name.clone(),
            credit_bytes: 0,
        };
        let frame = wire::Frame { request_id: 0, body: Some(Body::Hello(hello)) };
        let frame = encode_frame(&frame, 0).map_err(|_| Error::invalid("token", "is too long"))?;
        writer.push(vec![frame]);
        poll_fn(|context| writer.poll_write(context)).await.map_err(unreachable)?;
        let answer = reader.next().await.map_err(|reason| unreachable(reader.explain(reason)))?;
        let (answer, _) = decode_frame::<wire::Frame>(answer)
            .map_err(|source| Error::BadData { server: address.to_string(), source })?;
        match answer.body {
            Some(Body::Welcome(welcome)) if CLIENT_VERSIONS.contains(welcome.version) => Ok((reader, writer, welcome)),
            Some(Body::Welcome(welcome)) => Err(no_common_version(welcome.version)),
            Some(Body::Error(error)) => Err(error.into()),
            _ => Err(Error::unexpected(address.as_str())),
        }
    };
    timeout(options.connect_timeout, attempt)
        .await
        .unwrap_or_else(|_| Err(unreachable(format!("no handshake within {}", seconds(options.connect_timeout)))))
}

/// A server that takes a version which this client did not offer.
fn no_common_version(version: u32) -> Error {
    let message = format!("the server speaks version {version}, this client speaks {CLIENT_VERSIONS}");
    Error::server(ErrorCode::UnsupportedVersion, message)
}

fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f32())
}

async fn open_websocket(
    url: &str,
    options: &Options,
    tls: Option<&TlsConnector>,
) -> Result<(FrameReader, FrameWriter), Error> {
    let unreachable = |reason: String| Error::Unreachable { servers: url.to_owned(), reason };
    let mut request = url.into_client_request().map_err(|error| Error::invalid("servers", error.to_string()))?;
    let bearer = HeaderValue::from_str(&format!("Bearer {}", options.token))
        .map_err(|_| Error::invalid("token", "has characters that no token has"))?;
    request.headers_mut().insert("authorization", bearer);
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static(SUBPROTOCOL));
    let config = WebSocketConfig::default()
        .max_message_size(Some(limits::FRAME_SIZE_MAX))
        .max_frame_size(Some(limits::FRAME_SIZE_MAX));
    let tls = tls.filter(|_| request.uri().scheme_str() == Some("wss"));
    let is_secure = tls.is_some();
    let host = request.uri().authority().map(ToString::to_string).unwrap_or_default();
    let stream = open(&host, tls).await.map_err(unreachable)?;
    match client_async_with_config(request, stream, Some(config)).await {
        Ok((socket, _)) => {
            let (sink, stream) = socket.split();
            Ok((FrameReader::WebSocket(stream), FrameWriter::WebSocket(sink, VecDeque::new())))
        }
        Err(tungstenite::Error::Http(response)) => {
            let status = response.status();
            let text = response.body().as_deref().map(|body| String::from_utf8_lossy(body).trim().to_owned());
            let reason = text.filter(|text| !text.is_empty()).unwrap_or_else(|| status.to_string());
            match status.as_u16() {
                401 => Err(Error::server(ErrorCode::AuthenticationFailed, reason)),
                403 => Err(Error::server(ErrorCode::AuthorizationDenied, reason)),
                _ => Err(unreachable(format!("refused with {status}: {reason}"))),
            }
        }
        // A server that expects TLS answers with bytes that are not HTTP.
        Err(tungstenite::Error::Protocol(_) | tungstenite::Error::HttpFormat(_)) if !is_secure => {
            Err(unreachable("it does not speak HTTP; it may expect a TLS handshake (wss://)".to_owned()))
        }
        Err(error) => Err(unreachable(error.to_string())),
    }
}
