//! Rolling upgrades, and back again: one node after the other is restarted with the other program.
//!
//! In a mix other faults come and go between two nodes, so the cluster is of two versions under all of them.

use std::{path::Path, time::Duration};

use rand::{RngExt, seq::SliceRandom};
use tokio::time::{Instant, sleep};

use super::{
    Fault,
    active::{Active, Undo},
    nemesis::Nemesis,
};
use crate::{
    cluster::{Error, Program},
    history::Line,
};

/// Time between two nodes, in milliseconds.
const STEP_MS: (u64, u64) = (200, 3_000);
/// Time until a node is looked at again that other faults keep from its turn.
const LOOK_PAUSE: Duration = Duration::from_millis(200);
/// How likely an upgrade is taken back before its last node.
const TAKEN_BACK_CHANCE: f64 = 0.3;

/// The programs of a run with upgrades.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// Of the earlier release: the cluster begins with it.
    pub before: Program,
    /// The newer one.
    pub after: Program,
}

/// A node that is to run a program.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Step {
    node: u64,
    program: Program,
}

/// An upgrade that is under way.
#[derive(Clone, Debug)]
pub struct Upgrade {
    /// The last one is next.
    steps: Vec<Step>,
    /// The step whose node is not known to be ready, and which version the node told before it.
    begun: Option<(Step, Option<String>)>,
    is_proven: bool,
    told: Vec<String>,
}

/// The steps of an upgrade of `nodes` in their order; the first `upto` of them only, and back, where that is not all.
fn steps(nodes: &[u64], upto: usize, to: &Program, from: &Program) -> Vec<Step> {
    let step = |program: &Program| {
        let program = program.clone();
        move |node: &u64| Step { node: *node, program: program.clone() }
    };
    let mut all: Vec<Step> = nodes.iter().take(upto).map(step(to)).collect();
    if upto < nodes.len() {
        all.extend(nodes.iter().take(upto).rev().map(step(from)));
    }
    all.reverse();
    all
}

/// Whether a node that told `was` and now tells `is` and runs from `file` has changed to `program`.
fn has_changed(was: Option<&str>, is: Option<&str>, file: Option<&Path>, program: &Program) -> bool {
    let (Some(was), Some(is)) = (was, is) else { return false };
    // Programs of the first version of the peer protocol do not tell.
    was != is && (is.is_empty() || is == program.version) && file == Some(program.path.as_path())
}

fn shown(version: Option<&str>) -> &str {
    match version {
        Some("") => "no version",
        Some(version) => version,
        None => "nothing",
    }
}

impl Nemesis<'_> {
    pub(super) async fn upgrade(&mut self) -> Result<Option<Active>, Error> {
        let Some(Programs { before, after }) = self.plan.programs.clone() else { return Ok(None) };
        let mut nodes = self.cluster.nodes();
        nodes.shuffle(&mut self.random);
        let runs = |nemesis: &Self, node: u64, program: &Program| {
            nemesis.cluster.program(node).is_ok_and(|path| path == program.path)
        };
        let is_done = nodes.iter().all(|node| runs(self, *node, &after));
        let (to, from) = if is_done { (before, after) } else { (after, before) };
        nodes.retain(|node| !runs(self, *node, &to));
        let count = nodes.len();
        let is_taken_back = count > 1 && self.random.random_bool(TAKEN_BACK_CHANCE);
        let upto = if is_taken_back { self.random.random_range(1..count) } else { count };
        self.begins(Fault::Upgrade, 0, &nodes).await;
        let steps = steps(&nodes, upto, &to, &from);
        let upgrade = Upgrade { steps, begun: None, is_proven: true, told: Vec::new() };
        let undo = Undo::Upgrade(upgrade);
        Ok(Some(Active { fault: Fault::Upgrade, label: 0, nodes: Vec::new(), until: Instant::now(), undo }))
    }

    /// Looks whether the node of the last step is back, and makes the next step. `None`: that was all.
    pub(super) async fn upgrade_on(&mut self, mut upgrade: Upgrade) -> Result<Option<Active>, Error> {
        if self.active.is_empty() && !self.settle().await {
            upgrade.told.push("not all nodes came back".to_owned());
            self.struck(Fault::Upgrade, 0, false, upgrade.told.join("; "));
            return Ok(None);
        }
        if let Some((step, was)) = upgrade.begun.take() {
            if !self.cluster.is_ready(step.node).await {
                // Whatever keeps it away has to end first.
                let nodes = vec![step.node];
                upgrade.begun = Some((step, was));
                return Ok(Some(Self::waits(upgrade, nodes).await));
            }
            self.look_at(&mut upgrade, &step, was.as_deref()).await;
        }
        let Some(step) = upgrade.steps.pop() else {
            self.struck(Fault::Upgrade, 0, upgrade.is_proven, upgrade.told.join("; "));
            return Ok(None);
        };
        let node = step.node;
        let is_busy = self.active.iter().any(|active| active.nodes.contains(&node));
        if is_busy || !self.cluster.is_ready(node).await {
            upgrade.steps.push(step);
            return Ok(Some(Self::waits(upgrade, Vec::new()).await));
        }
        let was = self.cluster.version_of(node).await;
        if !self.cluster.stop(node).await? {
            upgrade.is_proven = false;
            upgrade.told.push(format!("node {node} did not end with success"));
        }
        self.cluster.set_program(node, &step.program.path)?;
        self.history.record(Line { node: Some(node), ..Line::nemesis("restart") });
        self.cluster.begin(node)?;
        upgrade.begun = Some((step, was));
        let until = Instant::now() + self.time(STEP_MS.0, STEP_MS.1);
        Ok(Some(Active { fault: Fault::Upgrade, label: 0, nodes: vec![node], until, undo: Undo::Upgrade(upgrade) }))
    }

    async fn waits(upgrade: Upgrade, nodes: Vec<u64>) -> Active {
        sleep(LOOK_PAUSE).await;
        Active { fault: Fault::Upgrade, label: 0, nodes, until: Instant::now(), undo: Undo::Upgrade(upgrade) }
    }

    async fn look_at(&mut self, upgrade: &mut Upgrade, step: &Step, was: Option<&str>) {
        let is = self.cluster.version_of(step.node).await;
        let file = self.cluster.runs_from(step.node);
        let has_changed = has_changed(was, is.as_deref(), file.as_deref(), &step.program);
        upgrade.is_proven &= has_changed;
        let not = if has_changed { "" } else { " (NOT the other program)" };
        let (node, was, is) = (step.node, shown(was), shown(is.as_deref()));
        upgrade.told.push(format!("node {node} told {was} and now {is}{not}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(name: &str) -> Program {
        Program { path: format!("/{name}").into(), version: name.to_owned() }
    }

    #[test]
    fn an_upgrade_goes_through_all_nodes_or_back_the_way_it_came() {
        let order = |upto| {
            let steps = steps(&[3, 1, 2], upto, &program("new"), &program("old"));
            steps.into_iter().rev().map(|step| (step.node, step.program.version)).collect::<Vec<_>>()
        };
        let told = |node, name: &str| (node, name.to_owned());
        assert_eq!(order(3), [told(3, "new"), told(1, "new"), told(2, "new")]);
        assert_eq!(order(2), [told(3, "new"), told(1, "new"), told(1, "old"), told(3, "old")]);
    }

    #[test]
    fn only_another_version_from_the_other_file_proves_a_change() {
        let new = program("new");
        let file = Some(Path::new("/new"));
        assert!(has_changed(Some(""), Some("new"), file, &new));
        assert!(has_changed(Some("old"), Some("new"), file, &new));
        assert!(has_changed(Some("new"), Some(""), Some(Path::new("/old")), &program("old")));
        assert!(!has_changed(Some("new"), Some("new"), file, &new));
        assert!(!has_changed(Some(""), Some("new"), Some(Path::new("/old")), &new));
        assert!(!has_changed(Some(""), Some("newer"), file, &new));
        assert!(!has_changed(None, Some("new"), file, &new), "a node that was away tells nothing");
        assert!(!has_changed(Some(""), None, file, &new));
    }
}
