//! What all edges of a node share: finding topics, partitions and leaders, and asking other
//! nodes.
//!
//! ```text
//!   session.rs, control.rs --> Broker --> replicas.rs --> Partition     (led or held here)
//!                                 |-----> Host::forward --> Broker      (another node)
//!                                 '-----> metadata/                     (topics, lease keys)
//! ```

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arqon_proto::{
    Batch, GroupId, LeaseKey, NodeId, OPERATOR_TOPIC, PEER_VERSIONS, SYSTEM_TENANT, Session, Verb, Verifier,
    decode_frame, encode_frame, wire,
};
use arqon_raft::{ForwardError, Host};
use arqon_storage::Store;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::future::{BoxFuture, join_all};
use prost::Message;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use wire::{ErrorCode, frame::Body};

use crate::{
    error::{error, malformed, not_found, not_leader, starting},
    groups::FORGET_GROUP_KIND,
    health::{HEALTH_KIND, Health},
    join::{REJOIN_KIND, WHO_KIND, WHO_LEADER_KIND},
    members::{LostReplica, Progress, TRANSFER_KIND},
    metadata::{COMMITTED_KIND, FORWARD_KIND as METADATA_KIND, MetadataGroup, MetadataState, Topic, wanted_replicas},
    metrics::Metrics,
    operators::Operators,
    partition::{Ahead, Partition, Services},
    replicas::Replicas,
    topics::{STATUS_KIND, TRIM_KIND},
};

const PRODUCE_KIND: &str = "produce";
const REPORT_KIND: &str = "report";
/// How long another node may take to report on itself.
const REPORT_PATIENCE: Duration = Duration::from_secs(1);
/// How often nodes are asked who leads what, while some topic has no replica here.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// How often leadership is given back to where it belongs, and of how many partitions at a time.
const BALANCE_INTERVAL: Duration = Duration::from_secs(1);
const BALANCE_COUNT_MAX: usize = 32;
/// A node gets no leadership back before it has been reachable for this long.
const BALANCE_PATIENCE: Duration = Duration::from_secs(5);
/// How long the creation of a topic waits for leaders.
const LEADERS_PATIENCE: Duration = Duration::from_secs(10);
const LEADERS_POLL_DELAY: Duration = Duration::from_millis(20);
const LEADERS_POLL_DELAY_MAX: Duration = Duration::from_millis(200);

/// What a node tells others of itself.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Report {
    /// Groups that it leads and takes writes for.
    #[prost(uint64, repeated, tag = "1")]
    pub led: Vec<u64>,
    /// How far its metadata is.
    #[prost(uint64, tag = "2")]
    pub next_group: u64,
    /// Whether all its replicas are open.
    #[prost(bool, tag = "3")]
    pub complete: bool,
    /// Replicas on it.
    #[prost(uint32, tag = "4")]
    pub replica_count: u32,
    /// One line for each replica that does not work.
    #[prost(string, repeated, tag = "5")]
    pub problems: Vec<String>,
    /// Replicas that may not be trusted any more.
    #[prost(message, repeated, tag = "6")]
    pub quarantined: Vec<LostReplica>,
    /// How far the changes of replicas are that it leads.
    #[prost(message, repeated, tag = "7")]
    pub moves: Vec<Progress>,
    /// Its disk is slow, and others should lead. For programs before 08e395c950e7 alone: later ones go by the pulse.
    #[prost(bool, tag = "8")]
    pub slow: bool,
    /// Version of its program.
    #[prost(string, tag = "9")]
    pub program: String,
    /// The highest version of the peer protocol that it speaks; 0: it does not tell.
    #[prost(uint32, tag = "10")]
    pub peer_version_max: u32,
}

/// The shared part of a node.
pub(crate) struct Broker {
    pub node: NodeId,
    pub cluster: String,
    /// Version of the program that runs the node.
    pub program: String,
    /// The nodes that this one's configuration names, by number.
    pub configured: Vec<wire::NodeInfo>,
    pub host: Host,
    pub store: Store,
    pub metadata: MetadataGroup,
    pub replicas: Arc<Replicas>,
    pub operators: Operators,
    pub verifier: Verifier,
    pub health: Arc<Health>,
    pub metrics: Arc<Metrics>,
    pub stopping: watch::Sender<bool>,
    /// Leaders of groups without a replica here, as other nodes told.
    pub leaders: Mutex<HashMap<GroupId, NodeId>>,
    /// How far the changes of replicas are that this node leads.
    pub moves: Mutex<HashMap<GroupId, Progress>>,
    /// Whether the disk here is slow.
    pub slow: AtomicBool,
}

impl Broker {
    /// What `token` grants now.
    ///
    /// # Errors
    /// AUTHENTICATION_FAILED, saying why but not repeating the token.
    pub(crate) fn authenticate(&self, token: &str) -> Result<Session, wire::Error> {
        self.verifier
            .verify(token, self.health.now_seconds())
            .map_err(|refused| error(ErrorCode::AuthenticationFailed, refused.to_string()))
    }

    /// The topic `name` as `session` sees it.
    ///
    /// # Errors
    /// TARGET_NOT_FOUND naming it; OVERLOADED while this node cannot know all topics.
    pub(crate) fn topic(&self, session: &Session, name: &str) -> Result<Arc<Topic>, wire::Error> {
        self.topic_of(tenant_of(session, name), name)
    }

    fn topic_of(&self, tenant: &str, name: &str) -> Result<Arc<Topic>, wire::Error> {
        let published = self.metadata.published();
        published.state.topic(tenant, name).cloned().ok_or_else(|| match self.require_started() {
            Ok(()) => not_found("topic", name),
            Err(starting) => starting,
        })
    }

    /// Checks that the topics known here are those of the cluster.
    ///
    /// # Errors
    /// OVERLOADED, with a time to wait, while the node catches up after its start.
    pub(crate) fn require_started(&self) -> Result<(), wire::Error> {
        if self.metadata.is_starting() { Err(starting(self.node)) } else { Ok(()) }
    }

    /// The local replica of a partition.
    ///
    /// # Errors
    /// As [`Broker::topic`]; TARGET_NOT_FOUND naming the partition; NOT_LEADER with the leader's address when
    /// there is no replica here that works.
    pub(crate) fn partition(&self, session: &Session, name: &str, partition: u32) -> Result<Partition, wire::Error> {
        let topic = self.topic(session, name)?;
        self.local_partition(&topic, partition)
    }

    fn local_partition(&self, topic: &Topic, partition: u32) -> Result<Partition, wire::Error> {
        let placement = topic
            .partitions
            .get(partition as usize)
            .ok_or_else(|| not_found("partition", &format!("{}/{partition}", topic.config.name)))?;
        self.replicas.get(GroupId(placement.group)).ok_or_else(|| {
            let elsewhere = self.leader(placement).filter(|leader| *leader != self.node);
            not_leader(elsewhere.and_then(|leader| self.client_address(leader)))
        })
    }

    /// The leader of a partition, as far as it is known here.
    pub(crate) fn leader(&self, placement: &wire::PartitionPlacement) -> Option<NodeId> {
        let group = GroupId(placement.group);
        if let Some(partition) = self.replicas.get(group) {
            return partition.group().leader();
        }
        if let [only] = placement.replicas.as_slice()
            && placement.target.is_empty()
        {
            return Some(NodeId(only.node));
        }
        self.leaders.lock().unwrap_or_else(PoisonError::into_inner).get(&group).copied()
    }

    /// The nodes of the cluster, by number.
    pub(crate) fn nodes(&self) -> Arc<[wire::NodeInfo]> {
        self.metadata.published().nodes.clone()
    }

    /// `host:port` of a node's client port.
    pub(crate) fn client_address(&self, node: NodeId) -> Option<String> {
        self.nodes().iter().find(|info| info.node == node.0).map(|info| info.client_address.clone())
    }

    /// A topic as clients see it.
    pub(crate) fn describe(&self, topic: &Topic) -> wire::TopicDescription {
        let config = &topic.config;
        let address = |node: u64| self.client_address(NodeId(node)).unwrap_or_default();
        let partition = |(index, placement): (usize, &wire::PartitionPlacement)| {
            let leader = self.leader(placement).map_or(0, |leader| leader.0);
            wire::PartitionDescription {
                partition: index as u32,
                leader_node: leader,
                leader_address: if leader == 0 { String::new() } else { address(leader) },
                replica_nodes: placement.replicas.iter().map(|at| at.node).collect(),
                replica_addresses: placement.replicas.iter().map(|at| address(at.node)).collect(),
            }
        };
        wire::TopicDescription {
            topic: config.name.clone(),
            class: config.class.clone(),
            partitions: topic.partitions.iter().enumerate().map(partition).collect(),
            replication: config.replication,
            retention_ms: config.retention_ms,
            retention_bytes: config.retention_bytes,
            attempts_max: config.attempts_max,
            results_topic: config.results_topic.clone(),
        }
    }

    /// Creates a topic and waits until its partitions can be written to.
    ///
    /// # Errors
    /// What the metadata refuses; UNKNOWN_OUTCOME where the topic was made and this node does not see it. A topic
    /// whose leaders are late is no error.
    pub(crate) async fn create_topic(&self, config: wire::TopicConfig) -> Result<Arc<Topic>, wire::Error> {
        let (tenant, name) = (config.tenant.clone(), config.name.clone());
        let request_id = Bytes::copy_from_slice(uuid::Uuid::now_v7().as_bytes());
        let command = wire::CreateTopicCommand { config: Some(config), request_id };
        self.metadata.submit(wire::metadata_command::Command::CreateTopic(command)).await?;
        let created = async {
            let mut published = self.metadata.watch();
            let known = published.wait_for(|published| published.state.topic(&tenant, &name).is_some()).await;
            drop(known);
            self.wait_for_leaders(&tenant, &name).await;
        };
        timeout(LEADERS_PATIENCE, created).await.ok();
        self.topic_of(&tenant, &name).map_err(|refused| match refused.code() {
            ErrorCode::TargetNotFound => {
                let message =
                    format!("topic {name:?} was made; this node is behind and does not see it, or it is gone");
                error(ErrorCode::UnknownOutcome, message)
            }
            _ => refused,
        })
    }

    /// Deletes a topic.
    ///
    /// # Errors
    /// What the metadata refuses.
    pub(crate) async fn delete_topic(&self, tenant: String, name: String) -> Result<(), wire::Error> {
        let command = wire::DeleteTopicCommand { tenant: tenant.clone(), name: name.clone() };
        self.metadata.submit(wire::metadata_command::Command::DeleteTopic(command)).await?;
        let mut published = self.metadata.watch();
        let gone = published.wait_for(|published| published.state.topic(&tenant, &name).is_none());
        timeout(LEADERS_PATIENCE, gone).await.map(drop).ok();
        Ok(())
    }

    /// Why the node should get no clients now, if so.
    pub(crate) fn not_ready(&self) -> Option<String> {
        let status = self.metadata.group().status();
        if *self.stopping.borrow() {
            return Some("the node is shutting down".to_owned());
        }
        if let Some(reason) = status.stopped {
            return Some(format!("the metadata group has stopped: {reason}"));
        }
        if status.leader.is_none() {
            return Some("the metadata group has no leader".to_owned());
        }
        let published = self.metadata.published();
        if published.state.nodes().is_empty() || published.lease_keys.is_empty() {
            return Some("the cluster is not formed yet".to_owned());
        }
        if let Some(problem) = self.replicas.problems().into_iter().next() {
            return Some(problem);
        }
        (!self.replicas.complete(&published.state)).then(|| "replicas are being opened".to_owned())
    }

    /// A log here that a failed write or sync has closed until this node starts again: one line. What stops a replica
    /// otherwise would stop it once more.
    pub(crate) fn closed(&self) -> Option<String> {
        let metadata = self.metadata.group().closed().map(|reason| format!("the metadata group: {reason}"));
        metadata.or_else(|| self.replicas.closed())
    }

    // Until every partition of the topic and of those made with it has a leader, and every
    // node that answers knows the topic, so that clients may go to any of them.
    pub(crate) async fn wait_for_leaders(&self, tenant: &str, name: &str) {
        let mut delay = LEADERS_POLL_DELAY;
        loop {
            let published = self.metadata.published();
            let Some(topic) = published.state.topic(tenant, name) else { return };
            let dead = format!("{name}.dead");
            let made = [name, &topic.config.results_topic, &dead].map(|name| published.state.topic(tenant, name));
            let partitions = made.into_iter().flatten().flat_map(|topic| &topic.partitions);
            let reports = self.reports().await;
            // A replica here must have heard of its leader, too: this node describes the topic.
            let is_heard = |at: &wire::PartitionPlacement| {
                !at.replicas.iter().any(|replica| replica.node == self.node.0) || self.leader(at).is_some()
            };
            let led_groups: HashSet<u64> = reports.iter().flat_map(|(_, report)| report.led.iter().copied()).collect();
            let led = |at: &wire::PartitionPlacement| led_groups.contains(&at.group) && is_heard(at);
            let is_known = reports.iter().all(|(_, report)| report.next_group >= published.state.next_group());
            let ready = is_known && partitions.into_iter().all(led);
            if ready {
                return;
            }
            // Each look asks every node about every partition.
            sleep(delay).await;
            delay = (delay * 2).min(LEADERS_POLL_DELAY_MAX);
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = [self.replicas.problems(), self.replicas.damage(), self.health.problems()].concat();
        if let Some(reason) = self.metadata.group().status().stopped {
            problems.push(format!("the metadata group has stopped: {reason}"));
        }
        if self.slow.load(Ordering::Relaxed) {
            problems.push("the disk takes over 500 ms for a flush; other nodes lead".to_owned());
        }
        problems
    }

    /// What this node tells others of itself.
    pub(crate) fn report(&self) -> Report {
        let published = self.metadata.published();
        let open = self.replicas.open();
        let led = open.iter().filter(|partition| partition.group().is_ready());
        Report {
            led: led.map(|partition| partition.group_id().0).collect(),
            next_group: published.state.next_group(),
            complete: self.replicas.complete(&published.state),
            replica_count: open.len() as u32,
            problems: self.problems(),
            quarantined: self.replicas.quarantined(),
            moves: self.moves.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect(),
            slow: self.slow.load(Ordering::Relaxed),
            program: self.program.clone(),
            peer_version_max: PEER_VERSIONS.max(),
        }
    }

    /// The reports of this node and of all others that answer within a second.
    pub(crate) async fn reports(&self) -> Vec<(NodeId, Report)> {
        let nodes = self.nodes();
        let others = nodes.iter().map(|info| NodeId(info.node)).filter(|node| *node != self.node);
        let asked = others.filter(|node| self.host.peer_reachable(*node)).map(|node| async move {
            let answer =
                timeout(REPORT_PATIENCE, self.host.forward(node, REPORT_KIND, Bytes::new())).await.ok()?.ok()?;
            Some((node, Report::decode(answer).ok()?))
        });
        let mut reports: Vec<_> = join_all(asked).await.into_iter().flatten().collect();
        reports.push((self.node, self.report()));
        reports.sort_by_key(|(node, _)| node.0);
        reports
    }

    /// Keeps up with the leaders of partitions that have no replica here, until stopped.
    pub(crate) async fn run_leader_watch(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        loop {
            let published = self.metadata.published();
            let elsewhere = |at: &wire::PartitionPlacement| {
                (at.replicas.len() > 1 || !at.target.is_empty()) && !at.replicas.iter().any(|at| at.node == self.node.0)
            };
            if published.state.topics().any(|topic| topic.partitions.iter().any(elsewhere)) {
                let reports = self.reports().await;
                let leaders =
                    reports.iter().flat_map(|(node, report)| report.led.iter().map(|group| (GroupId(*group), *node)));
                *self.leaders.lock().unwrap_or_else(PoisonError::into_inner) = leaders.collect();
            }
            tokio::select! {
                () = sleep(REPORT_INTERVAL) => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
        }
    }

    /// Gives leadership back to the first replica of each partition, where placement spreads it
    /// evenly over the nodes, once that replica has caught up. A few at a time, until stopped.
    pub(crate) async fn run_balance(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        let mut reachable_since: HashMap<NodeId, Instant> = HashMap::new();
        loop {
            tokio::select! {
                () = sleep(BALANCE_INTERVAL) => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            reachable_since.retain(|node, _| self.host.peer_reachable(*node));
            for info in self.nodes().iter().filter(|info| self.host.peer_reachable(info.node.into())) {
                reachable_since.entry(info.node.into()).or_insert_with(Instant::now);
            }
            for (partition, heir) in self.led_for_others(&reachable_since) {
                if let Err(cause) = partition.group().transfer_leader(heir).await {
                    tracing::debug!(group = partition.group_id().0, %cause, "leadership not given back");
                }
            }
        }
    }

    // Partitions led here whose first replica is on another node that could lead them now.
    fn led_for_others(&self, reachable_since: &HashMap<NodeId, Instant>) -> Vec<(Partition, NodeId)> {
        let published = self.metadata.published();
        let is_settled =
            |node: NodeId| reachable_since.get(&node).is_some_and(|since| since.elapsed() >= BALANCE_PATIENCE);
        let placements = published.state.topics().flat_map(|topic| &topic.partitions);
        placements
            .filter_map(|placement| {
                let heir = NodeId(wanted_replicas(placement).first()?.node);
                if heir == self.node || !is_settled(heir) || !self.health.may_lead(heir) {
                    return None;
                }
                let partition = self.replicas.get(GroupId(placement.group))?;
                let may_move = partition.group().is_ready() && partition.group().is_caught_up(heir);
                may_move.then_some((partition, heir))
            })
            .take(BALANCE_COUNT_MAX)
            .collect()
    }

    /// Answers a request that another node of the cluster forwarded.
    pub(crate) async fn handle_forward(&self, kind: String, body: Bytes) -> Result<Bytes, String> {
        match kind.as_str() {
            METADATA_KIND => Ok(self.metadata.handle_forward(body).await),
            COMMITTED_KIND => self.metadata.handle_committed().await,
            WHO_KIND => self.metadata.handle_who(body, true).await,
            WHO_LEADER_KIND => self.metadata.handle_who(body, false).await,
            REJOIN_KIND => self.metadata.handle_rejoin(body).await,
            TRANSFER_KIND => self.handle_transfer(&body).await,
            REPORT_KIND => Ok(self.report().encode_to_vec().into()),
            PRODUCE_KIND => self.handle_produce(body).await,
            HEALTH_KIND => Ok(self.health.pulse(self.slow.load(Ordering::Relaxed)).encode_to_vec().into()),
            STATUS_KIND => self.handle_status(body),
            TRIM_KIND => self.handle_trim(body).await,
            FORGET_GROUP_KIND => self.handle_forget_group(body).await,
            other => Err(format!("this node does not know requests of the kind {other:?}")),
        }
    }

    async fn handle_produce(&self, body: Bytes) -> Result<Bytes, String> {
        let (tenant, request, batch) = decode_produce(body).map_err(|error| error.to_string())?;
        let produced = async {
            let topic = self.topic_of(&tenant, &request.topic)?;
            let partition = self.local_partition(&topic, request.partition)?;
            partition.produce(request, batch).await
        };
        let body = match produced.await {
            Ok(produced) => Body::Produced(produced),
            Err(refused) => Body::Error(refused),
        };
        let frame = wire::Frame { request_id: 0, body: Some(body) };
        encode_frame(&frame, 0).map_err(|error| error.to_string())
    }

    // On the leader, wherever it is; one change of leader is followed.
    async fn produce_anywhere(
        &self,
        tenant: String,
        request: wire::Produce,
        batch: Batch,
    ) -> Result<wire::Produced, wire::Error> {
        let topic = self.topic_of(&tenant, &request.topic)?;
        let deadline = Instant::now() + LEADERS_PATIENCE;
        loop {
            let answer = self.produce_once(&tenant, &topic, &request, &batch).await;
            let is_late = Instant::now() >= deadline;
            match answer {
                Err(refused) if refused.code() == ErrorCode::NotLeader && !is_late => sleep(LEADERS_POLL_DELAY).await,
                answer => return answer,
            }
        }
    }

    async fn produce_once(
        &self,
        tenant: &str,
        topic: &Topic,
        request: &wire::Produce,
        batch: &Batch,
    ) -> Result<wire::Produced, wire::Error> {
        let name = || format!("{}/{}", topic.config.name, request.partition);
        let placement =
            topic.partitions.get(request.partition as usize).ok_or_else(|| not_found("partition", &name()))?;
        let Some(leader) = self.leader(placement) else {
            return Err(not_leader(None));
        };
        if leader == self.node {
            return self.local_partition(topic, request.partition)?.produce(request.clone(), batch.clone()).await;
        }
        let body = encode_produce(tenant, request, batch)?;
        let answer = self.forward(leader, PRODUCE_KIND, body).await?;
        match decode_frame::<wire::Frame>(answer).map_err(|_| malformed(leader))?.0.body {
            Some(Body::Produced(produced)) => Ok(produced),
            Some(Body::Error(refused)) => Err(refused),
            _ => Err(malformed(leader)),
        }
    }

    /// What `leader` answers under `kind`.
    ///
    /// # Errors
    /// NOT_LEADER when it refuses; UNKNOWN_OUTCOME when it cannot be reached.
    pub(crate) async fn forward(&self, leader: NodeId, kind: &str, body: Bytes) -> Result<Bytes, wire::Error> {
        self.host.forward(leader, kind, body).await.map_err(|failure| match failure {
            ForwardError::Refused(reason) => error(ErrorCode::NotLeader, reason),
            ForwardError::Unreachable { .. } => error(ErrorCode::UnknownOutcome, failure.to_string()),
        })
    }
}

/// Whose topic `name` is: the session's, but for the one that all tenants share.
fn tenant_of<'a>(session: &'a Session, name: &str) -> &'a str {
    if name == OPERATOR_TOPIC { SYSTEM_TENANT } else { &session.tenant }
}

/// Checks that `session` allows `verb` on `topic`.
///
/// # Errors
/// AUTHORIZATION_DENIED naming both.
pub(crate) fn authorize(session: &Session, verb: Verb, topic: &str) -> Result<(), wire::Error> {
    if session.allows(verb, topic) {
        return Ok(());
    }
    let shown: String = topic.chars().take(200).collect();
    let message = format!("the token does not allow {verb}:{shown}");
    Err(wire::Error { field: shown, ..error(ErrorCode::AuthorizationDenied, message) })
}

/// Checks that `session` may know of `topic`: whoever may do anything with it, and operators,
/// which look up where results go.
///
/// # Errors
/// AUTHORIZATION_DENIED naming it.
pub(crate) fn authorize_describe(session: &Session, topic: &str) -> Result<(), wire::Error> {
    let may = [Verb::Publish, Verb::Admin].into_iter().any(|verb| session.allows(verb, topic));
    let is_operator = session.executes_any() && !topic.starts_with("system.");
    if may || is_operator { Ok(()) } else { authorize(session, Verb::Subscribe, topic) }
}

// 2 tenant size | tenant | frame with the request | batch
fn encode_produce(tenant: &str, request: &wire::Produce, batch: &Batch) -> Result<Bytes, wire::Error> {
    let frame = wire::Frame { request_id: 0, body: Some(Body::Produce(request.clone())) };
    let too_large = |cause: arqon_proto::DecodeError| error(ErrorCode::ValidationError, cause.to_string());
    let head = encode_frame(&frame, batch.header.batch_size()).map_err(too_large)?;
    let mut out = BytesMut::with_capacity(2 + tenant.len() + head.len() + batch.header.batch_size());
    out.put_u16_le(tenant.len() as u16);
    out.extend_from_slice(tenant.as_bytes());
    out.extend_from_slice(&head);
    batch.encode_into(&mut out);
    Ok(out.freeze())
}

fn decode_produce(mut body: Bytes) -> Result<(String, wire::Produce, Batch), arqon_proto::DecodeError> {
    use arqon_proto::DecodeError::{Protobuf, Text, Truncated};
    let have = body.len();
    let cut = |need| Truncated { what: "forwarded produce", need, have };
    if have < 2 {
        return Err(cut(2));
    }
    let tenant_size = usize::from(body.get_u16_le());
    if body.len() < tenant_size {
        return Err(cut(2 + tenant_size));
    }
    let tenant = String::from_utf8(body.split_to(tenant_size).into()).map_err(|_| Text { field: "tenant" })?;
    let (frame, mut rest) = decode_frame::<wire::Frame>(body)?;
    let Some(Body::Produce(request)) = frame.body else {
        return Err(Protobuf { what: "forwarded produce" });
    };
    let batch = Batch::split_from(&mut rest)?;
    Ok((tenant, request, batch))
}

/// The broker as its partitions see it. Weak: the broker holds the partitions.
pub(crate) struct BrokerServices {
    broker: Weak<Broker>,
    health: Arc<Health>,
    ahead: Ahead,
}

impl BrokerServices {
    pub(crate) fn new(broker: &Arc<Broker>, ahead: Ahead) -> Self {
        Self { broker: Arc::downgrade(broker), health: broker.health.clone(), ahead }
    }
}

impl Services for BrokerServices {
    fn lease_keys(&self) -> Arc<[LeaseKey]> {
        self.broker.upgrade().map(|broker| broker.metadata.published().lease_keys.clone()).unwrap_or_default()
    }

    fn node_client_address(&self, node: NodeId) -> Option<String> {
        self.broker.upgrade()?.client_address(node)
    }

    fn partition_count(&self, tenant: &str, topic: &str) -> Option<u32> {
        let published = self.broker.upgrade()?.metadata.published();
        published.state.topic(tenant, topic).map(|topic| topic.partitions.len() as u32)
    }

    fn produce_routed(
        &self,
        tenant: String,
        request: wire::Produce,
        batch: Batch,
    ) -> BoxFuture<'static, Result<wire::Produced, wire::Error>> {
        let broker = self.broker.clone();
        Box::pin(async move {
            match broker.upgrade() {
                Some(broker) => broker.produce_anywhere(tenant, request, batch).await,
                None => Err(error(ErrorCode::Overloaded, "the node is shutting down")),
            }
        })
    }

    fn now_ms(&self) -> u64 {
        self.health.now_ms()
    }

    fn ahead(&self) -> &Ahead {
        &self.ahead
    }

    fn storage_refusal(&self, nodes: &[NodeId]) -> Option<String> {
        self.health.storage_refusal(nodes)
    }

    fn clock_is_sound(&self) -> bool {
        !self.health.is_clock_off()
    }
}

impl Broker {
    /// Number of topics and partitions, and partitions that nobody leads by `reports`.
    pub(crate) fn counts(state: &MetadataState, reports: &[(NodeId, Report)]) -> (u32, u32, u32) {
        let led: HashSet<u64> = reports.iter().flat_map(|(_, report)| report.led.iter().copied()).collect();
        let groups = || state.topics().flat_map(|topic| &topic.partitions);
        let leaderless = groups().filter(|at| !led.contains(&at.group)).count();
        (state.topics().count() as u32, groups().count() as u32, leaderless as u32)
    }
}
