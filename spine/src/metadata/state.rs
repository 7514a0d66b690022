//! The metadata as a pure state machine.
//!
//! Group and replica ids only ever grow, so a group with an id below `next_group` that no
//! topic has was deleted, and its data may go.

mod alter;

use std::{collections::BTreeMap, sync::Arc};

use arqon_proto::{
    DecodeError, LEASE_KEY_SIZE, LeaseKey, OPERATOR_TOPIC, SYSTEM_TENANT, TopicClass, check_tenant, check_topic,
    limits, results_topic_of, wire,
};
use bytes::Bytes;
use prost::Message;
use wire::metadata_command::Command;

use crate::error::{error, invalid, not_found};

/// Partitions of all topics together.
const PARTITION_TOTAL_MAX: usize = 20_000;
/// Lease keys that are kept: tokens signed with older ones are refused.
const LEASE_KEY_COUNT: usize = 3;
/// Replicas of a partition when its topic names no number, if there are as many nodes.
const REPLICATION_DEFAULT: usize = 3;
/// The operators' topic keeps this much per partition, in bytes.
const OPERATOR_TOPIC_RETENTION_SIZE: u64 = 256 << 20;

/// A topic, its settings and where its partitions are.
#[derive(Clone, Debug, PartialEq)]
pub struct Topic {
    /// Number of the topic, never used twice.
    pub id: u64,
    /// Its settings, complete.
    pub config: Arc<wire::TopicConfig>,
    /// One per partition, by its index.
    pub partitions: Vec<wire::PartitionPlacement>,
    request_id: Bytes,
}

impl Topic {
    fn to_wire(&self) -> wire::TopicState {
        wire::TopicState {
            topic_id: self.id,
            config: Some((*self.config).clone()),
            partitions: self.partitions.clone(),
            request_id: self.request_id.clone(),
        }
    }

    fn from_wire(topic: wire::TopicState) -> Result<Self, DecodeError> {
        let config = topic.config.ok_or(DecodeError::Protobuf { what: "topic without settings" })?;
        Ok(Self {
            id: topic.topic_id,
            config: Arc::new(config),
            partitions: topic.partitions,
            request_id: topic.request_id,
        })
    }
}

/// The cluster's metadata. Cloning is cheap enough to publish every change.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetadataState {
    pub(super) nodes: Vec<wire::NodeInfo>,
    // By tenant and then name, so that a look-up needs no owned key.
    pub(super) topics: BTreeMap<String, BTreeMap<String, Arc<Topic>>>,
    lease_keys: Vec<wire::LeaseKeyState>,
    pub(super) next_group: u64,
    pub(super) next_replica: u64,
    next_topic: u64,
    pub(super) unsafe_recoveries: Vec<wire::UnsafeRecoveryCommand>,
}

impl MetadataState {
    /// The nodes of the cluster; empty before it is formed.
    #[must_use]
    pub fn nodes(&self) -> &[wire::NodeInfo] {
        &self.nodes
    }

    /// The topic `name` of `tenant`.
    #[must_use]
    pub fn topic(&self, tenant: &str, name: &str) -> Option<&Arc<Topic>> {
        self.topics.get(tenant)?.get(name)
    }

    /// All topics, by tenant and name.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<Topic>> {
        self.topics.values().flat_map(BTreeMap::values)
    }

    /// The topics of `tenant`, by name.
    pub fn topics_of(&self, tenant: &str) -> impl Iterator<Item = &Arc<Topic>> {
        self.topics.get(tenant).into_iter().flat_map(BTreeMap::values)
    }

    /// Every group below this number has existed.
    #[must_use]
    pub fn next_group(&self) -> u64 {
        self.next_group
    }

    /// The keys that lease tokens may be signed with, the newest last.
    #[must_use]
    pub fn lease_keys(&self) -> Vec<LeaseKey> {
        let key =
            |key: &wire::LeaseKeyState| Some(LeaseKey::new(key.key_id, key.secret.first_chunk::<LEASE_KEY_SIZE>()?));
        self.lease_keys.iter().filter_map(key).collect()
    }

    /// Number that the next lease key takes.
    #[must_use]
    pub fn next_lease_key_id(&self) -> u32 {
        self.lease_keys.last().map_or(1, |key| key.key_id + 1)
    }

    /// Takes one command. A refused one changes nothing.
    ///
    /// # Errors
    /// ALREADY_EXISTS, TARGET_NOT_FOUND or VALIDATION_ERROR, naming the field.
    pub fn apply(&mut self, command: wire::MetadataCommand) -> Result<Option<Arc<Topic>>, wire::Error> {
        match command.command {
            Some(Command::FormCluster(command)) => self.form_cluster(command.nodes).map(|()| None),
            Some(Command::CreateTopic(command)) => self.create_topic(command).map(Some),
            Some(Command::DeleteTopic(command)) => self.delete_topic(&command).map(|()| None),
            Some(Command::AddLeaseKey(command)) => self.add_lease_key(command).map(|()| None),
            Some(Command::AddNode(command)) => self.add_node(command.info).map(|()| None),
            Some(Command::RemoveNode(command)) => self.remove_node(command.node).map(|()| None),
            Some(Command::DrainNode(command)) => self.drain_node(&command).map(|()| None),
            Some(Command::RejoinNode(command)) => self.rejoin_node(&command).map(|()| None),
            Some(Command::MovePartition(command)) => self.move_partition(&command).map(|()| None),
            Some(Command::CancelMove(command)) => self.cancel_move(command.group).map(|()| None),
            Some(Command::ReplaceReplica(command)) => self.replace_replica(&command).map(|()| None),
            Some(Command::FinishMove(command)) => self.finish_move(&command).map(|()| None),
            Some(Command::NodeSeen(command)) => self.node_seen(&command).map(|()| None),
            Some(Command::ExtendPartition(command)) => self.extend_partition(command.group).map(|()| None),
            Some(Command::UnsafeRecovery(command)) => self.recover_unsafely(command).map(|()| None),
            Some(Command::PreferLeader(command)) => self.prefer_leader(&command).map(|()| None),
            Some(Command::AlterTopic(command)) => self.alter_topic(&command).map(Some),
            None => Err(invalid("command", "the command is empty or newer than this program")),
        }
    }

    fn form_cluster(&mut self, mut nodes: Vec<wire::NodeInfo>) -> Result<(), wire::Error> {
        if !self.nodes.is_empty() {
            return Err(error(wire::ErrorCode::AlreadyExists, "the cluster is formed already"));
        }
        nodes.sort_by_key(|info| info.node);
        let unique = nodes.windows(2).all(|pair| pair[0].node != pair[1].node);
        if nodes.is_empty() || nodes[0].node == 0 || !unique {
            return Err(invalid("nodes", "a cluster needs nodes with different numbers from 1"));
        }
        // The metadata group's replicas have the numbers of their nodes.
        self.next_replica = nodes.last().map_or(1, |info| info.node + 1);
        self.next_group = 1;
        self.next_topic = 1;
        // Whoever forms a cluster has voted.
        self.nodes = nodes.into_iter().map(|info| wire::NodeInfo { seen: true, ..info }).collect();
        let operators = wire::TopicConfig {
            tenant: SYSTEM_TENANT.to_owned(),
            name: OPERATOR_TOPIC.to_owned(),
            class: TopicClass::System.name().to_owned(),
            partitions: 1,
            // Every node reads it from its own replica.
            replication: self.nodes.len() as u32,
            retention_bytes: OPERATOR_TOPIC_RETENTION_SIZE,
            ..Default::default()
        };
        self.place(operators, &Bytes::new());
        Ok(())
    }

    fn add_lease_key(&mut self, command: wire::AddLeaseKeyCommand) -> Result<(), wire::Error> {
        if command.secret.len() != LEASE_KEY_SIZE {
            return Err(invalid("secret", format!("a lease key has {LEASE_KEY_SIZE} bytes")));
        }
        if command.key_id != self.next_lease_key_id() {
            return Err(error(wire::ErrorCode::AlreadyExists, "another lease key took this number"));
        }
        self.lease_keys.push(wire::LeaseKeyState { key_id: command.key_id, secret: command.secret });
        let surplus = self.lease_keys.len().saturating_sub(LEASE_KEY_COUNT);
        self.lease_keys.drain(..surplus);
        Ok(())
    }

    fn create_topic(&mut self, command: wire::CreateTopicCommand) -> Result<Arc<Topic>, wire::Error> {
        let config = command.config.ok_or_else(|| invalid("config", "the topic has no settings"))?;
        if let Some(known) = self.topic(&config.tenant, &config.name) {
            if !command.request_id.is_empty() && known.request_id == command.request_id {
                return Ok(known.clone());
            }
            let message = format!("topic {:?} exists already", config.name);
            return Err(wire::Error { field: config.name, ..error(wire::ErrorCode::AlreadyExists, message) });
        }
        let config = self.complete(config)?;
        let mut wanted = vec![config.clone()];
        if config.class == TopicClass::Jobs.name() {
            wanted.extend(self.companions(&config)?);
        }
        let existing: usize = self.topics().map(|topic| topic.partitions.len()).sum();
        let added: usize = wanted.iter().map(|config| config.partitions as usize).sum();
        if existing + added > PARTITION_TOTAL_MAX {
            return Err(invalid("partitions", format!("the cluster would have more than {PARTITION_TOTAL_MAX}")));
        }
        for companion in wanted.drain(1..) {
            self.place(companion, &command.request_id);
        }
        Ok(self.place(config, &command.request_id))
    }

    // Fills in what was left out and refuses what cannot be.
    fn complete(&self, mut config: wire::TopicConfig) -> Result<wire::TopicConfig, wire::Error> {
        if self.nodes.is_empty() {
            return Err(error(wire::ErrorCode::Overloaded, "the cluster is not formed yet"));
        }
        let named = |error: arqon_proto::NameError| invalid(error.field, error.to_string());
        check_tenant("tenant", &config.tenant).map_err(named)?;
        check_topic(&config.name).map_err(named)?;
        if config.tenant == SYSTEM_TENANT || TopicClass::of(&config.name) == TopicClass::System {
            return Err(invalid("name", format!("topic {:?}: names under \"system.\" are reserved", config.name)));
        }
        let class = topic_class(&config)?;
        config.class = class.name().to_owned();
        config.partitions = config.partitions.max(1);
        if config.partitions > limits::PARTITION_COUNT_MAX {
            return Err(invalid("partitions", format!("the limit is {}", limits::PARTITION_COUNT_MAX)));
        }
        let node_count = self.nodes.iter().filter(|info| !info.leaving).count();
        if config.replication == 0 {
            config.replication = node_count.min(REPLICATION_DEFAULT) as u32;
        }
        if config.replication as usize > node_count {
            return Err(invalid(
                "replication",
                format!("{} replicas need as many nodes, there are {node_count}", config.replication),
            ));
        }
        if config.retention_ms == 0 && config.retention_bytes == 0 {
            return Err(invalid("retention", "a topic needs a retention by time or size"));
        }
        if class != TopicClass::Jobs {
            if !config.results_topic.is_empty() || config.attempts_max != 0 {
                let field = if config.results_topic.is_empty() { "attempts_max" } else { "results_topic" };
                return Err(invalid(field, "only a jobs topic has one"));
            }
            return Ok(config);
        }
        if config.attempts_max == 0 {
            config.attempts_max = limits::ATTEMPT_COUNT_DEFAULT;
        }
        if config.results_topic.is_empty() {
            config.results_topic = results_topic_of(&config.name);
        }
        Ok(config)
    }

    // The results and dead-letter topics of a jobs topic that do not exist yet.
    fn companions(&self, jobs: &wire::TopicConfig) -> Result<Vec<wire::TopicConfig>, wire::Error> {
        let mut missing = Vec::new();
        for (name, class) in
            [(jobs.results_topic.clone(), TopicClass::Results), (dead_topic(&jobs.name), TopicClass::Dead)]
        {
            check_topic(&name).map_err(|error| invalid(error.field, error.to_string()))?;
            let Some(known) = self.topic(&jobs.tenant, &name) else {
                missing.push(wire::TopicConfig {
                    name,
                    class: class.name().to_owned(),
                    attempts_max: 0,
                    results_topic: String::new(),
                    ..jobs.clone()
                });
                if TopicClass::of(&missing[missing.len() - 1].name) != class {
                    return Err(invalid("results_topic", "its name must end in .results or .features"));
                }
                continue;
            };
            if known.config.class != class.name() {
                return Err(invalid("results_topic", format!("topic {name:?} is of class {}", known.config.class)));
            }
            // Results of partition p go to partition p.
            if class == TopicClass::Results && known.config.partitions != jobs.partitions {
                let problem = format!(
                    "topic {name:?} has {} partitions; a jobs topic has as many as its results topic",
                    known.config.partitions
                );
                return Err(invalid("partitions", problem));
            }
        }
        Ok(missing)
    }

    fn delete_topic(&mut self, command: &wire::DeleteTopicCommand) -> Result<(), wire::Error> {
        let (tenant, name) = (&command.tenant, &command.name);
        if tenant == SYSTEM_TENANT {
            return Err(invalid("name", format!("topic {name:?} belongs to the bus")));
        }
        if self.topic(tenant, name).is_none() {
            return Err(not_found("topic", name));
        }
        let user = self.topics_of(tenant).find(|topic| {
            let config = &topic.config;
            config.class == TopicClass::Jobs.name()
                && (config.results_topic == *name || dead_topic(&config.name) == *name)
        });
        if let Some(user) = user {
            return Err(invalid(
                "name",
                format!("topic {name:?} is used by {:?}; delete that first", user.config.name),
            ));
        }
        if let Some(topics) = self.topics.get_mut(tenant) {
            topics.remove(name);
            if topics.is_empty() {
                self.topics.remove(tenant);
            }
        }
        Ok(())
    }

    // Round robin over the nodes by group number, so that preferred leaders are spread evenly
    // over the partitions of all topics.
    fn place_partition(&mut self, replication: u32) -> wire::PartitionPlacement {
        let nodes: Vec<_> = self.nodes.iter().filter(|info| !info.leaving).cloned().collect();
        let group = self.next_group;
        self.next_group += 1;
        let replicas = (0..u64::from(replication)).map(|turn| {
            let info = &nodes[((group + turn) % nodes.len() as u64) as usize];
            let replica = self.next_replica;
            self.next_replica += 1;
            wire::ReplicaNode { replica, node: info.node, peer_address: info.peer_address.clone() }
        });
        wire::PartitionPlacement { group, replicas: replicas.collect(), ..Default::default() }
    }

    fn place(&mut self, config: wire::TopicConfig, request_id: &Bytes) -> Arc<Topic> {
        let partitions = (0..config.partitions).map(|_| self.place_partition(config.replication)).collect();
        let (tenant, name) = (config.tenant.clone(), config.name.clone());
        let topic = Arc::new(Topic {
            id: self.next_topic,
            config: Arc::new(config),
            partitions,
            request_id: request_id.clone(),
        });
        self.next_topic += 1;
        self.topics.entry(tenant).or_default().insert(name, topic.clone());
        topic
    }

    /// The whole state as bytes; equal states give equal bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        wire::MetadataState {
            nodes: self.nodes.clone(),
            topics: self.topics().map(|topic| topic.to_wire()).collect(),
            lease_keys: self.lease_keys.clone(),
            next_group: self.next_group,
            next_replica: self.next_replica,
            next_topic: self.next_topic,
            unsafe_recoveries: self.unsafe_recoveries.clone(),
        }
        .encode_to_vec()
        .into()
    }

    /// The state that `bytes` encode; none give the state before the first command.
    ///
    /// # Errors
    /// Malformed protobuf, or a topic without settings.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let state = wire::MetadataState::decode(bytes).map_err(|_| DecodeError::Protobuf { what: "metadata state" })?;
        let mut topics = BTreeMap::<String, BTreeMap<String, Arc<Topic>>>::new();
        for topic in state.topics {
            let topic = Topic::from_wire(topic)?;
            let by_name = topics.entry(topic.config.tenant.clone()).or_default();
            by_name.insert(topic.config.name.clone(), Arc::new(topic));
        }
        Ok(Self {
            nodes: state.nodes,
            topics,
            lease_keys: state.lease_keys,
            next_group: state.next_group,
            next_replica: state.next_replica,
            next_topic: state.next_topic,
            unsafe_recoveries: state.unsafe_recoveries,
        })
    }
}

fn dead_topic(jobs: &str) -> String {
    format!("{jobs}.dead")
}

// A name that says what its topic is for is believed; only a plain name may be told.
fn topic_class(config: &wire::TopicConfig) -> Result<TopicClass, wire::Error> {
    let by_name = TopicClass::of(&config.name);
    if config.class.is_empty() || config.class == by_name.name() {
        return Ok(by_name);
    }
    if by_name != TopicClass::Events {
        let problem =
            format!("topic {:?} is of class {} by its name, not {:?}", config.name, by_name.name(), config.class);
        return Err(invalid("class", problem));
    }
    [TopicClass::Jobs, TopicClass::Streams]
        .into_iter()
        .find(|class| class.name() == config.class)
        .ok_or_else(|| invalid("class", format!("{:?} is none of events, jobs, streams", config.class)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formed(node_count: u64) -> MetadataState {
        let mut state = MetadataState::default();
        let nodes = (1..=node_count).rev().map(|node| wire::NodeInfo { node, ..Default::default() }).collect();
        run(&mut state, Command::FormCluster(wire::FormClusterCommand { nodes })).unwrap();
        state
    }

    fn run(state: &mut MetadataState, command: Command) -> Result<Option<Arc<Topic>>, wire::Error> {
        state.apply(wire::MetadataCommand { command: Some(command) })
    }

    fn config(name: &str) -> wire::TopicConfig {
        wire::TopicConfig {
            tenant: "acme".into(),
            name: name.into(),
            partitions: 6,
            retention_ms: 1,
            ..Default::default()
        }
    }

    fn create(
        state: &mut MetadataState,
        config: wire::TopicConfig,
        id: &'static [u8],
    ) -> Result<Arc<Topic>, wire::Error> {
        let command = wire::CreateTopicCommand { config: Some(config), request_id: Bytes::from_static(id) };
        run(state, Command::CreateTopic(command)).map(|topic| topic.expect("a created topic"))
    }

    fn delete(state: &mut MetadataState, name: &str) -> Result<(), wire::Error> {
        let command = wire::DeleteTopicCommand { tenant: "acme".into(), name: name.into() };
        run(state, Command::DeleteTopic(command)).map(|_| ())
    }

    #[test]
    fn a_cluster_forms_once_and_has_the_operators_topic_on_every_node() {
        let mut state = formed(3);
        let before = state.clone();
        let again = run(&mut state, Command::FormCluster(wire::FormClusterCommand { nodes: vec![] })).unwrap_err();
        assert_eq!(again.code(), wire::ErrorCode::AlreadyExists);
        assert_eq!(state, before);
        let topic = state.topic("system", OPERATOR_TOPIC).unwrap();
        assert_eq!(topic.partitions[0].replicas.len(), 3);
    }

    #[test]
    fn a_jobs_topic_brings_its_results_and_dead_letters_in_one_command() {
        let mut state = formed(3);
        let jobs = create(&mut state, config("nvm.jobs"), b"1").unwrap();
        assert_eq!(jobs.config.results_topic, "nvm.results");
        assert_eq!(jobs.config.attempts_max, limits::ATTEMPT_COUNT_DEFAULT);
        for (name, class) in [("nvm.results", "results"), ("nvm.jobs.dead", "dead")] {
            let topic = state.topic("acme", name).unwrap();
            assert_eq!((topic.partitions.len(), topic.config.class.as_str()), (6, class));
            assert_eq!(topic.config.results_topic, "");
        }
        assert!(state.topic("other", "nvm.jobs").is_none());
    }

    #[test]
    fn a_retried_create_answers_as_the_first_and_another_is_refused() {
        let mut state = formed(1);
        let first = create(&mut state, config("a.jobs"), b"1").unwrap();
        let before = state.clone();
        assert_eq!(create(&mut state, config("a.jobs"), b"1").unwrap(), first);
        let other = create(&mut state, config("a.jobs"), b"2").unwrap_err();
        assert_eq!((other.code(), other.field.as_str()), (wire::ErrorCode::AlreadyExists, "a.jobs"));
        assert_eq!(state, before);
    }

    #[test]
    fn leaders_and_replicas_are_spread_and_no_replica_id_comes_twice() {
        let mut state = formed(3);
        for name in ["a.jobs", "b", "c"] {
            create(&mut state, config(name), b"").unwrap();
        }
        let mut leaders = [0; 4];
        let mut replicas = std::collections::HashSet::from([1, 2, 3]);
        let mut groups = std::collections::HashSet::from([0]);
        for placement in state.topics().flat_map(|topic| &topic.partitions) {
            assert!(groups.insert(placement.group));
            leaders[placement.replicas[0].node as usize] += 1;
            let nodes: std::collections::HashSet<u64> = placement.replicas.iter().map(|at| at.node).collect();
            assert_eq!(nodes.len(), placement.replicas.len());
            assert!(placement.replicas.iter().all(|at| replicas.insert(at.replica)));
        }
        assert!(leaders[1..].iter().max().unwrap() - leaders[1..].iter().min().unwrap() <= 1, "{leaders:?}");
    }

    #[test]
    fn what_cannot_be_is_refused_naming_the_field_and_changes_nothing() {
        let mut state = formed(3);
        create(&mut state, config("six.results"), b"").unwrap();
        let before = state.clone();
        let with = |change: fn(&mut wire::TopicConfig)| {
            let mut config = config("a");
            change(&mut config);
            config
        };
        let cases = [
            (with(|c| c.name = "a..b".into()), "topic"),
            (with(|c| c.name = String::new()), "topic"),
            (with(|c| c.name = "system.x".into()), "name"),
            (with(|c| c.tenant = "system".into()), "name"),
            (with(|c| c.tenant = "a/b".into()), "tenant"),
            (with(|c| c.partitions = 1_001), "partitions"),
            (with(|c| c.replication = 4), "replication"),
            (with(|c| c.retention_ms = 0), "retention"),
            (with(|c| c.class = "results".into()), "class"),
            (with(|c| (c.name, c.class) = ("a.jobs".into(), "events".into())), "class"),
            (with(|c| c.results_topic = "b".into()), "results_topic"),
            (with(|c| (c.name, c.results_topic) = ("a.jobs".into(), "plain".into())), "results_topic"),
            (with(|c| (c.name, c.partitions) = ("six.jobs".into(), 2)), "partitions"),
        ];
        for (config, field) in cases {
            let error = create(&mut state, config.clone(), b"").expect_err(field);
            assert_eq!((error.code(), error.field.as_str()), (wire::ErrorCode::ValidationError, field), "{config:?}");
            assert!(!error.message.is_empty() && !error.message.contains('\n'));
        }
        assert_eq!(state, before);
    }

    #[test]
    fn a_deleted_topic_is_gone_and_its_numbers_are_not_used_again() {
        let mut state = formed(1);
        let first = create(&mut state, config("a"), b"").unwrap();
        delete(&mut state, "a").unwrap();
        assert!(state.topic("acme", "a").is_none());
        assert_eq!(delete(&mut state, "a").unwrap_err().code(), wire::ErrorCode::TargetNotFound);
        let second = create(&mut state, config("a"), b"").unwrap();
        assert!(second.partitions[0].group > first.partitions[5].group);
        create(&mut state, config("b.jobs"), b"").unwrap();
        for name in ["b.results", "b.jobs.dead"] {
            assert!(delete(&mut state, name).unwrap_err().message.contains("b.jobs"), "{name}");
        }
        delete(&mut state, "b.jobs").unwrap();
        delete(&mut state, "b.results").unwrap();
    }

    #[test]
    fn lease_keys_rotate_and_the_last_three_stay() {
        let mut state = formed(1);
        for id in 1..=5u32 {
            let secret = Bytes::from(vec![id as u8; LEASE_KEY_SIZE]);
            run(&mut state, Command::AddLeaseKey(wire::AddLeaseKeyCommand { key_id: id, secret: secret.clone() }))
                .unwrap();
            // Two leaders that rotate at once must not both succeed.
            assert!(run(&mut state, Command::AddLeaseKey(wire::AddLeaseKeyCommand { key_id: id, secret })).is_err());
        }
        assert_eq!(state.lease_keys().iter().map(LeaseKey::id).collect::<Vec<_>>(), [3, 4, 5]);
        let short = wire::AddLeaseKeyCommand { key_id: 6, secret: Bytes::from_static(b"short") };
        assert!(run(&mut state, Command::AddLeaseKey(short)).is_err());
    }

    #[test]
    fn the_state_survives_a_checkpoint() {
        let mut state = formed(3);
        create(&mut state, config("a.jobs"), b"1").unwrap();
        create(&mut state, config("b"), b"2").unwrap();
        let back = MetadataState::decode(&state.encode()).unwrap();
        assert_eq!(back, state);
        assert_eq!(back.encode(), state.encode());
        assert_eq!(MetadataState::decode(b"").unwrap(), MetadataState::default());
        assert!(MetadataState::decode(b"junk").is_err());
    }
}
