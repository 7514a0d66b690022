//! A node that ends at a point of its code: inside a roll, retention, a snapshot, a truncation, a repair, a checkpoint,
//! a vote, a recovery.
//!
//! The victim runs, for a while, the program with crash points (`planted/`), which is told one of them and
//! ends there as if by SIGKILL. Then it starts again with the ordinary program. Half of the times its power goes
//! as well, so that a name or a byte that was not synced at the point is lost.

mod stir;

use std::{fs, path::Path, time::Duration};

use arqon_proto::planted::{CRASH_POINTS, CRASH_VARIABLE, SEGMENT_VARIABLE};
use rand::{RngExt, seq::IndexedRandom};
use rustix::process::Signal;
use tokio::time::{Instant, timeout};

use super::{
    Fault,
    active::{Active, Undo},
    nemesis::Nemesis,
};
use stir::{Scratch, Stir};

use crate::{
    cluster::{Error, Exit},
    disk::DiskKind,
    history::Line,
};

/// Time for the point to be reached.
const REACH_TIME_MAX: Duration = Duration::from_secs(20);
/// Time that is given to what is done so that the point is reached, and then to the node.
const STIR_TIME_MAX: Duration = Duration::from_secs(10);
const LOOK_TIME: Duration = Duration::from_millis(500);
/// How long the node is down, in milliseconds.
const DOWN_MS: (u64, u64) = (50, 1_000);

/// A point and how it is reached.
#[derive(Clone, Copy, Debug)]
struct Point {
    name: &'static str,
    /// Times that it is passed before, at most.
    passed_max: u64,
    stir: Stir,
}

const fn point(name: &'static str, passed_max: u64, stir: Stir) -> Point {
    Point { name, passed_max, stir }
}

/// Those that a node comes to under the load of the workloads and what is done for each.
const POINTS: &[Point] = &[
    point("group-written", 200, Stir::Load),
    point("group-flushed", 200, Stir::Load),
    point("mark-written", 200, Stir::Load),
    point("segment-written", 2, Stir::Topic),
    point("segment-named", 2, Stir::Topic),
    point("segment-begun", 2, Stir::Topic),
    point("segment-in-manifest", 2, Stir::Topic),
    point("recycle-written", 1, Stir::Retention),
    point("recycle-named", 1, Stir::Retention),
    point("manifest-written", 4, Stir::Retention),
    point("manifest-named", 4, Stir::Retention),
    point("truncate-marked", 0, Stir::Truncation),
    point("truncate-in-manifest", 0, Stir::Truncation),
    point("truncate-removed", 0, Stir::Truncation),
    point("retention-proposed", 0, Stir::Retention),
    point("retention-checkpoint", 0, Stir::Retention),
    point("purge-in-manifest", 0, Stir::Retention),
    point("purge-removed", 0, Stir::Retention),
    point("retire-renamed", 0, Stir::Retention),
    point("retire-removed", 0, Stir::Retention),
    point("retire-pooled", 1, Stir::Retention),
    point("snapshot-received", 0, Stir::Snapshot),
    point("install-checkpoint", 0, Stir::Snapshot),
    point("install-in-manifest", 0, Stir::Snapshot),
    point("install-removed", 0, Stir::Snapshot),
    point("vote-written", 2, Stir::Elections),
    point("vote-named", 2, Stir::Elections),
    point("checkpoint-written", 0, Stir::Stop),
    point("checkpoint-named", 1, Stir::Retention),
    point("checkpoint-pruned", 0, Stir::Retention),
    point(INDEX_WRITTEN, 0, Stir::Retention),
    point("repair-written", 0, Stir::Damage),
    point("repair-named", 0, Stir::Damage),
    point("node-file-written", 0, Stir::Topic),
    point("node-file-named", 0, Stir::Topic),
    point("log-created", 2, Stir::Topic),
    point("log-deleted", 2, Stir::Topic),
    point(RECOVERY_MARKED, 0, Stir::Start),
    point("recovery-cleaned", 2, Stir::Start),
];

/// Only a segment of a mebibyte or more has an index.
const INDEX_WRITTEN: &str = "index-written";
/// Sizes of the segments of a node with crash points, in bytes: what comes once a segment comes soon.
const SEGMENT_SIZE: u64 = 256 << 10;
const SEGMENT_SIZE_INDEXED: u64 = 2 << 20;
/// Recovery comes to it only when a group was flushed and its mark was not yet written.
const RECOVERY_MARKED: &str = "recovery-marked";
/// Where a node ends first, so that it comes to that point when it starts again.
const FLUSHED_UNMARKED: &str = "group-flushed:20";

/// Checks the name of a crash point.
///
/// # Errors
/// There is none of that name; all are listed.
pub fn parse_point(name: &str) -> Result<String, String> {
    match CRASH_POINTS.contains(&name) {
        true => Ok(name.to_owned()),
        false => Err(format!("is no crash point; these are: {}", CRASH_POINTS.join(", "))),
    }
}

/// What to choose from: the points named `wanted`, or, when there are none, all.
fn points(wanted: &[String]) -> Vec<Point> {
    let is_wanted = |point: &&Point| wanted.is_empty() || wanted.iter().any(|name| name == point.name);
    POINTS.iter().filter(is_wanted).copied().collect()
}

impl Nemesis<'_> {
    pub(super) async fn fail_point(&mut self) -> Result<Option<Active>, Error> {
        let fault = Fault::FailPoint;
        let Some(program) = self.plan.planted.clone() else { return Ok(None) };
        let Some(node) = self.pick(&self.cluster.nodes()) else { return Ok(None) };
        let mut points = points(&self.plan.points);
        points.retain(|point| self.plan.may_partition || !point.stir.partitions());
        let Some(point) = points.choose(&mut self.random).copied() else { return Ok(None) };
        let passed = self.random.random_range(0..=point.passed_max);
        let is_killed = point.stir == Stir::Start || self.random.random_bool(0.5);
        let loses_power = self.random.random_bool(0.5) && self.cluster.disk(node)?.kind() != DiskKind::Plain;
        self.begins(fault, node, &[node]).await;
        let scratch = self.scratch().await;
        let mut prepared = self.prepare(point.stir, &scratch).await;
        if is_killed {
            self.cluster.kill(node).await?;
        } else {
            self.cluster.stop(node).await?;
        }
        if prepared.is_ok() {
            prepared = self.prepare_down(point.stir, node, &scratch).await;
        }
        if point.name == RECOVERY_MARKED {
            self.cluster.begin_with(node, &program, &[(CRASH_VARIABLE, FLUSHED_UNMARKED)])?;
            if self.cluster.ends(node, REACH_TIME_MAX).await?.is_none() {
                self.cluster.kill(node).await?;
            }
        }
        let log = self.cluster.log(node)?.to_owned();
        let log_before = fs::metadata(&log).map_or(0, |log| log.len());
        self.history.record(Line { node: Some(node), ..Line::nemesis("restart") });
        let segment_size = if point.name == INDEX_WRITTEN { SEGMENT_SIZE_INDEXED } else { SEGMENT_SIZE };
        let variables =
            [(CRASH_VARIABLE, format!("{}:{passed}", point.name)), (SEGMENT_VARIABLE, segment_size.to_string())];
        self.cluster.begin_with(node, &program, &variables.each_ref().map(|(name, value)| (*name, value.as_str())))?;
        let exit = self.until_it_ends(node, point, &scratch).await?;
        let is_reached = says(&log, log_before, &format!("crash point {} reached", point.name));
        let mut detail = format!("{} after {passed} times", point.name);
        if let Err(error) = prepared {
            detail.push_str(&format!(" ({error})"));
        }
        match exit {
            Some(_) if is_reached => detail.push_str(": reached"),
            Some(exit) if exit.success => detail.push_str(": not reached before it was asked to end"),
            // That is no crash which anybody asked for.
            Some(exit) => {
                self.not_ready(node, exit.story.clone());
                detail.push_str(&format!(": {}", exit.story));
            }
            None => {
                self.cluster.kill(node).await?;
                detail.push_str(&format!(": not reached within {} s", REACH_TIME_MAX.as_secs()));
            }
        }
        if is_reached && loses_power {
            self.lose_power(&[node]).await?;
            let cut = self.restore_power(&[node]).await?;
            detail.push_str(&format!("; then without power: {}", cut.detail));
        }
        self.struck(fault, node, is_reached, detail);
        let until = Instant::now() + self.time(DOWN_MS.0, DOWN_MS.1);
        Ok(Some(Active { fault, label: node, nodes: vec![node], until, undo: Undo::Start }))
    }

    /// Does what makes the point likely until the node ends; `None` when it does not in time.
    async fn until_it_ends(&mut self, node: u64, point: Point, scratch: &Scratch) -> Result<Option<Exit>, Error> {
        let deadline = Instant::now() + REACH_TIME_MAX;
        if !matches!(point.stir, Stir::Load | Stir::Start) {
            // It may end before it is ready, too.
            let _ = timeout(REACH_TIME_MAX, self.cluster.ready(node)).await;
        }
        while Instant::now() < deadline {
            if let Some(exit) = self.cluster.ends(node, LOOK_TIME).await? {
                return Ok(Some(exit));
            }
            if point.stir == Stir::Stop {
                self.cluster.signal(node, Signal::TERM)?;
                return self.cluster.ends(node, deadline - Instant::now()).await;
            }
            // What fails because the node is gone has done its work.
            let _ = timeout(STIR_TIME_MAX, self.stir(point.stir, node, scratch)).await;
            if point.stir.partitions() {
                self.reunite().await;
            }
        }
        self.cluster.ends(node, LOOK_TIME).await
    }
}

/// Whether a log says `what` after its first `skip` bytes.
fn says(log: &Path, skip: u64, what: &str) -> bool {
    let bytes = fs::read(log).unwrap_or_default();
    let rest = bytes.get(skip as usize..).unwrap_or_default();
    String::from_utf8_lossy(rest).lines().any(|line| line == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_those_of_the_program_and_can_be_named() {
        let listed: Vec<_> = points(&[]).iter().map(|point| point.name).collect();
        assert_eq!(listed, CRASH_POINTS, "each is known to be reached somehow");
        let named = points(&["truncate-marked".to_owned(), "vote-named".to_owned()]);
        let found: Vec<_> = named.iter().map(|point| (point.name, point.stir)).collect();
        assert_eq!(found, [("truncate-marked", Stir::Truncation), ("vote-named", Stir::Elections)]);
        assert!(parse_point("vote-lost").unwrap_err().contains("vote-named"));
    }

    #[test]
    fn the_proof_is_a_whole_line_of_this_start() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "crash point vote-named reached\nINFO ready\n").unwrap();
        assert!(says(&log, 0, "crash point vote-named reached"));
        assert!(!says(&log, 1, "crash point vote-named reached"));
        assert!(!says(&log, 0, "crash point vote reached"));
    }
}
