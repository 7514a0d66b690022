//! Finds the server for a request: connections by address, leaders by topic and partition.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use arqon_proto::wire;
use bytes::Bytes;
use tokio::{
    sync::OnceCell,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;
use wire::{ErrorCode, frame::Body};

use crate::{
    Error, Options,
    connection::{Answer, Connection},
    limits,
    options::Address,
    retry::{Backoff, Verdict, judge, named_leader},
};

/// Who must answer a request.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// Any server.
    Any,
    /// The leader of a partition.
    Leader { topic: String, partition: u32 },
    /// Any node with a replica of the partition.
    Replica { topic: String, partition: u32 },
    /// The replica on one node.
    Node { topic: String, partition: u32, node: u64 },
}

/// Shared by everything that a client does.
pub(crate) struct Router {
    pub(crate) options: Options,
    tls: Option<TlsConnector>,
    seeds: Vec<Address>,
    connections: Mutex<HashMap<Address, Arc<OnceCell<Arc<Connection>>>>>,
    failures: Mutex<HashMap<Address, Failure>>,
    topics: Mutex<HashMap<String, Arc<TopicSlot>>>,
    preferred: AtomicUsize,
    tenant: Mutex<Arc<str>>,
}

/// A server that could not be reached lately is left alone until `until`.
struct Failure {
    until: Instant,
    backoff: Backoff,
    error: Error,
}

#[derive(Default)]
struct TopicSlot {
    description: OnceCell<Arc<wire::TopicDescription>>,
    /// Leaders named by `NOT_LEADER` answers; newer than the description.
    leaders: Mutex<HashMap<u32, String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Router {
    pub(crate) fn new(options: Options) -> Result<Self, Error> {
        let seeds = options.addresses()?;
        let tls = options.connector()?;
        // Many clients with the same list must not all lean on its first server.
        let preferred = AtomicUsize::new(rand::random_range(0..seeds.len()));
        Ok(Self {
            options,
            tls,
            seeds,
            connections: Mutex::default(),
            failures: Mutex::default(),
            topics: Mutex::default(),
            preferred,
            tenant: Mutex::new("".into()),
        })
    }

    /// Whether everything goes through Shields.
    pub(crate) fn is_websocket(&self) -> bool {
        self.seeds[0].is_websocket()
    }

    /// The tenant of the token, as a server told it; empty before the first connection.
    pub(crate) fn tenant(&self) -> Arc<str> {
        lock(&self.tenant).clone()
    }

    /// The open connection to `address`, made if need be; callers at the same time share it.
    pub(crate) async fn connection(&self, address: &Address) -> Result<Arc<Connection>, Error> {
        loop {
            let cell = {
                let mut connections = lock(&self.connections);
                if connections.len() >= limits::ADDRESS_COUNT_MAX {
                    connections.retain(|_, cell| cell.get().is_some_and(|connection| connection.is_alive()));
                }
                connections.entry(address.clone()).or_default().clone()
            };
            let connection = cell.get_or_try_init(|| self.dial(address)).await?;
            if connection.is_alive() {
                return Ok(connection.clone());
            }
            let mut connections = lock(&self.connections);
            if connections.get(address).is_some_and(|current| Arc::ptr_eq(current, &cell)) {
                connections.remove(address);
            }
        }
    }

    async fn dial(&self, address: &Address) -> Result<Arc<Connection>, Error> {
        if let Some(failure) = lock(&self.failures).get(address)
            && Instant::now() < failure.until
        {
            return Err(failure.error.clone());
        }
        match Connection::open(address, &self.options, self.tls.as_ref()).await {
            Ok(connection) => {
                lock(&self.failures).remove(address);
                *lock(&self.tenant) = connection.welcome().tenant.as_str().into();
                Ok(Arc::new(connection))
            }
            Err(error) => {
                let mut failures = lock(&self.failures);
                if failures.len() >= limits::ADDRESS_COUNT_MAX {
                    failures.clear();
                }
                let failure = failures.entry(address.clone()).or_insert_with(|| Failure {
                    until: Instant::now(),
                    backoff: Backoff::new(&self.options),
                    error: error.clone(),
                });
                failure.until = Instant::now() + failure.backoff.after(&error);
                failure.error = error.clone();
                Err(error)
            }
        }
    }

    /// A connection to any server: an open one, else the first that can be reached.
    ///
    /// # Errors
    /// What a server said to refuse the client, else [`Error::Unreachable`] naming all.
    pub(crate) async fn any(&self) -> Result<Arc<Connection>, Error> {
        let start = self.preferred.load(Ordering::Relaxed);
        let in_order = || (0..self.seeds.len()).map(move |step| start.wrapping_add(step) % self.seeds.len());
        let open = {
            let connections = lock(&self.connections);
            let alive = |cell: &Arc<OnceCell<Arc<Connection>>>| cell.get().filter(|c| c.is_alive()).cloned();
            in_order()
                .filter_map(|index| connections.get(&self.seeds[index]))
                .find_map(alive)
                .or_else(|| connections.values().find_map(alive))
        };
        if let Some(connection) = open {
            return Ok(connection);
        }
        let mut reasons = Vec::new();
        for index in in_order() {
            match self.connection(&self.seeds[index]).await {
                Ok(connection) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(connection);
                }
                Err(Error::Unreachable { servers, reason }) => reasons.push((servers, reason)),
                Err(error @ Error::Server { .. }) if judge(&error) == Verdict::Final => return Err(error),
                Err(error) => reasons.push((self.seeds[index].to_string(), error.to_string())),
            }
        }
        Err(unreachable(reasons))
    }

    /// The topic as some server describes it, from memory when it is known.
    pub(crate) async fn describe(&self, topic: &str) -> Result<Arc<wire::TopicDescription>, Error> {
        let slot = self.topic_slot(topic);
        slot.description.get_or_try_init(|| self.ask_description(topic)).await.cloned()
    }

    /// As [`Router::describe`], with retries within the request's time.
    pub(crate) async fn describe_patiently(&self, topic: &str) -> Result<Arc<wire::TopicDescription>, Error> {
        let deadline = Instant::now() + self.options.request_timeout;
        let what = format!("describe {topic}");
        let mut backoff = Backoff::new(&self.options);
        loop {
            let error = match timeout_at(deadline, self.describe(topic)).await {
                Ok(Ok(description)) => return Ok(description),
                Ok(Err(error)) if judge(&error) == Verdict::Final => return Err(error),
                Ok(Err(error)) => error,
                Err(_) => return Err(timed_out(&what, "no answer")),
            };
            self.preferred.fetch_add(1, Ordering::Relaxed);
            let pause = backoff.after(&error);
            if Instant::now() + pause >= deadline {
                return Err(timed_out(&what, &error.to_string()));
            }
            sleep(pause).await;
        }
    }

    /// Asks one server after the other until one knows the topic and who leads all of it; gives the answer that
    /// knows most. A node that is cut off from the others, or whose disk has failed it, knows of no leader, or of one
    /// that is none any more.
    async fn ask_description(&self, topic: &str) -> Result<Arc<wire::TopicDescription>, Error> {
        let body = Body::DescribeTopic(wire::DescribeTopic { topic: topic.to_owned() });
        // One that hangs leaves time for the others.
        let patience = self.options.attempt_timeout / self.seeds.len() as u32;
        let preferred = &self.seeds[self.preferred.load(Ordering::Relaxed) % self.seeds.len()];
        let first = match self.connection_soon(preferred).await {
            Some(connection) => connection,
            None => self.any().await?,
        };
        let mut others = self.seeds.iter();
        let (mut next, mut best, mut refusal) = (Some(first), None, None);
        while let Some(connection) = next.take() {
            match describe_at(&connection, &body, Instant::now() + patience).await {
                Ok(description) if self.is_websocket() || leaderless_count(&description) == 0 => {
                    return Ok(Arc::new(description));
                }
                Ok(description) => {
                    let count = leaderless_count(&description);
                    if best.as_ref().is_none_or(|best| count < leaderless_count(best)) {
                        best = Some(description);
                    }
                }
                Err(error) => {
                    // A topic made a moment ago may not have come to every node yet, and a node that starts
                    // knows none: one that knows it is right.
                    let is_unknown = error.code() == Some(ErrorCode::TargetNotFound);
                    if best.is_none() && (self.is_websocket() || judge(&error) == Verdict::Final && !is_unknown) {
                        return Err(error);
                    }
                    if refusal.is_none() || is_unknown {
                        refusal = Some(error);
                    }
                }
            }
            for address in others.by_ref().filter(|address| *address != connection.address()) {
                next = self.connection_soon(address).await;
                if next.is_some() {
                    break;
                }
            }
        }
        best.map(Arc::new).ok_or_else(|| refusal.unwrap_or_else(|| unreachable(Vec::new())))
    }

    /// A connection to `address` if there is one or it comes soon: others can be asked instead.
    async fn connection_soon(&self, address: &Address) -> Option<Arc<Connection>> {
        timeout(limits::OTHER_DIAL_TIME_MAX, self.connection(address)).await.ok()?.ok()
    }

    fn topic_slot(&self, topic: &str) -> Arc<TopicSlot> {
        let mut topics = lock(&self.topics);
        if let Some(slot) = topics.get(topic) {
            return slot.clone();
        }
        if topics.len() >= limits::TOPIC_COUNT_MAX {
            topics.clear();
        }
        topics.entry(topic.to_owned()).or_default().clone()
    }

    pub(crate) fn forget_topic(&self, topic: &str) {
        lock(&self.topics).remove(topic);
    }

    /// A connection to who must answer.
    pub(crate) async fn connect(&self, target: &Target) -> Result<Arc<Connection>, Error> {
        if self.is_websocket() {
            if let Target::Node { node, .. } = target {
                return Err(Error::invalid("any_replica_of", format!("{node} needs TCP servers, not a Shield")));
            }
            return self.any().await;
        }
        match target {
            Target::Any => self.any().await,
            Target::Leader { topic, partition } => {
                let named = lock(&self.topic_slot(topic).leaders).get(partition).cloned();
                let address = match named {
                    Some(address) => address,
                    None => self.partition(topic, *partition).await?.leader_address,
                };
                if address.is_empty() {
                    return Err(Error::Unreachable {
                        servers: format!("the leader of {topic}/{partition}"),
                        reason: "none is known".to_owned(),
                    });
                }
                self.connection(&Address::Tcp(address)).await
            }
            Target::Replica { topic, partition } => {
                let description = self.partition(topic, *partition).await?;
                let mut reasons = Vec::new();
                for address in description.replica_addresses {
                    match self.connection(&Address::Tcp(address.clone())).await {
                        Ok(connection) => return Ok(connection),
                        Err(error) => reasons.push((address, error.to_string())),
                    }
                }
                Err(unreachable(reasons))
            }
            Target::Node { topic, partition, node } => {
                let description = self.partition(topic, *partition).await?;
                let mut replicas = description.replica_nodes.iter().zip(&description.replica_addresses);
                match replicas.find(|(id, _)| *id == node) {
                    Some((_, address)) => self.connection(&Address::Tcp(address.clone())).await,
                    None => {
                        Err(Error::invalid("any_replica_of", format!("{node} has no replica of {topic}/{partition}")))
                    }
                }
            }
        }
    }

    async fn partition(&self, topic: &str, partition: u32) -> Result<wire::PartitionDescription, Error> {
        let description = self.describe(topic).await?;
        match description.partitions.iter().find(|known| known.partition == partition) {
            Some(known) => Ok(known.clone()),
            None => Err(wire::Error {
                code: ErrorCode::TargetNotFound.into(),
                message: format!("topic {topic} has no partition {partition}"),
                field: "partition".to_owned(),
                ..Default::default()
            }
            .into()),
        }
    }

    /// Takes from `error` what it teaches about who leads.
    pub(crate) fn learn(&self, target: &Target, error: &Error) {
        let Target::Leader { topic, partition } = target else { return };
        if let Some(leader) = named_leader(error) {
            lock(&self.topic_slot(topic).leaders).insert(*partition, leader.to_owned());
        } else if judge(error) != Verdict::Final
            && !matches!(error.code(), Some(ErrorCode::Overloaded | ErrorCode::RateLimitExceeded))
        {
            self.forget_topic(topic);
            // Who described it may know no better than last time.
            self.preferred.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends a request until it is answered, within `deadline`. `safe` says whether it may be
    /// sent again when its outcome is not clear; `what` names it in errors.
    pub(crate) async fn request(
        &self,
        target: &Target,
        body: &Body,
        payload: &[Bytes],
        patience: Patience,
        what: &str,
    ) -> Result<Answer, Error> {
        let deadline = Instant::now() + self.options.request_timeout + patience.wait;
        let mut backoff = Backoff::new(&self.options);
        loop {
            let attempt = async {
                let connection = self.connect(target).await?;
                let attempt_end = Instant::now() + self.options.attempt_timeout + patience.wait;
                match connection.exchange(body.clone(), payload, attempt_end.min(deadline)).await? {
                    (Body::Error(error), _) => Err(Error::from(error)),
                    answer => Ok(answer),
                }
            };
            let error = match timeout_at(deadline, attempt).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => error,
                Err(_) => return Err(timed_out(what, "no answer")),
            };
            match judge(&error) {
                Verdict::Final => return Err(error),
                Verdict::Unclear if !patience.safe => return Err(error),
                Verdict::NotDone | Verdict::Unclear => {}
            }
            self.learn(target, &error);
            let pause = backoff.after(&error);
            if Instant::now() + pause >= deadline {
                return Err(timed_out(what, &error.to_string()));
            }
            tracing::debug!(what, %error, pause_ms = pause.as_millis() as u64, "will try again");
            sleep(pause).await;
        }
    }
}

/// How long and how often a request may be tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// What the server was asked to wait (long-poll), on top of the time-outs.
    pub(crate) wait: std::time::Duration,
    /// Whether the request may be sent again when its outcome is not clear.
    pub(crate) safe: bool,
}

impl Patience {
    pub(crate) fn safe(wait_ms: u32) -> Self {
        Self { wait: std::time::Duration::from_millis(u64::from(wait_ms)), safe: true }
    }
}

async fn describe_at(connection: &Connection, body: &Body, deadline: Instant) -> Result<wire::TopicDescription, Error> {
    match connection.exchange(body.clone(), &[], deadline).await? {
        (Body::TopicDescription(description), _) => Ok(description),
        (Body::Error(error), _) => Err(error.into()),
        _ => Err(Error::unexpected(connection.address().as_str())),
    }
}

/// Partitions whose leader a description does not name.
fn leaderless_count(description: &wire::TopicDescription) -> usize {
    description.partitions.iter().filter(|partition| partition.leader_address.is_empty()).count()
}

pub(crate) fn timed_out(what: &str, reason: &str) -> Error {
    Error::TimedOut { what: what.to_owned(), reason: reason.to_owned() }
}

fn unreachable(reasons: Vec<(String, String)>) -> Error {
    let servers = reasons.iter().map(|(server, _)| server.as_str()).collect::<Vec<_>>().join(", ");
    let same = reasons.windows(2).all(|pair| pair[0].1 == pair[1].1);
    let reason = match reasons.first() {
        None => "no server is known".to_owned(),
        Some((_, reason)) if same => reason.clone(),
        Some(_) => reasons.iter().map(|(server, reason)| format!("{server}: {reason}")).collect::<Vec<_>>().join("; "),
    };
    Error::Unreachable { servers, reason }
}
