//! What the nodes tell each other of their clocks and disks, once a second, and what follows.
//!
//! A node whose clock is wrong, or whose disk is slow or nearly full, leads nothing that a better node can lead. One
//! with a wrong clock drops nothing by age, and takes the other nodes' median for the time. A partition takes no new records while its leader's
//! disk, or those of so many replicas that the others are no majority, are nearly full.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arqon_proto::NodeId;
use arqon_raft::Group;
use arqon_storage::{Space, SpaceState, Store};
use bytes::Bytes;
use futures_util::future::join_all;
use prost::Message;
use tokio::time::{Instant, sleep_until, timeout};

use crate::{
    broker::Broker,
    clock::{Clock, ClockWatch},
};

/// The kind under which a node is asked for its [`Pulse`].
pub(crate) const HEALTH_KIND: &str = "health";
const INTERVAL: Duration = Duration::from_secs(1);
const ANSWER_PATIENCE: Duration = Duration::from_millis(900);
/// What a node said counts for this long.
const NEWS_PATIENCE: Duration = Duration::from_secs(4);
/// Groups that a node hands over at a time.
const HAND_OVER_COUNT_MAX: usize = 64;

/// What a node answers.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Pulse {
    /// Its wall clock, in ms since 1970.
    #[prost(uint64, tag = "1")]
    pub wall_ms: u64,
    /// Its disk should take no new data.
    #[prost(bool, tag = "2")]
    pub is_low: bool,
    /// It knows that its clock is wrong.
    #[prost(bool, tag = "3")]
    pub is_off: bool,
    /// Its disk is slow.
    #[prost(bool, tag = "4")]
    pub is_slow: bool,
}

/// What another node said last.
#[derive(Clone, Copy, Debug)]
struct News {
    at: Instant,
    ahead_ms: i64,
    is_low: bool,
    is_off: bool,
    is_slow: bool,
}

/// Clocks and disks as this node knows them.
pub(crate) struct Health {
    node: NodeId,
    clock: Clock,
    store: Store,
    watch: Mutex<(Instant, ClockWatch)>,
    others: Mutex<HashMap<NodeId, News>>,
    is_off: AtomicBool,
    correction_ms: AtomicI64,
    /// Whether any other disk is nearly full: most of the time none is, and nobody has to look.
    is_any_low: AtomicBool,
    lateness_ms: AtomicU64,
}

impl Health {
    pub(crate) fn new(node: NodeId, clock: Clock, store: Store) -> Self {
        let watch = (Instant::now(), ClockWatch::new(clock.now_ms(), Duration::ZERO));
        Self {
            node,
            clock,
            store,
            watch: watch.into(),
            others: Mutex::default(),
            is_off: AtomicBool::new(false),
            correction_ms: AtomicI64::new(0),
            is_any_low: AtomicBool::new(false),
            lateness_ms: AtomicU64::new(0),
        }
    }

    /// Milliseconds since 1970: by the own clock, or by those of the other nodes when that is wrong.
    pub(crate) fn now_ms(&self) -> u64 {
        let correction_ms = if self.is_off.load(Relaxed) { self.correction_ms.load(Relaxed) } else { 0 };
        self.clock.now_ms().saturating_add_signed(correction_ms)
    }

    /// Seconds since 1970, as [`Self::now_ms`].
    pub(crate) fn now_seconds(&self) -> u64 {
        self.now_ms() / 1_000
    }

    /// Whether the own clock is wrong.
    pub(crate) fn is_clock_off(&self) -> bool {
        self.is_off.load(Relaxed)
    }

    /// How far the own clock is ahead of the median, in ms.
    pub(crate) fn skew_ms(&self) -> i64 {
        self.correction_ms.load(Relaxed).saturating_neg()
    }

    /// How much later than due the last look at the clocks began, in ms.
    pub(crate) fn lateness_ms(&self) -> u64 {
        self.lateness_ms.load(Relaxed)
    }

    /// The disk of this node.
    pub(crate) fn space(&self) -> Space {
        self.store.space()
    }

    /// Whether `node` may get leadership, as far as it said.
    pub(crate) fn may_lead(&self, node: NodeId) -> bool {
        !self.lock_others().get(&node).is_some_and(|news| news.is_off || news.is_low || news.is_slow)
    }

    /// What this node tells of itself; whether its disk `is_slow` is not known here.
    pub(crate) fn pulse(&self, is_slow: bool) -> Pulse {
        Pulse {
            wall_ms: self.clock.now_ms(),
            is_low: self.space().state != SpaceState::Enough,
            is_off: self.is_clock_off(),
            is_slow,
        }
    }

    /// Why a partition led here with replicas on `nodes` takes no new records, if so.
    pub(crate) fn storage_refusal(&self, nodes: &[NodeId]) -> Option<String> {
        let space = self.space();
        if space.state != SpaceState::Enough {
            return Some(self.space_problem(space));
        }
        if !self.is_any_low.load(Relaxed) {
            return None;
        }
        let others = self.lock_others();
        let is_low = |node: &&NodeId| **node != self.node && others.get(node).is_some_and(|news| news.is_low);
        let low: Vec<String> = nodes.iter().filter(is_low).map(ToString::to_string).collect();
        let is_majority_left = nodes.len() - low.len() > nodes.len() / 2;
        (!is_majority_left).then(|| format!("the disks of nodes {} are nearly full", low.join(", ")))
    }

    fn space_problem(&self, space: Space) -> String {
        format!(
            "node {} has {} bytes of disk left, and keeps {} in reserve",
            self.node, space.free_size, space.reserve_size
        )
    }

    /// One line for each thing that is wrong with this node's clock or disk.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let space = self.space();
        if space.state != SpaceState::Enough {
            problems.push(format!("{}: no new records are taken", self.space_problem(space)));
        }
        if self.is_clock_off() {
            let skew_ms = self.skew_ms();
            let direction = if skew_ms > 0 { "ahead of" } else { "behind" };
            problems.push(format!(
                "the clock of node {} is {} ms {direction} the others: it leads nothing that another node can lead",
                self.node,
                skew_ms.unsigned_abs()
            ));
        }
        problems
    }

    fn lock_others(&self) -> MutexGuard<'_, HashMap<NodeId, News>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what other nodes said, and judges the own clock.
    fn take(&self, news: Vec<(NodeId, News)>) {
        let ahead_ms = {
            let mut others = self.lock_others();
            others.extend(news);
            others.retain(|_, news| news.at.elapsed() < NEWS_PATIENCE);
            self.is_any_low.store(others.values().any(|news| news.is_low), Relaxed);
            others.values().map(|news| news.ahead_ms).collect()
        };
        let judgement = {
            let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
            let monotonic = watch.0.elapsed();
            watch.1.observe(self.clock.now_ms(), monotonic, ahead_ms)
        };
        self.correction_ms.store(judgement.correction_ms, Relaxed);
        let was_off = self.is_off.swap(judgement.is_off, Relaxed);
        if was_off != judgement.is_off {
            let skew_ms = self.skew_ms();
            match judgement.is_off {
                true => tracing::error!(skew_ms, "the clock of this node is wrong: it gives up leadership"),
                false => tracing::info!(skew_ms, "the clock of this node is right again"),
            }
        }
    }
}

impl Broker {
    /// Asks the other nodes for their clocks and disks, and acts on it, until stopped.
    pub(crate) async fn run_health(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        let mut due = Instant::now();
        let mut was_off = false;
        loop {
            tokio::select! {
                () = sleep_until(due) => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            let late = due.elapsed();
            self.health.lateness_ms.store(u64::try_from(late.as_millis()).unwrap_or(u64::MAX), Relaxed);
            due = Instant::now() + INTERVAL;
            self.health.take(self.ask_health().await);
            let is_off = self.health.is_clock_off();
            if is_off || was_off {
                // Also those that were opened meanwhile; but who is alone has nobody to leave it to.
                let is_alone = |group: &Group| group.status().voters.len() <= 1;
                self.groups().iter().for_each(|group| group.stand_for_election(!is_off || is_alone(group)));
            }
            was_off = is_off;
            // Followers with space commit without a leader whose own disk is nearly full.
            let is_low = self.health.space().state != SpaceState::Enough;
            if is_off || is_low {
                self.hand_over().await;
            }
        }
    }

    async fn ask_health(&self) -> Vec<(NodeId, News)> {
        let nodes = self.nodes();
        let others = nodes.iter().map(|info| NodeId(info.node));
        let others = others.filter(|node| *node != self.node && self.host.peer_reachable(*node));
        let asked = others.map(|node| async move {
            let began = Instant::now();
            let answer =
                timeout(ANSWER_PATIENCE, self.host.forward(node, HEALTH_KIND, Bytes::new())).await.ok()?.ok()?;
            let pulse = Pulse::decode(answer).ok()?;
            // The other node read its clock about in the middle.
            let middle_ms = (began.elapsed() / 2).as_millis() as u64;
            let own_ms = self.health.clock.now_ms().saturating_sub(middle_ms);
            let ahead_ms = pulse.wall_ms.wrapping_sub(own_ms).cast_signed();
            Some((
                node,
                News {
                    at: Instant::now(),
                    ahead_ms,
                    is_low: pulse.is_low,
                    is_off: pulse.is_off,
                    is_slow: pulse.is_slow,
                },
            ))
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    fn groups(&self) -> Vec<Group> {
        let open = self.replicas.open();
        std::iter::once(self.metadata.group()).chain(open.iter().map(|partition| partition.group())).cloned().collect()
    }

    /// Gives leadership to replicas that have everything, on nodes with a right clock and a good disk.
    pub(crate) async fn hand_over(&self) {
        let led = self.groups().into_iter().filter(|group| group.status().is_leader);
        let heir = |group: &Group| {
            let mut heirs = group.status().voters;
            heirs.retain(|node| {
                *node != self.node
                    && self.host.peer_reachable(*node)
                    && self.health.may_lead(*node)
                    && group.is_caught_up(*node)
            });
            // Not all to the same one.
            let at = usize::try_from(group.id().0).unwrap_or(0).checked_rem(heirs.len())?;
            heirs.get(at).copied()
        };
        let moves = led.filter_map(|group| heir(&group).map(|heir| (group, heir)));
        for (group, heir) in moves.take(HAND_OVER_COUNT_MAX) {
            if let Err(cause) = group.transfer_leader(heir).await {
                tracing::debug!(group = group.id().0, %cause, "leadership not handed over");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use arqon_storage::{Identity, MemoryDisk, Options};

    use super::*;

    fn health() -> Health {
        let disk = MemoryDisk::new();
        let identity = Identity { cluster: "test".into(), node: NodeId(1) };
        let store = Store::open_on(Arc::new(disk), identity, Options::default()).unwrap();
        Health::new(NodeId(1), Clock::default(), store)
    }

    fn news(is_low: bool, ahead_ms: i64) -> News {
        News { at: Instant::now(), ahead_ms, is_low, is_off: false, is_slow: false }
    }

    #[tokio::test]
    async fn a_majority_of_disks_with_space_is_enough_for_new_records() {
        let health = health();
        let nodes = [NodeId(1), NodeId(2), NodeId(3)];
        assert_eq!(health.storage_refusal(&nodes), None);
        health.take(vec![(NodeId(2), news(true, 0)), (NodeId(3), news(false, 0))]);
        assert_eq!(health.storage_refusal(&nodes), None);
        assert!(health.storage_refusal(&nodes[..2]).unwrap().contains("nodes 2 are"), "of two both are needed");
        assert!(!health.may_lead(NodeId(2)) && health.may_lead(NodeId(3)));
        health.take(vec![(NodeId(3), news(true, 0))]);
        assert!(health.storage_refusal(&nodes).unwrap().contains("nodes 2, 3 are nearly full"));
        health.take(vec![(NodeId(2), news(false, 0))]);
        assert_eq!(health.storage_refusal(&nodes), None);
    }

    #[tokio::test]
    async fn a_clock_that_the_others_contradict_is_replaced_by_their_median() {
        let health = health();
        let right = health.now_ms();
        health.clock.set_ahead_ms(-100_000);
        let seen = |ahead_ms| vec![(NodeId(2), news(false, ahead_ms)), (NodeId(3), news(false, ahead_ms))];
        health.take(seen(100_000));
        assert!(health.is_clock_off());
        assert!(health.now_ms().abs_diff(right) < 4_000);
        assert_eq!(health.skew_ms(), -100_000);
        assert!(health.problems()[0].contains("100000 ms behind the others"), "{:?}", health.problems());
        health.clock.set_ahead_ms(0);
        health.take(seen(0));
        assert!(!health.is_clock_off() && health.problems().is_empty());
    }
}
