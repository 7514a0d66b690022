//! Requests of peers, translated for openraft and back.

use arqon_proto::wire::{self, peer_frame::Body as Message};
use bytes::Bytes;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest};

use crate::{
    host::Raft,
    types::{
        Snapshot, SnapshotMeta, StoredMembership, TypeConfig, from_wire_log_id, from_wire_membership, from_wire_vote,
        wire_log_id, wire_vote,
    },
};

type Answer = Result<Message, String>;

fn vote_of(vote: Option<&wire::Vote>) -> Result<crate::types::Vote, String> {
    vote.and_then(from_wire_vote).ok_or_else(|| "vote is malformed".to_owned())
}

pub(crate) async fn append(raft: &Raft, request: AppendEntriesRequest<TypeConfig>) -> Answer {
    use wire::append_reply::Result as Reply;
    let prev = request.prev_log_id;
    let last = request.entries.last().map(|entry| entry.log_id).or(prev);
    let response = raft.append_entries(request).await.map_err(|error| error.to_string())?;
    let matching =
        |id: Option<crate::types::LogId>| id.map_or(Reply::MatchingNone(true), |id| Reply::Matching(wire_log_id(&id)));
    let result = match response {
        AppendEntriesResponse::Success => matching(last),
        AppendEntriesResponse::PartialSuccess(id) => matching(id),
        AppendEntriesResponse::Conflict => {
            Reply::Conflict(prev.as_ref().map(wire_log_id).ok_or("conflict before the first entry")?)
        }
        AppendEntriesResponse::HigherVote(vote) => Reply::HigherVote(wire_vote(&vote)),
    };
    Ok(Message::AppendReply(wire::AppendReply { result: Some(result) }))
}

pub(crate) async fn vote(raft: &Raft, request: wire::VoteRequest, pre: bool) -> Answer {
    let mut rpc = VoteRequest::new(vote_of(request.vote.as_ref())?, request.last.map(from_wire_log_id));
    rpc.leadership_transfer = request.leader_transfer;
    let response = if pre { raft.pre_vote(rpc).await } else { raft.vote(rpc).await };
    let response = response.map_err(|error| error.to_string())?;
    Ok(Message::VoteReply(wire::VoteReply {
        vote: Some(wire_vote(&response.vote)),
        granted: response.vote_granted,
        last: response.last_log_id.as_ref().map(wire_log_id),
    }))
}

pub(crate) async fn snapshot(raft: &Raft, request: wire::SnapshotRequest, body: Bytes) -> Answer {
    let vote = vote_of(request.vote.as_ref())?;
    let membership = from_wire_membership(request.membership.unwrap_or_default()).ok_or("membership is malformed")?;
    let membership_id = request.membership_id.map(from_wire_log_id);
    let meta = SnapshotMeta {
        last_log_id: request.last.map(from_wire_log_id),
        last_membership: StoredMembership::new(membership_id, membership),
    };
    let response =
        raft.install_full_snapshot(vote, Snapshot { meta, snapshot: body }).await.map_err(|error| error.to_string())?;
    Ok(Message::SnapshotReply(wire::SnapshotReply { vote: Some(wire_vote(&response.vote)) }))
}

pub(crate) async fn transfer(raft: &Raft, request: wire::TransferLeader) -> Answer {
    let from = vote_of(request.from.as_ref())?;
    let rpc = TransferLeaderRequest::new(from, request.to, request.last.map(from_wire_log_id));
    let accepted = raft.handle_transfer_leader(rpc).await.map_err(|error| error.to_string())?.is_ok();
    Ok(Message::TransferReply(wire::TransferReply { accepted }))
}
