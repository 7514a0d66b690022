//! Fault injection: which node is killed when, from a seed, and the record of it.

use std::{sync::Arc, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{Instant, sleep, sleep_until};

use crate::{
    cluster::{Cluster, Error},
    history::{Kind, Line, Writer},
};

/// Longest time that a killed node stays down, in milliseconds.
const DOWN_MS_MAX: u64 = 400;

/// One kill: which of the nodes, and how long it stays down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kill {
    index: usize,
    down: Duration,
}

/// The kills of a seed, without end.
fn kills(seed: u64, node_count: usize) -> impl Iterator<Item = Kill> {
    let mut random = StdRng::seed_from_u64(seed);
    std::iter::repeat_with(move || Kill {
        index: random.random_range(0..node_count),
        down: Duration::from_millis(random.random_range(0..=DOWN_MS_MAX)),
    })
}

/// When and for how long to kill.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Chooses the victims and the time that they stay down.
    pub seed: u64,
    /// Kills begun per second, at most; 0 for none. The next one waits until all are ready.
    pub kills_per_second: f64,
    /// How long to go on.
    pub time: Duration,
}

/// Kills one node after the other with SIGKILL and starts each again, never two down at once.
/// Returns when every node is ready again, which the history calls `heal`; a node that does not
/// come back ends the faults and is recorded as `not-ready`.
///
/// # Errors
/// A process could not be killed.
pub async fn run(cluster: &mut Cluster, history: &Arc<Writer>, topic: &str, plan: Plan) -> Result<(), Error> {
    let end = Instant::now() + plan.time;
    if plan.kills_per_second <= 0.0 {
        sleep_until(end).await;
        return Ok(());
    }
    let pause = Duration::from_secs_f64(1.0 / plan.kills_per_second);
    let nodes = cluster.nodes();
    let mut next = Instant::now();
    for kill in kills(plan.seed, nodes.len()) {
        next = (next + pause).max(Instant::now());
        if next >= end {
            sleep_until(end).await;
            break;
        }
        sleep_until(next).await;
        let node = nodes[kill.index];
        kill_and_restart(cluster, history, topic, node, kill.down).await?;
        if !cluster.is_up() {
            return Ok(());
        }
    }
    history.record(Line::nemesis("heal"));
    Ok(())
}

async fn kill_and_restart(
    cluster: &mut Cluster,
    history: &Arc<Writer>,
    topic: &str,
    node: u64,
    down: Duration,
) -> Result<(), Error> {
    // Unknown leaders only cost a measurement of the fail-over.
    let leaders = cluster.leaders(topic, node).await.unwrap_or_default();
    let led = leaders.iter().filter(|(_, leader)| *leader == node);
    let leads = led.map(|(partition, _)| format!("{topic}/{partition}")).collect();
    history.record(Line { leads, ..Line::fault("kill", node) });
    let proven = cluster.kill(node).await?;
    history.record(Line { kind: Kind::Info, proven: Some(proven), ..Line::fault("kill", node) });
    sleep(down).await;
    history.record(Line { node: Some(node), ..Line::nemesis("restart") });
    if let Err(error) = cluster.restart(node).await {
        history.record(Line { node: Some(node), error: Some(error.to_string()), ..Line::nemesis("not-ready") });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_names_the_same_kills_every_time_and_reaches_every_node() {
        let first: Vec<Kill> = kills(7, 3).take(50).collect();
        assert_eq!(first, kills(7, 3).take(50).collect::<Vec<_>>());
        assert_ne!(first, kills(8, 3).take(50).collect::<Vec<_>>());
        for index in 0..3 {
            assert!(first.iter().any(|kill| kill.index == index), "node {index} is never killed");
        }
    }
}
