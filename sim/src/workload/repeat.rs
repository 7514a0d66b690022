//! Producers that number their batches themselves, and send one again long after it was acknowledged: as a client
//! does whose answer was lost, perhaps when nodes have ended, come back and dropped the front of the log.
//!
//! A batch stands once, however often it is sent.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arqon_proto::{BatchBuilder, Compression, EventType, ProducerStamp, RecordParts};
use arqon_sdk::{Client, Error, wire};
use bytes::{Bytes, BytesMut};
use tokio::time::{sleep, timeout};

use super::{Pace, Stop, pause};
use crate::{
    cluster::Access,
    history::{Fact, History, Place, encode},
    random::Random,
};

/// Records of one batch.
const RECORD_COUNT_MAX: u64 = 3;
/// How often, of a hundred times, an older batch is sent again after a new one.
const REPEAT_PERCENT: u64 = 30;
/// Batches that a producer keeps to send them again; one of them goes for each further one.
const KEPT_COUNT_MAX: usize = 32;
/// How often, of a hundred times, another producer takes over after a batch: of one that falls silent nothing is
/// known any more but what the state remembers.
const TAKE_OVER_PERCENT: u64 = 30;
/// Until then the SDK tries.
const PATIENCE: Duration = Duration::from_secs(8);
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// A batch that was acknowledged.
#[derive(Clone)]
struct Kept {
    place: Place,
    client: u64,
    batch: Bytes,
    values: Vec<u64>,
    base_offset: u64,
}

/// All batches that may be sent again.
#[derive(Clone, Default)]
pub struct Repeats(Arc<Mutex<Vec<Kept>>>);

impl Repeats {
    fn all(&self) -> Vec<Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, kept: Kept, random: &mut Random) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = (0..all.len()).filter(|at| all[*at].client == kept.client).collect::<Vec<_>>();
        if own.len() >= KEPT_COUNT_MAX {
            all.remove(*random.pick(&own));
        }
        all.push(kept);
    }

    fn any_of(&self, client: u64, random: &mut Random) -> Option<Kept> {
        let own: Vec<Kept> = self.all().into_iter().filter(|kept| kept.client == client).collect();
        (!own.is_empty()).then(|| random.pick(&own).clone())
    }

    /// Sends every batch once more, until each was answered.
    pub async fn send_all(&self, access: &Access, history: &History) {
        let connection = access.client();
        for kept in self.all() {
            while send_again(&connection, history, &kept).await.is_err_and(|error| is_unclear(&error)) {
                sleep(RETRY_DELAY).await;
            }
        }
    }
}

/// Sends batches to one partition until it is told to stop.
pub async fn repeat(
    access: Access,
    history: History,
    stop: Stop,
    repeats: Repeats,
    (client, place): (u64, Place),
    pace: Pace,
    mut random: Random,
) {
    let connections = [access.client(), access.client()];
    let mut id = [0; 16];
    random.fill(&mut id);
    let (mut epoch, mut base_sequence, mut next) = (0, 0, 1);
    let gap_ms = pace.gap_ms(&mut random);
    while !stop.is_set() {
        let count = random.of(1..RECORD_COUNT_MAX + 1);
        let values: Vec<u64> = (next..next + count).map(|number| client << 32 | number).collect();
        next += count;
        values.iter().for_each(|value| history.note(client, &place, *value, Fact::Sent));
        let batch = build(&values, ProducerStamp { id, epoch, base_sequence }, &mut random);
        base_sequence += count;
        match submit(random.pick(&connections), &place, &batch).await {
            Ok(base_offset) => {
                note_acked(&history, client, &place, &values, base_offset);
                let kept = Kept { place: place.clone(), client, batch, values, base_offset };
                repeats.keep(kept, &mut random);
                if random.percent(TAKE_OVER_PERCENT) {
                    random.fill(&mut id);
                    (epoch, base_sequence) = (0, 0);
                }
            }
            Err(error) => {
                let unknown = |value: &u64| history.note(client, &place, *value, Fact::Unknown(error.to_string()));
                values.iter().for_each(unknown);
                // The next epoch shuts out what is left of this one.
                (epoch, base_sequence) = (epoch + 1, 0);
            }
        }
        if random.percent(REPEAT_PERCENT)
            && let Some(kept) = repeats.any_of(client, &mut random)
        {
            // Any refusal is fine here: the judge sees whether it stands twice.
            drop(send_again(random.pick(&connections), &history, &kept).await);
        }
        pause(&mut random, 1..2 * gap_ms).await;
    }
}

fn build(values: &[u64], stamp: ProducerStamp, random: &mut Random) -> Bytes {
    let mut builder = BatchBuilder::new();
    for value in values {
        let payload = encode(*value, random.of(16..300) as usize);
        let mut id = [0; 16];
        random.fill(&mut id);
        let record = RecordParts {
            id,
            event_type: EventType::Event as u8,
            schema: "",
            key: &[],
            headers: &[],
            extension: &[],
            payload: &payload,
        };
        // A few small records fit into any batch.
        let _fits = builder.append(&record);
    }
    let mut out = BytesMut::new();
    builder.build(Compression::None, Some(stamp)).encode_into(&mut out);
    out.freeze()
}

fn note_acked(history: &History, client: u64, place: &Place, values: &[u64], base_offset: u64) {
    for (value, offset) in values.iter().zip(base_offset..) {
        history.note(client, place, *value, Fact::Acked(offset));
    }
}

/// Sends a batch that was acknowledged. An answer with another place goes into the history.
async fn send_again(connection: &Client, history: &History, kept: &Kept) -> Result<(), Error> {
    let base_offset = submit(connection, &kept.place, &kept.batch).await?;
    if base_offset != kept.base_offset {
        note_acked(history, kept.client, &kept.place, &kept.values, base_offset);
    }
    Ok(())
}

/// Gives the offset of the first record, also where the bus knows the batch already and its place.
async fn submit(connection: &Client, place: &Place, batch: &Bytes) -> Result<u64, Error> {
    let produce = wire::Produce { topic: place.topic.clone(), partition: place.partition, ..Default::default() };
    let tried = async { connection.submit(produce, batch.clone()).await?.outcome().await };
    match timeout(PATIENCE, tried).await {
        Ok(Ok(produced)) => Ok(produced.base_offset),
        Ok(Err(Error::Server { code: wire::ErrorCode::Duplicate, details, message, field })) => {
            let known = details.duplicates.first().and_then(|known| known.offset);
            known.ok_or(Error::Server { code: wire::ErrorCode::Duplicate, details, message, field })
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::TimedOut { what: "produce".to_owned(), reason: "given up".to_owned() }),
    }
}

/// Whether sending the same again can tell what became of it.
fn is_unclear(error: &Error) -> bool {
    error.is_transient() || matches!(error, Error::TimedOut { .. } | Error::Lost { .. })
}
