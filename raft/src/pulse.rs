//! Signs of life and election timers of all groups of a node, kept by one task.
//!
//! openraft has a timer a group, and every tick of it wakes two tasks; with heartbeats of its own
//! for each group and follower, a thousand groups that do nothing cost more than a core. Here
//! the timers stand still, and nodes tell each other in one frame which groups they lead:
//!
//! ```text
//!   leader's node                                    follower's node
//!   every 250 ms   Beats [group, term, ..] ────────► hear: same leader and term? the time is noted
//!                  ◄──────────── BeatsReply [group]  groups that follow somebody else, or nobody
//!   every 2 s a group, and at once where
//!   a beat was not recognised:
//!   openraft's own heartbeat ──────────────────────► openraft
//!                                                    silent for too long: openraft's timer is
//!                                                    switched on, which asks for pre-votes
//! ```
//!
//! Nothing here bears on safety: a beat changes no Raft state, it only keeps a timer from being
//! switched on and votes from being given away while a leader is alive. A beat is sent only while
//! openraft says that it leads, has not stopped, and has sent a heartbeat of its own not long ago.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arqon_proto::{
    GroupId, NodeId,
    wire::{self, PeerFrame, peer_frame::Body as Message},
};
use futures_util::FutureExt;
use openraft::{ServerState, async_runtime::watch::WatchReceiver as _};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval},
};

use crate::{
    config::{ELECTION_MS_MAX, ELECTION_MS_MIN, HEARTBEAT_MS},
    group::Group,
    host::{HostInner, Replica},
    network::Peer,
    peer::{Failure, framed::Body},
    types::{TypeConfig, Vote, wire_log_id, wire_vote},
};

type Metrics = openraft::metrics::RaftServerMetrics<TypeConfig>;

/// Election timers are looked at this often.
const ROUND_MS: u64 = 50;
/// Beats go out every so many rounds.
const BEAT_ROUND_COUNT: u64 = HEARTBEAT_MS / ROUND_MS;
/// openraft itself sends a heartbeat this often, if nothing else makes it.
const PROBE_MS: u64 = 2_000;
/// A group whose openraft has sent none for this long shows no life any more.
const PROOF_MS_MAX: u64 = 3 * PROBE_MS;
/// A round counts as no more silence than this: when this node stood still, nobody was silent.
const ROUND_MS_MAX: u64 = 500;
/// How long a replica that has just been opened waits for a leader, if it should be the leader...
const OPENED_FIRST_MS: u64 = 200;
/// ... and if not; and the random part of both.
const OPENED_MS: u64 = 700;
const OPENED_SPREAD_MS: u64 = 300;
const BEATS_PATIENCE: Duration = Duration::from_secs(1);
/// Groups of one frame.
const BEAT_COUNT_MAX: usize = 16_384;

/// What is known of the life of one group's leader. Times are on the host's clock.
pub(crate) struct Pulse {
    host: Weak<HostInner>,
    /// Whether this replica should be the group's first leader.
    is_first: bool,
    /// When the leader last showed life; on the leader, when a majority last did. 0: never.
    heard_ms: AtomicU64,
    /// Silence counts from here, or from `heard_ms` when that is later.
    since_ms: AtomicU64,
    /// When openraft last sent a heartbeat of its own.
    proven_ms: AtomicU64,
    /// When it was last asked to.
    probed_ms: AtomicU64,
    /// The term in which this replica was last seen to lead.
    led_term: AtomicU64,
    /// The term in which this replica has asked another to take over: openraft takes no more
    /// proposals then, so the others must elect somebody if that one does not.
    resigned_term: AtomicU64,
    /// Wakes the one task that tells of it.
    resigned: Notify,
    /// Some follower does not recognise the beats.
    is_doubted: AtomicBool,
    /// Whether openraft's timer is on.
    is_ticking: AtomicBool,
}

impl Pulse {
    pub(crate) fn new(host: &Arc<HostInner>, is_first: bool) -> Self {
        Self {
            since_ms: AtomicU64::new(host.now_ms()),
            host: Arc::downgrade(host),
            is_first,
            heard_ms: AtomicU64::default(),
            proven_ms: AtomicU64::default(),
            probed_ms: AtomicU64::default(),
            led_term: AtomicU64::default(),
            resigned_term: AtomicU64::default(),
            resigned: Notify::new(),
            is_doubted: AtomicBool::default(),
            is_ticking: AtomicBool::default(),
        }
    }

    /// openraft has sent a heartbeat.
    pub(crate) fn prove(&self) {
        if let Some(host) = self.host.upgrade() {
            self.proven_ms.store(host.now_ms(), Relaxed);
        }
    }

    /// This replica gives leadership away and shows no more life as the leader of `term`.
    pub(crate) fn resign(&self, term: u64) {
        self.resigned_term.store(term, Relaxed);
        self.resigned.notify_one();
    }

    /// Whether this replica has asked another to take over in `term`: it may lead still, and takes no proposals.
    pub(crate) fn has_resigned(&self, term: u64) -> bool {
        self.resigned_term.load(Relaxed) == term
    }

    /// Waits until this replica resigns.
    pub(crate) async fn resigned(&self) {
        self.resigned.notified().await;
    }

    /// Whether the leader's lease runs.
    fn is_fresh(&self, now_ms: u64) -> bool {
        let heard_ms = self.heard_ms.load(Relaxed);
        heard_ms > 0 && now_ms < heard_ms + ELECTION_MS_MAX
    }

    /// Since when nothing was heard.
    fn silent_since_ms(&self) -> u64 {
        self.heard_ms.load(Relaxed).max(self.since_ms.load(Relaxed))
    }

    /// Whether a leader should have been heard by now.
    fn is_overdue(&self, replica: u64, now_ms: u64) -> bool {
        let since_ms = self.silent_since_ms();
        let spread = |span_ms: u64| mix(replica ^ since_ms.rotate_left(32)) % span_ms;
        let patience_ms = match (self.heard_ms.load(Relaxed), self.is_first) {
            (0, true) => OPENED_FIRST_MS + spread(OPENED_SPREAD_MS),
            (0, false) => OPENED_MS + spread(OPENED_SPREAD_MS),
            _ => ELECTION_MS_MAX + ELECTION_MS_MIN + spread(ELECTION_MS_MAX - ELECTION_MS_MIN),
        };
        now_ms >= since_ms + patience_ms
    }
}

/// Spreads what differs little (the finaliser of splitmix64).
fn mix(seed: u64) -> u64 {
    let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

/// Runs until the host stops.
pub(crate) async fn run(host: Arc<HostInner>) {
    let mut stopping = host.stopping.subscribe();
    let mut rounds = interval(Duration::from_millis(ROUND_MS));
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_ms = host.now_ms();
    for round in 0_u64.. {
        tokio::select! {
            _ = rounds.tick() => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        let now_ms = host.now_ms();
        let pause_ms = (now_ms - last_ms).saturating_sub(ROUND_MS_MAX);
        let mut beats = round.is_multiple_of(BEAT_ROUND_COUNT).then(HashMap::new);
        look_at_all(&host, now_ms, pause_ms, beats.as_mut());
        for (node, beats) in beats.into_iter().flatten() {
            tokio::spawn(send(host.clone(), host.peer(node), beats, now_ms));
        }
        last_ms = now_ms;
    }
}

type Beats = HashMap<NodeId, wire::Beats>;

fn look_at_all(host: &HostInner, now_ms: u64, pause_ms: u64, mut beats: Option<&mut Beats>) {
    for replica in host.lock_groups().values() {
        let Replica::Running(group) = replica else { continue };
        let pulse = group.pulse();
        if pause_ms > 0 {
            pulse.since_ms.store(pulse.silent_since_ms() + pause_ms, Relaxed);
        }
        let metrics = group.raft().server_metrics();
        let metrics = metrics.borrow_watched();
        let wants_tick = match metrics.state {
            ServerState::Leader => {
                lead(host, group, &metrics, now_ms, beats.as_deref_mut());
                false
            }
            ServerState::Follower | ServerState::Candidate => {
                is_only_voter(&metrics) || pulse.is_overdue(metrics.id, now_ms)
            }
            ServerState::Learner | ServerState::Shutdown => false,
        };
        drop(metrics);
        if pulse.is_ticking.swap(wants_tick, Relaxed) != wants_tick {
            group.raft().runtime_config().tick(wants_tick);
        }
    }
}

fn is_only_voter(metrics: &Metrics) -> bool {
    let mut voters = metrics.membership_config.membership().voter_ids();
    voters.next() == Some(metrics.id) && voters.next().is_none()
}

/// What a leader does in a round: makes openraft send a heartbeat if that is due, and adds its
/// group to what the other nodes are told.
fn lead(host: &HostInner, group: &Group, metrics: &Metrics, now_ms: u64, beats: Option<&mut Beats>) {
    let pulse = group.pulse();
    let term = metrics.vote.leader_id.term;
    if pulse.led_term.swap(term, Relaxed) != term {
        // Its first entry shows life.
        pulse.proven_ms.store(now_ms, Relaxed);
        pulse.probed_ms.store(now_ms, Relaxed);
        pulse.is_doubted.store(false, Relaxed);
    }
    let Some(beats) = beats.filter(|_| !pulse.has_resigned(term)) else { return };
    // At another time for each group, so that they do not all come at once.
    let phase_ms = mix(metrics.id) % PROBE_MS;
    let period = |at_ms: u64| (at_ms + phase_ms) / PROBE_MS;
    let is_doubted = pulse.is_doubted.swap(false, Relaxed);
    if is_doubted || period(pulse.probed_ms.load(Relaxed)) != period(now_ms) {
        pulse.probed_ms.store(now_ms, Relaxed);
        // A group that is too busy to take this up is asked again; what else it sends shows life.
        drop(group.raft().trigger().heartbeat().now_or_never());
    }
    if now_ms > pulse.proven_ms.load(Relaxed) + PROOF_MS_MAX || group.stopped().is_some() {
        return;
    }
    let membership = metrics.membership_config.membership();
    let others = membership.nodes().filter(|(id, _)| **id != metrics.id);
    for (target, at) in others {
        let beats = beats.entry(NodeId(at.node)).or_default();
        if beats.groups.len() < BEAT_COUNT_MAX {
            beats.groups.push(group.id().0);
            beats.targets.push(*target);
            beats.terms.push(term);
            beats.leaders.push(metrics.id);
        }
    }
    let mut answered: Vec<u64> = membership
        .voter_ids()
        .filter_map(
            |id| if id == metrics.id { Some(now_ms) } else { answered_ms(host, membership.get_node(&id)?.node) },
        )
        .collect();
    answered.sort_unstable_by_key(|at_ms| std::cmp::Reverse(*at_ms));
    let majority = membership.voter_ids().count() / 2;
    if let (false, Some(at_ms)) = (is_doubted, answered.get(majority)) {
        pulse.heard_ms.fetch_max(*at_ms, Relaxed);
    }
}

fn answered_ms(host: &HostInner, node: u64) -> Option<u64> {
    Some(host.peer(NodeId(node)).answered_ms.load(Relaxed)).filter(|at_ms| *at_ms > 0)
}

async fn send(host: Arc<HostInner>, peer: Arc<Peer>, beats: wire::Beats, sent_ms: u64) {
    let frame = PeerFrame { body: Some(Message::Beats(beats)), ..Default::default() };
    match peer.control.call(frame, Body::EMPTY, BEATS_PATIENCE).await {
        Ok((Message::BeatsReply(reply), _)) => {
            let groups = host.lock_groups();
            for group in reply.unknown {
                if let Some(Replica::Running(group)) = groups.get(&GroupId(group)) {
                    group.pulse().is_doubted.store(true, Relaxed);
                }
            }
            peer.answered_ms.fetch_max(sent_ms, Relaxed);
        }
        Err(Failure::TimedOut) => peer.control.reset(),
        // The next ones come soon.
        Ok(_) | Err(_) => {}
    }
}

/// Answers what needs no openraft: beats, and requests for votes while a leader is alive.
pub(crate) fn answer(host: &HostInner, group: GroupId, replica: u64, message: &Message) -> Option<Message> {
    match message {
        Message::Beats(beats) => Some(Message::BeatsReply(hear(host, beats))),
        Message::Vote(request) | Message::PreVote(request) => refuse_vote(host, group, replica, request),
        _ => None,
    }
}

fn hear(host: &HostInner, beats: &wire::Beats) -> wire::BeatsReply {
    let now_ms = host.now_ms();
    let groups = host.lock_groups();
    let mut unknown = Vec::new();
    let told = beats.groups.iter().zip(&beats.targets).zip(&beats.terms).zip(&beats.leaders);
    for (((group, target), term), leader) in told {
        match groups.get(&GroupId(*group)) {
            Some(Replica::Running(running))
                if running.replica().0 == *target && follows(running, &Vote::new_committed(*term, *leader)) =>
            {
                running.pulse().heard_ms.store(now_ms, Relaxed);
            }
            _ => unknown.push(*group),
        }
    }
    wire::BeatsReply { unknown }
}

fn follows(group: &Group, leader: &Vote) -> bool {
    let metrics = group.raft().server_metrics();
    let metrics = metrics.borrow_watched();
    metrics.vote == *leader && matches!(metrics.state, ServerState::Follower | ServerState::Learner)
}

/// openraft refuses votes while a leader's lease runs, but does not see the beats that renew it.
fn refuse_vote(host: &HostInner, group: GroupId, replica: u64, request: &wire::VoteRequest) -> Option<Message> {
    let groups = host.lock_groups();
    let Some(Replica::Running(group)) = groups.get(&group) else { return None };
    let is_asked = group.replica().0 == replica && !request.leader_transfer;
    if !is_asked || !group.pulse().is_fresh(host.now_ms()) {
        return None;
    }
    let metrics = group.raft().server_metrics();
    let vote = metrics.borrow_watched().vote;
    let last = group.log().last().map(|last| wire_log_id(&crate::types::log_id(last)));
    vote.committed.then(|| Message::VoteReply(wire::VoteReply { vote: Some(wire_vote(&vote)), granted: false, last }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pulse(is_first: bool, since_ms: u64, heard_ms: u64) -> Pulse {
        Pulse {
            host: Weak::new(),
            is_first,
            heard_ms: heard_ms.into(),
            since_ms: since_ms.into(),
            proven_ms: 0.into(),
            probed_ms: 0.into(),
            led_term: 0.into(),
            resigned_term: 0.into(),
            resigned: Notify::new(),
            is_doubted: false.into(),
            is_ticking: false.into(),
        }
    }

    fn patience_ms(pulse: &Pulse, replica: u64) -> u64 {
        (0..10_000).find(|ms| pulse.is_overdue(replica, pulse.silent_since_ms() + ms)).unwrap()
    }

    #[test]
    fn a_silent_leader_is_given_up_after_1600_to_2000_ms_not_by_all_at_once() {
        let pulse = pulse(false, 5, 10_000);
        let times: std::collections::BTreeSet<u64> = (1..=100).map(|replica| patience_ms(&pulse, replica)).collect();
        assert!(times.iter().all(|ms| (1_600..2_000).contains(ms)), "{times:?}");
        assert!(times.len() > 70, "{times:?}");
    }

    #[test]
    fn after_a_start_the_preferred_leader_asks_first() {
        let (first, other) = (pulse(true, 1, 0), pulse(false, 1, 0));
        for replica in 1..=100 {
            assert!(patience_ms(&first, replica) < patience_ms(&other, replica + 1_000));
        }
    }

    #[test]
    fn the_lease_runs_from_the_last_sign_of_life_and_not_before_the_first() {
        assert!(!pulse(true, 1, 0).is_fresh(2));
        let heard = pulse(false, 1, 100);
        assert!(heard.is_fresh(100 + ELECTION_MS_MAX - 1));
        assert!(!heard.is_fresh(100 + ELECTION_MS_MAX));
    }
}
