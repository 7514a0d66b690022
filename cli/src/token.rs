//! `arqon token`: makes tokens, and the keys that sign them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use arqon_proto::{AUDIENCE_DEFAULT, Claims, Permission, TokenAlgorithm, TokenKeyPair, TokenSigner, check_tenant};
use clap::ValueEnum;
use serde_json::json;

use crate::cluster::{file_failed, unix_seconds, write_secret};
use crate::topic::parse_duration;
use crate::{Failure, output};

/// Arguments of `arqon token`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  arqon token --new-key token.pem\n  arqon token --key token.pem --tenant acme \
    --subject ada --permission 'publish:demo.*' --permission subscribe:demo.results --ttl 12h\n\n\
    A permission is publish:TOPIC, subscribe:TOPIC, admin:TOPIC or execute:OPERATOR_TYPE; a last * matches\n\
    any rest. --role admin allows all of it within the tenant.")]
pub struct TokenArgs {
    /// Make an Ed25519 key: the private one in FILE, the public one beside it in FILE with .pub.pem
    #[arg(long, value_name = "FILE", exclusive = true)]
    new_key: Option<PathBuf>,
    /// Private key in PEM that signs the token
    #[arg(long, value_name = "FILE", required_unless_present = "new_key")]
    key: Option<PathBuf>,
    /// What kind of key it is
    #[arg(long, value_enum, default_value_t = Algorithm::EdDsa)]
    algorithm: Algorithm,
    /// Id of the key, when the servers know several
    #[arg(long, value_name = "ID")]
    kid: Option<String>,
    /// Tenant whose topics the token is for
    #[arg(long, required_unless_present = "new_key")]
    tenant: Option<String>,
    /// Whom the token is for
    #[arg(long, required_unless_present = "new_key")]
    subject: Option<String>,
    /// What the token allows; may be given several times
    #[arg(long = "permission", value_name = "VERB:NAME")]
    permissions: Vec<String>,
    /// Role; admin allows everything within the tenant
    #[arg(long, default_value = "client")]
    role: String,
    /// How long the token is valid, as in 12h or 30d
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    ttl: Duration,
    /// Audience, as the servers' configuration names it
    #[arg(long, default_value = AUDIENCE_DEFAULT)]
    audience: String,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Algorithm {
    #[value(name = "EdDSA")]
    EdDsa,
    #[value(name = "RS256")]
    Rs256,
}

/// Prints a token, or makes a key.
///
/// # Errors
/// The key cannot be read or written, or a claim cannot be.
pub fn token(args: TokenArgs) -> Result<(), Failure> {
    match &args.new_key {
        Some(path) => new_key(path),
        None => mint(&args),
    }
}

fn new_key(path: &Path) -> Result<(), Failure> {
    let public_path = path.with_extension("pub.pem");
    for path in [path, &public_path] {
        if path.exists() {
            return Err(Failure::failed(format!("{} exists; it is not overwritten", path.display())));
        }
    }
    let pair = TokenKeyPair::generate().map_err(Failure::failed)?;
    write_secret(path, pair.private_key_pem.as_bytes())?;
    std::fs::write(&public_path, pair.public_key_pem).map_err(|error| file_failed(&public_path, &error))?;
    output::line(format_args!("private key {}\npublic key  {}", path.display(), public_path.display()))
}

fn mint(args: &TokenArgs) -> Result<(), Failure> {
    let tenant = args.tenant.clone().unwrap_or_default();
    let subject = args.subject.clone().unwrap_or_default();
    check_tenant("--tenant", &tenant).map_err(Failure::usage)?;
    if subject.is_empty() {
        return Err(Failure::usage("--subject is empty"));
    }
    if let Some(wrong) = args.permissions.iter().find(|text| Permission::parse(text).is_none()) {
        return Err(Failure::usage(format!("--permission {wrong:?} is not VERB:NAME, as in publish:demo.*")));
    }
    let path = args.key.as_deref().unwrap_or(Path::new(""));
    let pem = std::fs::read(path).map_err(|error| file_failed(path, &error))?;
    let algorithm = match args.algorithm {
        Algorithm::EdDsa => TokenAlgorithm::EdDSA,
        Algorithm::Rs256 => TokenAlgorithm::RS256,
    };
    let signer = TokenSigner::from_pem(algorithm, args.kid.clone(), &pem);
    let signer = signer.map_err(|error| Failure::failed(error).at(path.display()))?;
    let now = unix_seconds();
    let claims = Claims {
        sub: subject,
        tenant_id: tenant,
        aud: args.audience.clone(),
        exp: now.saturating_add(args.ttl.as_secs()),
        iat: now,
        role: args.role.clone(),
        permissions: args.permissions.clone(),
    };
    let token = signer.mint(&claims).map_err(Failure::failed)?;
    if args.json {
        let mut document = json!({ "token": token });
        document["claims"] = serde_json::to_value(&claims).map_err(Failure::failed)?;
        return output::json(&document);
    }
    output::line(token)
}
