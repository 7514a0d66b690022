//! openraft's network over the peer transport.

use std::{
    future::Future,
    io,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering::Relaxed},
    time::Duration,
};

use arqon_proto::{
    GroupId, NodeId,
    wire::{self, PeerFrame, append_reply, peer_frame::Body as Message},
};
use bytes::Bytes;
use futures_util::{
    Stream, StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use openraft::{
    RPCTypes,
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable},
    network::{RPCOption, RaftNetworkFactory, v2::RaftNetworkV2},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError, StreamAppendResult,
        TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
    },
};

use tokio::time::{Instant, sleep};

use crate::{
    hold::Held,
    host::HostInner,
    peer::{Failure, framed::Body, outgoing::Outgoing},
    pulse::Pulse,
    repair,
    types::{
        ReplicaAt, Snapshot, TypeConfig, Vote, from_wire_log_id, from_wire_vote, into_batch, wire_log_id,
        wire_membership, wire_vote,
    },
};

type Rpc<T> = Result<T, RPCError<TypeConfig>>;

/// Appends of one group sent to one follower and not answered.
const PIPELINE_DEPTH: usize = 32;
/// An append that has no answer for this long fails its session, and the connection with it.
const APPEND_PATIENCE: Duration = Duration::from_secs(5);
/// A new group's replicas open at about the same time; one that asks for votes before the others
/// are open asks again after this time. openraft ends it when the election is over.
const VOTE_RETRY_DELAY: Duration = Duration::from_millis(20);
/// Votes and heartbeats that take longer are as good as lost.
const CONTROL_PATIENCE: Duration = Duration::from_secs(1);

static NEXT_SESSION: AtomicU64 = AtomicU64::new(1);

/// Makes clients for one group's replicas.
pub(crate) struct Network {
    pub host: Arc<HostInner>,
    pub group: u64,
    pub pulse: Arc<Pulse>,
    /// How long followers may go without being told of a commit.
    pub commit_patience: Duration,
}

impl Network {
    fn client(&self, target: u64, at: ReplicaAt, heartbeats: Option<Arc<Pulse>>) -> Client {
        let peer = self.host.peer(NodeId(at.node));
        let commit_patience = self.commit_patience;
        Client { host: self.host.clone(), group: self.group, target, peer, heartbeats, commit_patience }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Client;

    async fn new_client(&mut self, target: u64, node: &ReplicaAt) -> Client {
        self.client(target, *node, None)
    }

    /// On the control connection: neither behind bulk nor as a session of appends.
    async fn new_heartbeat_client(&mut self, target: u64, node: &ReplicaAt) -> Client {
        self.client(target, *node, Some(self.pulse.clone()))
    }
}

/// The two connections to one node.
pub(crate) struct Peer {
    pub control: Outgoing,
    pub bulk: Outgoing,
    /// When the last signs of life left that the node has answered, on the host's clock.
    pub answered_ms: AtomicU64,
}

/// Talks to one replica of one group.
pub(crate) struct Client {
    host: Arc<HostInner>,
    group: u64,
    target: u64,
    peer: Arc<Peer>,
    /// Set where this client carries heartbeats.
    heartbeats: Option<Arc<Pulse>>,
    commit_patience: Duration,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Reason(String);

impl Client {
    fn frame(&self, message: Message, session: u64) -> PeerFrame {
        PeerFrame { request_id: 0, group: self.group, target_replica: self.target, session, body: Some(message) }
    }

    fn failed(&self, failure: &Failure, what: RPCTypes, patience: Duration) -> RPCError<TypeConfig> {
        match failure {
            Failure::TimedOut => RPCError::Timeout(Timeout {
                action: what,
                id: self.host.node.0,
                target: self.target,
                timeout: patience,
            }),
            // Backed off from: nobody is there, or the replica is not (yet) open.
            Failure::Unreachable(_) | Failure::Refused { .. } => {
                RPCError::Unreachable(Unreachable::new(&Reason(failure.to_string())))
            }
            Failure::Protocol(_) => RPCError::Network(NetworkError::new(&Reason(failure.to_string()))),
        }
    }

    async fn control(&self, message: Message, what: RPCTypes) -> Rpc<Message> {
        self.call(message).await.map_err(|failure| self.failed(&failure, what, CONTROL_PATIENCE))
    }

    async fn call(&self, message: Message) -> Result<Message, Failure> {
        let answer = self.peer.control.call(self.frame(message, 0), Body::EMPTY, CONTROL_PATIENCE).await;
        if matches!(answer, Err(Failure::TimedOut)) {
            self.peer.control.reset();
        }
        answer.map(|(message, _)| message)
    }

    async fn ask_vote(&self, rpc: &VoteRequest<TypeConfig>, pre: bool) -> Rpc<VoteResponse<TypeConfig>> {
        let request = wire::VoteRequest {
            vote: Some(wire_vote(&rpc.vote)),
            last: rpc.last_log_id.as_ref().map(wire_log_id),
            leader_transfer: rpc.leadership_transfer,
        };
        let message = if pre { Message::PreVote(request) } else { Message::Vote(request) };
        let deadline = Instant::now() + CONTROL_PATIENCE;
        let mut answer = self.call(message.clone()).await;
        while let Err(Failure::Refused { code: wire::peer_error::Code::NoReplica, .. }) = &answer
            && Instant::now() < deadline
        {
            sleep(VOTE_RETRY_DELAY).await;
            answer = self.call(message.clone()).await;
        }
        let Message::VoteReply(reply) =
            answer.map_err(|failure| self.failed(&failure, RPCTypes::Vote, CONTROL_PATIENCE))?
        else {
            return Err(unexpected("something other than a vote"));
        };
        let vote = reply.vote.as_ref().and_then(from_wire_vote).ok_or_else(|| unexpected("a malformed vote"))?;
        Ok(VoteResponse::new(vote, reply.last.map(from_wire_log_id), reply.granted))
    }

    async fn heartbeat(
        &self,
        pulse: &Pulse,
        mut input: impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin,
    ) -> Rpc<StreamAppendResult<TypeConfig>> {
        let rpc = input.next().await.ok_or_else(|| unexpected("a stream without a heartbeat"))?;
        pulse.prove();
        let (message, _) = append_frame(rpc);
        stream_result(self.control(message, RPCTypes::AppendEntries).await?)
    }
}

fn unexpected(what: &'static str) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::new(&io::Error::other(Failure::Protocol(what))))
}

fn append_frame(rpc: AppendEntriesRequest<TypeConfig>) -> (Message, Body) {
    let append = wire::AppendEntries {
        vote: Some(wire_vote(&rpc.vote)),
        prev: rpc.prev_log_id.as_ref().map(wire_log_id),
        leader_commit: rpc.leader_commit.as_ref().map(wire_log_id),
        entry_count: rpc.entries.len() as u32,
    };
    (Message::Append(append), Body::Batches(rpc.entries.into_iter().map(into_batch).collect()))
}

fn stream_result(message: Message) -> Rpc<StreamAppendResult<TypeConfig>> {
    let Message::AppendReply(reply) = message else { return Err(unexpected("something other than an append reply")) };
    match reply.result {
        Some(append_reply::Result::Matching(id)) => Ok(Ok(Some(from_wire_log_id(id)))),
        Some(append_reply::Result::MatchingNone(_)) => Ok(Ok(None)),
        Some(append_reply::Result::Conflict(id)) => Ok(Err(StreamAppendError::Conflict(from_wire_log_id(id)))),
        Some(append_reply::Result::HigherVote(vote)) => {
            let vote = from_wire_vote(&vote).ok_or_else(|| unexpected("a malformed vote"))?;
            Ok(Err(StreamAppendError::HigherVote(vote)))
        }
        None => Err(unexpected("an empty append reply")),
    }
}

impl RaftNetworkV2<TypeConfig> for Client {
    type SnapshotData = Bytes;

    /// openraft itself uses [`Self::stream_append`] only.
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<TypeConfig>> {
        let last = rpc.entries.last().map(|entry| entry.log_id).or(rpc.prev_log_id);
        let (message, body) = append_frame(rpc);
        let frame = self.frame(message, 0);
        let answer = self.peer.control.call(frame, body, CONTROL_PATIENCE).await;
        let message = match answer {
            Ok((message, _)) => message,
            Err(failure) => {
                if matches!(failure, Failure::TimedOut) {
                    self.peer.control.reset();
                }
                return Err(self.failed(&failure, RPCTypes::AppendEntries, CONTROL_PATIENCE));
            }
        };
        Ok(match stream_result(message)? {
            Ok(matching) if matching == last => AppendEntriesResponse::Success,
            Ok(matching) => AppendEntriesResponse::PartialSuccess(matching),
            Err(StreamAppendError::Conflict(_)) => AppendEntriesResponse::Conflict,
            Err(StreamAppendError::HigherVote(vote)) => AppendEntriesResponse::HigherVote(vote),
        })
    }

    /// Sends appends without waiting for each answer. They leave in order on one connection, the
    /// follower works on a session in order, and the first failure ends the session.
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Rpc<BoxStream<'s, Rpc<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        let this = &*self;
        if let Some(pulse) = &self.heartbeats {
            let answer: BoxStream<'s, _> = Box::pin(stream::once(this.heartbeat(pulse, input)));
            return Box::pin(std::future::ready(Ok(answer)));
        }
        let session = NEXT_SESSION.fetch_add(1, Relaxed);
        let answers = Held::new(input, this.commit_patience)
            .then(move |rpc| async move {
                let (message, body) = append_frame(rpc);
                this.peer.bulk.submit(this.frame(message, session), body).await
            })
            .map(move |submitted| async move {
                let answer = match submitted {
                    Ok(pending) => pending.answer(APPEND_PATIENCE).await,
                    Err(failure) => Err(failure),
                };
                match answer {
                    Ok((message, _)) => stream_result(message),
                    Err(failure) => {
                        if matches!(failure, Failure::TimedOut) {
                            this.peer.bulk.reset();
                        }
                        Err(this.failed(&failure, RPCTypes::AppendEntries, APPEND_PATIENCE))
                    }
                }
            })
            .buffered(PIPELINE_DEPTH)
            .scan(false, |over, result| {
                let item = (!*over).then_some(result);
                *over = matches!(&item, Some(Err(_) | Ok(Err(_))));
                std::future::ready(item)
            });
        let answers: BoxStream<'s, _> = Box::pin(answers);
        Box::pin(std::future::ready(Ok(answers)))
    }

    async fn vote(&mut self, rpc: VoteRequest<TypeConfig>, _option: RPCOption) -> Rpc<VoteResponse<TypeConfig>> {
        self.ask_vote(&rpc, false).await
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<TypeConfig>, _option: RPCOption) -> Rpc<VoteResponse<TypeConfig>> {
        self.ask_vote(&rpc, true).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        if snapshot.snapshot.is_empty() {
            // Only another leader can help this follower.
            repair::resign(&self.host, GroupId(self.group)).await;
            let reason = Reason("the checkpoint at the log's start is lost on this node".to_owned());
            return Err(RPCError::Unreachable(Unreachable::new(&reason)).into());
        }
        let membership = &snapshot.meta.last_membership;
        let request = wire::SnapshotRequest {
            vote: Some(wire_vote(&vote)),
            last: snapshot.meta.last_log_id.as_ref().map(wire_log_id),
            membership_id: membership.log_id().as_ref().map(wire_log_id),
            membership: Some(wire_membership(membership.membership())),
        };
        let patience = option.hard_ttl();
        let frame = self.frame(Message::Snapshot(request), 0);
        let sending = self.peer.bulk.call(frame, Body::Bytes(snapshot.snapshot), patience);
        let answer = tokio::select! {
            answer = sending => answer,
            closed = cancel => return Err(StreamingError::Closed(closed)),
        };
        let reply = match answer {
            Ok((Message::SnapshotReply(reply), _)) => reply,
            Ok(_) => return Err(unexpected("something other than a snapshot reply").into()),
            Err(failure) => return Err(self.failed(&failure, RPCTypes::InstallSnapshot, patience).into()),
        };
        let vote = reply.vote.as_ref().and_then(from_wire_vote);
        Ok(SnapshotResponse::new(vote.ok_or_else(|| StreamingError::from(unexpected("a malformed vote")))?))
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Rpc<TransferLeaderResponse<TypeConfig>> {
        let request = wire::TransferLeader {
            from: Some(wire_vote(req.from_leader())),
            to: *req.to_node_id(),
            last: req.last_log_id().map(wire_log_id),
        };
        // What a refusal says does not matter: the leader then keeps or loses its lease as it would.
        match self.control(Message::TransferLeader(request), RPCTypes::TransferLeader).await? {
            Message::TransferReply(_) => Ok(Ok(())),
            _ => Err(unexpected("something other than a transfer reply")),
        }
    }
}
