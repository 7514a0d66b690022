//! Topics created, altered, deleted and listed while faults go on, and what every node lists at
//! the end. Each name is used by one process and never again after its deletion.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    Shared,
    control::{Control, RETENTION_MS, Refused},
};
use crate::{
    check::CONVERGE_SECONDS_MAX,
    history::{Kind, Line, Value},
};

/// Processes that change topics.
const PROCESS_COUNT: u64 = 3;
/// What all names begin with.
const PREFIX: &str = "jepsen.meta.";
/// Time between two changes of one process: a topic is a Raft group on every node.
const CHANGE_PAUSE: Duration = Duration::from_millis(150);
/// Time between two listings of one node.
const LIST_PAUSE: Duration = Duration::from_millis(300);
/// Topics of a process that are left standing.
const STANDING_COUNT_MAX: usize = 10;

/// Starts processes that change topics, and one per node that lists them.
pub(super) fn start(shared: &Arc<Shared>, control: &Control, tasks: &mut JoinSet<()>) {
    for index in 0..PROCESS_COUNT {
        tasks.spawn(change(shared.clone(), control.clone(), index));
    }
    for index in 0..shared.setup.nodes.len() {
        tasks.spawn(list(shared.clone(), control.clone(), index));
    }
}

/// One process that changes topics.
struct Changer {
    shared: Arc<Shared>,
    control: Control,
    random: StdRng,
    process: u64,
}

async fn change(shared: Arc<Shared>, control: Control, index: u64) {
    let process = shared.history.new_process();
    let random = StdRng::seed_from_u64(shared.setup.seed ^ (index << 40));
    let mut changer = Changer { shared, control, random, process };
    let mut standing: Vec<String> = Vec::new();
    let mut count = 0;
    while !changer.shared.stops() {
        let delete = standing.len() >= STANDING_COUNT_MAX || (!standing.is_empty() && changer.random.random_bool(0.35));
        if delete {
            let topic = standing.swap_remove(changer.random.random_range(0..standing.len()));
            changer.delete(&topic).await;
        } else if !standing.is_empty() && changer.random.random_bool(0.3) {
            let topic = standing[changer.random.random_range(0..standing.len())].clone();
            changer.alter(&topic).await;
        } else {
            let topic = format!("{PREFIX}{index}-{count}");
            count += 1;
            if changer.create(&topic).await {
                standing.push(topic);
            }
        }
        changer.shared.pause(CHANGE_PAUSE).await;
    }
}

impl Changer {
    fn node(&mut self) -> usize {
        self.random.random_range(0..self.shared.setup.nodes.len())
    }

    async fn create(&mut self, topic: &str) -> bool {
        let (node, healed) = (self.node(), self.shared.is_healed());
        self.invoke("create", topic, None);
        let outcome = self.control.create(node, topic, 1).await;
        let created = self.complete("create", topic, None, outcome) == Kind::Ok;
        if created {
            for partition in 0..self.shared.setup.partition_count {
                self.shared.acked(partition, 0, healed);
            }
        }
        created
    }

    async fn alter(&mut self, topic: &str) {
        let node = self.node();
        let retention_ms = RETENTION_MS + self.random.random_range(1..1_000_000);
        self.invoke("alter", topic, Some(retention_ms));
        let outcome = self.control.alter(node, topic, retention_ms).await;
        self.complete("alter", topic, Some(retention_ms), outcome);
    }

    async fn delete(&mut self, topic: &str) {
        let node = self.node();
        self.invoke("delete", topic, None);
        let outcome = self.control.delete(node, topic).await;
        self.complete("delete", topic, None, outcome);
    }

    fn line(&self, kind: Kind, f: &str, topic: &str, value: Option<u64>) -> Line {
        Line { value: value.map(Value::One), ..Line::client(self.process, kind, f, topic) }
    }

    fn invoke(&self, f: &str, topic: &str, value: Option<u64>) {
        self.shared.history.record(self.line(Kind::Invoke, f, topic, value));
    }

    fn complete(&mut self, f: &str, topic: &str, value: Option<u64>, outcome: Result<(), Refused>) -> Kind {
        let (kind, error) = match outcome {
            Ok(()) => (Kind::Ok, None),
            Err(refused) => (if refused.surely { Kind::Fail } else { Kind::Info }, Some(refused.error)),
        };
        self.shared.history.record(Line { error, ..self.line(kind, f, topic, value) });
        if kind == Kind::Info {
            self.process = self.shared.history.new_process();
        }
        kind
    }
}

/// What one node lists, again and again.
async fn list(shared: Arc<Shared>, control: Control, index: usize) {
    let node = Some(shared.setup.nodes[index]);
    let process = shared.history.new_process();
    let line = |kind| Line { key: None, node, ..Line::client(process, kind, "list", "") };
    while !shared.stops() {
        shared.history.record(line(Kind::Invoke));
        let (kind, topics, error) = match control.list(index).await {
            Ok(topics) => (Kind::Ok, Some(ours(topics)), None),
            Err(refused) => (Kind::Fail, None, Some(refused.error)),
        };
        shared.history.record(Line { topics, error, ..line(kind) });
        shared.pause(LIST_PAUSE).await;
    }
}

fn ours(topics: Vec<(String, u64)>) -> Vec<(String, u64)> {
    let mut topics: Vec<_> = topics.into_iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    topics.sort();
    topics
}

/// Waits until all nodes list the same and records it as the closing read; also when the time is
/// over, with what each one lists then.
pub(super) async fn finish(shared: &Arc<Shared>) {
    let control = Control::new(&shared.setup);
    let deadline = Instant::now() + Duration::from_secs(CONVERGE_SECONDS_MAX);
    loop {
        let mut lists = BTreeMap::new();
        // Those that have left the cluster list nothing any more.
        let members = control.members().await;
        for (index, node) in shared.setup.nodes.iter().enumerate().filter(|(_, node)| members.contains(node)) {
            lists.insert(*node, control.list(index).await.map(ours));
        }
        let first = lists.values().next();
        let equal = !lists.is_empty()
            && lists
                .values()
                .all(|list| list.is_ok() && list.as_ref().ok() == first.and_then(|list| list.as_ref().ok()));
        if equal || Instant::now() >= deadline {
            for (node, list) in lists {
                let process = shared.history.new_process();
                let line = |kind| Line {
                    key: None,
                    node: Some(node),
                    last: Some(true),
                    ..Line::client(process, kind, "list", "")
                };
                shared.history.record(line(Kind::Invoke));
                let (kind, topics, error) = match list {
                    Ok(topics) => (Kind::Ok, Some(topics), None),
                    Err(refused) => (Kind::Fail, None, Some(refused.error)),
                };
                shared.history.record(Line { topics, error, ..line(kind) });
            }
            return;
        }
        sleep(LIST_PAUSE).await;
    }
}
