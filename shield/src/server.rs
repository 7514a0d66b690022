//! Start, accept, stop.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arqon_proto::Verifier;
use futures_util::future::BoxFuture;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_tungstenite::{
    accept_hdr_async_with_config,
    tungstenite::{self, handshake::server, protocol::WebSocketConfig},
};

use crate::{
    Config, ConfigError, admin,
    handshake::{Admitted, accepted, admit, refused},
    metrics::Metrics,
    rates::Rates,
    session,
    tls::Loaded,
};

const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// How long sessions may take to say goodbye.
const DRAIN_TIME: Duration = Duration::from_secs(5);
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// Why a Shield does not start: one line that names the key or address.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A key of the configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address that cannot be listened on.
    #[error("{key}: cannot listen on {address}: {source}")]
    Listen {
        /// The key of the configuration.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
}

/// A running Shield. Stop it with [`Shield::shutdown`]; dropping it ends it at once.
#[derive(Debug)]
pub struct Shield {
    address: SocketAddr,
    admin_address: SocketAddr,
    is_secure: bool,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

/// What all sessions share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) metrics: Metrics,
    pub(crate) rates: Rates,
    pub(crate) tls: Loaded,
    verifier: Verifier,
}

impl Shield {
    /// Starts to listen. The Spine need not be there yet.
    ///
    /// # Errors
    /// A wrong configuration, a key or certificate file that cannot be used, an address in use.
    pub fn start(config: Config) -> BoxFuture<'static, Result<Self, StartError>> {
        Box::pin(async move {
            config.check()?;
            let (listen, admin) = config.addresses()?;
            let verifier = config.verifier()?;
            let tls = config.tls.load()?;
            let is_secure = tls.acceptor.is_some();
            let bind = async |key, address| {
                TcpListener::bind(address).await.map_err(|source| StartError::Listen { key, address, source })
            };
            let (clients, admins) = (bind("listen", listen).await?, bind("admin", admin).await?);
            let local = |key, address, listener: &TcpListener| {
                listener.local_addr().map_err(|source| StartError::Listen { key, address, source })
            };
            let (address, admin_address) = (local("listen", listen, &clients)?, local("admin", admin, &admins)?);
            let rates = Rates::new(&config.limits);
            let shared = Arc::new(Shared { metrics: Metrics::new(), rates, tls, verifier, config });
            let (stop, stopping) = watch::channel(false);
            let tasks = vec![
                tokio::spawn(accept(shared.clone(), clients, stopping.clone())),
                tokio::spawn(admin::serve(shared, admins, stopping)),
            ];
            tracing::info!(%address, admin = %admin_address, "Shield listens");
            Ok(Self { address, admin_address, is_secure, stop, tasks })
        })
    }

    /// Where clients connect: `ws://ADDRESS/v1/ws`, or `wss://` if [`Shield::is_secure`].
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether clients are spoken to with TLS.
    #[must_use]
    pub fn is_secure(&self) -> bool {
        self.is_secure
    }

    /// Where metrics and health are shown.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// Takes no more clients, closes every session with code 1001 and returns when they are gone,
    /// after 5 s at most.
    pub fn shutdown(mut self) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            self.stop.send_replace(true);
            for task in &mut self.tasks {
                if timeout(DRAIN_TIME, &mut *task).await.is_err() {
                    task.abort();
                }
            }
        })
    }
}

impl Drop for Shield {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener, mut stopping: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(shared.config.limits.connections));
    let mut sessions = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = sessions.join_next() => continue,
            _ = stopping.wait_for(|stopping| *stopping) => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            // Out of descriptors, for example: wait for connections to go rather than spin.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            shared.metrics.refused_handshake("full");
            // What fits into an empty socket buffer is told, without waiting. Nobody who expects
            // TLS would understand it.
            if shared.tls.acceptor.is_none() {
                let _ = stream.try_write(FULL);
            }
            continue;
        };
        let (shared, stopping) = (shared.clone(), stopping.clone());
        sessions.spawn(async move {
            shared.metrics.connections.inc();
            connection(&shared, stream, stopping).await;
            shared.metrics.connections.dec();
            drop(place);
        });
    }
    drop(listener);
    let drained = async { while sessions.join_next().await.is_some() {} };
    if timeout(DRAIN_TIME, drained).await.is_err() {
        tracing::warn!(count = sessions.len(), "sessions did not end in time");
    }
}

/// Where a handshake ended.
enum Failed {
    Tls(io::Error),
    WebSocket(tungstenite::Error),
}

async fn connection(shared: &Arc<Shared>, stream: TcpStream, mut stopping: watch::Receiver<bool>) {
    let limits = &shared.config.limits;
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let config = WebSocketConfig::default()
        .read_buffer_size(16 << 10)
        .write_buffer_size(64 << 10)
        .max_message_size(Some(limits.message_size))
        .max_frame_size(Some(limits.message_size));
    let mut admitted = None;
    #[expect(clippy::result_large_err, reason = "the library's signature")]
    let judge =
        |request: &server::Request, response: server::Response| match admit(&shared.verifier, request, now_seconds()) {
            Ok(client) => {
                admitted = Some(client);
                Ok(accepted(response))
            }
            Err(refusal) => {
                shared.metrics.refused_handshake(refusal.reason);
                Err(refused(refusal))
            }
        };
    let handshake = async {
        let stream = shared.tls.accept(stream).await.map_err(Failed::Tls)?;
        accept_hdr_async_with_config(stream, judge, Some(config)).await.map_err(Failed::WebSocket)
    };
    let socket = tokio::select! {
        socket = timeout(limits.handshake(), handshake) => socket,
        _ = stopping.wait_for(|stopping| *stopping) => return,
    };
    match (socket, admitted) {
        (Ok(Ok(socket)), Some(Admitted { token, session })) => {
            session::run(shared, socket, token, session, stopping).await;
        }
        (Err(_), _) => shared.metrics.refused_handshake("slow"),
        (Ok(Err(Failed::Tls(error))), _) => {
            tracing::debug!(%error, "no TLS with a client");
            shared.metrics.refused_handshake("tls");
        }
        // A refusal has been counted where it was judged.
        (Ok(Err(Failed::WebSocket(error))), _) => tracing::debug!(%error, "no WebSocket with a client"),
        (Ok(Ok(_)), None) => {}
    }
}

/// Seconds since 1970.
pub(crate) fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
