//! What the control planes of all nodes say about the queue of jobs.

use std::time::Duration;

use arqon_proto::wire;
use tokio::time::{Instant, sleep};

use crate::Failure;
use crate::cluster::NodeAddresses;
use crate::connect::Control;

const PAUSE: Duration = Duration::from_millis(10);
/// One node may be down while the others are asked.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// Who leads one partition of the queue, and how many jobs are leased there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The leader.
    pub node: u64,
    /// Partition.
    pub partition: u32,
    /// Jobs leased.
    pub leased: u64,
}

/// One queue, as the leaders of its partitions know it.
pub struct Queue {
    topic: String,
    nodes: Vec<NodeAddresses>,
    token: String,
    controls: Vec<Option<Control>>,
}

impl Queue {
    /// A queue on `topic`; connects when it is first asked.
    pub fn new(topic: &str, nodes: &[NodeAddresses], token: &str) -> Self {
        let controls = nodes.iter().map(|_| None).collect();
        Self { topic: topic.to_owned(), nodes: nodes.to_vec(), token: token.to_owned(), controls }
    }

    /// The partitions that each reachable node leads.
    async fn led(&mut self) -> Vec<(u64, wire::PartitionStatus)> {
        let mut led = Vec::new();
        for index in 0..self.nodes.len() {
            let asked = tokio::time::timeout(ASK_TIMEOUT, self.ask(index)).await;
            match asked.unwrap_or_else(|_| Err(Failure::failed("no answer"))) {
                Ok(partitions) => {
                    let node = index as u64 + 1;
                    led.extend(partitions.into_iter().filter(|status| status.leader).map(|status| (node, status)));
                }
                // Down, as a node may be in this demo: the next question connects anew.
                Err(_) => self.controls[index] = None,
            }
        }
        led
    }

    async fn ask(&mut self, index: usize) -> Result<Vec<wire::PartitionStatus>, Failure> {
        let slot = &mut self.controls[index];
        let control = match slot {
            Some(control) => control,
            None => slot.insert(Control::connect(&self.nodes[index].control, &self.token).await?),
        };
        let request = control.request(wire::DescribeTopic { topic: self.topic.clone() });
        Ok(control.client().describe_topic(request).await?.into_inner().partitions)
    }

    /// Waits until jobs are leased, and says where most are.
    ///
    /// # Errors
    /// None are within `limit`.
    pub async fn wait_leased(&mut self, limit: Duration) -> Result<Held, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            let held = self.led().await.into_iter().map(|(node, status)| Held {
                node,
                partition: status.partition,
                leased: status.queues.iter().map(|queue| queue.leased).sum(),
            });
            match held.max_by_key(|held| held.leased) {
                Some(held) if held.leased > 0 => return Ok(held),
                _ if Instant::now() >= deadline => {
                    return Err(Failure::failed(format!("no job of {} was leased within {limit:?}", self.topic)));
                }
                _ => sleep(PAUSE).await,
            }
        }
    }

    /// Waits until every job of all `partition_count` partitions is settled, so that no result
    /// can still be on its way.
    ///
    /// # Errors
    /// Some are not within `limit`.
    pub async fn wait_settled(&mut self, partition_count: u32, limit: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + limit;
        loop {
            let led = self.led().await;
            let settled = led.iter().filter(|(_, status)| is_settled(status)).count();
            if settled == partition_count as usize {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Failure::failed(format!(
                    "{}: only {settled} of {partition_count} partitions were settled within {limit:?}",
                    self.topic
                )));
            }
            sleep(PAUSE).await;
        }
    }
}

fn is_settled(status: &wire::PartitionStatus) -> bool {
    let settled =
        |queue: &wire::QueueStatus| queue.leased == 0 && queue.pending == 0 && queue.floor >= status.committed;
    // A partition that never had a job has no queue.
    status.queues.iter().all(settled) && (status.committed == 0 || !status.queues.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_settled_when_nothing_is_left_to_do() {
        let queue = wire::QueueStatus { floor: 7, next: 7, ..Default::default() };
        let status = |queues| wire::PartitionStatus { committed: 7, queues, ..Default::default() };
        assert!(is_settled(&status(vec![queue.clone()])));
        assert!(!is_settled(&status(vec![])));
        assert!(!is_settled(&status(vec![wire::QueueStatus { leased: 1, ..queue.clone() }])));
        assert!(!is_settled(&status(vec![wire::QueueStatus { floor: 6, ..queue }])));
        assert!(is_settled(&wire::PartitionStatus::default()));
    }
}
