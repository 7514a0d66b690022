//! Linearizable reads of a partition's tail: each must show everything that was acknowledged
//! before it began.

use std::{sync::Arc, time::Duration};

use arqon_proto::DecodeError;
use arqon_sdk::{Client, Error, wire};
use tokio::task::JoinSet;

use super::{Shared, told};
use crate::{
    history::{Kind, Line, Value},
    payload,
};

/// Time between two reads of a partition's tail.
const TAIL_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of one read; the tail fits when no more was written since the last one.
const TAIL_SIZE_MAX: u32 = 1 << 20;
/// Processes per partition, so that reads of the tail meet.
const PROCESS_COUNT: usize = 2;

/// Starts the readers of a partition's tail.
pub(super) fn start(shared: &Arc<Shared>, partition: u32, tasks: &mut JoinSet<()>) -> Result<(), Error> {
    for _ in 0..PROCESS_COUNT {
        let client = shared.setup.client("tail")?;
        tasks.spawn(run(shared.clone(), client, partition));
    }
    Ok(())
}

async fn run(shared: Arc<Shared>, client: Client, partition: u32) {
    let key = shared.key(partition);
    let mut next = 0;
    while !shared.stops() {
        let process = shared.history.new_process();
        let line = |kind| Line { offset: Some(next), ..Line::client(process, kind, "read", &key) };
        let fetch = wire::Fetch {
            topic: shared.topic.clone(),
            partition,
            offset: next,
            bytes_max: TAIL_SIZE_MAX,
            linearizable: true,
            ..Default::default()
        };
        shared.history.record(line(Kind::Invoke));
        match client.fetch_raw(fetch).await {
            Ok(fetched) => match decode(&fetched, &key, next) {
                Ok((values, end)) => {
                    // What did not fit into the answer has yet to be read: the answer is no tail then.
                    let whole = end >= fetched.committed;
                    shared.history.record(Line {
                        value: Some(Value::Many(values)),
                        hw: Some(fetched.committed),
                        log_start: Some(fetched.log_start),
                        tail: Some(whole),
                        ..line(Kind::Ok)
                    });
                    next = end.max(next);
                }
                Err(error) => {
                    shared.history.record(Line { error: Some(format!("BAD_DATA: {error}")), ..line(Kind::Fail) })
                }
            },
            Err(error) => shared.history.record(Line { error: Some(told(&error)), ..line(Kind::Fail) }),
        }
        shared.pause(TAIL_PAUSE).await;
    }
}

/// Offsets with values.
type Values = Vec<(u64, Option<u64>)>;

/// Offsets and values from `next` on, and the offset after the last record.
fn decode(fetched: &arqon_sdk::Fetched, key: &str, next: u64) -> Result<(Values, u64), DecodeError> {
    let (mut values, mut end) = (Vec::new(), next);
    for batch in &fetched.batches {
        arqon_proto::records::<DecodeError>(batch, |index, record| {
            let offset = batch.header.base_offset.0 + u64::from(index);
            // The first batch may begin before the offset asked for.
            if offset >= next {
                values.push((offset, payload::decode(key, record.payload)));
            }
            Ok(())
        })?;
        end = end.max(batch.header.next_offset().0);
    }
    Ok((values, end))
}
