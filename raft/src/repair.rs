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
//!
//! What this replica needs and a majority has purged comes back from nobody: the replica is given up
//! then, and copied anew. That cannot take a majority of the replicas at once. Each one that is given up
//! has a log start below that of a majority; were they a majority themselves, the one of them with the highest
//! log start could not have it.

mod attempts;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::RangeInclusive,
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
use arqon_storage::{Damage, Log, ReadError};
use futures_util::{StreamExt, stream};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use attempts::Attempts;

use crate::{
    aside::aside,
    host::{HostInner, Replica},
    peer::{Failure, framed::Body},
    types::Membership,
};

/// Readers of a damaged entry wait this long for its repair, then openraft is told.
pub(crate) const REPAIR_PATIENCE: Duration = Duration::from_secs(10);
/// The logs are looked over this often, if nobody waits.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Logs that are repaired side by side.
const REPAIRS_AT_ONCE: usize = 4;
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
    /// Attempts that failed since the last one that did not.
    pub failed_count: u64,
}

/// One log that is looked after.
pub(crate) struct Place {
    log: Log,
    /// Nodes of the voters, as far as the state that the replica opened with tells; two sets while they change.
    voters_at_open: Vec<BTreeSet<NodeId>>,
    repaired_count: AtomicU64,
    state: Mutex<PlaceState>,
}

#[derive(Default)]
struct PlaceState {
    attempts: Attempts,
    /// Why the replica was given up before it ran.
    given_up: Option<String>,
}

/// Somebody waits for a damaged entry, as long as this is there.
struct Waiter {
    place: Arc<Place>,
    index: RaftIndex,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.place.state().attempts.leave(self.index);
    }
}

impl Place {
    fn state(&self) -> MutexGuard<'_, PlaceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for(self: Arc<Self>, index: RaftIndex, wake: &Notify) -> Waiter {
        self.state().attempts.wait_for(index);
        wake.notify_one();
        Waiter { place: self, index }
    }

    /// Begins an attempt, if one is due.
    fn begin(&self) -> bool {
        let mut state = self.state();
        let is_due = state.attempts.due_at().is_none_or(|at| at <= Instant::now());
        if is_due {
            state.attempts.begin();
        }
        is_due
    }

    /// Why the replica was given up while it was being opened, if it was.
    pub(crate) fn given_up(&self) -> Option<String> {
        self.state().given_up.clone()
    }

    fn summary(&self) -> DamageSummary {
        let (damaged, state) = (self.log.damaged(), self.state());
        DamageSummary {
            group: self.log.group(),
            replica: self.log.replica(),
            damaged,
            repaired_count: self.repaired_count.load(Relaxed),
            problem: state.attempts.problem().map(str::to_owned),
            failed_count: state.attempts.failed_count(),
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

    /// From now on the log is repaired, and answers peers that repair theirs. `voters` are the nodes of the
    /// voters by the state of the machine.
    pub(crate) fn add(&self, log: Log, voters_at_open: Vec<BTreeSet<NodeId>>) -> Arc<Place> {
        let (repaired_count, state) = (AtomicU64::new(0), Mutex::default());
        let place = Arc::new(Place { log, voters_at_open, repaired_count, state });
        self.places().insert(place.log.group(), place.clone());
        self.wake.notify_one();
        place
    }

    /// Ends the repair of a log whose replica is given up. Whoever waits is told that there will be none.
    pub(crate) fn give_up(&self, group: GroupId, reason: String) {
        if let Some(place) = self.place(group) {
            place.state().given_up = Some(reason);
        }
        self.remove(group);
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
        let covers = |damage: &Damage| span(damage).contains(&index);
        if !log.damaged().iter().any(covers) {
            return false;
        }
        let _waiter = self.place(log.group()).map(|place| place.wait_for(index, &self.wake));
        let waiting = async {
            loop {
                changed.borrow_and_update();
                if self.place(log.group()).is_none() {
                    return false;
                }
                if !log.damaged().iter().any(covers) {
                    return true;
                }
                // Damage also goes with entries that are purged or cut off, of which nothing is told.
                if let Ok(Err(_)) = timeout(LOOK_INTERVAL, changed.changed()).await {
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

/// The entries that are lost.
fn span(damage: &Damage) -> RangeInclusive<RaftIndex> {
    damage.first..=damage.last
}

/// Repairs the logs of a node until it stops.
pub(crate) async fn run(host: Arc<HostInner>) {
    let mut stopping = host.stopping.subscribe();
    let mut pause = LOOK_INTERVAL;
    loop {
        tokio::select! {
            () = host.repairs.wake.notified() => {}
            () = tokio::time::sleep(pause) => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        pause = LOOK_INTERVAL;
        if host.damage_count() == 0 {
            continue;
        }
        let places: Vec<_> = host.repairs.places().values().cloned().collect();
        // A node that does not answer holds up the logs that need it, and not the others.
        let host = &host;
        let repairs = stream::iter(&places).for_each_concurrent(REPAIRS_AT_ONCE, |place| async move {
            if !place.begin() {
                return;
            }
            let damaged = place.log.damaged();
            if !damaged.is_empty() {
                repair_log(host, place, damaged).await;
            }
        });
        tokio::select! {
            () = repairs => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        // Whoever waits for one that was too early has woken this task already.
        let now = Instant::now();
        let due = places.iter().filter_map(|place| place.state().attempts.due_at());
        let next = due.map(|at| at.saturating_duration_since(now)).filter(|pause| !pause.is_zero()).min();
        pause = next.map_or(LOOK_INTERVAL, |next| next.min(LOOK_INTERVAL));
    }
}

/// One attempt at all damage of a log.
async fn repair_log(host: &Arc<HostInner>, place: &Place, damaged: Vec<Damage>) {
    let (mut problem, mut given_up) = (None, None);
    for damage in damaged {
        let mut purged_on = BTreeSet::new();
        let result = match fetch(host, &place.log, &damage, &mut purged_on).await {
            Ok(batches) => place.log.repair(&damage, batches).await.map_err(|error| error.to_string()),
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => {
                place.repaired_count.fetch_add(1, Relaxed);
                host.repairs.changed.send_modify(|count| *count += 1);
            }
            Err(error) => {
                let text = format!("entries {} to {}: {error}", damage.first, damage.last);
                let is_needed = place.state().attempts.is_needed(span(&damage));
                if is_needed && is_majority(host, place, &purged_on) {
                    given_up = Some(text.clone());
                }
                problem = Some(text);
            }
        }
    }
    if note_attempt(place, problem) {
        give_way(host, place, "entries of the log here are damaged").await;
    }
    if let Some(reason) = given_up {
        host.give_up(place.log.group(), format!("it needs damaged entries that a majority has purged: {reason}")).await;
    }
}

/// Remembers why damage is still there; says whether somebody waits for what could not be repaired.
fn note_attempt(place: &Place, problem: Option<String>) -> bool {
    let damaged = place.log.damaged();
    let mut state = place.state();
    if let Some(text) = problem.as_deref().filter(|text| state.attempts.problem() != Some(text)) {
        tracing::warn!(group = place.log.group().0, "damage is not repaired: {text}");
    }
    let is_repaired = problem.is_none();
    state.attempts.end(problem, Instant::now());
    !is_repaired && damaged.iter().any(|damage| state.attempts.is_needed(span(damage)))
}

/// The nodes of the voters; two sets while they change.
pub(crate) fn voter_nodes(membership: &Membership) -> Vec<BTreeSet<NodeId>> {
    let node_of = |voter: &u64| membership.get_node(voter).map(|at| NodeId(at.node));
    membership.get_joint_config().iter().map(|config| config.iter().filter_map(node_of).collect()).collect()
}

/// Whether `nodes` hold a majority of the voters of a group, by what its replica here knows.
fn is_majority(host: &HostInner, place: &Place, nodes: &BTreeSet<NodeId>) -> bool {
    let configs = match host.lock_groups().get(&place.log.group()) {
        Some(Replica::Running(running)) => running.voter_nodes(),
        _ => place.voters_at_open.clone(),
    };
    !configs.is_empty() && configs.iter().all(|voters| voters.intersection(nodes).count() * 2 > voters.len())
}

/// A leader that has lost the checkpoint at the start of its log gives way: only another one can help a follower that
/// needs it.
pub(crate) async fn resign(host: &Arc<HostInner>, group: GroupId) {
    if let Some(place) = host.repairs.place(group) {
        give_way(host, &place, "the checkpoint at the start of the log here is lost").await;
    }
}

/// A leader that cannot give a follower what it needs gives way to a replica that perhaps can, unless it has of late.
async fn give_way(host: &Arc<HostInner>, place: &Place, why: &str) {
    let group = place.log.group();
    let running = match host.lock_groups().get(&group) {
        Some(Replica::Running(running)) => running.clone(),
        _ => return,
    };
    let status = running.status();
    let heir = status.voters.iter().copied().find(|node| *node != host.node && running.is_caught_up(*node));
    let (true, Some(heir)) = (status.is_leader, heir) else { return };
    if !place.state().attempts.gives_way(status.term, Instant::now()) {
        return;
    }
    tracing::warn!(group = group.0, "leadership goes to node {heir}: {why}");
    if let Err(error) = running.transfer_leader(heir).await {
        tracing::warn!(group = group.0, %error, "leadership was not handed over");
    }
}

/// The entries of `damage`, each from any peer that has it; adds the peers that have purged some to `purged_on`.
async fn fetch(
    host: &Arc<HostInner>,
    log: &Log,
    damage: &Damage,
    purged_on: &mut BTreeSet<NodeId>,
) -> Result<Vec<Batch>, String> {
    let (mut batches, mut size, mut next) = (Vec::new(), 0, damage.first);
    let mut reasons: BTreeMap<u64, String> = BTreeMap::new();
    while next <= damage.last {
        let mut part = Vec::new();
        for node in host.peer_nodes() {
            match ask(host, node, log.group(), next, damage.last).await {
                Ok(Found { batches, .. }) if !batches.is_empty() => {
                    part = batches;
                    break;
                }
                Ok(Found { log_first, .. }) if log_first > next => {
                    purged_on.insert(node);
                    let reason = format!("node {node} has purged entry {next}, its log begins with entry {log_first}");
                    reasons.insert(node.0, reason);
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

/// What a peer has of the entries asked for.
struct Found {
    batches: Vec<Batch>,
    /// First index that it retains; 0 when it did not say.
    log_first: RaftIndex,
}

/// Entries from `first` on, as many as the peer likes to give.
async fn ask(
    host: &Arc<HostInner>,
    node: NodeId,
    group: GroupId,
    first: RaftIndex,
    last: RaftIndex,
) -> Result<Found, Failure> {
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
    Ok(Found { batches, log_first: RaftIndex(reply.log_first) })
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
    let has_threads = log.store_has_threads();
    let read = match aside(has_threads, move || log.entries(first..end, limits::FETCH_SIZE_MAX)).await {
        Ok(Ok(batches)) => Ok(batches),
        // Told apart from damage here: who hears it from a majority looks for these entries no more.
        Ok(Err(ReadError::Purged { .. })) => Ok(Vec::new()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match read {
        Ok(batches) => {
            let entry_count = batches.len() as u32;
            let log_first = place.log.purged().map_or(0, |purged| purged.index.0 + 1);
            (Message::EntriesReply(wire::EntriesReply { entry_count, log_first }), Body::Batches(batches))
        }
        Err(reason) => refuse(format!("entry {first} cannot be read on node {} either: {reason}", host.node)),
    }
}
