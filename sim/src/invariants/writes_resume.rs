//! When all faults are over, writes go on soon, queues become empty, and all replicas can be read.

use crate::invariants::Facts;

pub fn check(facts: &Facts) -> Vec<String> {
    facts.late.clone()
}
