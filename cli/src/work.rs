//! `arqon work`: runs a command for each job of a queue.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use arqon_proto::{check_schema, limits};
use arqon_sdk::{Client, EventType, Job, NewEvent, Worker, WorkerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::connect::Connect;
use crate::signals::StopSignals;
use crate::topic::parse_duration;
use crate::{Failure, output};

/// Arguments of `arqon work`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example: arqon work demo.jobs --group upper --exec 'tr a-z A-Z'\n\n\
    The command is run by sh with the job's payload on its standard input. When it ends with 0, its standard\n\
    output is published as the job's one result (if the topic has a results topic) and the job is settled;\n\
    otherwise the job is given back and tried again after --retry-delay. ARQON_JOB_ID, ARQON_JOB_TOPIC,\n\
    ARQON_JOB_PARTITION, ARQON_JOB_OFFSET, ARQON_JOB_ATTEMPT, ARQON_JOB_KEY and ARQON_JOB_SCHEMA are set.")]
pub struct WorkArgs {
    /// Topic, as in demo.jobs
    topic: String,
    /// Queue group: the workers of one group share the jobs
    #[arg(long, value_name = "NAME")]
    group: String,
    /// Command to run for each job
    #[arg(long, value_name = "CMD")]
    exec: String,
    /// Jobs at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    parallelism: u16,
    /// Stop after N jobs were settled
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Time after which a job whose worker has vanished goes to another one
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    lease: Duration,
    /// Longest time that the command may take
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    timeout: Duration,
    /// Pause before a failed job is tried again
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    retry_delay: Duration,
    /// Schema of the results, as in example.result.v1
    #[arg(long, value_name = "SCHEMA", default_value = "", hide_default_value = true)]
    result_schema: String,
    #[command(flatten)]
    connect: Connect,
    /// Print one JSON document a job
    #[arg(long)]
    json: bool,
}

/// Works until the limit or a signal, then lets running commands end.
///
/// # Errors
/// The topic does not exist or its jobs cannot be leased.
pub async fn work(args: WorkArgs) -> Result<(), Failure> {
    check_schema(&args.result_schema).map_err(Failure::usage)?;
    let mut signals = StopSignals::listen()?;
    let client = args.connect.client().await?;
    let results_topic = client.describe_topic(&args.topic).await?.results_topic;
    let worker = worker(&client, &args).await?;
    let mut run = Run { args, results_topic, worker, commands: JoinSet::new(), settled: 0 };
    let result = run.until(&mut signals).await;
    let drained = run.drain(&mut signals).await;
    result.and(drained)
}

async fn worker(client: &Client, args: &WorkArgs) -> Result<Worker, Failure> {
    let options = WorkerOptions {
        group: args.group.clone(),
        parallelism: usize::from(args.parallelism),
        lease: args.lease,
        ..WorkerOptions::default()
    };
    Ok(client.worker(&args.topic, options).await?)
}

/// What became of one job.
struct Outcome {
    partition: u32,
    offset: u64,
    attempt: u32,
    settled: bool,
    detail: String,
}

struct Run {
    args: WorkArgs,
    results_topic: String,
    worker: Worker,
    commands: JoinSet<Outcome>,
    settled: u64,
}

impl Run {
    async fn until(&mut self, signals: &mut StopSignals) -> Result<(), Failure> {
        let limit = self.args.limit.unwrap_or(u64::MAX);
        while self.settled < limit {
            // No more is started than may still be needed, so that the limit is exact.
            let wanted = self.settled + (self.commands.len() as u64) < limit
                && self.commands.len() < usize::from(self.args.parallelism);
            tokio::select! {
                () = signals.wait() => return Ok(()),
                Some(outcome) = self.commands.join_next() => self.settle(outcome)?,
                job = self.worker.next(), if wanted => match job {
                    Ok(Some(job)) => {
                        self.commands.spawn(run_job(job, self.args.clone(), self.results_topic.clone()));
                    }
                    Ok(None) => return Ok(()),
                    // The worker goes on by itself once the partition can be asked again.
                    Err(error) if error.is_transient() => tracing::warn!(%error, "no jobs for now"),
                    Err(error) => return Err(error.into()),
                },
            }
        }
        Ok(())
    }

    /// Takes no more jobs and lets the running commands end; a second signal ends them.
    async fn drain(&mut self, signals: &mut StopSignals) -> Result<(), Failure> {
        let stopping = self.worker.stop(self.args.timeout);
        tokio::select! {
            _ = stopping => {}
            () = signals.wait() => self.commands.abort_all(),
        }
        while let Some(outcome) = self.commands.join_next().await {
            if outcome.as_ref().is_err_and(tokio::task::JoinError::is_cancelled) {
                continue;
            }
            self.settle(outcome)?;
        }
        Ok(())
    }

    fn settle(&mut self, outcome: Result<Outcome, tokio::task::JoinError>) -> Result<(), Failure> {
        let outcome = outcome.map_err(|error| Failure::failed(format!("a job's task ended: {error}")))?;
        self.settled += u64::from(outcome.settled);
        let Outcome { partition, offset, attempt, settled, detail } = outcome;
        if self.args.json {
            return output::json(&serde_json::json!({
                "topic": self.args.topic, "partition": partition, "offset": offset,
                "attempt": attempt, "settled": settled, "detail": detail,
            }));
        }
        output::line(format_args!("{partition}/{offset} attempt {attempt}: {detail}"))
    }
}

async fn run_job(job: Job, args: WorkArgs, results_topic: String) -> Outcome {
    let (partition, offset, attempt) = (job.event.partition, job.event.offset, job.attempt);
    let outcome = tokio::select! {
        outcome = run_command(&job, &args) => outcome,
        () = job.lost() => Err("the lease was lost".to_owned()),
    };
    let (settled, detail) = match outcome {
        Ok(payload) => {
            let settlement = if results_topic.is_empty() {
                job.ack().await.map(drop)
            } else {
                let result = NewEvent::new(payload)
                    .schema(args.result_schema.clone())
                    .key(job.event.key.clone())
                    .event_type(EventType::JobResult);
                job.complete(&results_topic, result).await.map(drop)
            };
            settlement.map_or_else(|error| (false, error.to_string()), |()| (true, "done".to_owned()))
        }
        Err(problem) => match job.nack(args.retry_delay).await {
            Ok(()) => (false, format!("{problem}; tried again later")),
            Err(error) => (false, format!("{problem}; {error}")),
        },
    };
    Outcome { partition, offset, attempt, settled, detail }
}

/// Runs the command: its standard output, or why the job has to be tried again.
async fn run_command(job: &Job, args: &WorkArgs) -> Result<Vec<u8>, String> {
    let event = &job.event;
    let mut child = Command::new("sh")
        .arg("-c")
        .arg(&args.exec)
        .env("ARQON_JOB_ID", uuid::Uuid::from_bytes(event.id).to_string())
        .env("ARQON_JOB_TOPIC", &*event.topic)
        .env("ARQON_JOB_PARTITION", event.partition.to_string())
        .env("ARQON_JOB_OFFSET", event.offset.to_string())
        .env("ARQON_JOB_ATTEMPT", job.attempt.to_string())
        .env("ARQON_JOB_KEY", String::from_utf8_lossy(&event.key).replace('\0', ""))
        .env("ARQON_JOB_SCHEMA", &*event.schema)
        // The command gets the job, not the bus.
        .env_remove("ARQON_TOKEN")
        .env_remove("ARQONBUS_TOKEN")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot run sh: {error}"))?;
    let (mut input, output) = (child.stdin.take(), child.stdout.take());
    let feed = async {
        if let Some(mut input) = input.take() {
            // A command need not read its input.
            let _ = input.write_all(&event.payload).await;
        }
    };
    let read = async {
        let mut payload = Vec::new();
        if let Some(output) = output {
            output.take(limits::PAYLOAD_SIZE_MAX as u64 + 1).read_to_end(&mut payload).await?;
        }
        Ok::<_, std::io::Error>(payload)
    };
    let all = async {
        let ((), payload) = tokio::join!(feed, read);
        let payload = payload?;
        if payload.len() > limits::PAYLOAD_SIZE_MAX {
            return Ok((payload, None));
        }
        child.wait().await.map(|status| (payload, Some(status)))
    };
    let (payload, status) = timeout(args.timeout, all)
        .await
        .map_err(|_| format!("the command took longer than {} s", args.timeout.as_secs()))?
        .map_err(|error| format!("the command: {error}"))?;
    match status {
        None => Err(format!("the command printed more than {} bytes", limits::PAYLOAD_SIZE_MAX)),
        Some(status) if status.success() => Ok(payload),
        Some(status) => Err(describe(status)),
    }
}

fn describe(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("the command failed with exit code {code}"),
        None => format!("the command failed: {status}"),
    }
}
