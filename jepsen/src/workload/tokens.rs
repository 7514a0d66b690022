//! Tokens that must open nothing, tried on everything while faults go on: expired ones, forged
//! ones, ones without a signature, of another audience or tenant, without a permission; and one
//! that expires while its connection is open.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arqon_proto::{AUDIENCE_DEFAULT, Claims, TokenAlgorithm, TokenKeyPair, TokenSigner};
use arqon_sdk::{Client, Error, NewEvent, ProducerOptions, wire};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{task::JoinSet, time::sleep};

use super::{Shared, append, control::Control, read, told};
use crate::history::{Kind, Line};

/// Time between two tries of one process.
const TRY_PAUSE: Duration = Duration::from_millis(50);
/// Processes that try.
const PROCESS_COUNT: u64 = 2;
/// Life of the token that expires under its connection, in seconds.
const SHORT_SECONDS: u64 = 3;
/// Time after its expiry from which on it must open nothing; a node may be 5 s off the others.
const GRACE: Duration = Duration::from_secs(6);
/// `{"alg":"none","typ":"JWT"}` in the alphabet of URLs.
const UNSIGNED_HEADER: &str = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0";
/// What a token is tried on.
const VERBS: [&str; 4] = ["publish", "subscribe", "describe", "admin"];

/// Tokens that must open nothing.
#[derive(Clone, Copy, Debug)]
enum Bad {
    Expired,
    Forged,
    Unsigned,
    CutOff,
    OtherAudience,
    OtherTenant,
    NoPermission,
}

impl Bad {
    const ALL: [(Self, &'static str); 7] = [
        (Self::Expired, "expired"),
        (Self::Forged, "forged"),
        (Self::Unsigned, "unsigned"),
        (Self::CutOff, "cut-off"),
        (Self::OtherAudience, "other-audience"),
        (Self::OtherTenant, "other-tenant"),
        (Self::NoPermission, "no-permission"),
    ];
}

/// Makes tokens.
struct Mint {
    signer: TokenSigner,
    forger: TokenSigner,
    tenant: String,
}

fn failed(error: impl std::fmt::Display) -> super::Error {
    super::Error(format!("workload tokens: {error}"))
}

impl Mint {
    fn new(shared: &Shared) -> Result<Self, super::Error> {
        let path = &shared.setup.token_key;
        let key = std::fs::read(path).map_err(|error| failed(format!("{}: {error}", path.display())))?;
        let signer = TokenSigner::from_pem(TokenAlgorithm::EdDSA, None, &key).map_err(failed)?;
        let other = TokenKeyPair::generate().map_err(failed)?;
        let forger = TokenSigner::from_pem(TokenAlgorithm::EdDSA, None, other.private_key_pem.as_bytes());
        Ok(Self { signer, forger: forger.map_err(failed)?, tenant: shared.setup.tenant.clone() })
    }

    /// The claims of a token that may do everything.
    fn claims(&self) -> Claims {
        let now = seconds_now();
        Claims {
            sub: "jepsen".to_owned(),
            tenant_id: self.tenant.clone(),
            aud: AUDIENCE_DEFAULT.to_owned(),
            exp: now + 3_600,
            iat: now,
            role: "admin".to_owned(),
            permissions: Vec::new(),
        }
    }

    fn bad(&self, bad: Bad) -> Result<String, super::Error> {
        let good = self.claims();
        let signed = |claims: &Claims| self.signer.mint(claims).map_err(failed);
        match bad {
            Bad::Expired => signed(&Claims { exp: good.iat - 60, iat: good.iat - 3_600, ..good }),
            Bad::Forged => self.forger.mint(&good).map_err(failed),
            Bad::Unsigned => {
                let token = signed(&good)?;
                let payload = token.split('.').nth(1).unwrap_or_default();
                Ok(format!("{UNSIGNED_HEADER}.{payload}."))
            }
            Bad::CutOff => signed(&good).map(|token| token[..token.len() - 8].to_owned()),
            Bad::OtherAudience => signed(&Claims { aud: "elsewhere".to_owned(), ..good }),
            Bad::OtherTenant => signed(&Claims { tenant_id: format!("{}-other", self.tenant), ..good }),
            Bad::NoPermission => signed(&Claims { role: "client".to_owned(), ..good }),
        }
    }
}

/// Starts an ordinary load, and the processes that try tokens.
pub(super) fn start(shared: &Arc<Shared>, tasks: &mut JoinSet<()>) -> Result<(), super::Error> {
    let mint = Arc::new(Mint::new(shared)?);
    for partition in 0..shared.setup.partition_count {
        append::producers(shared, partition, 1, tasks)?;
        read::start(shared, &shared.topic, partition, tasks)?;
    }
    for index in 0..PROCESS_COUNT {
        tasks.spawn(try_bad(shared.clone(), mint.clone(), shared.setup.seed ^ index));
    }
    tasks.spawn(outlive(shared.clone(), mint));
    Ok(())
}

async fn try_bad(shared: Arc<Shared>, mint: Arc<Mint>, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    while !shared.stops() {
        let (bad, name) = Bad::ALL[random.random_range(0..Bad::ALL.len())];
        let verb = VERBS[random.random_range(0..VERBS.len())];
        let node = random.random_range(0..shared.setup.nodes.len());
        // What cannot be made cannot be tried; Mint::new has signed with both keys.
        if let Ok(token) = mint.bad(bad)
            && let Ok(client) = shared.setup.client_with("token", &token)
        {
            try_token(&shared, &client, &token, (name, verb, node)).await;
        }
        shared.pause(TRY_PAUSE).await;
    }
}

/// A connection that outlives its token: what worked must end.
async fn outlive(shared: Arc<Shared>, mint: Arc<Mint>) {
    while !shared.stops() {
        let mut claims = mint.claims();
        claims.exp = claims.iat + SHORT_SECONDS;
        let Ok(token) = mint.signer.mint(&claims) else { return };
        let Ok(client) = shared.setup.client_with("token", &token) else { return };
        let line = access_line(&shared, "good", "subscribe");
        let (kind, error) = access(&shared, &client, &token, ("subscribe", 0)).await;
        // An answer that took so long says nothing: the token may have run out before somebody saw it.
        let is_late = kind == Kind::Fail && seconds_now() >= claims.exp;
        shared.history.record(Line { kind: if is_late { Kind::Info } else { kind }, error, ..line });
        sleep(Duration::from_secs(SHORT_SECONDS) + GRACE).await;
        try_token(&shared, &client, &token, ("outlived", "subscribe", 0)).await;
    }
}

/// Tries a token on one thing and records whether it was let in.
async fn try_token(shared: &Shared, client: &Client, token: &str, (name, verb, node): (&str, &str, usize)) {
    let line = access_line(shared, name, verb);
    let (kind, error) = access(shared, client, token, (verb, node)).await;
    shared.history.record(Line { kind, error, ..line });
}

/// The line of a try of the token `name`, recorded as begun.
fn access_line(shared: &Shared, name: &str, verb: &str) -> Line {
    let process = shared.history.new_process();
    let line = Line {
        token: Some(name.to_owned()),
        verb: Some(verb.to_owned()),
        ..Line::client(process, Kind::Invoke, "access", &shared.key(0))
    };
    shared.history.record(line.clone());
    line
}

/// Whether a token was let in, and why not.
async fn access(shared: &Shared, client: &Client, token: &str, (verb, node): (&str, usize)) -> (Kind, Option<String>) {
    let outcome = match verb {
        "publish" => publish(shared, client).await.map_err(|error| told(&error)),
        "subscribe" => {
            let fetch = wire::Fetch { topic: shared.topic.clone(), bytes_max: 1_024, ..Default::default() };
            client.fetch_raw(fetch).await.map(drop).map_err(|error| told(&error))
        }
        "describe" => client.describe_topic(&shared.topic).await.map(drop).map_err(|error| told(&error)),
        _ => {
            let control = Control::with_token(&shared.setup, token);
            let altered = control.alter(node, &shared.topic, super::control::RETENTION_MS + 1).await;
            altered.map_err(|refused| refused.error)
        }
    };
    match outcome {
        Ok(()) => (Kind::Ok, None),
        Err(error) if is_refusal(&error) => (Kind::Fail, Some(error)),
        // Nobody to ask: it says nothing about the token.
        Err(error) => (Kind::Info, Some(error)),
    }
}

/// Seconds since 1970 on the clock that the tokens are made by.
fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

async fn publish(shared: &Shared, client: &Client) -> Result<(), Error> {
    let options = ProducerOptions { partition: Some(0), ..ProducerOptions::default() };
    let producer = client.producer(&shared.topic, options).await?;
    producer.publish(NewEvent::new("nobody may write this")).await.map(drop)
}

/// Another tenant's token is told that there is no such topic.
fn is_refusal(error: &str) -> bool {
    ["AUTHENTICATION_FAILED", "AUTHORIZATION_DENIED", "TARGET_NOT_FOUND"].iter().any(|code| error.contains(code))
}
