//! Which operators exist and which of them are alive.
//!
//! Every node reads `system.control.operators` from its own replica and comes to the same
//! list. Liveness is counted on this node's monotonic clock, from when it saw a heartbeat.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arqon_proto::{
    Batch, BatchBuilder, Compression, DecodeError, Record, RecordRef, Session, Verb, check_tenant, limits, records,
    wire,
};
use bytes::Bytes;
use prost::Message;
use tokio::time::Instant;

use crate::error::{error, invalid, not_found};

const REGISTRATION_SCHEMA: &str = "arqonbus.operator.registration.v1";
const HEARTBEAT_SCHEMA: &str = "arqonbus.operator.heartbeat.v1";
/// Silence after which an operator loses its leases.
pub(crate) const EXPIRY: Duration = Duration::from_millis(limits::OPERATOR_EXPIRY_MS);
/// Operators remembered; those longest silent go first.
const OPERATOR_COUNT_MAX: usize = 10_000;
/// Texts of one registration together, in bytes.
const REGISTRATION_SIZE_MAX: usize = 16 << 10;

/// Tenant and operator id.
pub(crate) type OperatorKey = (String, String);

struct Entry {
    registration: wire::OperatorRegistration,
    // Whether it may take work.
    live: bool,
    last_seen: Instant,
    last_heartbeat_ms: u64,
}

/// The operators that this node knows of.
#[derive(Default)]
pub(crate) struct Operators {
    entries: Mutex<HashMap<OperatorKey, Entry>>,
}

/// When a record of the operators' topic was made.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    /// When it counts as seen, on this node's clock.
    pub at: Instant,
    /// Whether that is recent enough to make an operator live.
    pub is_fresh: bool,
    /// Batch time in ms since 1970.
    pub time_ms: u64,
}

impl Operators {
    fn lock(&self) -> MutexGuard<'_, HashMap<OperatorKey, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the records of one batch of the operators' topic. What is malformed is passed
    /// over: the leader refused such records, so there are none.
    pub(crate) fn follow(&self, batch: &Batch, seen: Seen) -> Vec<OperatorKey> {
        let mut left = Vec::new();
        let read = records(batch, |_, record| {
            let Some(key) = split_key(record.key) else { return Ok(()) };
            match record.schema {
                REGISTRATION_SCHEMA => {
                    if let Ok(registration) = wire::OperatorRegistration::decode(record.payload) {
                        self.register(key, registration, seen);
                    }
                }
                HEARTBEAT_SCHEMA => {
                    if let Ok(heartbeat) = wire::OperatorHeartbeat::decode(record.payload)
                        && self.heartbeat(&key, heartbeat.leaving, seen)
                    {
                        left.push(key);
                    }
                }
                _ => {}
            }
            Ok::<_, DecodeError>(())
        });
        if let Err(error) = read {
            tracing::warn!(%error, offset = batch.header.base_offset.0, "records of the operators' topic passed over");
        }
        left
    }

    fn register(&self, key: OperatorKey, registration: wire::OperatorRegistration, seen: Seen) {
        let mut entries = self.lock();
        if entries.len() >= OPERATOR_COUNT_MAX && !entries.contains_key(&key) {
            let oldest = entries.iter().min_by_key(|(_, entry)| entry.last_seen).map(|(key, _)| key.clone());
            oldest.and_then(|oldest| entries.remove(&oldest));
        }
        let entry = Entry { registration, live: seen.is_fresh, last_seen: seen.at, last_heartbeat_ms: seen.time_ms };
        entries.insert(key, entry);
    }

    // Whether a live operator has just left.
    fn heartbeat(&self, key: &OperatorKey, leaving: bool, seen: Seen) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(key) else { return false };
        let was_live = entry.live;
        entry.live = seen.is_fresh && !leaving;
        entry.last_seen = entry.last_seen.max(seen.at);
        entry.last_heartbeat_ms = seen.time_ms;
        was_live && leaving
    }

    /// Declares those dead that were silent for too long, and names them.
    pub(crate) fn expire(&self, now: Instant) -> Vec<OperatorKey> {
        let mut entries = self.lock();
        let silent = entries
            .iter_mut()
            .filter(|(_, entry)| entry.live && now.saturating_duration_since(entry.last_seen) >= EXPIRY);
        silent
            .map(|(key, entry)| {
                entry.live = false;
                key.clone()
            })
            .collect()
    }

    /// Gives all operators `pause` more time: the node itself stood still that long.
    pub(crate) fn forgive(&self, pause: Duration) {
        for entry in self.lock().values_mut() {
            entry.last_seen += pause;
        }
    }

    /// The registration of a live operator that `session` may act as.
    ///
    /// # Errors
    /// TARGET_NOT_FOUND naming it when it is not registered or not alive;
    /// AUTHORIZATION_DENIED when the token does not cover its type.
    pub(crate) fn admit(&self, session: &Session, id: &str) -> Result<wire::OperatorRegistration, wire::Error> {
        let entries = self.lock();
        let entry = entries.get(&(session.tenant.clone(), id.to_owned())).ok_or_else(|| not_found("operator", id))?;
        if !entry.live {
            let message = format!("operator {id:?} has expired: it sent no heartbeat for {} s", EXPIRY.as_secs());
            return Err(wire::Error { field: id.to_owned(), ..error(wire::ErrorCode::TargetNotFound, message) });
        }
        may_execute(session, &entry.registration.operator_type)?;
        Ok(entry.registration.clone())
    }

    /// All operators of `tenant`, by id.
    pub(crate) fn list(&self, tenant: &str) -> Vec<wire::OperatorStatus> {
        let entries = self.lock();
        let mut out: Vec<_> = entries
            .iter()
            .filter(|((of, _), _)| of == tenant)
            .map(|(_, entry)| wire::OperatorStatus {
                registration: Some(entry.registration.clone()),
                live: entry.live,
                last_heartbeat_ms: entry.last_heartbeat_ms,
            })
            .collect();
        drop(entries);
        let id = |status: &wire::OperatorStatus| status.registration.as_ref().map(|r| r.operator_id.clone());
        out.sort_by_key(id);
        out
    }

    /// Number of operators that are alive.
    pub(crate) fn live_count(&self) -> usize {
        self.lock().values().filter(|entry| entry.live).count()
    }

    /// Checks what a client wants to write to the operators' topic, and gives each record the
    /// key `tenant/operator_id`: the payload names no tenant, and a client's key proves none.
    ///
    /// # Errors
    /// VALIDATION_ERROR naming the field, AUTHORIZATION_DENIED naming the type, or
    /// TARGET_NOT_FOUND for the heartbeat of an operator that is not registered.
    pub(crate) fn rewrite(&self, session: &Session, batch: &Batch) -> Result<Batch, wire::Error> {
        if batch.header.record_count as usize > limits::BATCH_RECORD_COUNT_MAX || batch.header.record_count == 0 {
            return Err(invalid("record count", "a batch needs records"));
        }
        let mut builder = BatchBuilder::new();
        // Types of operators registered earlier in this very batch.
        let mut registered = HashMap::new();
        let visited = records(batch, |_, record| {
            let id = self.check(session, &record, &mut registered)?;
            let key = Bytes::from(format!("{}/{id}", session.tenant));
            let record = Record { key, ..record.to_record() };
            builder.push(&record).map_err(Refusal::from)
        });
        visited.map_err(|refusal: Refusal| refusal.0)?;
        // Without the producer's sequence: registrations and heartbeats may come twice, and one
        // tenant's producer ids must not meet another's.
        Ok(builder.build(Compression::None, None))
    }

    fn check(
        &self,
        session: &Session,
        record: &RecordRef<'_>,
        registered: &mut HashMap<String, String>,
    ) -> Result<String, Refusal> {
        match record.schema {
            REGISTRATION_SCHEMA => {
                let registration = wire::OperatorRegistration::decode(record.payload)
                    .map_err(|_| invalid("payload", "it is not an OperatorRegistration"))?;
                check_registration(&registration, record.payload.len())?;
                may_execute(session, &registration.operator_type)?;
                registered.insert(registration.operator_id.clone(), registration.operator_type);
                Ok(registration.operator_id)
            }
            HEARTBEAT_SCHEMA => {
                let id = wire::OperatorHeartbeat::decode(record.payload)
                    .map_err(|_| invalid("payload", "it is not an OperatorHeartbeat"))?
                    .operator_id;
                let known = self
                    .lock()
                    .get(&(session.tenant.clone(), id.clone()))
                    .map(|e| e.registration.operator_type.clone());
                let operator_type = registered.get(&id).cloned().or(known).ok_or_else(|| not_found("operator", &id))?;
                may_execute(session, &operator_type)?;
                Ok(id)
            }
            other => Err(Refusal(invalid(
                "schema",
                format!("{other:?} does not belong here; use {REGISTRATION_SCHEMA} or {HEARTBEAT_SCHEMA}"),
            ))),
        }
    }
}

struct Refusal(wire::Error);

impl From<wire::Error> for Refusal {
    fn from(error: wire::Error) -> Self {
        Self(error)
    }
}

impl From<DecodeError> for Refusal {
    fn from(error: DecodeError) -> Self {
        Self(invalid("batch", error.to_string()))
    }
}

fn may_execute(session: &Session, operator_type: &str) -> Result<(), wire::Error> {
    if session.allows(Verb::Execute, operator_type) {
        return Ok(());
    }
    let message = format!("the token does not allow execute:{operator_type}");
    Err(wire::Error { field: operator_type.to_owned(), ..error(wire::ErrorCode::AuthorizationDenied, message) })
}

fn check_registration(registration: &wire::OperatorRegistration, size: usize) -> Result<(), wire::Error> {
    let named = |error: arqon_proto::NameError| invalid(error.field, error.to_string());
    check_tenant("operator_id", &registration.operator_id).map_err(named)?;
    check_tenant("operator_type", &registration.operator_type).map_err(named)?;
    if registration.version.is_empty() || registration.version.len() > limits::NAME_SIZE_MAX {
        return Err(invalid("version", "it is empty or too long"));
    }
    if size > REGISTRATION_SIZE_MAX {
        return Err(invalid("payload", format!("a registration has at most {REGISTRATION_SIZE_MAX} bytes")));
    }
    Ok(())
}

fn split_key(key: &[u8]) -> Option<OperatorKey> {
    let (tenant, id) = std::str::from_utf8(key).ok()?.split_once('/')?;
    Some((tenant.to_owned(), id.to_owned()))
}

#[cfg(test)]
mod tests {
    use arqon_proto::Permission;

    use super::*;

    fn session(tenant: &str, permission: &str) -> Session {
        Session {
            tenant: tenant.into(),
            subject: "ada".into(),
            expires_at: u64::MAX,
            admin: false,
            permissions: Permission::parse(permission).into_iter().collect(),
        }
    }

    fn batch(schema: &str, payload: Vec<u8>) -> Batch {
        let mut builder = BatchBuilder::new();
        // A key that claims another tenant.
        let record =
            Record { schema: schema.into(), key: "other/g1".into(), payload: payload.into(), ..Default::default() };
        builder.push(&record).unwrap();
        builder.build(Compression::None, None)
    }

    fn registration(operator_type: &str) -> Batch {
        let message = wire::OperatorRegistration {
            operator_id: "g1".into(),
            operator_type: operator_type.into(),
            version: "1".into(),
            ..Default::default()
        };
        batch(REGISTRATION_SCHEMA, message.encode_to_vec())
    }

    fn heartbeat(leaving: bool) -> Batch {
        let message = wire::OperatorHeartbeat { operator_id: "g1".into(), running_jobs: 0, leaving };
        batch(HEARTBEAT_SCHEMA, message.encode_to_vec())
    }

    fn seen(at: Instant) -> Seen {
        Seen { at, is_fresh: true, time_ms: 1 }
    }

    #[test]
    fn an_operator_lives_while_it_beats_and_is_named_when_it_expires() {
        let (operators, start) = (Operators::default(), Instant::now());
        let ada = session("acme", "execute:genesis");
        let admitted = |id: &str| operators.admit(&ada, id).map_err(|error| error.code());
        assert_eq!(admitted("g1"), Err(wire::ErrorCode::TargetNotFound));
        operators.follow(&operators.rewrite(&ada, &registration("genesis")).unwrap(), seen(start));
        assert_eq!(admitted("g1").unwrap().version, "1");
        operators.follow(&operators.rewrite(&ada, &heartbeat(false)).unwrap(), seen(start + EXPIRY / 2));
        assert!(operators.expire(start + EXPIRY).is_empty());
        let key = ("acme".to_owned(), "g1".to_owned());
        assert_eq!(operators.expire(start + EXPIRY * 2), std::slice::from_ref(&key));
        assert!(operators.expire(start + EXPIRY * 2).is_empty(), "named once");
        let expired = operators.admit(&ada, "g1").unwrap_err();
        assert!(expired.code() == wire::ErrorCode::TargetNotFound && expired.message.contains("g1"));
        operators.follow(&operators.rewrite(&ada, &heartbeat(false)).unwrap(), seen(start + EXPIRY * 3));
        assert!(admitted("g1").is_ok(), "a heartbeat brings it back");
        let left = operators.follow(&operators.rewrite(&ada, &heartbeat(true)).unwrap(), seen(start + EXPIRY * 3));
        assert_eq!(left, [key]);
        assert!(admitted("g1").is_err());
    }

    #[test]
    fn tenant_and_type_come_from_the_token_alone() {
        let operators = Operators::default();
        let ada = session("acme", "execute:genesis");
        operators.follow(&operators.rewrite(&ada, &registration("genesis")).unwrap(), seen(Instant::now()));
        assert_eq!((operators.list("acme").len(), operators.list("other").len()), (1, 0));
        let denied = operators.rewrite(&ada, &registration("nvm")).unwrap_err();
        assert_eq!((denied.code(), denied.field.as_str()), (wire::ErrorCode::AuthorizationDenied, "nvm"));
        let eve = session("other", "execute:*");
        assert_eq!(operators.rewrite(&eve, &heartbeat(true)).unwrap_err().code(), wire::ErrorCode::TargetNotFound);
        assert_eq!(operators.admit(&eve, "g1").unwrap_err().code(), wire::ErrorCode::TargetNotFound);
        let bob = session("acme", "execute:nvm");
        assert_eq!(operators.admit(&bob, "g1").unwrap_err().code(), wire::ErrorCode::AuthorizationDenied);
        assert_eq!(operators.rewrite(&bob, &heartbeat(true)).unwrap_err().code(), wire::ErrorCode::AuthorizationDenied);
    }

    #[test]
    fn what_is_no_registration_is_refused() {
        let operators = Operators::default();
        let ada = session("acme", "execute:*");
        let nameless =
            wire::OperatorRegistration { operator_type: "nvm".into(), version: "1".into(), ..Default::default() };
        for (batch, field) in [
            (batch("arqonbus.nvm.job.v1", vec![]), "schema"),
            (batch(REGISTRATION_SCHEMA, vec![0xff]), "payload"),
            (batch(REGISTRATION_SCHEMA, nameless.encode_to_vec()), "operator_id"),
            (batch(REGISTRATION_SCHEMA, vec![]), "operator_id"),
        ] {
            assert_eq!(operators.rewrite(&ada, &batch).unwrap_err().field, field);
        }
    }

    #[test]
    fn what_is_read_long_after_it_was_written_makes_nobody_live() {
        let operators = Operators::default();
        let ada = session("acme", "execute:genesis");
        let old = Seen { is_fresh: false, ..seen(Instant::now()) };
        operators.follow(&operators.rewrite(&ada, &registration("genesis")).unwrap(), old);
        assert!(operators.admit(&ada, "g1").unwrap_err().message.contains("expired"));
        assert!(operators.expire(Instant::now()).is_empty());
    }

    #[test]
    fn a_pause_of_the_node_itself_expires_nobody() {
        let (operators, start) = (Operators::default(), Instant::now());
        let ada = session("acme", "execute:genesis");
        operators.follow(&operators.rewrite(&ada, &registration("genesis")).unwrap(), seen(start));
        operators.forgive(EXPIRY * 4);
        assert!(operators.expire(start + EXPIRY * 4).is_empty());
        assert_eq!(operators.expire(start + EXPIRY * 5).len(), 1);
    }
}
