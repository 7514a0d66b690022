//! A bus in memory that speaks the client frames on TCP and WebSocket, with faults on request.
//! It keeps the rules that clients can see: sequences, leases, one result a job, leaders.
#![expect(dead_code, reason = "each test file uses its own part")]

#[path = "../../../raft/tests/support/loopback.rs"]
mod loopback;
mod state;

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use arqon_proto::{decode_frame, encode_frame, frame_size, wire};
use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tokio_tungstenite::tungstenite::{
    Message,
    handshake::server::{Request, Response},
    http::HeaderValue,
};
use wire::{ErrorCode, frame::Body};

pub use state::{State, error};

/// What happens to one request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It is answered with this error and not done.
    Refuse(wire::Error),
    /// It is done, then the connection ends without an answer.
    DoneThenLost,
    /// The connection ends, nothing is done.
    Lost,
    /// It is done and never answered.
    Mute,
    /// It is answered with these bytes instead of a frame.
    Garbage(&'static [u8]),
}

/// Which requests a fault is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Produce,
    Fetch,
    Work,
    Ack,
    Renew,
    Describe,
}

pub struct Bus {
    pub shared: Arc<Shared>,
    nodes: Vec<Option<Node>>,
    addresses: Vec<SocketAddr>,
}

struct Node {
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

pub struct Shared {
    state: Mutex<State>,
    pub changed: Notify,
    faults: Mutex<HashMap<Kind, VecDeque<Option<Fault>>>>,
}

impl Bus {
    /// Starts `node_count` nodes on free ports.
    pub async fn start(node_count: usize) -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Notify::new(), faults: Mutex::default() });
        let mut bus = Self { shared, nodes: Vec::new(), addresses: Vec::new() };
        let host = loopback::own_loopback();
        for index in 0..node_count {
            let listener = TcpListener::bind((host, 0)).await.unwrap();
            let address = listener.local_addr().unwrap();
            bus.addresses.push(address);
            bus.state().addresses.push(address.to_string());
            bus.nodes.push(Some(serve(listener, index, bus.shared.clone())));
        }
        bus
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    pub fn address(&self, node: usize) -> String {
        self.addresses[node].to_string()
    }

    pub fn servers(&self) -> Vec<String> {
        self.addresses.iter().map(ToString::to_string).collect()
    }

    /// The next requests of `kind` meet these faults, one each; `None` lets one pass.
    pub fn faults(&self, kind: Kind, faults: impl IntoIterator<Item = Option<Fault>>) {
        self.shared.faults.lock().unwrap().entry(kind).or_default().extend(faults);
    }

    /// Ends a node and its connections; leaders stay where they are.
    pub async fn kill(&mut self, node: usize) {
        if let Some(Node { stop, task }) = self.nodes[node].take() {
            stop.send_replace(true);
            task.await.unwrap();
        }
    }

    /// Starts a killed node again on its old port.
    pub async fn restart(&mut self, node: usize) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.addresses[node]).unwrap();
        self.nodes[node] = Some(serve(socket.listen(64).unwrap(), node, self.shared.clone()));
    }

    pub fn lead(&self, topic: &str, partition: u32, node: usize) {
        self.state().topic(topic).leaders[partition as usize] = node;
        self.shared.changed.notify_waiters();
    }
}

fn serve(listener: TcpListener, node: usize, shared: Arc<Shared>) -> Node {
    let (stop, mut stopped) = watch::channel(false);
    let task = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                _ = stopped.wait_for(|stop| *stop) => break,
                accepted = listener.accept() => {
                    connections.spawn(connection(accepted.unwrap().0, node, shared.clone()));
                }
            }
        }
        connections.shutdown().await;
    });
    Node { stop, task }
}

async fn connection(stream: TcpStream, node: usize, shared: Arc<Shared>) {
    stream.set_nodelay(true).unwrap();
    let mut start = [0; 4];
    if stream.peek(&mut start).await.is_ok() && &start == b"GET " {
        websocket(stream, node, shared).await;
    } else {
        tcp(stream, node, shared).await;
    }
}

async fn tcp(stream: TcpStream, node: usize, shared: Arc<Shared>) {
    let (mut read, mut write) = stream.into_split();
    let (out, mut frames) = mpsc::channel::<Bytes>(64);
    let mut session = Session::new(node, shared, out);
    let mut buffer = BytesMut::new();
    loop {
        while let Ok(Some(size)) = frame_size(&buffer) {
            if buffer.len() < size {
                break;
            }
            let frame = buffer.split_to(size).freeze();
            if !session.received(frame) {
                return;
            }
        }
        tokio::select! {
            count = read.read_buf(&mut buffer) => if !matches!(count, Ok(1..)) { return },
            frame = frames.recv() => if let Some(frame) = frame && write.write_all(&frame).await.is_err() { return },
            () = session.lost() => return,
        }
    }
}

async fn websocket(stream: TcpStream, node: usize, shared: Arc<Shared>) {
    let mut token = String::new();
    #[expect(clippy::result_large_err, reason = "the library's signature")]
    let accept = |request: &Request, mut response: Response| {
        let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        assert_eq!(header("sec-websocket-protocol"), "arqonbus.v1");
        token = header("authorization").trim_start_matches("Bearer ").to_owned();
        if token == "wrong" {
            let mut refused = tokio_tungstenite::tungstenite::http::Response::new(Some("token is wrong".to_owned()));
            *refused.status_mut() = tokio_tungstenite::tungstenite::http::StatusCode::UNAUTHORIZED;
            return Err(refused);
        }
        response.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("arqonbus.v1"));
        Ok(response)
    };
    let Ok(socket) = tokio_tungstenite::accept_hdr_async(stream, accept).await else { return };
    let (mut sink, mut messages) = socket.split();
    let (out, mut frames) = mpsc::channel::<Bytes>(64);
    let mut session = Session::new(node, shared, out);
    session.through_shield = true;
    loop {
        tokio::select! {
            message = messages.next() => match message {
                Some(Ok(Message::Binary(frame))) => if !session.received(frame) { return },
                Some(Ok(_)) => {}
                _ => return,
            },
            frame = frames.recv() => if let Some(frame) = frame
                && sink.send(Message::Binary(frame)).await.is_err() { return },
            () = session.lost() => return,
        }
    }
}

struct Session {
    node: usize,
    shared: Arc<Shared>,
    out: mpsc::Sender<Bytes>,
    /// Requests that wait; they end with the session.
    waiting: JoinSet<()>,
    lost: Arc<Notify>,
    through_shield: bool,
}

impl Session {
    fn new(node: usize, shared: Arc<Shared>, out: mpsc::Sender<Bytes>) -> Self {
        Self { node, shared, out, waiting: JoinSet::new(), lost: Arc::default(), through_shield: false }
    }

    async fn lost(&self) {
        self.lost.notified().await;
    }

    /// Handles one frame; `false` ends the connection.
    fn received(&mut self, frame: Bytes) -> bool {
        let Ok((frame, payload)) = decode_frame::<wire::Frame>(frame) else { return false };
        let Some(body) = frame.body else { return false };
        let fault = kind_of(&body).and_then(|kind| self.shared.faults.lock().unwrap().get_mut(&kind)?.pop_front()?);
        let id = frame.request_id;
        match fault {
            None => self.handle(id, body, payload, true),
            Some(Fault::Refuse(error)) => self.answer(id, Body::Error(error), &[]),
            Some(Fault::Garbage(bytes)) => {
                self.send(Bytes::from_static(bytes));
                true
            }
            Some(Fault::Lost) => false,
            Some(Fault::Mute) => self.handle(id, body, payload, false),
            Some(Fault::DoneThenLost) => {
                self.handle(id, body, payload, false);
                false
            }
        }
    }

    fn send(&mut self, frame: Bytes) {
        let out = self.out.clone();
        self.waiting.spawn(async move {
            let _ = out.send(frame).await;
        });
    }

    fn answer(&mut self, id: u64, body: Body, payload: &[Bytes]) -> bool {
        let frame = frame(id, body, payload);
        self.send(frame);
        true
    }

    fn handle(&mut self, id: u64, body: Body, payload: Bytes, answered: bool) -> bool {
        let now = self.state().handle(self.node_view(), &body, &payload);
        match now {
            Ok((answer, batches)) if !is_empty(&answer) || wait_of(&body).is_zero() => {
                self.shared.changed.notify_waiters();
                !answered || self.answer(id, answer, &batches)
            }
            Err(error) => !answered || self.answer(id, Body::Error(error), &[]),
            Ok(_) => {
                let (shared, out, view) = (self.shared.clone(), self.out.clone(), self.node_view());
                self.waiting.spawn(async move {
                    let (answer, batches) = long_poll(&shared, view, &body).await;
                    let _ = out.send(frame(id, answer, &batches)).await;
                });
                true
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    /// The node that checks leadership; behind a Shield it never says NOT_LEADER.
    fn node_view(&self) -> Option<usize> {
        (!self.through_shield).then_some(self.node)
    }
}

async fn long_poll(shared: &Shared, node: Option<usize>, body: &Body) -> (Body, Vec<Bytes>) {
    let end = Instant::now() + wait_of(body);
    loop {
        let changed = shared.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let result = shared.state.lock().unwrap().handle(node, body, &Bytes::new());
        match result {
            Ok((answer, batches)) if !is_empty(&answer) || Instant::now() >= end => return (answer, batches),
            Ok(_) => {}
            Err(error) => return (Body::Error(error), Vec::new()),
        }
        let _ = timeout_at(end, changed).await;
    }
}

fn frame(id: u64, body: Body, payload: &[Bytes]) -> Bytes {
    let size = payload.iter().map(Bytes::len).sum();
    let mut out = BytesMut::from(&encode_frame(&wire::Frame { request_id: id, body: Some(body) }, size).unwrap()[..]);
    for piece in payload {
        out.extend_from_slice(piece);
    }
    out.freeze()
}

fn is_empty(answer: &Body) -> bool {
    match answer {
        Body::Leased(leased) => leased.leases.is_empty(),
        Body::Fetched(fetched) => fetched.topic == "(nothing)",
        _ => false,
    }
}

fn wait_of(body: &Body) -> Duration {
    Duration::from_millis(u64::from(match body {
        Body::Fetch(fetch) => fetch.wait_ms,
        Body::Work(work) => work.wait_ms,
        _ => 0,
    }))
}

fn kind_of(body: &Body) -> Option<Kind> {
    match body {
        Body::Produce(_) => Some(Kind::Produce),
        Body::Fetch(_) => Some(Kind::Fetch),
        Body::Work(_) => Some(Kind::Work),
        Body::Ack(_) => Some(Kind::Ack),
        Body::Renew(_) => Some(Kind::Renew),
        Body::DescribeTopic(_) => Some(Kind::Describe),
        _ => None,
    }
}

pub fn refuse(code: ErrorCode) -> Option<Fault> {
    Some(Fault::Refuse(error(code, "as the test asked", "")))
}
