//! Damaged entries are fetched from other replicas.
//!
//! ```text
//!   reader of the log meets damage ── waits ──┐
//!   scrubber, opening                         ▼
//!        └──► Log::damaged() ──► one task a node: asks peers ──► Log::repair() ──► readers go on
//!                                                  │
//!   any replica of the group ◄── EntriesRequest ───┘ committed and readable there, or none
//! ```
//!
//! What peers answer is not believed: the chain proves that it is what was lost (see storage).

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arqon_proto::{
    Batch, GroupId, NodeId, RaftIndex, ReplicaId, limits,
    wire::{self, PeerFrame, peer_frame::Body as Message},
};
use arqon_storage::{Damage, Log};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use crate::{
    host::{HostInner, Replica},
    peer::{Failure, framed::Body},
};

/// Readers of a damaged entry wait this long for its repair, then openraft is told.
pub(crate) const REPAIR_PATIENCE: Duration = Duration::from_secs(10);
/// The logs are looked over this often, if nobody waits.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A log that could not be repaired is tried again after this time, which doubles up to the longest.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(250);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// Patience with one peer.
const ENTRIES_PATIENCE: Duration = Duration::from_secs(5);

/// Damage of one replica, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamageSummary {
    /// The group.
    pub group: GroupId,
    /// The replica.
    pub replica: ReplicaId,
    /// What cannot be read now.
    pub damaged: Vec<Damage>,
    /// Ranges repaired since the replica was opened.
    pub repaired_count: u64,
    /// Why the last attempt failed; none when it did not.
    pub problem: Option<String>,
}

/// One log that is looked after.
struct Place {
    log: Log,
    repaired_count: AtomicU64,
    state: Mutex<PlaceState>,
}

#[derive(Default)]
struct PlaceState {
    problem: Option<String>,
    /// The next attempt, and how long the one after it waits.
    retry_at: Option<Instant>,
    retry_after: Duration,
    /// Raft cannot go on without an entry that is damaged.
    is_needed: bool,
    /// Leadership was given away because of that: where everybody has the damage it would go round.
    has_resigned: bool,
}

impl Place {
    fn state(&self) -> MutexGuard<'_, PlaceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody waits: the next attempt is made at once.
    fn need(&self, wake: &Notify) {
        let mut state = self.state();
        if !std::mem::replace(&mut state.is_needed, true) {
            state.retry_at = None;
            wake.notify_one();
        }
    }

    fn summary(&self) -> DamageSummary {
        DamageSummary {
            group: self.log.group(),
            replica: self.log.replica(),
            damaged: self.log.damaged(),
            repaired_count: self.repaired_count.load(Relaxed),
            problem: self.state().problem.clone(),
        }
    }
}

/// The open logs of a node, and who waits for their repair.
pub(crate) struct Repairs {
    places: Mutex<HashMap<GroupId, Arc<Place>>>,
    wake: Notify,
    /// Counts repairs, and logs that went.
    changed: watch::Sender<u64>,
}

impl Default for Repairs {
    fn default() -> Self {
        Self { places: Mutex::default(), wake: Notify::new(), changed: watch::Sender::new(0) }
    }
}

impl Repairs {
    fn places(&self) -> MutexGuard<'_, HashMap<GroupId, Arc<Place>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, group: GroupId) -> Option<Arc<Place>> {
        self.places().get(&group).cloned()
    }

    /// From now on the log is repaired, and answers peers that repair theirs.
    pub(crate) fn add(&self, log: Log) {
        let place = Place { repaired_count: AtomicU64::new(0), state: Mutex::default(), log };
        self.places().insert(place.log.group(), Arc::new(place));
        self.wake.notify_one();
    }

    pub(crate) fn remove(&self, group: GroupId) {
        self.places().remove(&group);
        self.changed.send_modify(|count| *count += 1);
    }

    pub(crate) fn clear(&self) {
        self.places().clear();
        self.changed.send_modify(|count| *count += 1);
    }

    /// Logs with damage, and those that had some.
    pub(crate) fn summary(&self) -> Vec<DamageSummary> {
        let places: Vec<_> = self.places().values().cloned().collect();
        let mut summaries: Vec<_> = places.iter().map(|place| place.summary()).collect();
        summaries.retain(|summary| summary.repaired_count > 0 || !summary.damaged.is_empty());
        summaries.sort_by_key(|summary| summary.group);
        summaries
    }

    /// Waits until entry `index` is not damaged any more. False when the time is over or the log
    /// is closed, and when the damage is not on the list: nobody repairs it then.
    pub(crate) async fn repaired(&self, log: &Log, index: RaftIndex, patience: Option<Duration>) -> bool {
        let mut changed = self.changed.subscribe();
        let covers = |damage: &Damage| (damage.first..=damage.last).contains(&index);
        if !log.damaged().iter().any(covers) {
            return false;
        }
        let waiting = async {
            loop {
                changed.borrow_and_update();
                let Some(place) = self.place(log.group()) else { return false };
                if !log.damaged().iter().any(covers) {
                    return true;
                }
                place.need(&self.wake);
                if changed.changed().await.is_err() {
                    return false;
                }
            }
        };
        match patience {
            Some(patience) => timeout(patience, waiting).await.unwrap_or(false),
            None => waiting.await,
        }
    }
}

/// Repairs the logs of a node until it stops.
pub(crate) async fn run(host: Arc<HostInner>) {
    let mut stopping = host.stopping.subscribe();
    loop {
        tokio::select! {
            () = host.repairs.wake.notified() => {}
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        if host.damage_count() == 0 {
            continue;
        }
        let places: Vec<_> = host.repairs.places().values().cloned().collect();
        for place in places {
            let due = place.state().retry_at.is_none_or(|at| at <= Instant::now());
            let damaged = if due { place.log.damaged() } else { Vec::new() };
            if damaged.is_empty() {
                continue;
            }
            tokio::select! {
                () = repair_log(&host, &place, damaged) => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
        }
    }
}

/// One attempt at all damage of a log.
async fn repair_log(host: &Arc<HostInner>, place: &Place, damaged: Vec<Damage>) {
    let mut problem = None;
    for damage in damaged {
        let result = match fetch(host, &place.log, &damage).await {
            Ok(batches) => place.log.repair(&damage, batches).await.map_err(|error| error.to_string()),
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => {
                place.repaired_count.fetch_add(1, Relaxed);
                host.repairs.changed.send_modify(|count| *count += 1);
            }
            Err(error) => problem = Some(format!("entries {} to {}: {error}", damage.first, damage.last)),
        }
    }
    let hands_over = {
        let mut state = place.state();
        match &problem {
            None => *state = PlaceState::default(),
            Some(text) => {
                if state.problem.as_ref() != Some(text) {
                    tracing::warn!(group = place.log.group().0, "damage is not repaired: {text}");
                }
                state.retry_after = (state.retry_after * 2).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX);
                state.retry_at = Some(Instant::now() + state.retry_after);
            }
        }
        state.problem = problem;
        let is_needed = state.problem.is_some() && std::mem::take(&mut state.is_needed);
        is_needed && !state.has_resigned
    };
    if hands_over && hand_over(host, place.log.group()).await {
        place.state().has_resigned = true;
    }
}

/// A leader that cannot read what a follower needs gives way to one that can. Whether it tried.
async fn hand_over(host: &Arc<HostInner>, group: GroupId) -> bool {
    let running = match host.lock_groups().get(&group) {
        Some(Replica::Running(running)) => running.clone(),
        _ => return false,
    };
    let status = running.status();
    let heir = status.voters.iter().copied().find(|node| *node != host.node && running.is_caught_up(*node));
    let (true, Some(heir)) = (status.is_leader, heir) else { return false };
    tracing::warn!(group = group.0, "leadership goes to node {heir}: entries of the log here are damaged");
    if let Err(error) = running.transfer_leader(heir).await {
        tracing::warn!(group = group.0, %error, "leadership was not handed over");
    }
    true
}

/// The entries of `damage`, each from any peer that has it.
async fn fetch(host: &Arc<HostInner>, log: &Log, damage: &Damage) -> Result<Vec<Batch>, String> {
    let (mut batches, mut size, mut next) = (Vec::new(), 0, damage.first);
    let mut reasons: BTreeMap<u64, String> = BTreeMap::new();
    while next <= damage.last {
        let mut part = Vec::new();
        for node in host.peer_nodes() {
            match ask(host, node, log.group(), next, damage.last).await {
                Ok(found) if !found.is_empty() => {
                    part = found;
                    break;
                }
                Ok(_) => drop(reasons.insert(node.0, format!("node {node} has not got entry {next} to give"))),
                Err(failure) => drop(reasons.insert(node.0, format!("node {node}: {failure}"))),
            }
        }
        if part.is_empty() {
            let reasons: Vec<_> = reasons.into_values().collect();
            return Err(if reasons.is_empty() { "there is no other node".to_owned() } else { reasons.join("; ") });
        }
        size += part.iter().map(|batch| batch.header.batch_size()).sum::<usize>();
        if size > limits::REPAIR_SIZE_MAX {
            return Err(format!("more than {} bytes are lost at once", limits::REPAIR_SIZE_MAX));
        }
        next = RaftIndex(next.0 + part.len() as u64);
        batches.append(&mut part);
    }
    Ok(batches)
}

/// Entries from `first` on, as many as the peer likes to give.
async fn ask(
    host: &Arc<HostInner>,
    node: NodeId,
    group: GroupId,
    first: RaftIndex,
    last: RaftIndex,
) -> Result<Vec<Batch>, Failure> {
    let message = Message::Entries(wire::EntriesRequest { first: first.0, last: last.0 });
    let frame = PeerFrame { group: group.0, body: Some(message), ..Default::default() };
    let (reply, mut body) = host.peer(node).bulk.call(frame, Body::EMPTY, ENTRIES_PATIENCE).await?;
    let Message::EntriesReply(reply) = reply else { return Err(Failure::Protocol("something other than entries")) };
    let mut batches = Vec::new();
    for index in (first.0..=last.0).take(reply.entry_count as usize) {
        let batch = Batch::split_from(&mut body).map_err(|_| Failure::Protocol("malformed entries"))?;
        if batch.header.index.0 != index {
            return Err(Failure::Protocol("other entries than asked for"));
        }
        batches.push(batch);
    }
    Ok(batches)
}

/// Answers a peer that repairs its log: entries that are committed here and pass their checks.
pub(crate) async fn answer(host: &HostInner, group: GroupId, request: wire::EntriesRequest) -> (Message, Body) {
    let refuse = |message: String| {
        let code = wire::peer_error::Code::NoReplica.into();
        (Message::Error(wire::PeerError { code, message }), Body::EMPTY)
    };
    let Some(place) = host.repairs.place(group) else {
        return refuse(format!("group {group} has no replica on node {}", host.node));
    };
    let log = place.log.clone();
    let committed_end = log.committed().map_or(0, |committed| committed.index.0 + 1);
    let end = request.last.saturating_add(1).min(committed_end);
    let (first, end) = (RaftIndex(request.first), RaftIndex(end.max(request.first)));
    // Reads the disk: not on a thread that others wait for.
    let reading = tokio::task::spawn_blocking(move || log.entries(first..end, limits::FETCH_SIZE_MAX));
    let read = match reading.await.map_err(io::Error::other) {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match read {
        Ok(batches) => {
            let entry_count = batches.len() as u32;
            (Message::EntriesReply(wire::EntriesReply { entry_count }), Body::Batches(batches))
        }
        Err(reason) => refuse(format!("entry {first} cannot be read on node {} either: {reason}", host.node)),
    }
}
