//! What changes a topic or tells of it beyond the metadata: these ask the leaders of its partitions.

use std::{sync::Arc, time::Duration};

use arqon_proto::{GroupId, NodeId, Offset, TopicClass, wire};
use bytes::Bytes;
use futures_util::{
    FutureExt, StreamExt, TryStreamExt,
    future::{BoxFuture, join_all},
    stream,
};
use prost::Message;
use tokio::time::{Instant, sleep, timeout};
use wire::{ErrorCode, metadata_command::Command, trim_answer, trim_request, trim_topic_request};

use crate::{
    broker::Broker,
    error::{error, invalid, malformed, not_found, not_leader},
    metadata::Topic,
    partition::{Partition, TrimBefore},
};

/// The kind under which a node is asked how the partitions are that it leads.
pub(crate) const STATUS_KIND: &str = "status";
/// The kind under which a leader is asked to trim.
pub(crate) const TRIM_KIND: &str = "trim";
/// How long a node may take to say how its partitions are.
const STATUS_PATIENCE: Duration = Duration::from_secs(1);
/// How long leaders are waited for.
const LEADER_PATIENCE: Duration = Duration::from_secs(10);
const LEADER_RETRY_DELAY: Duration = Duration::from_millis(50);
/// Partitions of a topic whose leaders are asked at a time.
pub(crate) const PARTITION_COUNT_MAX: usize = 16;

impl Broker {
    /// How the partitions of `topic` are, as their leaders say, by number. Those whose leader does
    /// not answer within a second are left out.
    pub(crate) async fn leader_statuses(&self, topic: &Topic) -> Vec<wire::PartitionStatus> {
        let groups: Vec<u64> = topic.partitions.iter().map(|at| at.group).collect();
        let mut statuses = self.led_statuses(&groups);
        let request = Bytes::from(wire::StatusRequest { groups }.encode_to_vec());
        let holds = |node: &NodeId| topic.partitions.iter().any(|at| at.replicas.iter().any(|at| at.node == node.0));
        let nodes = self.nodes();
        let others = nodes.iter().map(|info| NodeId(info.node));
        let others = others.filter(|node| *node != self.node && holds(node) && self.host.peer_reachable(*node));
        let asked = others.map(|node| {
            let asking = self.host.forward(node, STATUS_KIND, request.clone());
            async move { wire::StatusAnswer::decode(timeout(STATUS_PATIENCE, asking).await.ok()?.ok()?).ok() }
        });
        statuses.extend(join_all(asked).await.into_iter().flatten().flat_map(|answer| answer.partitions));
        // While leadership moves two may answer: the later term counts.
        statuses.sort_by_key(|status| (status.partition, std::cmp::Reverse(status.term)));
        statuses.dedup_by_key(|status| status.partition);
        statuses
    }

    fn led_statuses(&self, groups: &[u64]) -> Vec<wire::PartitionStatus> {
        let open = groups.iter().filter_map(|group| self.replicas.get(GroupId(*group)));
        open.filter(|partition| partition.group().is_ready()).map(|partition| partition.full_status()).collect()
    }

    pub(crate) fn handle_status(&self, body: Bytes) -> Result<Bytes, String> {
        let request = wire::StatusRequest::decode(body).map_err(|cause| cause.to_string())?;
        Ok(wire::StatusAnswer { partitions: self.led_statuses(&request.groups) }.encode_to_vec().into())
    }

    /// Changes settings of a topic. When partitions were added, waits until they can be written to.
    ///
    /// # Errors
    /// What the metadata refuses; OVERLOADED when it has to be known that a topic is empty and its
    /// leaders do not say so.
    pub(crate) async fn alter_topic(
        &self,
        tenant: String,
        change: wire::AlterTopicRequest,
    ) -> Result<Arc<Topic>, wire::Error> {
        let name = change.topic;
        let topic = self.own_topic(&tenant, &name)?;
        let grows = change.partitions.is_some_and(|count| count as usize > topic.partitions.len());
        let must_be_empty = grows && topic.config.class == TopicClass::Jobs.name();
        let empty = must_be_empty && self.is_empty(&tenant, &topic).await?;
        let command = wire::AlterTopicCommand {
            tenant: tenant.clone(),
            name: name.clone(),
            topic_id: topic.id,
            retention_ms: change.retention_ms,
            retention_bytes: change.retention_bytes,
            attempts_max: change.attempts_max,
            partitions: change.partitions,
            empty,
        };
        self.metadata.submit(Command::AlterTopic(command)).await?;
        let altered = async {
            let mut published = self.metadata.watch();
            let is_known =
                |topic: &Arc<Topic>| change.partitions.is_none_or(|count| topic.partitions.len() >= count as usize);
            let known = published.wait_for(|now| now.state.topic(&tenant, &name).is_none_or(is_known)).await;
            drop(known);
            if grows {
                self.wait_for_leaders(&tenant, &name).await;
            }
        };
        timeout(LEADER_PATIENCE, altered).await.ok();
        self.own_topic(&tenant, &name)
    }

    pub(crate) fn own_topic(&self, tenant: &str, name: &str) -> Result<Arc<Topic>, wire::Error> {
        self.require_started()?;
        self.metadata.published().state.topic(tenant, name).cloned().ok_or_else(|| not_found("topic", name))
    }

    /// Whether neither the jobs topic nor one that was made with it holds a record. Somebody may
    /// write one right after: it then stands as if the partitions had been added after it.
    async fn is_empty(&self, tenant: &str, jobs: &Topic) -> Result<bool, wire::Error> {
        let dead = format!("{}.dead", jobs.config.name);
        for name in [&jobs.config.name, &jobs.config.results_topic, &dead] {
            let Ok(topic) = self.own_topic(tenant, name) else { continue };
            let statuses = self.leader_statuses(&topic).await;
            if statuses.iter().any(|status| status.log_start < status.log_end) {
                return Ok(false);
            }
            if statuses.len() < topic.partitions.len() {
                let message = format!("not every partition of {name:?} has a leader that says whether it is empty");
                return Err(error(ErrorCode::Overloaded, message));
            }
        }
        Ok(true)
    }

    /// Drops old segments of one partition, or of all; see [`Partition::trim`]. Partitions in order.
    ///
    /// # Errors
    /// As [`Partition::trim`]; TARGET_NOT_FOUND; VALIDATION_ERROR naming the field that is missing.
    /// Nothing is dropped when a partition refuses, unless something changes just then.
    pub(crate) async fn trim_topic(
        &self,
        tenant: &str,
        request: &wire::TrimTopicRequest,
    ) -> Result<Vec<wire::TrimmedPartition>, wire::Error> {
        let topic = self.own_topic(tenant, &request.topic)?;
        let before = match request.before {
            Some(trim_topic_request::Before::BeforeOffset(offset)) => trim_request::Before::Offset(offset),
            Some(trim_topic_request::Before::BeforeTimeMs(time_ms)) => trim_request::Before::TimeMs(time_ms),
            None => return Err(invalid("before", "say before which offset or time")),
        };
        let partitions = match (request.partition, before) {
            (Some(partition), _) => vec![partition],
            (None, trim_request::Before::TimeMs(_)) => (0..topic.partitions.len() as u32).collect(),
            (None, trim_request::Before::Offset(_)) => {
                return Err(invalid("partition", "an offset is one of a partition: say which"));
            }
        };
        self.trim_all(&topic, &partitions, before, true).await?;
        self.trim_all(&topic, &partitions, before, false).await
    }

    async fn trim_all(
        &self,
        topic: &Topic,
        partitions: &[u32],
        before: trim_request::Before,
        only_check: bool,
    ) -> Result<Vec<wire::TrimmedPartition>, wire::Error> {
        let trims = partitions.iter().copied().map(|partition| async move {
            let place = || format!("{}/{partition}", topic.config.name);
            let placement = topic.partitions.get(partition as usize).ok_or_else(|| not_found("partition", &place()))?;
            let log_start = self.trim_led(placement, before, only_check).await?;
            Ok(wire::TrimmedPartition { partition, log_start })
        });
        stream::iter(trims).buffered(PARTITION_COUNT_MAX).try_collect().await
    }

    async fn trim_led(
        &self,
        placement: &wire::PartitionPlacement,
        before: trim_request::Before,
        only_check: bool,
    ) -> Result<u64, wire::Error> {
        let request = wire::TrimRequest { group: placement.group, before: Some(before), only_check };
        self.at_leader(placement, |leader| {
            let request = &request;
            async move {
                if leader == self.node { self.trim_here(request).await } else { self.trim_there(leader, request).await }
            }
            .boxed()
        })
        .await
    }

    /// Asks the leader of a partition, wherever it is, for something that may be done twice. One that cannot be
    /// found or does not answer is looked for again for ten seconds.
    ///
    /// # Errors
    /// What `ask` refuses.
    pub(crate) async fn at_leader<'a, T>(
        &self,
        placement: &wire::PartitionPlacement,
        ask: impl Fn(NodeId) -> BoxFuture<'a, Result<T, wire::Error>>,
    ) -> Result<T, wire::Error> {
        let deadline = Instant::now() + LEADER_PATIENCE;
        loop {
            let answer = match self.leader(placement) {
                None => Err(not_leader(None)),
                Some(leader) => ask(leader).await,
            };
            match answer {
                Err(refused)
                    if matches!(refused.code(), ErrorCode::NotLeader | ErrorCode::UnknownOutcome)
                        && Instant::now() < deadline =>
                {
                    sleep(LEADER_RETRY_DELAY).await;
                }
                answer => return answer,
            }
        }
    }

    async fn trim_here(&self, request: &wire::TrimRequest) -> Result<u64, wire::Error> {
        let partition: Partition = self.replicas.get(GroupId(request.group)).ok_or_else(|| not_leader(None))?;
        let before = match request.before {
            Some(trim_request::Before::Offset(offset)) => TrimBefore::Offset(Offset(offset)),
            Some(trim_request::Before::TimeMs(time_ms)) => TrimBefore::TimeMs(time_ms),
            None => return Err(invalid("before", "say before which offset or time")),
        };
        partition.trim(before, request.only_check).await.map(|log_start| log_start.0)
    }

    async fn trim_there(&self, leader: NodeId, request: &wire::TrimRequest) -> Result<u64, wire::Error> {
        let answer = self.forward(leader, TRIM_KIND, request.encode_to_vec().into()).await?;
        match wire::TrimAnswer::decode(answer).ok().and_then(|answer| answer.answer) {
            Some(trim_answer::Answer::LogStart(log_start)) => Ok(log_start),
            Some(trim_answer::Answer::Error(refused)) => Err(refused),
            None => Err(malformed(leader)),
        }
    }

    pub(crate) async fn handle_trim(&self, body: Bytes) -> Result<Bytes, String> {
        let request = wire::TrimRequest::decode(body).map_err(|cause| cause.to_string())?;
        let answer = match self.trim_here(&request).await {
            Ok(log_start) => trim_answer::Answer::LogStart(log_start),
            Err(refused) => trim_answer::Answer::Error(refused),
        };
        Ok(wire::TrimAnswer { answer: Some(answer) }.encode_to_vec().into())
    }
}
