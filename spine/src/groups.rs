//! Groups of workers of a jobs topic, over all of its partitions: these ask their leaders.

use arqon_proto::{GroupId, NodeId, TopicClass, check_tenant, wire};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, TryStreamExt, stream};
use prost::Message;
use wire::forget_group_answer::Answer;

use crate::{
    broker::Broker,
    error::{invalid, malformed, not_found, not_leader},
    metadata::Topic,
    topics::PARTITION_COUNT_MAX,
};

/// The kind under which a leader is asked to forget a group.
pub(crate) const FORGET_GROUP_KIND: &str = "delete-group";

impl Broker {
    /// Deletes a group of a jobs topic from all partitions: how many knew it. See
    /// [`crate::partition::Partition::delete_group`].
    ///
    /// # Errors
    /// As there; TARGET_NOT_FOUND naming the topic or the group; VALIDATION_ERROR. Nothing is deleted when a
    /// partition refuses, unless a worker comes just then; the request may be repeated.
    pub(crate) async fn delete_group(
        &self,
        tenant: &str,
        request: &wire::DeleteGroupRequest,
    ) -> Result<u32, wire::Error> {
        check_tenant("group", &request.group).map_err(|cause| invalid("group", cause.to_string()))?;
        let topic = self.own_topic(tenant, &request.topic)?;
        if topic.config.class != TopicClass::Jobs.name() {
            return Err(invalid("topic", format!("{} is no topic of jobs: it has no groups", topic.config.name)));
        }
        let known_count = self.forget_all(&topic, request, true).await?;
        if known_count == 0 {
            return Err(wire::Error { field: "group".to_owned(), ..not_found("group", &request.group) });
        }
        self.forget_all(&topic, request, false).await?;
        Ok(known_count)
    }

    /// How many partitions know the group.
    async fn forget_all(
        &self,
        topic: &Topic,
        request: &wire::DeleteGroupRequest,
        only_check: bool,
    ) -> Result<u32, wire::Error> {
        let asked = (0..topic.partitions.len()).map(|partition| async move {
            let placement = &topic.partitions[partition];
            let (name, force) = (request.group.clone(), request.force);
            let request = wire::ForgetGroupRequest { group: placement.group, name, force, only_check };
            let ask = |leader| {
                let request = &request;
                async move {
                    if leader == self.node {
                        self.forget_here(request).await
                    } else {
                        self.forget_there(leader, request).await
                    }
                }
                .boxed()
            };
            self.at_leader(placement, ask).await
        });
        let known: Vec<bool> = stream::iter(asked).buffered(PARTITION_COUNT_MAX).try_collect().await?;
        Ok(known.into_iter().filter(|known| *known).count() as u32)
    }

    async fn forget_here(&self, request: &wire::ForgetGroupRequest) -> Result<bool, wire::Error> {
        let partition = self.replicas.get(GroupId(request.group)).ok_or_else(|| not_leader(None))?;
        partition.delete_group(&request.name, request.force, request.only_check).await
    }

    async fn forget_there(&self, leader: NodeId, request: &wire::ForgetGroupRequest) -> Result<bool, wire::Error> {
        let answer = self.forward(leader, FORGET_GROUP_KIND, request.encode_to_vec().into()).await?;
        match wire::ForgetGroupAnswer::decode(answer).ok().and_then(|answer| answer.answer) {
            Some(Answer::Known(known)) => Ok(known),
            Some(Answer::Error(refused)) => Err(refused),
            None => Err(malformed(leader)),
        }
    }

    pub(crate) async fn handle_forget_group(&self, body: Bytes) -> Result<Bytes, String> {
        let request = wire::ForgetGroupRequest::decode(body).map_err(|cause| cause.to_string())?;
        let answer = match self.forget_here(&request).await {
            Ok(known) => Answer::Known(known),
            Err(refused) => Answer::Error(refused),
        };
        Ok(wire::ForgetGroupAnswer { answer: Some(answer) }.encode_to_vec().into())
    }
}
