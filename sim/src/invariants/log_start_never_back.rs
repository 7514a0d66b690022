//! What was dropped from the front of a log stays dropped.

use crate::invariants::Facts;

pub fn check(facts: &Facts) -> Vec<String> {
    let mut broken = Vec::new();
    for (place, front) in &facts.fronts {
        for pair in front.starts.windows(2).filter(|pair| pair[1] < pair[0]) {
            let (topic, partition) = (&place.topic, place.partition);
            broken.push(format!("{topic}/{partition}: the log start went from {} to {}", pair[0], pair[1]));
        }
    }
    broken
}
