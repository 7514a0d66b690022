//! A native operator: answers every job with its own payload, in capitals.
//!
//! ```text
//! ARQON_SERVER=127.0.0.1:7700 ARQON_TOKEN=... cargo run --release -p arqon-operators --example echo
//! ```

use arqon_operators::{JobError, Operator, RunOptions, run};
use arqon_sdk::{Client, Event, NewEvent, Options, wire::OperatorRegistration};

struct Echo;

impl Operator for Echo {
    async fn run(&self, job: &Event, _attempt: u32) -> Result<NewEvent, JobError> {
        let text = std::str::from_utf8(&job.payload).map_err(|_| JobError::failed("payload: not UTF-8"))?;
        Ok(NewEvent::new(text.to_uppercase()))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = std::env::var("ARQON_SERVER").unwrap_or_else(|_| "127.0.0.1:7700".to_owned());
    let client = Client::connect(Options::new([server], std::env::var("ARQON_TOKEN")?)).await?;
    let registration = OperatorRegistration {
        operator_id: "echo-1".to_owned(),
        operator_type: "generic".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        hardware_profile: "cpu".to_owned(),
        stage: "prototype".to_owned(),
        ..OperatorRegistration::default()
    };
    let shutdown = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
    run(&client, registration, RunOptions::new("echo.jobs", "echo"), Echo, shutdown).await?;
    Ok(())
}
