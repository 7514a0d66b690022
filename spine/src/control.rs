//! The control plane: gRPC with reflection.

use std::{sync::Arc, time::Duration};

use arqon_proto::{
    NodeId, Session, Verb, code_name,
    wire::{self, ErrorCode, control_server, metadata_command::Command},
};
use tokio::net::TcpListener;
use tonic::{
    Code, Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use crate::{
    broker::{Broker, authorize, authorize_describe},
    error::error,
};

/// A request that takes longer is given up.
const REQUEST_PATIENCE: Duration = Duration::from_secs(30);
/// Requests of one connection at a time.
const REQUEST_COUNT_MAX: u32 = 64;
const REQUEST_SIZE_MAX: usize = 1 << 20;

struct Control {
    broker: Arc<Broker>,
}

/// Serves on what `server` has set up, TLS or none, until the node stops.
pub(crate) async fn serve(broker: Arc<Broker>, listener: TcpListener, server: Server) {
    let mut stopping = broker.stopping.subscribe();
    let stopped = async move {
        stopping.wait_for(|stopping| *stopping).await.ok();
    };
    let control = control_server::ControlServer::new(Control { broker }).max_decoding_message_size(REQUEST_SIZE_MAX);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(wire::DESCRIPTORS)
        .build_v1()
        .inspect_err(|error| tracing::error!(%error, "no reflection on the control port"))
        .ok();
    let served = server
        .timeout(REQUEST_PATIENCE)
        .max_concurrent_streams(REQUEST_COUNT_MAX)
        .http2_keepalive_interval(Some(REQUEST_PATIENCE))
        .add_service(control)
        .add_optional_service(reflection)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stopped)
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the control port has stopped");
    }
}

fn status(refused: wire::Error) -> Status {
    let code = match refused.code() {
        ErrorCode::ValidationError => Code::InvalidArgument,
        ErrorCode::AuthenticationFailed => Code::Unauthenticated,
        ErrorCode::AuthorizationDenied => Code::PermissionDenied,
        ErrorCode::TargetNotFound => Code::NotFound,
        ErrorCode::AlreadyExists => Code::AlreadyExists,
        ErrorCode::OffsetOutOfRange => Code::OutOfRange,
        ErrorCode::NotLeader | ErrorCode::Overloaded | ErrorCode::UnknownOutcome => Code::Unavailable,
        _ => Code::Internal,
    };
    Status::new(code, format!("{}: {}", code_name(refused.code()), refused.message))
}

impl Control {
    fn session<T>(&self, request: &Request<T>) -> Result<Session, Status> {
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let token =
            header.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        self.broker.authenticate(token.map_or("", |(_, token)| token.trim())).map_err(status)
    }

    /// The session of a request that changes the cluster itself.
    fn cluster_session<T>(&self, request: &Request<T>) -> Result<Session, Status> {
        let session = self.session(request)?;
        if session.administers_cluster() {
            return Ok(session);
        }
        Err(status(error(ErrorCode::AuthorizationDenied, "the token does not have the permission admin:cluster")))
    }

    async fn change<T>(
        &self,
        request: Request<T>,
        command: impl FnOnce(T) -> Command,
    ) -> Result<Response<wire::ClusterChangeResponse>, Status> {
        self.cluster_session(&request)?;
        self.broker.change_cluster(command(request.into_inner())).await.map_err(status)?;
        Ok(Response::new(wire::ClusterChangeResponse {}))
    }
}

#[tonic::async_trait]
impl control_server::Control for Control {
    async fn create_topic(
        &self,
        request: Request<wire::CreateTopicRequest>,
    ) -> Result<Response<wire::TopicDescription>, Status> {
        let session = self.session(&request)?;
        let mut config = request
            .into_inner()
            .config
            .ok_or_else(|| status(crate::error::invalid("config", "the topic has no settings")))?;
        authorize(&session, Verb::Admin, &config.name).map_err(status)?;
        config.tenant = session.tenant;
        let topic = self.broker.create_topic(config).await.map_err(status)?;
        Ok(Response::new(self.broker.describe(&topic)))
    }

    async fn delete_topic(
        &self,
        request: Request<wire::DeleteTopicRequest>,
    ) -> Result<Response<wire::DeleteTopicResponse>, Status> {
        let session = self.session(&request)?;
        let name = request.into_inner().topic;
        authorize(&session, Verb::Admin, &name).map_err(status)?;
        self.broker.delete_topic(session.tenant, name).await.map_err(status)?;
        Ok(Response::new(wire::DeleteTopicResponse {}))
    }

    async fn list_topics(
        &self,
        request: Request<wire::ListTopicsRequest>,
    ) -> Result<Response<wire::ListTopicsResponse>, Status> {
        let session = self.session(&request)?;
        self.broker.require_started().map_err(status)?;
        let published = self.broker.metadata.published();
        let visible = published
            .state
            .topics_of(&session.tenant)
            .filter(|topic| authorize_describe(&session, &topic.config.name).is_ok());
        let topics = visible.map(|topic| self.broker.describe(topic)).collect();
        Ok(Response::new(wire::ListTopicsResponse { topics }))
    }

    async fn describe_topic(
        &self,
        request: Request<wire::DescribeTopic>,
    ) -> Result<Response<wire::TopicStatus>, Status> {
        let session = self.session(&request)?;
        let name = request.into_inner().topic;
        authorize_describe(&session, &name).map_err(status)?;
        let topic = self.broker.topic(&session, &name).map_err(status)?;
        let local = topic.partitions.iter().filter_map(|at| self.broker.replicas.get(at.group.into()));
        Ok(Response::new(wire::TopicStatus {
            description: Some(self.broker.describe(&topic)),
            partitions: local.map(|partition| partition.full_status()).collect(),
            leaders: self.broker.leader_statuses(&topic).await,
        }))
    }

    async fn alter_topic(
        &self,
        request: Request<wire::AlterTopicRequest>,
    ) -> Result<Response<wire::TopicDescription>, Status> {
        let session = self.session(&request)?;
        let change = request.into_inner();
        authorize(&session, Verb::Admin, &change.topic).map_err(status)?;
        let topic = self.broker.alter_topic(session.tenant, change).await.map_err(status)?;
        Ok(Response::new(self.broker.describe(&topic)))
    }

    async fn trim_topic(
        &self,
        request: Request<wire::TrimTopicRequest>,
    ) -> Result<Response<wire::TrimTopicResponse>, Status> {
        let session = self.session(&request)?;
        let request = request.into_inner();
        authorize(&session, Verb::Admin, &request.topic).map_err(status)?;
        let partitions = self.broker.trim_topic(&session.tenant, &request).await.map_err(status)?;
        Ok(Response::new(wire::TrimTopicResponse { partitions }))
    }

    async fn delete_group(
        &self,
        request: Request<wire::DeleteGroupRequest>,
    ) -> Result<Response<wire::DeleteGroupResponse>, Status> {
        let session = self.session(&request)?;
        let request = request.into_inner();
        authorize(&session, Verb::Admin, &request.topic).map_err(status)?;
        let partition_count = self.broker.delete_group(&session.tenant, &request).await.map_err(status)?;
        Ok(Response::new(wire::DeleteGroupResponse { partition_count }))
    }

    async fn cluster_status(
        &self,
        request: Request<wire::ClusterStatusRequest>,
    ) -> Result<Response<wire::ClusterStatusResponse>, Status> {
        let session = self.session(&request)?;
        Ok(Response::new(self.broker.cluster_status(&session).await))
    }

    async fn add_node(
        &self,
        request: Request<wire::AddNodeRequest>,
    ) -> Result<Response<wire::ClusterChangeResponse>, Status> {
        let command = |request: wire::AddNodeRequest| Command::AddNode(wire::AddNodeCommand { info: request.info });
        self.change(request, command).await
    }

    async fn remove_node(
        &self,
        request: Request<wire::RemoveNodeRequest>,
    ) -> Result<Response<wire::ClusterChangeResponse>, Status> {
        let command =
            |request: wire::RemoveNodeRequest| Command::RemoveNode(wire::RemoveNodeCommand { node: request.node });
        self.change(request, command).await
    }

    async fn drain_node(
        &self,
        request: Request<wire::DrainNodeRequest>,
    ) -> Result<Response<wire::ClusterChangeResponse>, Status> {
        let command =
            |wire::DrainNodeRequest { node, cancel }| Command::DrainNode(wire::DrainNodeCommand { node, cancel });
        self.change(request, command).await
    }

    async fn move_partition(
        &self,
        request: Request<wire::MovePartitionRequest>,
    ) -> Result<Response<wire::ClusterChangeResponse>, Status> {
        let session = self.cluster_session(&request)?;
        let wire::MovePartitionRequest { tenant, topic, partition, from, to, cancel } = request.into_inner();
        let tenant = if tenant.is_empty() { session.tenant } else { tenant };
        let (_, group) = self.broker.group_of(&tenant, &topic, partition).map_err(status)?;
        let command = if cancel {
            Command::CancelMove(wire::CancelMoveCommand { group })
        } else {
            Command::MovePartition(wire::MovePartitionCommand { group, from, to })
        };
        self.broker.change_cluster(command).await.map_err(status)?;
        Ok(Response::new(wire::ClusterChangeResponse {}))
    }

    async fn transfer_leader(
        &self,
        request: Request<wire::TransferLeaderRequest>,
    ) -> Result<Response<wire::ClusterChangeResponse>, Status> {
        let session = self.cluster_session(&request)?;
        let wire::TransferLeaderRequest { tenant, topic, partition, to } = request.into_inner();
        let tenant = if tenant.is_empty() { session.tenant } else { tenant };
        let (topic, _) = self.broker.group_of(&tenant, &topic, partition).map_err(status)?;
        self.broker.move_leader(&topic, partition, NodeId(to)).await.map_err(status)?;
        Ok(Response::new(wire::ClusterChangeResponse {}))
    }

    async fn list_operators(
        &self,
        request: Request<wire::ListOperatorsRequest>,
    ) -> Result<Response<wire::ListOperatorsResponse>, Status> {
        let session = self.session(&request)?;
        if !session.executes_any() && !session.allows(Verb::Admin, "operators") {
            let refused =
                error(ErrorCode::AuthorizationDenied, "the token allows neither admin:operators nor to execute");
            return Err(status(refused));
        }
        let operators = self.broker.operators.list(&session.tenant);
        Ok(Response::new(wire::ListOperatorsResponse { operators }))
    }
}

impl Broker {
    async fn cluster_status(&self, session: &Session) -> wire::ClusterStatusResponse {
        let reports = self.reports().await;
        let published = self.metadata.published();
        let (topic_count, partition_count, leaderless_count) = Self::counts(&published.state, &reports);
        let voters = self.metadata.group().voters();
        let node = |info: &wire::NodeInfo| {
            let report = reports.iter().find(|(node, _)| node.0 == info.node).map(|(_, report)| report.clone());
            let reachable = report.is_some() || self.host.peer_reachable(NodeId(info.node));
            let report = report.unwrap_or_default();
            wire::NodeStatus {
                info: Some(info.clone()),
                reachable,
                leader_count: report.led.len() as u32,
                replica_count: report.replica_count,
                problems: report.problems,
                voter: voters.values().any(|node| node.0 == info.node),
                program: report.program,
                peer_version_max: report.peer_version_max,
            }
        };
        wire::ClusterStatusResponse {
            cluster: self.cluster.clone(),
            answered_by: self.node.0,
            metadata_leader: self.metadata.group().status().leader.map_or(0, |leader| leader.0),
            nodes: self.nodes().iter().map(node).collect(),
            topic_count,
            partition_count,
            leaderless_count,
            // Other tenants' names are for those who run the cluster.
            moves: if session.administers_cluster() {
                Self::move_statuses(published.state.topics(), &reports)
            } else {
                Self::move_statuses(published.state.topics_of(&session.tenant), &reports)
            },
            unsafe_recoveries: published.state.unsafe_recoveries().to_vec(),
        }
    }
}
