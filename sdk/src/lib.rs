//! The Rust client of ArqonBus: publish, consume, and work a queue.
//!
//! ```text
//!   Client ─┬─ Producer ── Line and Flight (per partition) ─┐
//!           ├─ Consumer ── one fetch ahead (per partition) ─┼─ Router ── Connection ── Carrier
//!           ├─ Worker ──── Work, Ack, Nack, Renew ──────────┤  (who      (pipelined    (TCP or
//!           └─ request ─── lanes for produces ──────────────┘   leads)    requests)     WebSocket)
//! ```
//!
//! The same frames travel on TCP to brokers and as WebSocket messages to Shields. Operations
//! survive the loss of a server: they are sent again, within their time, where that cannot
//! change the outcome. Every queue is bounded and every wait has an end.
//!
//! ```no_run
//! # async fn example() -> Result<(), arqon_sdk::Error> {
//! use arqon_sdk::{Client, ConsumerOptions, From, NewEvent, Options, ProducerOptions};
//!
//! let client = Client::connect(Options::new(["127.0.0.1:7700"], "token")).await?;
//! let producer = client.producer("greetings", ProducerOptions::default()).await?;
//! let receipt = producer.publish(NewEvent::new("hello").key("world")).await?;
//! println!("at {}/{}", receipt.partition, receipt.offset);
//!
//! let options = ConsumerOptions { from: From::Earliest, stop_at_end: true, ..Default::default() };
//! let mut consumer = client.consumer("greetings", options).await?;
//! while let Some(event) = consumer.next().await? {
//!     println!("{} bytes", event.payload.len());
//! }
//! # Ok(()) }
//! ```

mod carrier;
mod client;
mod connection;
mod consumer;
mod error;
mod event;
mod flight;
mod job;
mod lane;
mod leases;
mod limits;
mod line;
mod options;
mod outcome;
mod producer;
mod retry;
mod router;
mod spare;
mod stream;
mod worker;

pub use arqon_proto::{Compression, EventType, wire, wire::Durability, wire::frame};
pub use client::{Client, Fetched};
pub use consumer::{Consumer, ConsumerOptions, From};
pub use error::{Error, SendError};
pub use event::{Event, NewEvent};
pub use job::{Completed, Job};
pub use lane::Submitted;
pub use options::Options;
pub use outcome::{Delivery, Receipt};
pub use producer::{Producer, ProducerOptions, partition_of};
pub use worker::{Worker, WorkerOptions};
