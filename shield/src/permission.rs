//! What each request needs, checked at the edge; the Spine checks the same again.

use arqon_proto::{Session, Verb, wire};
use wire::{ErrorCode, frame::Body};

/// Whether `session` may send `request`. A result that comes with lease tokens passes: a token is
/// the right to write its job's result, and only the Spine can check it.
///
/// # Errors
/// `AUTHORIZATION_DENIED` naming verb and topic; `VALIDATION_ERROR` for what is no request.
pub(crate) fn check(session: &Session, request: &Body) -> Result<(), wire::Error> {
    let (verb, topic) = match request {
        Body::Produce(produce) if !produce.lease_tokens.is_empty() => return Ok(()),
        Body::Produce(produce) => (Verb::Publish, &produce.topic),
        Body::Fetch(fetch) => (Verb::Subscribe, &fetch.topic),
        Body::ListOffsets(list) => (Verb::Subscribe, &list.topic),
        Body::Work(work) => (Verb::Subscribe, &work.topic),
        Body::Ack(ack) => (Verb::Subscribe, &ack.topic),
        Body::Nack(nack) => (Verb::Subscribe, &nack.topic),
        Body::Renew(renew) => (Verb::Subscribe, &renew.topic),
        Body::DescribeTopic(describe) => {
            let topic = &describe.topic;
            let may = [Verb::Publish, Verb::Admin].into_iter().any(|verb| session.allows(verb, topic));
            // An operator has to find the topic of its results, which it may not write otherwise.
            if may || (session.executes_any() && !topic.starts_with("system.")) {
                return Ok(());
            }
            (Verb::Subscribe, topic)
        }
        _ => {
            return Err(wire::Error {
                code: ErrorCode::ValidationError.into(),
                message: "a client does not send this".to_owned(),
                field: "body".to_owned(),
                ..Default::default()
            });
        }
    };
    if session.allows(verb, topic) {
        return Ok(());
    }
    Err(wire::Error {
        code: ErrorCode::AuthorizationDenied.into(),
        message: format!("the token does not allow {verb}:{topic}"),
        field: topic.clone(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use arqon_proto::Permission;

    use super::*;

    fn session(permissions: &[&str]) -> Session {
        Session {
            tenant: "acme".into(),
            subject: "ada".into(),
            expires_at: u64::MAX,
            admin: false,
            permissions: permissions.iter().filter_map(|text| Permission::parse(text)).collect(),
        }
    }

    #[test]
    fn each_verb_opens_its_own_requests_only() {
        let topic = || "x.jobs".to_owned();
        let produce = Body::Produce(wire::Produce { topic: topic(), ..Default::default() });
        let token = wire::Produce { topic: topic(), lease_tokens: vec!["t".into()], ..Default::default() };
        let fetch = Body::Fetch(wire::Fetch { topic: topic(), ..Default::default() });
        let describe = Body::DescribeTopic(wire::DescribeTopic { topic: topic() });
        let allowed = |permissions: &[&str], request: &Body| check(&session(permissions), request).is_ok();
        assert!(allowed(&["publish:x.*"], &produce) && !allowed(&["subscribe:x.*"], &produce));
        assert!(allowed(&["subscribe:x.jobs"], &fetch) && !allowed(&["publish:*"], &fetch));
        assert!(allowed(&[], &Body::Produce(token)));
        assert!(allowed(&["execute:x"], &describe) && allowed(&["publish:x.jobs"], &describe));
        let error = check(&session(&[]), &describe).unwrap_err();
        assert_eq!(error.message, "the token does not allow subscribe:x.jobs");
        assert!(check(&session(&["subscribe:*"]), &Body::Welcome(wire::Welcome::default())).is_err());
    }
}
