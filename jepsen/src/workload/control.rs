//! Calls of the control plane, one node at a time, none sent twice: the outcome of each is crisp.

use std::time::Duration;

use arqon_proto::wire::{self, control_client::ControlClient};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status, transport::Endpoint};

use super::{Error, JOBS_TOPIC, RESULTS_TOPIC, Setup};

/// Time for one call.
const CALL_TIME_MAX: Duration = Duration::from_secs(10);
/// Time to reach a node.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(2);
/// Time to create a topic before the faults begin.
const CREATE_TIME_MAX: Duration = Duration::from_secs(60);
/// Pause between two tries of that.
const CREATE_PAUSE: Duration = Duration::from_millis(200);
/// Retention of every topic of data: longer than any run.
pub(super) const RETENTION_MS: u64 = 7 * 24 * 3_600_000;
/// Tries of a job before it is given up: more than any run kills workers.
const ATTEMPT_COUNT_MAX: u32 = 1_000;

/// Why a call did not succeed.
#[derive(Clone, Debug)]
pub(super) struct Refused {
    /// The code, a colon, and the text.
    pub(super) error: String,
    /// It surely had no effect.
    pub(super) surely: bool,
}

/// The control planes of all nodes.
#[derive(Clone)]
pub(super) struct Control {
    addresses: Vec<String>,
    token: String,
    replication: u32,
    partition_count: u32,
}

impl Control {
    pub(super) fn new(setup: &Setup) -> Self {
        Self {
            addresses: setup.controls.clone(),
            token: setup.token.clone(),
            replication: setup.replication,
            partition_count: setup.partition_count,
        }
    }

    /// As [`Control::new`], with another token.
    pub(super) fn with_token(setup: &Setup, token: &str) -> Self {
        Self { token: token.to_owned(), ..Self::new(setup) }
    }

    /// Creates a topic before anything goes wrong; it may be there already.
    pub(super) async fn create_at_start(&self, topic: &str) -> Result<(), Error> {
        let deadline = Instant::now() + CREATE_TIME_MAX;
        for node in (0..self.addresses.len()).cycle() {
            let refused = match self.create(node, topic, self.partition_count).await {
                Ok(()) => return Ok(()),
                Err(refused) if refused.error.starts_with("ALREADY_EXISTS") => return Ok(()),
                Err(refused) => refused,
            };
            if Instant::now() > deadline {
                return Err(Error(format!("cannot create topic {topic}: {}", refused.error)));
            }
            sleep(CREATE_PAUSE).await;
        }
        Err(Error("no control plane is named".to_owned()))
    }

    pub(super) async fn create(&self, node: usize, topic: &str, partitions: u32) -> Result<(), Refused> {
        let is_jobs = topic == JOBS_TOPIC;
        let config = wire::TopicConfig {
            name: topic.to_owned(),
            // The class follows from the name.
            class: String::new(),
            partitions,
            replication: self.replication,
            retention_ms: RETENTION_MS,
            attempts_max: if is_jobs { ATTEMPT_COUNT_MAX } else { 0 },
            results_topic: if is_jobs { RESULTS_TOPIC.to_owned() } else { String::new() },
            ..Default::default()
        };
        let request = wire::CreateTopicRequest { config: Some(config) };
        self.call(node, request, |mut client, request| async move { client.create_topic(request).await }).await?;
        Ok(())
    }

    pub(super) async fn alter(&self, node: usize, topic: &str, retention_ms: u64) -> Result<(), Refused> {
        let request =
            wire::AlterTopicRequest { topic: topic.to_owned(), retention_ms: Some(retention_ms), ..Default::default() };
        self.call(node, request, |mut client, request| async move { client.alter_topic(request).await }).await?;
        Ok(())
    }

    pub(super) async fn delete(&self, node: usize, topic: &str) -> Result<(), Refused> {
        let request = wire::DeleteTopicRequest { topic: topic.to_owned() };
        self.call(node, request, |mut client, request| async move { client.delete_topic(request).await }).await?;
        Ok(())
    }

    /// Names and retention in ms of all topics, as one node has them.
    pub(super) async fn list(&self, node: usize) -> Result<Vec<(String, u64)>, Refused> {
        let request = wire::ListTopicsRequest {};
        let call = |mut client: Client, request| async move { client.list_topics(request).await };
        let answer = self.call(node, request, call).await?;
        Ok(answer.topics.into_iter().map(|topic| (topic.topic, topic.retention_ms)).collect())
    }

    /// The nodes of the cluster, as the first of them says that answers; none when nobody does.
    pub(super) async fn members(&self) -> Vec<u64> {
        for node in 0..self.addresses.len() {
            let call = |mut client: Client, request| async move { client.cluster_status(request).await };
            if let Ok(status) = self.call(node, wire::ClusterStatusRequest {}, call).await {
                return status.nodes.into_iter().filter_map(|node| Some(node.info?.node)).collect();
            }
        }
        Vec::new()
    }

    async fn call<Q, A, F>(
        &self,
        node: usize,
        message: Q,
        call: impl FnOnce(Client, Request<Q>) -> F,
    ) -> Result<A, Refused>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let before = |error: String| Refused { error: format!("UNREACHABLE: {error}"), surely: true };
        let endpoint = Endpoint::from_shared(format!("http://{}", self.addresses[node]));
        let endpoint = endpoint.map_err(|error| before(error.to_string()))?;
        let endpoint = endpoint.connect_timeout(CONNECT_TIME_MAX);
        let channel = match timeout(CONNECT_TIME_MAX, endpoint.connect()).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return Err(before(error.to_string())),
            Err(_) => return Err(before("no connection in time".to_owned())),
        };
        let mut request = Request::new(message);
        let bearer = format!("Bearer {}", self.token).parse();
        request
            .metadata_mut()
            .insert("authorization", bearer.map_err(|_| before("the token is no header".to_owned()))?);
        match timeout(CALL_TIME_MAX, call(ControlClient::new(channel), request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(refused(&status)),
            Err(_) => Err(Refused { error: "TIMED_OUT: no answer".to_owned(), surely: false }),
        }
    }
}

type Client = ControlClient<tonic::transport::Channel>;

/// Only what says by its code that nothing was changed counts as that. That a topic is not found does
/// not: a deletion that was tried twice inside the bus may say so, and a creation that shows late.
fn refused(status: &Status) -> Refused {
    let error = match status.message().split_once(':') {
        Some((code, _)) if code.chars().all(|letter| letter.is_ascii_uppercase() || letter == '_') => {
            status.message().to_owned()
        }
        _ => format!("{:?}: {}", status.code(), status.message()),
    };
    let surely = matches!(
        status.code(),
        Code::AlreadyExists | Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated
    );
    Refused { error, surely }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_refusal_is_surely_without_effect() {
        assert!(refused(&Status::already_exists("ALREADY_EXISTS: topic t exists")).surely);
        for (unclear, text) in [
            (Code::Unavailable, "NOT_LEADER: no leader"),
            (Code::NotFound, "TARGET_NOT_FOUND: no topic"),
            (Code::Unknown, "transport"),
            (Code::Internal, ""),
        ] {
            assert!(!refused(&Status::new(unclear, text)).surely, "{unclear}");
        }
        assert_eq!(refused(&Status::not_found("TARGET_NOT_FOUND: no")).error, "TARGET_NOT_FOUND: no");
        assert_eq!(refused(&Status::unavailable("connection reset")).error, "Unavailable: connection reset");
    }
}
