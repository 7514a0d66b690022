//! The leases that a worker holds: settled in merged requests, renewed while they live.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use arqon_proto::wire::{self, LeaseRef, frame::Body};
use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};

use crate::{Client, Error};

/// Leases that are settled or renewed by one request.
const MERGED_COUNT_MAX: usize = 10_000;
/// Requests of one partition that settle leases at the same time; those after them merge.
const SETTLING_COUNT_MAX: usize = 2;

/// Whose leases they are.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) topic: String,
    pub(crate) group: String,
}

/// Leases that the server says are lost, by offset and attempt.
#[derive(Debug, Default)]
pub(crate) struct Lost(HashSet<(u64, u32)>);

impl Lost {
    fn new(leases: &[LeaseRef]) -> Self {
        Self(leases.iter().map(|lease| (lease.offset, lease.attempt)).collect())
    }

    pub(crate) fn contains(&self, lease: LeaseRef) -> bool {
        !self.0.is_empty() && self.0.contains(&(lease.offset, lease.attempt))
    }
}

/// The leases of one answer, from grant to settlement.
#[derive(Debug)]
pub(crate) struct Grant {
    pub(crate) partition: u32,
    leases: Vec<Held>,
    /// One of them was lost.
    lost_now: Notify,
}

#[derive(Debug)]
struct Held {
    reference: LeaseRef,
    /// Bits [`LOST`], [`OVER`] and [`FREED`].
    state: AtomicU8,
}

/// The server said that the lease is lost.
const LOST: u8 = 1;
/// The job is settled or dropped: nothing is to be renewed.
const OVER: u8 = 2;
/// The job no longer has its place: someone else gives it back.
const FREED: u8 = 4;

impl Grant {
    pub(crate) fn new(partition: u32, leases: impl Iterator<Item = LeaseRef>) -> Self {
        let held = |reference| Held { reference, state: AtomicU8::new(0) };
        Self { partition, leases: leases.map(held).collect(), lost_now: Notify::new() }
    }

    pub(crate) fn count(&self) -> usize {
        self.leases.len()
    }

    pub(crate) fn reference(&self, index: u32) -> LeaseRef {
        self.leases[index as usize].reference
    }

    fn has(&self, index: u32, bit: u8) -> bool {
        self.leases[index as usize].state.load(Ordering::Acquire) & bit != 0
    }

    pub(crate) fn is_lost(&self, index: u32) -> bool {
        self.has(index, LOST)
    }

    pub(crate) fn is_over(&self, index: u32) -> bool {
        self.has(index, OVER)
    }

    pub(crate) fn end(&self, index: u32) {
        self.leases[index as usize].state.fetch_or(OVER, Ordering::AcqRel);
    }

    pub(crate) fn is_freed(&self, index: u32) -> bool {
        self.has(index, FREED)
    }

    pub(crate) fn free(&self, index: u32) {
        self.leases[index as usize].state.fetch_or(FREED, Ordering::AcqRel);
    }

    pub(crate) async fn wait_lost(&self, index: u32) {
        loop {
            let notified = self.lost_now.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.is_lost(index) {
                return;
            }
            notified.await;
        }
    }

    /// The leases that must be renewed.
    fn living(&self) -> impl Iterator<Item = LeaseRef> {
        self.leases.iter().filter(|held| held.state.load(Ordering::Acquire) == 0).map(|held| held.reference)
    }

    fn lose(&self, lost: &Lost) {
        for held in self.leases.iter().filter(|held| lost.contains(held.reference)) {
            held.state.fetch_or(LOST, Ordering::AcqRel);
        }
        self.lost_now.notify_waiters();
    }
}

/// The leases of one worker. As many as it may hold jobs, so the list is bounded.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    grants: Mutex<Vec<Weak<Grant>>>,
}

impl Leases {
    pub(crate) fn add(&self, grant: &Arc<Grant>) {
        let mut grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        if grants.len() == grants.capacity() {
            grants.retain(|grant| grant.strong_count() > 0);
        }
        grants.push(Arc::downgrade(grant));
    }

    fn by_partition(&self) -> HashMap<u32, Vec<Arc<Grant>>> {
        let mut out: HashMap<u32, Vec<Arc<Grant>>> = HashMap::new();
        let grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        for grant in grants.iter().filter_map(Weak::upgrade) {
            out.entry(grant.partition).or_default().push(grant);
        }
        out
    }
}

/// Renews every living lease at a third of its time, until the worker and its jobs are gone.
pub(crate) async fn renew(client: Client, queue: Arc<Queue>, leases: Weak<Leases>, lease_time: Duration) {
    let pause = lease_time / 3;
    loop {
        sleep(pause).await;
        let Some(held) = leases.upgrade().map(|leases| leases.by_partition()) else { return };
        let renewals = held.into_iter().flat_map(|(partition, grants)| {
            let leases: Vec<_> = grants.iter().flat_map(|grant| grant.living()).collect();
            let some = leases.chunks(MERGED_COUNT_MAX).map(<[LeaseRef]>::to_vec).collect::<Vec<_>>();
            some.into_iter().map(move |leases| (partition, grants.clone(), leases))
        });
        let renewals = renewals
            .map(|(partition, grants, leases)| renew_some(&client, &queue, partition, grants, leases, lease_time));
        join_all(renewals).await;
    }
}

async fn renew_some(
    client: &Client,
    queue: &Queue,
    partition: u32,
    grants: Vec<Arc<Grant>>,
    leases: Vec<LeaseRef>,
    lease_time: Duration,
) {
    let (topic, group) = (queue.topic.clone(), queue.group.clone());
    let body = Body::Renew(wire::Renew { topic, partition, group, leases });
    match timeout(lease_time, client.request(body, Vec::new())).await {
        Ok(Ok((Body::Settled(settled), _))) if settled.lost.is_empty() => {}
        Ok(Ok((Body::Settled(settled), _))) => {
            let lost = Lost::new(&settled.lost);
            grants.iter().for_each(|grant| grant.lose(&lost));
        }
        Ok(Ok(_)) => tracing::warn!(topic = queue.topic, partition, "a renewal was answered with something else"),
        Ok(Err(error)) => tracing::warn!(topic = queue.topic, partition, %error, "leases could not be renewed"),
        Err(_) => tracing::warn!(topic = queue.topic, partition, "leases could not be renewed in time"),
    }
}

/// What becomes of a job that has no result to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Settlement {
    Ack,
    Nack { delay_ms: u32 },
}

/// Leases of one partition to be settled alike.
pub(crate) struct Settle {
    pub(crate) partition: u32,
    pub(crate) leases: Vec<LeaseRef>,
    pub(crate) settlement: Settlement,
    /// Is told which leases were lost, these and others.
    pub(crate) reply: Option<oneshot::Sender<Result<Arc<Lost>, Error>>>,
    /// Whether the places of the jobs, which were dropped, are free when the settlement is through.
    pub(crate) frees_places: bool,
}

/// Settles leases, those of one partition that come together in one request.
pub(crate) async fn settle(
    client: Client,
    queue: Arc<Queue>,
    places: Weak<Semaphore>,
    mut queued: mpsc::UnboundedReceiver<Settle>,
) {
    let mut received = Vec::new();
    let mut waiting: HashMap<(u32, Settlement), Vec<Settle>> = HashMap::new();
    let mut under_way: HashMap<u32, usize> = HashMap::new();
    let mut requests = FuturesUnordered::new();
    let mut open = true;
    while open || !requests.is_empty() {
        tokio::select! {
            count = queued.recv_many(&mut received, MERGED_COUNT_MAX), if open => {
                open = count > 0;
                for one in received.drain(..) {
                    waiting.entry((one.partition, one.settlement)).or_default().push(one);
                }
            }
            Some(partition) = requests.next() => {
                under_way.entry(partition).and_modify(|count| *count -= 1);
            }
        }
        for (key, queued) in &mut waiting {
            let count = under_way.entry(key.0).or_default();
            while *count < SETTLING_COUNT_MAX && !queued.is_empty() {
                *count += 1;
                requests.push(settle_some(&client, &queue, &places, *key, merged(queued)));
            }
        }
        waiting.retain(|_, queued| !queued.is_empty());
        under_way.retain(|_, count| *count > 0);
    }
}

/// As many from the front as one request may settle.
fn merged(queued: &mut Vec<Settle>) -> Vec<Settle> {
    let mut lease_count = 0;
    let fits = |one: &&Settle| {
        lease_count += one.leases.len();
        lease_count <= MERGED_COUNT_MAX
    };
    let count = queued.iter().take_while(fits).count();
    queued.drain(..count.max(1).min(queued.len())).collect()
}

async fn settle_some(
    client: &Client,
    queue: &Queue,
    places: &Weak<Semaphore>,
    key: (u32, Settlement),
    some: Vec<Settle>,
) -> u32 {
    let (partition, settlement) = key;
    let (topic, group) = (queue.topic.clone(), queue.group.clone());
    let leases = some.iter().flat_map(|one| &one.leases).copied().collect();
    let body = match settlement {
        Settlement::Ack => Body::Ack(wire::Ack { topic, partition, group, leases }),
        Settlement::Nack { delay_ms } => Body::Nack(wire::Nack { topic, partition, group, leases, delay_ms }),
    };
    let outcome = match client.request(body, Vec::new()).await {
        Ok((Body::Settled(settled), _)) => Ok(Arc::new(Lost::new(&settled.lost))),
        Ok(_) => Err(Error::unexpected("the leader")),
        Err(error) => Err(error),
    };
    for one in some {
        if let Some(places) = places.upgrade().filter(|_| one.frees_places) {
            places.add_permits(one.leases.len());
        }
        match (one.reply, &outcome) {
            // Whoever asked may have stopped waiting; the leases are settled all the same.
            (Some(reply), Ok(lost)) => _ = reply.send(Ok(lost.clone())),
            (Some(reply), Err(error)) => _ = reply.send(Err(error.clone())),
            (None, Ok(_)) => {}
            (None, Err(error)) => {
                tracing::debug!(topic = queue.topic, partition, %error, "jobs will come back when their leases end");
            }
        }
    }
    partition
}
