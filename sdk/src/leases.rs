//! The leases that a worker holds: settled in merged requests, renewed while they live.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arqon_proto::wire::{self, LeaseRef, frame::Body};
use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot},
    time::{sleep, timeout},
};

use crate::{Client, Error};

const MERGED_COUNT_MAX: usize = 1_000;

/// Whose leases they are.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) topic: String,
    pub(crate) group: String,
}

/// One granted job, from grant to settlement.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) partition: u32,
    pub(crate) offset: u64,
    pub(crate) attempt: u32,
    lost: AtomicBool,
    lost_now: Notify,
}

impl Lease {
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    fn lose(&self) {
        self.lost.store(true, Ordering::Release);
        self.lost_now.notify_waiters();
    }

    pub(crate) async fn wait_lost(&self) {
        loop {
            let notified = self.lost_now.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.is_lost() {
                return;
            }
            notified.await;
        }
    }

    fn reference(&self) -> LeaseRef {
        LeaseRef { offset: self.offset, attempt: self.attempt }
    }
}

/// The leases of one worker. As many as it has permits for jobs, so the map is bounded.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    held: Mutex<HashMap<(u32, u64, u32), Arc<Lease>>>,
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, HashMap<(u32, u64, u32), Arc<Lease>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, partition: u32, lease: &wire::Lease) -> Arc<Lease> {
        let lease = Arc::new(Lease {
            partition,
            offset: lease.offset,
            attempt: lease.attempt,
            lost: AtomicBool::new(false),
            lost_now: Notify::new(),
        });
        self.lock().insert((partition, lease.offset, lease.attempt), lease.clone());
        lease
    }

    pub(crate) fn remove(&self, lease: &Lease) {
        self.lock().remove(&(lease.partition, lease.offset, lease.attempt));
    }

    fn by_partition(&self) -> HashMap<u32, Vec<Arc<Lease>>> {
        let mut out: HashMap<u32, Vec<Arc<Lease>>> = HashMap::new();
        for lease in self.lock().values().filter(|lease| !lease.is_lost()) {
            out.entry(lease.partition).or_default().push(lease.clone());
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
        let renewals = held.into_iter().flat_map(|(partition, held)| {
            held.chunks(MERGED_COUNT_MAX).map(|some| (partition, some.to_vec())).collect::<Vec<_>>()
        });
        join_all(renewals.map(|(partition, held)| renew_some(&client, &queue, partition, held, lease_time))).await;
    }
}

async fn renew_some(client: &Client, queue: &Queue, partition: u32, held: Vec<Arc<Lease>>, lease_time: Duration) {
    let body = Body::Renew(wire::Renew {
        topic: queue.topic.clone(),
        partition,
        group: queue.group.clone(),
        leases: held.iter().map(|lease| lease.reference()).collect(),
    });
    match timeout(lease_time, client.request(body, Vec::new())).await {
        Ok(Ok((Body::Settled(settled), _))) => {
            for lease in &held {
                if settled.lost.contains(&lease.reference()) {
                    lease.lose();
                }
            }
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

/// One lease to be settled.
pub(crate) struct Settle {
    pub(crate) partition: u32,
    pub(crate) lease: LeaseRef,
    pub(crate) settlement: Settlement,
    pub(crate) reply: Option<oneshot::Sender<Result<(), Error>>>,
    /// The place of a job that was dropped; free when the settlement is through.
    pub(crate) place: Option<OwnedSemaphorePermit>,
}

/// Settles leases, those of one partition that come together in one request.
pub(crate) async fn settle(client: Client, queue: Arc<Queue>, mut queued: mpsc::UnboundedReceiver<Settle>) {
    let mut received = Vec::new();
    let mut requests = FuturesUnordered::new();
    let mut open = true;
    while open || !requests.is_empty() {
        tokio::select! {
            count = queued.recv_many(&mut received, MERGED_COUNT_MAX), if open => {
                open = count > 0;
                let mut merged: HashMap<(u32, Settlement), Vec<Settle>> = HashMap::new();
                for one in received.drain(..) {
                    merged.entry((one.partition, one.settlement)).or_default().push(one);
                }
                requests.extend(merged.into_iter().map(|(key, some)| settle_some(&client, &queue, key, some)));
            }
            Some(()) = requests.next() => {}
        }
    }
}

async fn settle_some(client: &Client, queue: &Queue, key: (u32, Settlement), some: Vec<Settle>) {
    let (partition, settlement) = key;
    let (topic, group) = (queue.topic.clone(), queue.group.clone());
    let leases = some.iter().map(|one| one.lease).collect();
    let body = match settlement {
        Settlement::Ack => Body::Ack(wire::Ack { topic, partition, group, leases }),
        Settlement::Nack { delay_ms } => Body::Nack(wire::Nack { topic, partition, group, leases, delay_ms }),
    };
    let outcome = match client.request(body, Vec::new()).await {
        Ok((Body::Settled(settled), _)) => Ok(settled.lost),
        Ok(_) => Err(Error::unexpected("the leader")),
        Err(error) => Err(error),
    };
    for one in some {
        let outcome = match &outcome {
            Ok(lost) if lost.contains(&one.lease) => Err(Error::LeaseLost),
            Ok(_) => Ok(()),
            Err(error) => Err(error.clone()),
        };
        drop(one.place);
        match (one.reply, outcome) {
            // Whoever asked may have stopped waiting; the lease is settled all the same.
            (Some(reply), outcome) => _ = reply.send(outcome),
            (None, Ok(()) | Err(Error::LeaseLost)) => {}
            (None, Err(error)) => {
                tracing::debug!(topic = queue.topic, partition, %error, "a job will come back when its lease ends");
            }
        }
    }
}
