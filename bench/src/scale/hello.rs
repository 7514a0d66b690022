//! A client that shakes hands properly and then behaves as it likes.

use std::time::Duration;

use arqon_proto::{encode_frame, frame_size, wire};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use wire::frame::Body;

use super::text;

const HELLO_TIME_MAX: Duration = Duration::from_secs(10);

/// A connection that nobody reads from. It ends when dropped.
pub struct Deaf {
    stream: TcpStream,
    requests: u64,
}

impl Deaf {
    /// Connects to `server` and is welcomed.
    pub async fn connect(server: &str, token: &str) -> Result<Self, String> {
        let open = async {
            let mut stream = TcpStream::connect(server).await.map_err(text)?;
            let hello = wire::Hello {
                version: 1,
                token: token.to_owned(),
                client: "arqon-bench greedy".to_owned(),
                ..Default::default()
            };
            let frame = wire::Frame { request_id: 0, body: Some(Body::Hello(hello)) };
            stream.write_all(&encode_frame(&frame, 0).map_err(text)?).await.map_err(text)?;
            let mut prefix = [0; 4];
            stream.read_exact(&mut prefix).await.map_err(text)?;
            let size = frame_size(&prefix).map_err(text)?.unwrap_or_default();
            let mut rest = vec![0; size.saturating_sub(prefix.len())];
            stream.read_exact(&mut rest).await.map_err(text)?;
            Ok(Self { stream, requests: 0 })
        };
        timeout(HELLO_TIME_MAX, open).await.map_err(|_| format!("{server}: no handshake"))?
    }

    /// The bytes of a request whose body would have `body_size` bytes.
    pub fn request(&mut self, body: Body, body_size: usize) -> Result<Bytes, String> {
        self.requests += 1;
        encode_frame(&wire::Frame { request_id: self.requests, body: Some(body) }, body_size).map_err(text)
    }

    /// Writes until all is written, the server ends the connection, or `time` is over. What the
    /// server makes of it is the server's business.
    pub async fn write(&mut self, bytes: &[u8], time: Duration) {
        let _ = timeout(time, self.stream.write_all(bytes)).await;
    }

    /// Returns when the server has ended the connection; nothing is read before.
    pub async fn ended(self) {
        // Errors and hang-ups are told without reading.
        let _ = self.stream.ready(tokio::io::Interest::ERROR).await;
    }
}
