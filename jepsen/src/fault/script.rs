//! Runs with a fixed sequence of faults, by name: what other programs were found to lose data by.

use std::time::Duration;

use super::Fault;
use crate::workload::Kind;

/// How a fault is made where it can be made in several ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// As the seed says.
    #[default]
    Any,
    /// The node that is taken out of the majority is stopped.
    Pause,
    /// It is cut off.
    CutOff,
    /// In a segment.
    Segment,
    /// In a checkpoint.
    Checkpoint,
}

/// A fault of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Load without a fault before it.
    pub after: Duration,
    /// The fault.
    pub fault: Fault,
    /// How.
    pub way: Way,
}

/// A fixed sequence of faults. The seed still chooses the nodes and what the disks lose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Script {
    /// As the command line has it.
    pub name: &'static str,
    /// What happens, in a line.
    pub about: &'static str,
    /// What the clients do.
    pub workloads: &'static [Kind],
    /// Operations per second of each workload.
    pub rate: u32,
    /// One after the other, over and over.
    pub steps: &'static [Step],
    /// How often all steps are made.
    pub rounds: usize,
}

const fn step(after_seconds: u64, fault: Fault, way: Way) -> Step {
    Step { after: Duration::from_secs(after_seconds), fault, way }
}

/// All of them: the ways in which NATS 2.12.1 lost what it had acknowledged:
/// <https://jepsen.io/analyses/nats-2.12.1>.
pub const SCRIPTS: [Script; 3] = [
    Script {
        name: "power-cut-of-all",
        about: "all nodes lose their power at once, seconds after acknowledgements, and all that was not synced",
        workloads: &[Kind::Append, Kind::Queue],
        rate: 500,
        steps: &[step(3, Fault::PowerCutAll, Way::Any), step(1, Fault::PowerCutAll, Way::Any)],
        rounds: 5,
    },
    Script {
        name: "swapped-majority",
        about: "a node is away, another one loses its power, and then the third goes as the first comes back",
        workloads: &[Kind::Append, Kind::Queue],
        rate: 500,
        steps: &[step(2, Fault::MajoritySwap, Way::Pause), step(2, Fault::MajoritySwap, Way::CutOff)],
        rounds: 5,
    },
    Script {
        name: "flipped-bits",
        about: "single bits of segments and checkpoints of a minority are flipped",
        workloads: &[Kind::Append],
        rate: 2_000,
        // A restart in good order leaves checkpoints.
        steps: &[
            step(10, Fault::Roll, Way::Any),
            step(1, Fault::BitFlip, Way::Segment),
            step(1, Fault::BitFlip, Way::Checkpoint),
            step(1, Fault::BitFlip, Way::Segment),
            step(1, Fault::BitFlip, Way::Checkpoint),
        ],
        rounds: 4,
    },
];

impl Script {
    /// The script of this name.
    ///
    /// # Errors
    /// There is none; the line names those there are.
    pub fn named(name: &str) -> Result<Self, String> {
        let names = || SCRIPTS.map(|script| script.name).join(", ");
        let found = SCRIPTS.iter().find(|script| script.name == name);
        found.copied().ok_or_else(|| format!("there is no such script; there are {}", names()))
    }

    /// The kinds of faults in it, each once, divided by commas.
    #[must_use]
    pub fn faults(&self) -> String {
        let mut kinds: Vec<Fault> = self.steps.iter().map(|step| step.fault).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds.iter().map(|fault| fault.name()).collect::<Vec<_>>().join(",")
    }

    /// All steps in their order.
    pub fn sequence(&self) -> impl Iterator<Item = Step> {
        std::iter::repeat_n(self.steps, self.rounds).flatten().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_found_by_name_and_are_a_sequence() {
        let script = Script::named("swapped-majority").unwrap();
        assert_eq!(script.faults(), "majority-swap");
        let ways: Vec<Way> = script.sequence().map(|step| step.way).take(3).collect();
        assert_eq!(ways, [Way::Pause, Way::CutOff, Way::Pause]);
        assert_eq!(script.sequence().count(), 10);
        assert!(Script::named("none").unwrap_err().contains("flipped-bits"));
    }
}
