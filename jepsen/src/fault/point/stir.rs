//! What brings a node to a crash point: topics of its own beside those of the workloads, and what is done to them.

use std::time::Duration;

use arqon_sdk::{Client, Delivery, NewEvent, Options, ProducerOptions};
use rand::RngExt;
use tokio::time::{Instant, sleep, timeout};

use super::super::{
    damage::{find_probe, flip, wrong},
    nemesis::Nemesis,
};
use crate::{cluster::Error, host::PacketDrop};

/// Partitions of a topic that is made so that logs are.
const LOGS_PARTITION_COUNT: u32 = 3;
/// Payload of a record, in bytes.
const PAYLOAD_SIZE: usize = 16 << 10;
/// Most of a batch: several of them fill a segment.
const BATCH_SIZE: usize = 64 << 10;
/// Records that fill some segments of a node with crash points.
const ROUND_COUNT: usize = 96;
/// Records that fill the first segment of an ordinary node, and begin the second one.
const SEGMENT_COUNT: usize = 100;
/// Time for ordinary nodes to drop their first segment, and then for one of them to lead.
const TRIM_TIME_MAX: Duration = Duration::from_secs(10);
/// Time for what is acknowledged to be known as committed on every disk.
const MARK_TIME: Duration = Duration::from_millis(500);
/// Time for a leader of before to meet the one that was chosen without it.
const MEET_TIME: Duration = Duration::from_secs(1);
/// Time for the others to choose a leader.
const ELECT_TIME_MAX: Duration = Duration::from_secs(6);
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Time for one operation of a client.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(4);

/// What brings a node to a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stir {
    /// The load alone.
    Load,
    /// A start after a SIGKILL.
    Start,
    /// Leaders that change.
    Elections,
    /// A topic that is created, which makes logs and their first segments, and deleted.
    Topic,
    /// SIGTERM: a node that stops in good order saves its state.
    Stop,
    /// A topic that keeps little, which the node leads and which is written to: segments are begun, full, dropped,
    /// and begun again in their files.
    Retention,
    /// A topic that keeps little and was written to while the node was away: what it lacks is gone.
    Snapshot,
    /// Entries that the node, as a leader, writes while it is cut off, and that the next leader lacks.
    Truncation,
    /// A record that went bad while the node was down, and that it needs.
    Damage,
}

impl Stir {
    /// Bytes of its own topic that are kept, where it needs one before the node ends; 0 for all of them.
    fn keeps(self) -> Option<u64> {
        match self {
            Self::Retention | Self::Snapshot => Some(1),
            Self::Truncation | Self::Damage => Some(0),
            Self::Load | Self::Start | Self::Elections | Self::Topic | Self::Stop => None,
        }
    }

    /// Whether a node is cut off from the others for it.
    pub(super) fn partitions(self) -> bool {
        self == Self::Truncation
    }
}

/// A topic that no workload knows.
#[derive(Clone, Debug)]
pub(super) struct Scratch {
    pub name: String,
    /// Bytes that stand in it once and nowhere else.
    probe: Vec<u8>,
}

impl Nemesis<'_> {
    /// A name for the topic of a stir; drops the one before it.
    pub(super) async fn scratch(&mut self) -> Scratch {
        if let Some(before) = self.scratch.take() {
            // One that is left over is in nobody's way.
            let _ = timeout(REQUEST_TIME_MAX, self.cluster.delete_topic(&before)).await;
        }
        let name = format!("scratch.{:08x}", self.random.random::<u32>());
        let probe = (0..64).map(|_| self.random.random()).collect();
        self.scratch = Some(name.clone());
        Scratch { name, probe }
    }

    /// Makes what a stir needs while all nodes run.
    pub(super) async fn prepare(&self, stir: Stir, scratch: &Scratch) -> Result<(), Error> {
        if let Some(kept_size) = stir.keeps() {
            self.cluster.create_topic_keeping(&scratch.name, 1, kept_size).await?;
            self.fill(&scratch.name, vec![NewEvent::new(scratch.probe.clone())]).await?;
            sleep(MARK_TIME).await;
        }
        Ok(())
    }

    /// Does what has to be done while `node` is down.
    pub(super) async fn prepare_down(&self, stir: Stir, node: u64, scratch: &Scratch) -> Result<(), Error> {
        match stir {
            Stir::Snapshot => self.outrun(node, scratch).await,
            Stir::Damage => {
                let Some((path, at)) = find_probe(&self.cluster.data(node)?, &scratch.probe) else {
                    return Err(Error::new(format!("{} has no record on node {node}", scratch.name)));
                };
                flip(&path, at).map_err(wrong(&path))
            }
            _ => Ok(()),
        }
    }

    /// Does once what makes a point likely on `node`. What fails because the node is gone has done its work.
    pub(super) async fn stir(&self, stir: Stir, node: u64, scratch: &Scratch) -> Result<(), Error> {
        match stir {
            Stir::Load | Stir::Start | Stir::Stop | Stir::Snapshot | Stir::Damage => Ok(()),
            Stir::Elections => self.change_leaders().await,
            // By turns: what is there already cannot be created.
            Stir::Topic => match self.cluster.create_topic(&scratch.name, LOGS_PARTITION_COUNT).await {
                Ok(()) => Ok(()),
                Err(_) => self.cluster.delete_topic(&scratch.name).await,
            },
            Stir::Retention => {
                self.lead(node, scratch).await?;
                self.fill(&scratch.name, records(ROUND_COUNT)).await
            }
            Stir::Truncation => self.write_alone(node, scratch).await,
        }
    }

    /// Moves the leadership of every partition to another node.
    async fn change_leaders(&self) -> Result<(), Error> {
        let nodes = self.cluster.nodes();
        for topic in self.plan.topics.clone() {
            for (partition, leader) in self.cluster.leaders(&topic, 0).await? {
                let others: Vec<u64> = nodes.iter().copied().filter(|node| *node != leader).collect();
                // Not by the seed: how often this is done is a question of time, and the next faults hang on the seed.
                if let Some(to) = others.get(partition as usize % others.len().max(1)) {
                    self.cluster.transfer_leader(&topic, partition, *to).await?;
                }
            }
        }
        Ok(())
    }

    async fn leads(&self, node: u64, topic: &str, except: u64) -> bool {
        let leaders = self.cluster.leaders(topic, except).await.unwrap_or_default();
        leaders.iter().any(|(_, leader)| *leader == node)
    }

    /// Waits until `node` leads the topic.
    async fn lead(&self, node: u64, scratch: &Scratch) -> Result<(), Error> {
        while !self.leads(node, &scratch.name, 0).await {
            // Refused while nobody leads.
            let _ = self.cluster.transfer_leader(&scratch.name, 0, node).await;
            sleep(LOOK_PAUSE).await;
        }
        Ok(())
    }

    fn client(&self) -> Result<Client, Error> {
        let mut options = Options::new([self.cluster.server()], self.cluster.token());
        options.client_name = "arqon-jepsen/scratch".to_owned();
        options.request_timeout = REQUEST_TIME_MAX;
        Client::lazy(options).map_err(told)
    }

    /// Writes records to a topic of one partition and waits for the acknowledgements.
    async fn fill(&self, topic: &str, events: Vec<NewEvent>) -> Result<(), Error> {
        let producer = self.client()?.producer(topic, options()).await.map_err(told)?;
        let mut sent = Vec::new();
        for event in events {
            sent.push(producer.send(event).await.map_err(|refused| told(refused.into()))?);
        }
        for delivery in sent {
            delivery.await.map_err(told)?;
        }
        Ok(())
    }

    /// Writes to a topic until one of the nodes that run has dropped its start, and leads.
    async fn outrun(&self, node: u64, scratch: &Scratch) -> Result<(), Error> {
        self.fill(&scratch.name, records(SEGMENT_COUNT)).await?;
        let others: Vec<u64> = self.cluster.nodes().into_iter().filter(|other| *other != node).collect();
        let end = Instant::now() + TRIM_TIME_MAX;
        while Instant::now() < end {
            for other in &others {
                // The leader keeps what a follower lacks that it tries to reach, the followers do not.
                if find_probe(&self.cluster.data(*other)?, &scratch.probe).is_none() {
                    let led = timeout(TRIM_TIME_MAX, self.lead(*other, scratch)).await;
                    return led.unwrap_or_else(|_| Err(Error::new(format!("node {other} does not lead"))));
                }
            }
            sleep(LOOK_PAUSE).await;
        }
        Err(Error::new(format!("{} keeps its first record", scratch.name)))
    }

    /// Has `node` write what nobody else gets, while it is cut off, until the others have a leader of their own; then it
    /// meets that one.
    async fn write_alone(&self, node: u64, scratch: &Scratch) -> Result<(), Error> {
        self.lead(node, scratch).await?;
        let producer = self.client()?.producer(&scratch.name, options()).await.map_err(told)?;
        producer.publish(NewEvent::new("the last one for all")).await.map_err(told)?;
        let nodes = self.cluster.nodes();
        let others = nodes.iter().copied().filter(|other| *other != node);
        let cut = |other| [(node, other), (other, node)].map(|(at, from)| PacketDrop { at, from, percent: 100 });
        let drops: Vec<PacketDrop> = others.flat_map(cut).collect();
        let Some(network) = self.cluster.network() else {
            return Err(Error::new("nodes without addresses of their own cannot be cut off"));
        };
        network.drop_packets(&drops).await?;
        // What it takes is not acknowledged, and sent again elsewhere as long as the producer is there.
        let mut lost: Vec<Delivery> = Vec::new();
        for event in records(ROUND_COUNT) {
            lost.push(producer.send(event).await.map_err(|refused| told(refused.into()))?);
        }
        let end = Instant::now() + ELECT_TIME_MAX;
        loop {
            let leaders = self.cluster.leaders(&scratch.name, node).await.unwrap_or_default();
            if leaders.iter().any(|(_, leader)| ![0, node].contains(leader)) || Instant::now() > end {
                break;
            }
            sleep(LOOK_PAUSE).await;
        }
        self.reunite().await;
        sleep(MEET_TIME).await;
        Ok(())
    }

    /// Lets all packets through that a stir which was given up may still have dropped.
    pub(super) async fn reunite(&self) {
        if let Some(network) = self.cluster.network() {
            // The next fault of the network sets all rules anew.
            let _ = network.drop_nothing().await;
        }
    }
}

fn records(count: usize) -> Vec<NewEvent> {
    (0..count).map(|number| NewEvent::new(vec![number as u8; PAYLOAD_SIZE])).collect()
}

fn options() -> ProducerOptions {
    ProducerOptions { partition: Some(0), batch_size: BATCH_SIZE, ..ProducerOptions::default() }
}

fn told(error: arqon_sdk::Error) -> Error {
    Error::new(error.to_string())
}
