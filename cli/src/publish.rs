//! `arqon publish`: each line of the input becomes an event.

use std::collections::VecDeque;
use std::path::PathBuf;

use arqon_proto::{check_schema, limits};
use arqon_sdk::{Delivery, Durability, NewEvent, Producer, ProducerOptions, Receipt};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::fs::File;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader, stdin};

use crate::connect::Connect;
use crate::{Failure, output};

/// Events without a receipt at a time.
const DELIVERIES_MAX: usize = 1_000;

/// Arguments of `arqon publish`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  echo hello | arqon publish demo.events --key greetings\n  \
    arqon publish demo.jobs --file jobs.jsonl --schema example.job.v1 --json\n\n\
    Prints how many events are on the disks of a majority; with --json one receipt a line.")]
pub struct PublishArgs {
    /// Topic
    topic: String,
    /// Read from FILE instead of standard input
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Publish the whole input as one event
    #[arg(long)]
    whole: bool,
    /// Key: events with the same key keep their order
    #[arg(long, default_value = "", hide_default_value = true)]
    key: String,
    /// Schema with a version, as in example.job.v1
    #[arg(long, default_value = "", hide_default_value = true)]
    schema: String,
    /// Header of the events; may be given several times
    #[arg(long = "header", value_name = "NAME=VALUE")]
    headers: Vec<String>,
    #[command(flatten)]
    connect: Connect,
    /// Print one JSON document an event
    #[arg(long)]
    json: bool,
}

/// Publishes until the input ends.
///
/// # Errors
/// The line that is refused or cannot be read; all lines before it are published.
pub async fn publish(args: PublishArgs) -> Result<(), Failure> {
    check_schema(&args.schema).map_err(Failure::usage)?;
    let template = template(&args)?;
    let input: Box<dyn AsyncRead + Unpin> = match &args.file {
        Some(path) => Box::new(File::open(path).await.map_err(|error| Failure::failed(error).at(path.display()))?),
        None => Box::new(stdin()),
    };
    let client = args.connect.client().await?;
    let producer = client.producer(&args.topic, ProducerOptions::default()).await?;
    let mut run = Run { producer, waiting: VecDeque::new(), published: 0, json: args.json };
    let result = run.input(BufReader::new(input), &template, args.whole).await;
    // What was sent before a refused line is waited for and told.
    let drained = run.drain(0).await;
    let result = result.and(drained);
    if let Err(failure) = result {
        let told = if run.published > 0 { format!(" ({} published before)", run.published) } else { String::new() };
        return Err(Failure::failed(format!("{failure}{told}")));
    }
    if args.json { Ok(()) } else { output::line(format_args!("published {} to {}", run.published, args.topic)) }
}

fn template(args: &PublishArgs) -> Result<NewEvent, Failure> {
    let mut event = NewEvent::new(Bytes::new()).schema(args.schema.clone()).key(args.key.clone());
    for header in &args.headers {
        let (name, value) =
            header.split_once('=').ok_or_else(|| Failure::usage(format!("--header {header:?} is not NAME=VALUE")))?;
        event = event.header(name, value);
    }
    Ok(event)
}

struct Run {
    producer: Producer,
    waiting: VecDeque<(u64, Delivery)>,
    published: u64,
    json: bool,
}

impl Run {
    async fn input(
        &mut self,
        mut input: impl AsyncBufRead + Unpin,
        template: &NewEvent,
        whole: bool,
    ) -> Result<(), Failure> {
        let mut number = 0;
        while let Some(payload) = read_payload(&mut input, whole).await? {
            number += 1;
            let event = NewEvent { payload, ..template.clone() };
            let sent = self.producer.send(event).await.map_err(|refused| at_line(number, refused.error))?;
            self.waiting.push_back((number, sent));
            self.drain(DELIVERIES_MAX).await?;
        }
        Ok(())
    }

    /// Waits for receipts until at most `left` are missing.
    async fn drain(&mut self, left: usize) -> Result<(), Failure> {
        while self.waiting.len() > left
            && let Some((number, delivery)) = self.waiting.pop_front()
        {
            let receipt = delivery.await.map_err(|error| at_line(number, error))?;
            self.published += 1;
            if self.json {
                output::json(&receipt_document(&receipt))?;
            }
        }
        Ok(())
    }
}

fn at_line(number: u64, error: arqon_sdk::Error) -> Failure {
    Failure::from(error).at(format_args!("line {number}"))
}

/// One line without its end, or the whole input. At most one byte more than a payload may have
/// is read, so that an endless line fills no memory.
async fn read_payload(input: &mut (impl AsyncBufRead + Unpin), whole: bool) -> Result<Option<Bytes>, Failure> {
    let mut payload = Vec::new();
    let mut limited = input.take(limits::PAYLOAD_SIZE_MAX as u64 + 2);
    let read =
        if whole { limited.read_to_end(&mut payload).await } else { limited.read_until(b'\n', &mut payload).await };
    let size = read.map_err(|error| Failure::failed(format!("input: {error}")))?;
    if size == 0 {
        return Ok(None);
    }
    if !whole && payload.last() == Some(&b'\n') {
        payload.pop();
        if payload.last() == Some(&b'\r') {
            payload.pop();
        }
    }
    Ok(Some(payload.into()))
}

/// The name of a durability level as documents show it.
pub(crate) fn durability_name(durability: Durability) -> &'static str {
    match durability {
        Durability::MajorityFsync => "majority-fsync",
        Durability::LeaderReceived => "leader-received",
    }
}

fn receipt_document(receipt: &Receipt) -> Value {
    json!({
        "topic": &*receipt.topic,
        "partition": receipt.partition,
        "offset": receipt.offset,
        "time_ms": receipt.time_ms,
        "durability": durability_name(receipt.durability),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_lose_only_their_ends() {
        let mut input = &b"one\r\n\nthree\nlast"[..];
        let mut lines = Vec::new();
        while let Some(line) = read_payload(&mut input, false).await.unwrap() {
            lines.push(line);
        }
        assert_eq!(lines, ["one", "", "three", "last"]);
        let mut input = &b"one\r\n\n"[..];
        assert_eq!(read_payload(&mut input, true).await.unwrap().unwrap(), "one\r\n\n");
        assert_eq!(read_payload(&mut input, true).await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_longest_payload_fits_a_line_and_one_byte_more_is_seen() {
        for extra in [0, 1] {
            let mut text = vec![b'x'; limits::PAYLOAD_SIZE_MAX + extra];
            text.push(b'\n');
            let line = read_payload(&mut &text[..], false).await.unwrap().unwrap();
            assert_eq!(line.len(), limits::PAYLOAD_SIZE_MAX + extra);
        }
    }
}
