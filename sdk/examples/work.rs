//! Answers each job with its payload in capitals, until Ctrl-C: `work SERVERS JOBS RESULTS`, with
//! the token in `ARQON_TOKEN`.

use std::{env, error::Error, time::Duration};

use arqon_sdk::{Client, NewEvent, Options, WorkerOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let [_, servers, jobs, results] =
        env::args().collect::<Vec<_>>().try_into().map_err(|_| "usage: work SERVERS JOBS RESULTS")?;
    let client = Client::connect(Options::new([servers], env::var("ARQON_TOKEN")?)).await?;
    let mut worker = client.worker(&jobs, WorkerOptions::default()).await?;
    loop {
        let job = tokio::select! {
            job = worker.next() => job?,
            _ = tokio::signal::ctrl_c() => break,
        };
        let Some(job) = job else { break };
        let results = results.clone();
        tokio::spawn(async move {
            let loud = NewEvent::new(job.event.payload.to_ascii_uppercase());
            if let Err(error) = job.complete(&results, loud).await {
                eprintln!("{job:?}: {error}");
            }
        });
    }
    let held = worker.stop(Duration::from_secs(10)).await;
    if held > 0 {
        eprintln!("{held} jobs were still running");
    }
    Ok(())
}
