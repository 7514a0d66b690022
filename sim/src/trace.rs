//! What happened in a run: a running hash of every event, and on request a line for each.
//!
//! Two runs with the same hash did the same things at the same times, to the byte of every packet.

use std::{cell::Cell, fmt::Write as _};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::system::{host, is_active, now_ns};

thread_local! {
    static HASH: Cell<u64> = const { Cell::new(0) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
    /// 0: no lines; 1: what the world does, and the program's log; 2: packets too.
    static DETAIL: Cell<u8> = const { Cell::new(0) };
}

/// Prints what happens on this thread from now on: 1 for what a reader wants to see, with the program's
/// log; 2 for packets too.
pub fn print(detail: u8) {
    DETAIL.set(detail);
    let level = if detail > 1 { Level::DEBUG } else { Level::INFO };
    if detail > 0 && tracing::subscriber::set_global_default(Log { level }).is_err() {
        eprintln!("the program's log is not shown: it goes elsewhere already");
    }
}

/// Hash and number of the events so far.
#[must_use]
pub fn summary() -> (u64, u64) {
    (HASH.get(), COUNT.get())
}

fn add(bytes: &[u8]) {
    HASH.set(xxh3_64_with_seed(bytes, HASH.get()));
}

/// Notes an event that concerns the innards of the simulation.
pub fn note(what: &str, numbers: &[u64]) {
    note_bytes(what, numbers, &[]);
}

/// As [`note`], with bytes that count for the hash.
pub fn note_bytes(what: &str, numbers: &[u64], bytes: &[u8]) {
    COUNT.set(COUNT.get() + 1);
    add(what.as_bytes());
    add(&now_ns().to_le_bytes());
    for number in numbers {
        add(&number.to_le_bytes());
    }
    if !bytes.is_empty() {
        add(bytes);
    }
    if DETAIL.get() >= 2 {
        line(&format!("{what} {numbers:?}, {} bytes", bytes.len()));
    }
}

/// Notes an event that a reader wants to see.
pub fn say(text: &str) {
    COUNT.set(COUNT.get() + 1);
    add(&now_ns().to_le_bytes());
    add(text.as_bytes());
    if DETAIL.get() >= 1 {
        line(text);
    }
}

/// A line with the simulated time in ms.
fn line(text: &str) {
    let us = now_ns() / 1_000;
    eprintln!("{:>10}.{:03} host {:<3} {text}", us / 1_000, us % 1_000, host().0);
}

/// Prints what the program logs, with simulated times. It keeps no tables of its own: what it did
/// there would shift the randomness of the run.
struct Log {
    /// Lines up to this level.
    level: Level,
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string does not fail.
        let _ = if field.name() == "message" {
            write!(self.0, "{value:?} ")
        } else {
            write!(self.0, "{}={value:?} ", field.name())
        };
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let level = if metadata.target().starts_with("arqon") { self.level } else { Level::WARN };
        *metadata.level() <= level && metadata.is_event()
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        if is_active() {
            let mut text = Text(String::new());
            event.record(&mut text);
            line(&format!("{} {}: {}", event.metadata().level(), event.metadata().target(), text.0));
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}
