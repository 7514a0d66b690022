//! The accepting end of peer connections: hands requests to their group and sends answers.

use std::{collections::HashMap, collections::VecDeque, io, sync::Arc, time::Duration};

use arqon_proto::{
    Batch, BatchKind, GroupId, NodeId, limits,
    wire::{self, PeerFrame, peer_error::Code, peer_frame::Body as Message},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use openraft::{
    EntryPayload,
    raft::{AppendEntriesRequest, StreamAppendError},
};
use tokio::{
    net::TcpStream,
    sync::{Semaphore, mpsc},
    time::timeout,
};

use super::{
    framed::{Body, FrameReader, FrameWriter},
    handshake::Dialler,
    secure,
};
use crate::{
    host::HostInner,
    pulse, repair, rpc,
    types::{LogId, TypeConfig, from_wire_log_id, from_wire_vote, into_entry, wire_log_id, wire_vote},
};

/// Answers waiting to be written.
const ANSWER_COUNT_MAX: usize = 1024;
/// Unary requests worked on at once, per connection.
const CONCURRENT_MAX: usize = 512;
/// Appends of one session handed to openraft and not answered.
const SESSION_DEPTH_MAX: usize = 256;

type Answers = mpsc::Sender<(PeerFrame, Body)>;

/// Serves one connection until it ends.
pub(crate) async fn serve(host: Arc<HostInner>, stream: TcpStream) -> io::Result<()> {
    let accepting = async {
        let (reader, writer) = secure::accept(stream, host.tls.as_ref()).await?;
        let mut reader = FrameReader::new(reader);
        let mut writer = FrameWriter::new(writer);
        let dialler = host.secret.accept(&mut reader, &mut writer, host.node).await?;
        Ok::<_, io::Error>((reader, writer, dialler))
    };
    let patience = Duration::from_millis(limits::HANDSHAKE_MS_MAX);
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let (mut reader, writer, dialler) = timeout(patience, accepting).await.map_err(late)??;
    tracing::debug!(node = dialler.node.0, version = dialler.version, "peer let in");
    host.dialled(dialler.node);
    let (answers, queue) = mpsc::channel(ANSWER_COUNT_MAX);
    let mut connection = Connection {
        host,
        dialler,
        answers,
        sessions: HashMap::new(),
        slots: Arc::new(Semaphore::new(CONCURRENT_MAX)),
    };
    tokio::select! {
        result = write_answers(writer, queue) => result,
        result = async {
            while let Some((frame, body)) = reader.next().await? {
                connection.dispatch(frame, body).await?;
            }
            Ok(())
        } => result,
    }
}

async fn write_answers(
    mut writer: FrameWriter<secure::Writer>,
    mut queue: mpsc::Receiver<(PeerFrame, Body)>,
) -> io::Result<()> {
    while let Some((frame, body)) = queue.recv().await {
        writer.push(&frame, &body)?;
        while !writer.is_full()
            && let Ok((frame, body)) = queue.try_recv()
        {
            writer.push(&frame, &body)?;
        }
        writer.flush().await?;
    }
    Ok(())
}

struct Session {
    id: u64,
    /// `None`: it ended because the disk is full, and all of it that follows is refused.
    requests: Option<mpsc::Sender<(u64, AppendEntriesRequest<TypeConfig>)>>,
}

struct Connection {
    host: Arc<HostInner>,
    dialler: Dialler,
    answers: Answers,
    /// The running append session of each group.
    sessions: HashMap<u64, Session>,
    slots: Arc<Semaphore>,
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::other(format!("peer sent a malformed {what}"))
}

fn refusal(code: Code, message: impl Into<String>) -> Message {
    Message::Error(wire::PeerError { code: code.into(), message: message.into() })
}

/// The answer to an append that the disk should not take. openraft never sees it, and its leader
/// tries again later.
fn storage_full(host: &HostInner, append: &AppendEntriesRequest<TypeConfig>) -> Option<Message> {
    let space = host.space();
    if append.entries.is_empty() || space.takes_entries(true) {
        return None;
    }
    let have_data = append.entries.iter().any(|entry| match &entry.payload {
        EntryPayload::Normal(batch) => batch.header.kind == BatchKind::Data,
        EntryPayload::Blank | EntryPayload::Membership(_) => false,
    });
    let text = || format!("node {} has {} bytes of disk left and takes no more data", host.node, space.free_size);
    (!space.takes_entries(have_data)).then(|| refusal(Code::StorageFull, text()))
}

async fn reply(answers: &Answers, request_id: u64, message: Message, body: Body) {
    let frame = PeerFrame { request_id, body: Some(message), ..Default::default() };
    // The connection may have ended meanwhile; its requests are then unknown to the peer.
    answers.send((frame, body)).await.ok();
}

impl Connection {
    async fn dispatch(&mut self, frame: PeerFrame, body: Bytes) -> io::Result<()> {
        let (group, replica) = (frame.group, frame.target_replica);
        let (request_id, session) = (frame.request_id, frame.session);
        let message = frame.body.ok_or_else(|| malformed("frame"))?;
        if let Message::Append(append) = &message
            && session != 0
        {
            let request = append_request(append, body)?;
            return self.session_append(group, replica, session, request_id, request).await;
        }
        let slot = self.slots.clone().acquire_owned().await.map_err(io::Error::other)?;
        let (host, answers, node) = (self.host.clone(), self.answers.clone(), self.dialler.node);
        tokio::spawn(async move {
            let (message, body) = handle(&host, node, GroupId(group), replica, message, body).await;
            reply(&answers, request_id, message, body).await;
            drop(slot);
        });
        Ok(())
    }

    async fn session_append(
        &mut self,
        group: u64,
        replica: u64,
        session: u64,
        request_id: u64,
        request: AppendEntriesRequest<TypeConfig>,
    ) -> io::Result<()> {
        if self.sessions.get(&group).is_none_or(|running| running.id != session) {
            let raft = match self.host.raft(GroupId(group), replica) {
                Ok(raft) => raft,
                Err(error) => {
                    reply(&self.answers, request_id, Message::Error(error), Body::EMPTY).await;
                    return Ok(());
                }
            };
            let (requests, queue) = mpsc::channel(SESSION_DEPTH_MAX);
            tokio::spawn(run_session(raft, queue, self.answers.clone()));
            self.sessions.insert(group, Session { id: session, requests: Some(requests) });
        }
        let Some(running) = self.sessions.get_mut(&group) else { return Ok(()) };
        let full = storage_full(&self.host, &request);
        if full.is_some() {
            running.requests = None;
        }
        let Some(requests) = &running.requests else {
            let message = full.unwrap_or_else(|| refusal(Code::StorageFull, "an earlier append met a full disk"));
            reply(&self.answers, request_id, message, Body::EMPTY).await;
            return Ok(());
        };
        if requests.send((request_id, request)).await.is_err() {
            // The session ended with an error that its leader has been told or is about to be.
            reply(&self.answers, request_id, refusal(Code::Stopped, "append session is over"), Body::EMPTY).await;
        }
        Ok(())
    }
}

/// Feeds one leader's appends to openraft in order and answers them in order.
async fn run_session(
    raft: crate::host::Raft,
    queue: mpsc::Receiver<(u64, AppendEntriesRequest<TypeConfig>)>,
    answers: Answers,
) {
    let order = Arc::new(std::sync::Mutex::new(VecDeque::new()));
    let ids = order.clone();
    let requests = stream::unfold(queue, move |mut queue| {
        let ids = ids.clone();
        async move {
            let (id, request) = queue.recv().await?;
            ids.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push_back(id);
            Some((request, queue))
        }
    });
    let mut results = std::pin::pin!(raft.stream_append(Box::pin(requests)));
    while let Some(result) = results.next().await {
        let Some(id) = order.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop_front() else { return };
        let (message, over) = match result {
            Ok(Ok(matching)) => (append_reply(matching), false),
            Ok(Err(error)) => (append_error(error), true),
            Err(fatal) => (refusal(Code::Stopped, fatal.to_string()), true),
        };
        reply(&answers, id, message, Body::EMPTY).await;
        if over {
            return;
        }
    }
}

fn append_reply(matching: Option<LogId>) -> Message {
    let result = match matching {
        Some(id) => wire::append_reply::Result::Matching(wire_log_id(&id)),
        None => wire::append_reply::Result::MatchingNone(true),
    };
    Message::AppendReply(wire::AppendReply { result: Some(result) })
}

fn append_error(error: StreamAppendError<TypeConfig>) -> Message {
    let result = match error {
        StreamAppendError::Conflict(id) => wire::append_reply::Result::Conflict(wire_log_id(&id)),
        StreamAppendError::HigherVote(vote) => wire::append_reply::Result::HigherVote(wire_vote(&vote)),
    };
    Message::AppendReply(wire::AppendReply { result: Some(result) })
}

fn append_request(append: &wire::AppendEntries, mut body: Bytes) -> io::Result<AppendEntriesRequest<TypeConfig>> {
    let vote = append.vote.as_ref().and_then(from_wire_vote).ok_or_else(|| malformed("vote"))?;
    let mut entries = Vec::new();
    for _ in 0..append.entry_count {
        let batch = Batch::split_from(&mut body).map_err(io::Error::other)?;
        entries.push(into_entry(batch).map_err(io::Error::other)?);
    }
    if !body.is_empty() {
        return Err(malformed("append: bytes after its entries"));
    }
    Ok(AppendEntriesRequest {
        vote,
        prev_log_id: append.prev.map(from_wire_log_id),
        entries,
        leader_commit: append.leader_commit.map(from_wire_log_id),
    })
}

async fn handle(
    host: &HostInner,
    from: NodeId,
    group: GroupId,
    replica: u64,
    message: Message,
    body: Bytes,
) -> (Message, Body) {
    if let Message::Forward(request) = message {
        return match host.handle_forward(from, request.kind, body).await {
            Ok(answer) => {
                (Message::ForwardReply(wire::ForwardedReply { ok: true, error: String::new() }), Body::Bytes(answer))
            }
            Err(error) => (Message::ForwardReply(wire::ForwardedReply { ok: false, error }), Body::EMPTY),
        };
    }
    if let Message::Entries(request) = message {
        return repair::answer(host, group, request).await;
    }
    if let Some(answer) = pulse::answer(host, group, replica, &message) {
        return (answer, Body::EMPTY);
    }
    let raft = match host.raft(group, replica) {
        Ok(raft) => raft,
        Err(error) => return (Message::Error(error), Body::EMPTY),
    };
    let answer = match message {
        Message::Append(append) => match append_request(&append, body) {
            Ok(request) => match storage_full(host, &request) {
                Some(full) => Ok(full),
                None => rpc::append(&raft, request).await,
            },
            Err(error) => Err(error.to_string()),
        },
        Message::Vote(request) => rpc::vote(&raft, request, false).await,
        Message::PreVote(request) => rpc::vote(&raft, request, true).await,
        Message::Snapshot(request) => rpc::snapshot(&raft, request, body).await,
        Message::TransferLeader(request) => rpc::transfer(&raft, request).await,
        _ => Err("this is not a request".into()),
    };
    (answer.unwrap_or_else(|error| refusal(Code::Failed, error)), Body::EMPTY)
}
