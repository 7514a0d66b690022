//! What lies on the disks when all nodes have ended.

use std::collections::BTreeMap;

use arqon_proto::{Batch, BatchKind, DecodeError, RaftIndex, limits};
use arqon_storage::Log;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::{cluster::Cluster, history::decode, invariants::ReplicaLog};

/// Logs by group.
type Logs = BTreeMap<u64, Vec<ReplicaLog>>;

/// The logs of all members, and why some could not be opened. `wants_values`: with offsets and values.
pub fn read(cluster: &mut Cluster, wants_values: bool) -> (Logs, Vec<String>) {
    let (mut out, mut refused) = (Logs::new(), Vec::new());
    for index in &cluster.members {
        let machine = &mut cluster.machines[*index];
        let node = u64::from(machine.number);
        let store = match machine.open_store() {
            Ok(store) => store,
            Err(error) => {
                refused.push(format!("the data of node {node} does not open after the end: {error}"));
                continue;
            }
        };
        let logs = match store.logs() {
            Ok(logs) => logs,
            Err(error) => {
                refused.push(format!("the logs of node {node} cannot be listed after the end: {error}"));
                continue;
            }
        };
        for (group, replica) in logs {
            let log = match store.open_log(group, replica) {
                Ok((log, _)) => read_log(node, &log, wants_values),
                Err(error) => ReplicaLog { node, failed: Some(error.to_string()), ..ReplicaLog::default() },
            };
            out.entry(group.0).or_default().push(log);
        }
    }
    (out, refused)
}

fn read_log(node: u64, log: &Log, wants_values: bool) -> ReplicaLog {
    let first = log.purged().map_or(0, |purged| purged.index.0 + 1);
    let end = log.last().map_or(first, |last| last.index.0 + 1);
    let committed = log.committed().map_or(0, |committed| committed.index.0);
    let mut out = ReplicaLog { node, committed, ..ReplicaLog::default() };
    let mut next = first;
    while next < end {
        let range = RaftIndex(next)..RaftIndex(end);
        let batches = match log.entries(range, limits::FETCH_SIZE_MAX) {
            Ok(batches) if !batches.is_empty() => batches,
            Ok(_) => {
                out.failed = Some(format!("entry {next} is missing"));
                return out;
            }
            Err(error) => {
                out.failed = Some(error.to_string());
                return out;
            }
        };
        for batch in batches {
            let header = &batch.header;
            let hash = xxh3_64_with_seed(&batch.records, xxh3_64(&batch.stamps) ^ header.time_ms);
            out.entries.push((header.term.0, header.index.0, header.base_offset.0, hash));
            next = header.index.0 + 1;
            if wants_values && header.kind == BatchKind::Data {
                out.values.extend(values(&batch));
            }
        }
    }
    out
}

/// Offsets and values of the records of a batch, as far as they are of producers here.
fn values(batch: &Batch) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    let read = arqon_proto::records::<DecodeError>(batch, |index, record| {
        let offset = batch.header.base_offset.0 + u64::from(index);
        out.extend(decode(record.payload).map(|value| (offset, value)));
        Ok(())
    });
    // What cannot be read does not count as being there.
    if read.is_ok() { out } else { Vec::new() }
}
