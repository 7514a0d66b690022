//! Access tokens: who a client is, which tenant it belongs to and what it may do.
//!
//! ```text
//!   JWT header   {"alg": "EdDSA" | "RS256", "kid": "..."}     kid is optional
//!   JWT claims   {"sub": "ada", "tenant_id": "acme", "aud": "arqonbus", "iat": .., "exp": ..,
//!                 "role": "admin", "permissions": ["publish:nvm.jobs", "subscribe:nvm.*", "execute:nvm"]}
//! ```
//!
//! A permission is `verb:pattern`; the pattern is exact, or a prefix that ends in `*`. The
//! verbs `publish`, `subscribe` and `admin` take topics, `execute` takes operator types. What
//! cannot be read as a permission grants nothing. The role `admin` grants every verb on every
//! topic of its tenant. Topics under `system.` belong to no tenant: only
//! [`OPERATOR_TOPIC`] may be published to, by whoever may execute some operator type.
//!
//! The Spine and the Shield check the same token with the same code. The algorithm is that of
//! the configured key; the token only has to agree with it.

use std::collections::HashSet;

use base64::Engine as _;
use jsonwebtoken::{DecodingKey, EncodingKey, Header, Validation, errors::ErrorKind};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde::{Deserialize, Serialize};

use crate::check_tenant;
use crate::planted::{self, Bug};

/// Longest token that is looked at, in bytes.
pub const TOKEN_SIZE_MAX: usize = 16 << 10;
/// The audience of a token when the configuration names none.
pub const AUDIENCE_DEFAULT: &str = "arqonbus";
/// The tenant of the bus itself; no token may claim it.
pub const SYSTEM_TENANT: &str = "system";
/// Where operators register and send heartbeats.
pub const OPERATOR_TOPIC: &str = "system.control.operators";

const ADMIN_ROLE: &str = "admin";
const SYSTEM_PREFIX: &str = "system.";

/// The signature algorithms that are accepted. All are asymmetric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenAlgorithm {
    /// Ed25519.
    EdDSA,
    /// RSA PKCS #1 v1.5 with SHA-256.
    RS256,
}

impl TokenAlgorithm {
    fn jwt(self) -> jsonwebtoken::Algorithm {
        match self {
            Self::EdDSA => jsonwebtoken::Algorithm::EdDSA,
            Self::RS256 => jsonwebtoken::Algorithm::RS256,
        }
    }
}

/// A public key that tokens may be signed with.
#[derive(Clone, Debug)]
pub struct TokenKey {
    /// Key id. A token that names a key id is checked with that key only.
    pub kid: Option<String>,
    /// The one algorithm for which the key may be used.
    pub algorithm: TokenAlgorithm,
    /// The public key, PEM (`BEGIN PUBLIC KEY`).
    pub public_key_pem: Vec<u8>,
}

/// Why a token is refused. Never repeats the token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// No token was given.
    #[error("the token is missing")]
    Missing,
    /// Not a JWT, or its claims are not what they should be.
    #[error("the token is malformed: {0}")]
    Malformed(String),
    /// The token names an algorithm other than that of the key.
    #[error("the token is signed with an algorithm that is not accepted")]
    Algorithm,
    /// The token names a key id that is not configured.
    #[error("the token is signed with an unknown key")]
    UnknownKey,
    /// No configured key made the signature.
    #[error("the token has a wrong signature")]
    Signature,
    /// `exp` is in the past.
    #[error("the token has expired")]
    Expired,
    /// `nbf` is in the future.
    #[error("the token is not valid yet")]
    NotYetValid,
    /// `aud` is not that of this cluster.
    #[error("the token is for another audience")]
    Audience,
    /// A claim that must be there is not.
    #[error("the token has no claim {0:?}")]
    MissingClaim(String),
    /// A claim that cannot be, for example the tenant of the bus itself.
    #[error("the token has an invalid claim {claim:?}: {rule}")]
    Claim {
        /// The claim.
        claim: &'static str,
        /// The rule it breaks.
        rule: String,
    },
    /// A configured key that cannot be used; only when keys are loaded or tokens minted.
    #[error("{0}")]
    Key(String),
}

/// What a token says, and what [`TokenSigner::mint`] signs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Whom the token was given to.
    pub sub: String,
    /// The tenant.
    pub tenant_id: String,
    /// The audience.
    pub aud: String,
    /// End of validity, seconds since 1970.
    pub exp: u64,
    /// Time of issue, seconds since 1970.
    pub iat: u64,
    /// `admin`, or anything else for none.
    pub role: String,
    /// `verb:pattern`.
    pub permissions: Vec<String>,
}

// What is read of a token. The audience may be a string or a list, and is checked by the
// library; the times are checked here, against the caller's clock.
#[derive(Deserialize)]
struct ReadClaims {
    sub: String,
    tenant_id: String,
    exp: f64,
    // Nothing rests on it, but a token without one was not made for this bus.
    #[serde(rename = "iat")]
    _iat: f64,
    #[serde(default)]
    nbf: Option<f64>,
    #[serde(default)]
    role: String,
    #[serde(default)]
    permissions: Vec<String>,
}

/// What may be done with a topic or as an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Write events to a topic.
    Publish,
    /// Read a topic, or take work from it.
    Subscribe,
    /// Act as an operator of a type.
    Execute,
    /// Create and delete topics.
    Admin,
}

impl Verb {
    /// The verb as permissions spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Subscribe => "subscribe",
            Self::Execute => "execute",
            Self::Admin => "admin",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Publish, Self::Subscribe, Self::Execute, Self::Admin].into_iter().find(|verb| verb.name() == name)
    }
}

impl std::fmt::Display for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What `admin` is asked for where the cluster itself is changed.
const CLUSTER: &str = "cluster";

/// One thing that a token allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permission {
    verb: Verb,
    // Without its trailing star.
    pattern: String,
    prefix: bool,
}

impl Permission {
    /// Reads `verb:pattern`; `None` when it is not one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (verb, pattern) = text.split_once(':')?;
        let verb = Verb::from_name(verb)?;
        let (pattern, prefix) = match pattern.strip_suffix('*') {
            Some(start) => (start, true),
            None => (pattern, false),
        };
        let valid = !pattern.contains('*') && (prefix || !pattern.is_empty());
        valid.then(|| Self { verb, pattern: pattern.to_owned(), prefix })
    }

    fn covers(&self, verb: Verb, name: &str) -> bool {
        self.verb == verb && if self.prefix { name.starts_with(&self.pattern) } else { name == self.pattern }
    }
}

/// What a verified token grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The tenant: every topic name is looked up within it.
    pub tenant: String,
    /// Whom the token was given to.
    pub subject: String,
    /// End of validity, seconds since 1970.
    pub expires_at: u64,
    /// Whether the role is `admin`.
    pub admin: bool,
    /// The permissions that could be read.
    pub permissions: Vec<Permission>,
}

impl Session {
    /// Whether `verb` is allowed on `name`: a topic, or an operator type for
    /// [`Verb::Execute`].
    #[must_use]
    pub fn allows(&self, verb: Verb, name: &str) -> bool {
        if verb != Verb::Execute && name.starts_with(SYSTEM_PREFIX) {
            return verb == Verb::Publish && name == OPERATOR_TOPIC && self.executes_any();
        }
        self.admin || self.permissions.iter().any(|permission| permission.covers(verb, name))
    }

    /// Whether the token may change the cluster itself: nodes, and where replicas are. Only the permission
    /// `admin:cluster` by that name says so, since tenants may have administrators of their own.
    #[must_use]
    pub fn administers_cluster(&self) -> bool {
        let is_it = |held: &Permission| held.verb == Verb::Admin && !held.prefix && held.pattern == CLUSTER;
        self.permissions.iter().any(is_it)
    }

    /// Whether the token may act as an operator of some type.
    #[must_use]
    pub fn executes_any(&self) -> bool {
        self.admin || self.permissions.iter().any(|permission| permission.verb == Verb::Execute)
    }
}

struct VerifyingKey {
    kid: Option<String>,
    key: DecodingKey,
    validation: Validation,
}

/// Checks tokens against the configured public keys.
pub struct Verifier {
    keys: Vec<VerifyingKey>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Verifier({} keys)", self.keys.len())
    }
}

impl Verifier {
    /// A verifier of tokens for `audience` that are signed with one of `keys`.
    ///
    /// # Errors
    /// [`TokenError::Key`]: no key at all, two with the same id, or one that is not a public
    /// key of its algorithm.
    pub fn from_keys(keys: &[TokenKey], audience: &str) -> Result<Self, TokenError> {
        if keys.is_empty() {
            return Err(TokenError::Key("no token keys are configured".into()));
        }
        if audience.is_empty() {
            return Err(TokenError::Key("the token audience is empty".into()));
        }
        let mut seen = HashSet::new();
        let mut out = Vec::with_capacity(keys.len());
        for (index, key) in keys.iter().enumerate() {
            if key.kid.as_ref().is_some_and(|kid| !seen.insert(kid)) {
                return Err(TokenError::Key(format!("token key {index} has the same kid as another")));
            }
            out.push(VerifyingKey {
                kid: key.kid.clone(),
                key: public_key(key).map_err(|rule| TokenError::Key(format!("token key {index} {rule}")))?,
                validation: validation(key.algorithm, audience),
            });
        }
        Ok(Self { keys: out })
    }

    /// Checks `token` at `now` (seconds since 1970).
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn verify(&self, token: &str, now: u64) -> Result<Session, TokenError> {
        if token.is_empty() {
            return Err(TokenError::Missing);
        }
        if token.len() > TOKEN_SIZE_MAX {
            return Err(TokenError::Malformed(format!("it is longer than {TOKEN_SIZE_MAX} bytes")));
        }
        let kid = jsonwebtoken::decode_header(token).map_err(refused)?.kid;
        let mut why = TokenError::UnknownKey;
        for key in self.keys.iter().filter(|key| kid.is_none() || key.kid.is_none() || key.kid == kid) {
            match jsonwebtoken::decode::<ReadClaims>(token, &key.key, &key.validation) {
                Ok(data) => return session(data.claims, now),
                Err(error) => {
                    let error = refused(error);
                    // With several keys the most telling refusal is kept: a wrong signature
                    // under the right algorithm says more than a wrong algorithm.
                    if why == TokenError::UnknownKey || why == TokenError::Algorithm {
                        why = error;
                    } else if !matches!(error, TokenError::Algorithm | TokenError::Signature) {
                        return Err(error);
                    }
                }
            }
        }
        Err(why)
    }
}

fn public_key(key: &TokenKey) -> Result<DecodingKey, String> {
    // A private key would verify nothing and must not lie on a server by mistake.
    if key.public_key_pem.windows(11).any(|text| text == b"PRIVATE KEY") {
        return Err("is a private key; give the public one".into());
    }
    match key.algorithm {
        TokenAlgorithm::EdDSA => DecodingKey::from_ed_pem(&key.public_key_pem),
        TokenAlgorithm::RS256 => DecodingKey::from_rsa_pem(&key.public_key_pem),
    }
    .map_err(|_| format!("is not a public key for {:?} in PEM", key.algorithm))
}

fn validation(algorithm: TokenAlgorithm, audience: &str) -> Validation {
    let mut validation = Validation::new(algorithm.jwt());
    validation.set_audience(&[audience]);
    validation.set_required_spec_claims(&["exp", "aud", "sub"]);
    validation.validate_exp = false;
    validation
}

fn session(claims: ReadClaims, now: u64) -> Result<Session, TokenError> {
    let bad = |claim, rule: &str| Err(TokenError::Claim { claim, rule: rule.to_owned() });
    let now_seconds = now as f64;
    if !claims.exp.is_finite() || claims.exp < 0.0 {
        return bad("exp", "it is not a time");
    }
    if claims.exp <= now_seconds && !planted::has(Bug::ExpiryIgnored) {
        return Err(TokenError::Expired);
    }
    if claims.nbf.is_some_and(|nbf| nbf > now_seconds) {
        return Err(TokenError::NotYetValid);
    }
    if claims.sub.is_empty() {
        return bad("sub", "it is empty");
    }
    check_tenant("tenant_id", &claims.tenant_id)
        .map_err(|error| TokenError::Claim { claim: "tenant_id", rule: error.rule.to_owned() })?;
    if claims.tenant_id == SYSTEM_TENANT {
        return bad("tenant_id", "this tenant is the bus itself");
    }
    Ok(Session {
        tenant: claims.tenant_id,
        subject: claims.sub,
        expires_at: claims.exp as u64,
        admin: claims.role == ADMIN_ROLE,
        permissions: claims.permissions.iter().filter_map(|text| Permission::parse(text)).collect(),
    })
}

fn refused(error: jsonwebtoken::errors::Error) -> TokenError {
    match error.into_kind() {
        ErrorKind::InvalidSignature | ErrorKind::Crypto(_) => TokenError::Signature,
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName | ErrorKind::MissingAlgorithm => {
            TokenError::Algorithm
        }
        ErrorKind::InvalidAudience => TokenError::Audience,
        ErrorKind::MissingRequiredClaim(claim) => TokenError::MissingClaim(claim),
        ErrorKind::Json(error) if error.is_data() => missing_or_malformed(&error.to_string()),
        _ => TokenError::Malformed("it is not a JWT".into()),
    }
}

// The JSON reader's message is kept only where it names a claim or an algorithm; it might
// else repeat parts of the token.
fn missing_or_malformed(message: &str) -> TokenError {
    if message.starts_with("unknown variant") {
        return TokenError::Algorithm;
    }
    match message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
        Some(claim) => TokenError::MissingClaim(claim.to_owned()),
        None => TokenError::Malformed("a claim has the wrong type".into()),
    }
}

/// Signs tokens: for `arqon token` and local clusters. Servers only verify.
pub struct TokenSigner {
    header: Header,
    key: EncodingKey,
}

impl TokenSigner {
    /// A signer with a private key in PEM (PKCS #8 for Ed25519, PKCS #1 or #8 for RSA).
    ///
    /// # Errors
    /// [`TokenError::Key`]: not a private key of that algorithm.
    pub fn from_pem(
        algorithm: TokenAlgorithm,
        kid: Option<String>,
        private_key_pem: &[u8],
    ) -> Result<Self, TokenError> {
        let key = match algorithm {
            TokenAlgorithm::EdDSA => EncodingKey::from_ed_pem(private_key_pem),
            TokenAlgorithm::RS256 => EncodingKey::from_rsa_pem(private_key_pem),
        }
        .map_err(|_| TokenError::Key(format!("the file is not a private key for {algorithm:?} in PEM")))?;
        Ok(Self { header: Header { kid, ..Header::new(algorithm.jwt()) }, key })
    }

    /// The signed token.
    ///
    /// # Errors
    /// [`TokenError::Key`] when the key cannot sign.
    pub fn mint(&self, claims: &Claims) -> Result<String, TokenError> {
        jsonwebtoken::encode(&self.header, claims, &self.key)
            .map_err(|_| TokenError::Key("the private key cannot sign".into()))
    }
}

/// A fresh Ed25519 key pair in PEM.
#[derive(Clone)]
pub struct TokenKeyPair {
    /// PKCS #8, for [`TokenSigner::from_pem`]. Secret.
    pub private_key_pem: String,
    /// SubjectPublicKeyInfo, for [`TokenKey::public_key_pem`].
    pub public_key_pem: String,
}

impl TokenKeyPair {
    /// Makes a key pair from the system's randomness.
    ///
    /// # Errors
    /// [`TokenError::Key`] when the system gives no randomness.
    pub fn generate() -> Result<Self, TokenError> {
        // RFC 8410: SubjectPublicKeyInfo of Ed25519 is this prefix and the 32 bytes of the key.
        const PUBLIC_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
        let failed = |_| TokenError::Key("no key could be generated".into());
        let random = ring::rand::SystemRandom::new();
        let private = Ed25519KeyPair::generate_pkcs8(&random).map_err(failed)?;
        let pair = Ed25519KeyPair::from_pkcs8(private.as_ref())
            .map_err(|_| TokenError::Key("the generated key cannot be read back".into()))?;
        let mut public = PUBLIC_PREFIX.to_vec();
        public.extend_from_slice(pair.public_key().as_ref());
        Ok(Self { private_key_pem: pem("PRIVATE KEY", private.as_ref()), public_key_pem: pem("PUBLIC KEY", &public) })
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        out.extend(line.iter().map(|&byte| char::from(byte)));
        out.push('\n');
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn claims() -> Claims {
        Claims {
            sub: "ada".into(),
            tenant_id: "acme".into(),
            aud: AUDIENCE_DEFAULT.into(),
            exp: NOW + 60,
            iat: NOW,
            role: String::new(),
            permissions: vec!["publish:nvm.jobs".into(), "subscribe:nvm.*".into(), "execute:nvm".into()],
        }
    }

    struct Issuer {
        pair: TokenKeyPair,
        verifier: Verifier,
    }

    impl Issuer {
        fn new() -> Self {
            let pair = TokenKeyPair::generate().unwrap();
            let verifier = Verifier::from_keys(&[key(&pair, None)], AUDIENCE_DEFAULT).unwrap();
            Self { pair, verifier }
        }

        fn mint(&self, claims: &Claims) -> String {
            signer(&self.pair, None).mint(claims).unwrap()
        }
    }

    fn key(pair: &TokenKeyPair, kid: Option<&str>) -> TokenKey {
        TokenKey {
            kid: kid.map(str::to_owned),
            algorithm: TokenAlgorithm::EdDSA,
            public_key_pem: pair.public_key_pem.clone().into_bytes(),
        }
    }

    fn signer(pair: &TokenKeyPair, kid: Option<&str>) -> TokenSigner {
        TokenSigner::from_pem(TokenAlgorithm::EdDSA, kid.map(str::to_owned), pair.private_key_pem.as_bytes()).unwrap()
    }

    fn base64url(text: &[u8]) -> String {
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text)
    }

    #[test]
    fn a_good_token_gives_its_tenant_and_exactly_its_permissions() {
        let issuer = Issuer::new();
        let session = issuer.verifier.verify(&issuer.mint(&claims()), NOW).unwrap();
        assert_eq!((session.tenant.as_str(), session.subject.as_str(), session.expires_at), ("acme", "ada", NOW + 60));
        assert!(session.allows(Verb::Publish, "nvm.jobs"));
        assert!(!session.allows(Verb::Publish, "nvm.jobs.dead"));
        assert!(!session.allows(Verb::Publish, "nvm.results"));
        assert!(session.allows(Verb::Subscribe, "nvm.results"));
        assert!(!session.allows(Verb::Subscribe, "nvmx"));
        assert!(session.allows(Verb::Execute, "nvm"));
        assert!(!session.allows(Verb::Execute, "genesis"));
        assert!(!session.allows(Verb::Admin, "nvm.jobs"));
    }

    #[test]
    fn system_topics_are_out_of_reach_but_for_registration() {
        let issuer = Issuer::new();
        let admin = Claims { role: "admin".into(), permissions: vec![], ..claims() };
        let admin = issuer.verifier.verify(&issuer.mint(&admin), NOW).unwrap();
        assert!(admin.allows(Verb::Admin, "any.topic") && admin.allows(Verb::Execute, "genesis"));
        assert!(admin.allows(Verb::Publish, OPERATOR_TOPIC));
        for verb in [Verb::Subscribe, Verb::Admin] {
            assert!(!admin.allows(verb, OPERATOR_TOPIC));
        }
        assert!(!admin.allows(Verb::Publish, "system.other"));
        let publisher = Claims { permissions: vec!["publish:*".into(), "subscribe:*".into()], ..claims() };
        let publisher = issuer.verifier.verify(&issuer.mint(&publisher), NOW).unwrap();
        assert!(publisher.allows(Verb::Publish, "a.b") && !publisher.allows(Verb::Publish, OPERATOR_TOPIC));
        assert!(!publisher.allows(Verb::Subscribe, OPERATOR_TOPIC));
    }

    #[test]
    fn what_is_no_permission_grants_nothing() {
        for text in
            ["publish", "publish:", ":a", "write:a", "publish:*a", "publish:a*b*", "Publish:a", "publish :a", ""]
        {
            assert_eq!(Permission::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn times_and_audience_are_checked() {
        let issuer = Issuer::new();
        let verify = |claims: &Claims, now| issuer.verifier.verify(&issuer.mint(claims), now);
        assert_eq!(verify(&claims(), NOW + 60), Err(TokenError::Expired));
        assert_eq!(verify(&Claims { exp: NOW - 1, ..claims() }, NOW), Err(TokenError::Expired));
        assert_eq!(verify(&Claims { aud: "other".into(), ..claims() }, NOW), Err(TokenError::Audience));
        assert!(verify(&claims(), NOW + 59).is_ok());
    }

    #[test]
    fn claims_that_are_missing_or_cannot_be_are_named() {
        let issuer = Issuer::new();
        let refused = |claims: &Claims| issuer.verifier.verify(&issuer.mint(claims), NOW).unwrap_err().to_string();
        assert!(refused(&Claims { tenant_id: "system".into(), ..claims() }).contains("tenant_id"));
        assert!(refused(&Claims { tenant_id: "a/b".into(), ..claims() }).contains("tenant_id"));
        assert!(refused(&Claims { sub: String::new(), ..claims() }).contains("sub"));
        for claim in ["sub", "tenant_id", "aud", "exp", "iat"] {
            let mut json = serde_json::to_value(claims()).unwrap();
            json.as_object_mut().unwrap().remove(claim);
            let key = EncodingKey::from_ed_pem(issuer.pair.private_key_pem.as_bytes()).unwrap();
            let token = jsonwebtoken::encode(&Header::new(jsonwebtoken::Algorithm::EdDSA), &json, &key).unwrap();
            assert_eq!(issuer.verifier.verify(&token, NOW), Err(TokenError::MissingClaim(claim.into())));
        }
    }

    #[test]
    fn alg_none_and_a_mac_made_with_the_public_key_are_refused() {
        let issuer = Issuer::new();
        let body = base64url(&serde_json::to_vec(&claims()).unwrap());
        for alg in ["none", "None", "NONE"] {
            let header = base64url(format!(r#"{{"alg":"{alg}","typ":"JWT"}}"#).as_bytes());
            for signature in ["", "AAAA"] {
                let refused = issuer.verifier.verify(&format!("{header}.{body}.{signature}"), NOW);
                assert_eq!(refused, Err(TokenError::Algorithm), "{alg} {signature:?}");
            }
        }
        let secret = EncodingKey::from_secret(issuer.pair.public_key_pem.as_bytes());
        let forged = jsonwebtoken::encode(&Header::new(jsonwebtoken::Algorithm::HS256), &claims(), &secret).unwrap();
        assert_eq!(issuer.verifier.verify(&forged, NOW), Err(TokenError::Algorithm));
    }

    #[test]
    fn garbage_and_forgeries_are_refused() {
        let issuer = Issuer::new();
        let good = issuer.mint(&claims());
        assert_eq!(issuer.verifier.verify("", NOW), Err(TokenError::Missing));
        let long = "a".repeat(TOKEN_SIZE_MAX + 1);
        for token in ["x", "..", "a.b.c", "\u{1f600}.\u{1f600}.x", &good[..good.len() - 8], &format!("{good}.x"), &long]
        {
            assert!(issuer.verifier.verify(token, NOW).is_err(), "{token}");
        }
        for at in (0..good.len()).step_by(7) {
            let mut bytes = good.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            assert!(issuer.verifier.verify(std::str::from_utf8(&bytes).unwrap(), NOW).is_err(), "byte {at}");
        }
        assert_eq!(issuer.verifier.verify(&Issuer::new().mint(&claims()), NOW), Err(TokenError::Signature));
    }

    #[test]
    fn a_key_id_chooses_the_key_and_rotation_keeps_both_valid() {
        let (old, new) = (TokenKeyPair::generate().unwrap(), TokenKeyPair::generate().unwrap());
        let keys = [key(&old, Some("old")), key(&new, Some("new"))];
        let verifier = Verifier::from_keys(&keys, AUDIENCE_DEFAULT).unwrap();
        for (pair, kid, good) in
            [(&old, Some("old"), true), (&new, Some("new"), true), (&new, None, true), (&old, Some("new"), false)]
        {
            let token = signer(pair, kid).mint(&claims()).unwrap();
            assert_eq!(verifier.verify(&token, NOW).is_ok(), good, "{kid:?}");
        }
        let unknown = signer(&new, Some("newer")).mint(&claims()).unwrap();
        assert_eq!(verifier.verify(&unknown, NOW), Err(TokenError::UnknownKey));
    }

    #[test]
    fn keys_that_cannot_be_used_are_named_at_start() {
        let pair = TokenKeyPair::generate().unwrap();
        let mut private = key(&pair, None);
        private.public_key_pem = pair.private_key_pem.clone().into_bytes();
        let mut wrong = key(&pair, None);
        wrong.algorithm = TokenAlgorithm::RS256;
        let text = TokenKey { public_key_pem: b"hello".to_vec(), ..key(&pair, None) };
        for keys in [vec![], vec![private], vec![text], vec![key(&pair, Some("a")), key(&pair, Some("a"))], vec![wrong]]
        {
            assert!(matches!(Verifier::from_keys(&keys, "x"), Err(TokenError::Key(_))), "{keys:?}");
        }
    }
}
