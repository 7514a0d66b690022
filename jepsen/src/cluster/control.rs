//! What a run asks of the control plane.

use std::time::Duration;

use arqon_proto::wire::{self, control_client::ControlClient};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

use super::{Cluster, Error, Node, refuse};

/// Time for one call of the control plane.
const CONTROL_SECONDS_MAX: u64 = 20;
/// Time for a look at the state of things.
const DESCRIBE_TIME_MAX: Duration = Duration::from_secs(1);
/// Time for a change to be decided.
const CHANGE_TIME_MAX: Duration = Duration::from_secs(10);

impl Cluster {
    /// Creates a topic of class `events` on all nodes.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn create_topic(&self, name: &str, partition_count: u32) -> Result<(), Error> {
        self.create_topic_keeping(name, partition_count, 0).await
    }

    /// As [`Cluster::create_topic`], with so many bytes of each partition kept; 0 for all.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn create_topic_keeping(&self, name: &str, partition_count: u32, kept_size: u64) -> Result<(), Error> {
        let config = wire::TopicConfig {
            name: name.to_owned(),
            class: "events".to_owned(),
            partitions: partition_count,
            replication: self.members().count() as u32,
            retention_ms: 24 * 3_600_000,
            retention_bytes: kept_size,
            ..Default::default()
        };
        let asked = self.ask(0, CHANGE_TIME_MAX, async |mut client| {
            let request = self.authorized(wire::CreateTopicRequest { config: Some(config.clone()) })?;
            let told = client.create_topic(request).await;
            told.map_err(|status| refused(&format!("create topic {name}"), &status))
        });
        asked.await.map(|_| ())
    }

    /// Deletes a topic and its data.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn delete_topic(&self, name: &str) -> Result<(), Error> {
        let asked = self.ask(0, CHANGE_TIME_MAX, async |mut client| {
            let request = self.authorized(wire::DeleteTopicRequest { topic: name.to_owned() })?;
            let told = client.delete_topic(request).await;
            told.map_err(|status| refused(&format!("delete topic {name}"), &status))
        });
        asked.await.map(|_| ())
    }

    /// The leader of each partition as a running node other than `except` sees it; 0 is unknown.
    ///
    /// # Errors
    /// No node answers.
    pub async fn leaders(&self, topic: &str, except: u64) -> Result<Vec<(u32, u64)>, Error> {
        let partitions = self.partitions(topic, except).await?;
        Ok(partitions.iter().map(|part| (part.partition, part.leader_node)).collect())
    }

    /// Leaders and replicas of the partitions of a topic, as a running node other than `except` sees them.
    ///
    /// # Errors
    /// No node answers.
    pub async fn partitions(&self, topic: &str, except: u64) -> Result<Vec<wire::PartitionDescription>, Error> {
        let asked = self.ask(except, DESCRIBE_TIME_MAX, async |mut client| {
            let request = self.authorized(wire::DescribeTopic { topic: topic.to_owned() })?;
            client.describe_topic(request).await.map_err(|status| refused(&format!("describe topic {topic}"), &status))
        });
        Ok(asked.await?.into_inner().description.unwrap_or_default().partitions)
    }

    /// The state of the cluster as a running node other than `except` sees it.
    ///
    /// # Errors
    /// No node answers.
    pub async fn status(&self, except: u64) -> Result<wire::ClusterStatusResponse, Error> {
        let asked = self.ask(except, DESCRIBE_TIME_MAX, async |mut client| {
            let request = self.authorized(wire::ClusterStatusRequest {})?;
            client.cluster_status(request).await.map_err(|status| refused("show the cluster", &status))
        });
        Ok(asked.await?.into_inner())
    }

    /// Adds a node that runs and waits for it.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn add_node(&self, number: u64) -> Result<(), Error> {
        let node = &self.nodes[self.index(number)?];
        let info = wire::NodeInfo {
            node: number,
            client_address: node.client.clone(),
            peer_address: node.peer.clone(),
            control_address: node.control.clone(),
            ..Default::default()
        };
        let asked = self.ask(number, CHANGE_TIME_MAX, async |mut client| {
            let request = self.authorized(wire::AddNodeRequest { info: Some(info.clone()) })?;
            client.add_node(request).await.map_err(|status| refused(&format!("add node {number}"), &status))
        });
        asked.await.map(|_| ())
    }

    /// Has the replicas of a node moved away, or no more.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn drain_node(&self, node: u64, cancel: bool) -> Result<(), Error> {
        let asked = self.ask(node, CHANGE_TIME_MAX, async |mut client| {
            let request = self.authorized(wire::DrainNodeRequest { node, cancel })?;
            client.drain_node(request).await.map_err(|status| refused(&format!("empty node {node}"), &status))
        });
        asked.await.map(|_| ())
    }

    /// Takes an empty node out of the cluster.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn remove_node(&self, node: u64) -> Result<(), Error> {
        let asked = self.ask(node, CHANGE_TIME_MAX, async |mut client| {
            let request = self.authorized(wire::RemoveNodeRequest { node })?;
            client.remove_node(request).await.map_err(|status| refused(&format!("remove node {node}"), &status))
        });
        asked.await.map(|_| ())
    }

    /// Has the replica of a partition moved from one node to another.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn move_partition(&self, topic: &str, partition: u32, from: u64, to: u64) -> Result<(), Error> {
        let wanted = wire::MovePartitionRequest { topic: topic.to_owned(), partition, from, to, ..Default::default() };
        let asked = self.ask(0, CHANGE_TIME_MAX, async |mut client| {
            let request = self.authorized(wanted.clone())?;
            client
                .move_partition(request)
                .await
                .map_err(|status| refused(&format!("move {topic}/{partition}"), &status))
        });
        asked.await.map(|_| ())
    }

    /// Has the leadership of a partition moved to a node.
    ///
    /// # Errors
    /// What the control plane says.
    pub async fn transfer_leader(&self, topic: &str, partition: u32, to: u64) -> Result<(), Error> {
        let wanted = wire::TransferLeaderRequest { topic: topic.to_owned(), partition, to, ..Default::default() };
        let asked = self.ask(0, CHANGE_TIME_MAX, async |mut client| {
            let request = self.authorized(wanted.clone())?;
            let told = client.transfer_leader(request).await;
            told.map_err(|status| refused(&format!("transfer leadership of {topic}/{partition}"), &status))
        });
        asked.await.map(|_| ())
    }

    /// Asks one running node after the other; the first answer counts.
    async fn ask<T>(
        &self,
        except: u64,
        limit: Duration,
        call: impl AsyncFn(ControlClient<Channel>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut last = Error("no node runs".into());
        for node in self.members().filter(|node| node.child.is_some() && node.number != except) {
            match timeout(limit, async { call(self.control(node).await?).await }).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => last = error,
                Err(_) => last = Error(format!("node {} does not answer", node.number)),
            }
        }
        Err(last)
    }

    async fn control(&self, node: &Node) -> Result<ControlClient<Channel>, Error> {
        let unreachable = |error| Error(format!("control plane of node {} at {}: {error}", node.number, node.control));
        let endpoint = Endpoint::from_shared(format!("http://{}", node.control)).map_err(unreachable)?;
        let endpoint = endpoint.timeout(Duration::from_secs(CONTROL_SECONDS_MAX));
        Ok(ControlClient::new(endpoint.connect().await.map_err(unreachable)?))
    }

    fn authorized<T>(&self, message: T) -> Result<tonic::Request<T>, Error> {
        let mut request = tonic::Request::new(message);
        let Ok(bearer) = format!("Bearer {}", self.token).parse() else {
            return refuse("the token that arqon up printed does not fit into a header");
        };
        request.metadata_mut().insert("authorization", bearer);
        Ok(request)
    }
}

fn refused(what: &str, status: &tonic::Status) -> Error {
    Error(format!("cannot {what}: {}", status.message()))
}
