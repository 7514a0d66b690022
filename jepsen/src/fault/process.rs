//! Faults of processes: killed, stopped, restarted, and with a clock that lies.

use std::time::Duration;

use rand::{RngExt, seq::SliceRandom};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::{
    Fault,
    active::{Active, Undo},
    nemesis::Nemesis,
};
use crate::{cluster::Error, history::Line};

/// Longest time that a killed node stays down, in milliseconds.
const DOWN_MS_MAX: u64 = 400;
/// How long nodes are stopped, in milliseconds.
const PAUSE_MS: (u64, u64) = (1_000, 60_000);
/// How far clocks go.
const JUMP_SECONDS: i64 = 3_600;
/// How long a clock is wrong: longer than libfaketime believes what it has read.
const CLOCK_TIME: Duration = Duration::from_millis(2_500);
/// Changes of a clock that goes to and fro.
const STROBE_COUNT: usize = 6;

impl Nemesis<'_> {
    pub(super) async fn kill(&mut self) -> Result<Option<Active>, Error> {
        let Some(node) = self.pick(&self.cluster.nodes()) else { return Ok(None) };
        self.begins(Fault::Kill, node, &[node]).await;
        let is_proven = self.cluster.runs(node) && self.cluster.kill(node).await?;
        self.struck(Fault::Kill, node, is_proven, "ended by signal 9".to_owned());
        let until = Instant::now() + Duration::from_millis(self.random.random_range(0..=DOWN_MS_MAX));
        Ok(Some(Active { fault: Fault::Kill, label: node, nodes: vec![node], until, undo: Undo::Start }))
    }

    pub(super) async fn start_again(&mut self, active: &Active) -> Result<(), Error> {
        for node in &active.nodes {
            self.history.record(Line { node: Some(*node), ..Line::nemesis("restart") });
            self.cluster.begin(*node)?;
        }
        Ok(())
    }

    pub(super) async fn pause(&mut self, fault: Fault) -> Result<Option<Active>, Error> {
        let mut candidates = self.cluster.nodes();
        if fault == Fault::PauseLeader {
            let mut leaders = Vec::new();
            for topic in &self.plan.topics {
                let led = self.cluster.leaders(topic, 0).await.unwrap_or_default();
                leaders.extend(led.into_iter().map(|(_, leader)| leader));
            }
            candidates.retain(|node| leaders.contains(node));
        }
        let Some(node) = self.pick(&candidates).filter(|node| self.cluster.runs(*node)) else { return Ok(None) };
        self.begins(fault, node, &[node]).await;
        self.cluster.signal(node, Signal::STOP)?;
        let longest = PAUSE_MS.1.min(self.plan.time.as_millis() as u64 / 3);
        let time = self.time(PAUSE_MS.0, longest);
        Ok(Some(Active { fault, label: node, nodes: vec![node], until: Instant::now() + time, undo: Undo::Continue }))
    }

    pub(super) async fn go_on(&mut self, active: &Active) -> Result<(), Error> {
        let is_stopped = self.cluster.is_stopped(active.label)?;
        self.cluster.signal(active.label, Signal::CONT)?;
        let detail = if is_stopped { "the kernel says that it was stopped" } else { "it was not stopped" };
        self.struck(active.fault, active.label, is_stopped, detail.to_owned());
        Ok(())
    }

    pub(super) async fn roll(&mut self) -> Result<Option<Active>, Error> {
        let fault = Fault::Roll;
        let mut nodes = self.cluster.nodes();
        nodes.shuffle(&mut self.random);
        self.begins(fault, 0, &nodes).await;
        let (mut is_clean, mut told) = (true, Vec::new());
        for node in &nodes {
            let was_clean = self.cluster.stop(*node).await?;
            is_clean &= was_clean;
            if !was_clean {
                told.push(format!("node {node} did not end with success"));
            }
            self.history.record(Line { node: Some(*node), ..Line::nemesis("restart") });
            self.cluster.begin(*node)?;
            if !self.settle().await {
                is_clean = false;
                break;
            }
        }
        told.push(format!("{} nodes ended by SIGTERM and came back", nodes.len()));
        self.struck(fault, 0, is_clean, told.join("; "));
        Ok(Some(Self::over(fault, 0)))
    }

    pub(super) async fn clock(&mut self, fault: Fault) -> Result<Option<Active>, Error> {
        let Some(node) = self.pick(&self.cluster.nodes()) else { return Ok(None) };
        self.begins(fault, node, &[node]).await;
        let file = self.cluster.clock(node)?;
        let set = |seconds: i64| {
            let written = std::fs::write(&file, format!("{seconds:+}"));
            written.map_err(|error| Error::new(format!("cannot write {}: {error}", file.display())))
        };
        let count = if fault == Fault::ClockJump { 2 } else { STROBE_COUNT };
        let mut furthest = 0;
        for step in 0..count {
            set(if step % 2 == 0 { JUMP_SECONDS } else { -JUMP_SECONDS })?;
            sleep(CLOCK_TIME).await;
            let seen = self.cluster.time_of(node).await.map_or(0, |seconds| seconds.abs_diff(now()));
            furthest = furthest.max(seen);
        }
        set(0)?;
        let is_proven = furthest > JUMP_SECONDS as u64 / 2;
        self.struck(fault, node, is_proven, format!("the node's clock was off by {furthest} s"));
        sleep(CLOCK_TIME).await;
        Ok(Some(Self::over(fault, node)))
    }
}

/// Seconds since 1970 on this machine's clock.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
