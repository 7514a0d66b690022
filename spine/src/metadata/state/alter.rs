//! Changes of a topic's settings.
//!
//! | setting | may change |
//! |---|---|
//! | retention, attempts | always; a topic keeps one limit at least, by time or by size |
//! | partitions of events and streams | upwards: keys then go to other partitions from the next event on |
//! | partitions of jobs | upwards while nothing was written, together with the results and dead letters |
//! | partitions of results and dead letters | with their jobs topic alone |

use std::sync::Arc;

use arqon_proto::{SYSTEM_TENANT, TopicClass, limits, wire};

use super::{MetadataState, PARTITION_TOTAL_MAX, Topic, dead_topic};
use crate::error::{error, invalid, not_found};

impl MetadataState {
    pub(super) fn alter_topic(&mut self, command: &wire::AlterTopicCommand) -> Result<Arc<Topic>, wire::Error> {
        let (tenant, name) = (&command.tenant, &command.name);
        if tenant == SYSTEM_TENANT {
            return Err(invalid("name", format!("topic {name:?} belongs to the bus")));
        }
        let topic = self.topic(tenant, name).ok_or_else(|| not_found("topic", name))?.clone();
        if topic.id != command.topic_id {
            let message = format!("topic {name:?} was deleted and made again meanwhile");
            return Err(wire::Error { field: name.clone(), ..error(wire::ErrorCode::TargetNotFound, message) });
        }
        let config = altered(&topic.config, command)?;
        let mut growing = Vec::new();
        if config.partitions > topic.config.partitions {
            growing = self.growing_with(&config, command.empty)?;
            let staying = self.nodes.iter().filter(|info| !info.leaving).count();
            if let Some(topic) = growing.iter().find(|topic| topic.config.replication as usize > staying) {
                let problem = format!(
                    "topic {:?} has {} replicas of each, which need as many nodes that stay, there are {staying}",
                    topic.config.name, topic.config.replication
                );
                return Err(invalid("partitions", problem));
            }
            let added: u32 = growing.iter().map(|topic| config.partitions - topic.config.partitions).sum();
            let existing: usize = self.topics().map(|topic| topic.partitions.len()).sum();
            if existing + added as usize > PARTITION_TOTAL_MAX {
                return Err(invalid("partitions", format!("the cluster would have more than {PARTITION_TOTAL_MAX}")));
            }
        }
        // Everything is checked: from here on nothing fails.
        for companion in growing.iter().skip(1) {
            let config = wire::TopicConfig { partitions: config.partitions, ..(*companion.config).clone() };
            self.replace(companion, config);
        }
        Ok(self.replace(&topic, config))
    }

    /// The topic of `config`, which is to get more partitions, and those that must get them with it.
    fn growing_with(&self, config: &wire::TopicConfig, empty: bool) -> Result<Vec<Arc<Topic>>, wire::Error> {
        let (tenant, name) = (&config.tenant, &config.name);
        let own = self.topic(tenant, name).ok_or_else(|| not_found("topic", name))?.clone();
        // Targets of circuits, once there are any, are refused here as well.
        let is = |class: TopicClass| class.name() == config.class;
        if is(TopicClass::Events) || is(TopicClass::Streams) {
            return Ok(vec![own]);
        }
        if !is(TopicClass::Jobs) {
            let problem = format!(
                "topic {name:?} is of class {}: its partitions are added with those of its jobs topic",
                config.class
            );
            return Err(invalid("partitions", problem));
        }
        if !empty {
            let problem = format!("topic {name:?} holds jobs: partitions are added before the first one is written");
            return Err(invalid("partitions", problem));
        }
        let shares = |topic: &&Arc<Topic>| {
            topic.config.name != *name
                && topic.config.class == TopicClass::Jobs.name()
                && topic.config.results_topic == config.results_topic
        };
        if let Some(other) = self.topics_of(tenant).find(shares) {
            let problem = format!(
                "{:?} has its results in {:?} too: the three must agree",
                other.config.name, config.results_topic
            );
            return Err(invalid("partitions", problem));
        }
        let companions = [config.results_topic.clone(), dead_topic(name)];
        let companions = companions.iter().filter_map(|name| self.topic(tenant, name).cloned());
        let fewer = companions.filter(|topic| topic.config.partitions < config.partitions);
        Ok(std::iter::once(own).chain(fewer).collect())
    }

    /// Puts `config` in the place of that of `topic`, and adds the partitions that it asks for.
    fn replace(&mut self, topic: &Topic, config: wire::TopicConfig) -> Arc<Topic> {
        let mut topic = topic.clone();
        let added = (config.partitions as usize).saturating_sub(topic.partitions.len());
        let placements: Vec<_> = (0..added).map(|_| self.place_partition(config.replication)).collect();
        topic.partitions.extend(placements);
        topic.config = Arc::new(config);
        let topic = Arc::new(topic);
        let (tenant, name) = (topic.config.tenant.clone(), topic.config.name.clone());
        self.topics.entry(tenant).or_default().insert(name, topic.clone());
        topic
    }
}

/// The settings after the change.
fn altered(known: &wire::TopicConfig, command: &wire::AlterTopicCommand) -> Result<wire::TopicConfig, wire::Error> {
    let mut config = known.clone();
    config.retention_ms = command.retention_ms.unwrap_or(config.retention_ms);
    config.retention_bytes = command.retention_bytes.unwrap_or(config.retention_bytes);
    if config.retention_ms == 0 && config.retention_bytes == 0 {
        return Err(invalid("retention", "a topic needs a retention by time or size"));
    }
    if let Some(attempts_max) = command.attempts_max {
        if config.class != TopicClass::Jobs.name() {
            return Err(invalid("attempts_max", "only a jobs topic has one"));
        }
        config.attempts_max = if attempts_max == 0 { limits::ATTEMPT_COUNT_DEFAULT } else { attempts_max };
    }
    if let Some(partitions) = command.partitions {
        if partitions < config.partitions {
            let problem =
                format!("topic {:?} has {} partitions: there can be more, never fewer", config.name, config.partitions);
            return Err(invalid("partitions", problem));
        }
        if partitions > limits::PARTITION_COUNT_MAX {
            return Err(invalid("partitions", format!("the limit is {}", limits::PARTITION_COUNT_MAX)));
        }
        config.partitions = partitions;
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use wire::{ErrorCode, metadata_command::Command};

    use super::*;

    fn run(state: &mut MetadataState, command: Command) -> Result<Option<Arc<Topic>>, wire::Error> {
        state.apply(wire::MetadataCommand { command: Some(command) })
    }

    fn with_topics(names: &[&str]) -> MetadataState {
        let mut state = MetadataState::default();
        let nodes = (1..=3).map(|node| wire::NodeInfo { node, ..Default::default() }).collect();
        run(&mut state, Command::FormCluster(wire::FormClusterCommand { nodes })).unwrap();
        for name in names {
            let config = wire::TopicConfig {
                tenant: "acme".into(),
                name: (*name).into(),
                partitions: 2,
                retention_ms: 1_000,
                ..Default::default()
            };
            let command = wire::CreateTopicCommand { config: Some(config), request_id: Bytes::new() };
            run(&mut state, Command::CreateTopic(command)).unwrap();
        }
        state
    }

    fn alter(
        state: &mut MetadataState,
        name: &str,
        change: impl FnOnce(&mut wire::AlterTopicCommand),
    ) -> Result<Arc<Topic>, wire::Error> {
        let topic_id = state.topic("acme", name).map_or(0, |topic| topic.id);
        let mut command =
            wire::AlterTopicCommand { tenant: "acme".into(), name: name.into(), topic_id, ..Default::default() };
        change(&mut command);
        run(state, Command::AlterTopic(command)).map(|topic| topic.expect("the topic as it is now"))
    }

    #[test]
    fn what_is_named_changes_and_the_rest_stays() {
        let mut state = with_topics(&["a.events", "a.jobs"]);
        let before = state.topic("acme", "a.events").unwrap().clone();
        let after = alter(&mut state, "a.events", |c| c.retention_bytes = Some(77)).unwrap();
        assert_eq!(after.config.retention_bytes, 77);
        assert_eq!((after.config.retention_ms, &after.partitions), (1_000, &before.partitions));
        let after = alter(&mut state, "a.events", |c| c.retention_ms = Some(0)).unwrap();
        assert_eq!((after.config.retention_ms, after.config.retention_bytes), (0, 77));
        assert_eq!(alter(&mut state, "a.jobs", |c| c.attempts_max = Some(9)).unwrap().config.attempts_max, 9);
        assert_eq!(MetadataState::decode(&state.encode()).unwrap(), state);
    }

    #[test]
    fn added_partitions_keep_the_old_ones_and_have_numbers_of_their_own() {
        let mut state = with_topics(&["a.events", "b.events"]);
        let before = state.topic("acme", "a.events").unwrap().clone();
        let after = alter(&mut state, "a.events", |c| c.partitions = Some(5)).unwrap();
        assert_eq!(&after.partitions[..2], &before.partitions[..]);
        assert_eq!((after.partitions.len(), after.config.partitions, after.id), (5, 5, before.id));
        let groups: Vec<u64> = state.topics().flat_map(|topic| &topic.partitions).map(|at| at.group).collect();
        let unique: std::collections::HashSet<u64> = groups.iter().copied().collect();
        assert_eq!(unique.len(), groups.len());
        assert!(groups.iter().all(|group| *group < state.next_group()));
        // The same again changes nothing.
        let state_before = state.clone();
        alter(&mut state, "a.events", |c| c.partitions = Some(5)).unwrap();
        assert_eq!(state, state_before);
    }

    #[test]
    fn an_empty_jobs_topic_grows_with_its_companions_and_one_with_jobs_does_not() {
        let mut state = with_topics(&["a.jobs"]);
        let refused = alter(&mut state, "a.jobs", |c| c.partitions = Some(3)).unwrap_err();
        assert_eq!((refused.code(), refused.field.as_str()), (ErrorCode::ValidationError, "partitions"));
        alter(&mut state, "a.jobs", |c| (c.partitions, c.empty) = (Some(3), true)).unwrap();
        for name in ["a.jobs", "a.results", "a.jobs.dead"] {
            let topic = state.topic("acme", name).unwrap();
            assert_eq!((topic.partitions.len(), topic.config.partitions), (3, 3), "{name}");
        }
    }

    /// After most nodes were lost, the companions of a jobs topic may ask for more copies than there are nodes.
    #[test]
    fn no_topic_gets_two_copies_of_a_partition_on_one_node() {
        let mut state = with_topics(&["a.results"]);
        let config = wire::TopicConfig {
            tenant: "acme".into(),
            name: "a.jobs".into(),
            partitions: 2,
            retention_ms: 1,
            replication: 1,
            ..Default::default()
        };
        let create = wire::CreateTopicCommand { config: Some(config), request_id: Bytes::new() };
        run(&mut state, Command::CreateTopic(create)).unwrap();
        let recovery = wire::UnsafeRecoveryCommand { lost: vec![2, 3], ..Default::default() };
        run(&mut state, Command::UnsafeRecovery(recovery)).unwrap();
        let before = state.clone();
        let refused = alter(&mut state, "a.jobs", |c| (c.partitions, c.empty) = (Some(3), true)).unwrap_err();
        assert_eq!((refused.code(), refused.field.as_str()), (ErrorCode::ValidationError, "partitions"));
        assert!(refused.message.contains("\"a.results\" has 3 replicas"), "{}", refused.message);
        assert_eq!(state, before);
    }

    #[test]
    fn what_cannot_be_is_refused_naming_the_field_and_changes_nothing() {
        let mut state = with_topics(&["a.events", "a.jobs", "b.results"]);
        let shared = wire::TopicConfig {
            tenant: "acme".into(),
            name: "b.jobs".into(),
            partitions: 2,
            retention_ms: 1,
            results_topic: "a.results".into(),
            ..Default::default()
        };
        let create = wire::CreateTopicCommand { config: Some(shared), request_id: Bytes::new() };
        run(&mut state, Command::CreateTopic(create)).unwrap();
        let before = state.clone();
        type Change = fn(&mut wire::AlterTopicCommand);
        let cases: [(&str, Change, &str); 9] = [
            ("a.events", |c| c.partitions = Some(1), "partitions"),
            ("a.events", |c| c.partitions = Some(0), "partitions"),
            ("a.events", |c| c.partitions = Some(1_001), "partitions"),
            ("a.events", |c| c.retention_ms = Some(0), "retention"),
            ("a.events", |c| c.attempts_max = Some(3), "attempts_max"),
            ("a.results", |c| (c.partitions, c.empty) = (Some(3), true), "partitions"),
            ("a.jobs.dead", |c| (c.partitions, c.empty) = (Some(3), true), "partitions"),
            ("a.jobs", |c| (c.partitions, c.empty) = (Some(3), true), "partitions"),
            ("a.events", |c| c.tenant = "system".into(), "name"),
        ];
        for (name, change, field) in cases {
            let refused = alter(&mut state, name, change).expect_err(field);
            assert_eq!((refused.code(), refused.field.as_str()), (ErrorCode::ValidationError, field), "{name}");
            assert!(!refused.message.contains('\n'));
        }
        let other = alter(&mut state, "a.events", |c| c.topic_id += 1).unwrap_err();
        assert_eq!(other.code(), ErrorCode::TargetNotFound);
        assert_eq!(alter(&mut state, "nothing", |_| {}).unwrap_err().code(), ErrorCode::TargetNotFound);
        assert_eq!(state, before);
    }
}
