//! Jobs without attempts left, on their way out of the queue: first to the dead-letter topic,
//! then, in a control entry, out of the pending jobs.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::time::Instant;

use super::clock::Clock;
use crate::partition::{
    Replica,
    dead::{self, DeadJob},
};

/// Jobs taken to the dead-letter topic at a time.
const DEAD_COUNT_MAX: usize = 64;
/// Pause after a job could not be taken to the dead-letter topic.
const DEAD_PAUSE: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Burials {
    pub(super) running: Option<BoxFuture<'static, Vec<(DeadJob, bool)>>>,
    /// Jobs that are in the dead-letter topic and still in the queue.
    pub(super) buried: Vec<DeadJob>,
    retry_at: Option<Instant>,
}

impl Burials {
    /// Takes the next dead jobs away, unless some are on their way or a pause is not over.
    pub(super) fn start(&mut self, replica: &Arc<Replica>, clocks: &BTreeMap<String, Clock>, now: Instant) {
        if self.running.is_some() || self.retry_at.is_some_and(|at| at > now) {
            return;
        }
        let is_free =
            |group: &str, offset: u64| !self.buried.iter().any(|job| job.offset == offset && job.group == group);
        let dead = clocks.iter().flat_map(|(group, clock)| clock.dead.iter().map(move |job| (group, job)));
        let jobs: Vec<_> = dead
            .filter(|(group, (offset, _))| is_free(group, **offset))
            .take(DEAD_COUNT_MAX)
            .map(|(group, (offset, attempt))| DeadJob { group: group.clone(), offset: *offset, attempt: *attempt })
            .collect();
        if !jobs.is_empty() {
            self.running = Some(dead::take_away(replica.clone(), jobs).boxed());
        }
    }

    /// Those that ran have ended; of each it says whether the job is away.
    pub(super) fn ended(&mut self, results: Vec<(DeadJob, bool)>) {
        self.running = None;
        let mut is_complete = true;
        for (job, is_away) in results {
            is_complete &= is_away;
            if is_away {
                self.buried.push(job);
            }
        }
        self.retry_at = if is_complete { None } else { Some(Instant::now() + DEAD_PAUSE) };
    }

    /// The jobs have left the queue of `group`.
    pub(super) fn forget(&mut self, group: &str, offsets: &BTreeSet<u64>) {
        self.buried.retain(|job| job.group != group || !offsets.contains(&job.offset));
    }

    /// The whole queue of `group` is gone.
    pub(super) fn forget_group(&mut self, group: &str) {
        self.buried.retain(|job| job.group != group);
    }

    /// When the pause ends, if one lasts at `now`.
    pub(super) fn retry_at(&self, now: Instant) -> Option<Instant> {
        self.retry_at.filter(|at| *at > now)
    }
}
