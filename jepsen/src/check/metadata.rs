//! Metadata: what was acknowledged about topics stands on every node at the end.
//!
//! | anomaly | |
//! |---|---|
//! | `topic-lost` | created, acknowledged, never deleted, and not listed at the end |
//! | `topic-resurrected` | the deletion was acknowledged, and the topic is listed at the end, or by a node that had listed without it after that |
//! | `topic-from-nowhere` | listed, and created by nobody, or by one who was surely refused |
//! | `topic-altered-back` | at the end the retention is none that the acknowledged changes allow |
//! | `created-twice` | two creations of one topic were acknowledged without a deletion between them |
//! | `metadata-differs` | two nodes list different topics at the end, or one does not answer |
//!
//! While faults go on a node may list what it knows, which may be old: only the closing listings
//! are held against the acknowledgements. But no node may forget a deletion that it had listed.

use std::collections::{BTreeMap, BTreeSet};

use super::Anomaly;
use crate::history::{ChangeKind, History, Listing, Outcome, TopicHistory};

pub(super) fn check(history: &History) -> Vec<Anomaly> {
    if history.topics.is_empty() && history.listings.is_empty() {
        return Vec::new();
    }
    let closing: Vec<&Listing> = history.listings.iter().filter(|listing| listing.last).collect();
    let mut found = differences(history, &closing);
    for (name, topic) in &history.topics {
        found.extend(created_twice(name, topic));
        let expected = Expected::of(topic);
        // One listing stands for all; where they differ, that is told already.
        if let Some(listing) = closing.first() {
            found.extend(expected.compare(name, listing));
        }
    }
    found.extend(from_nowhere(history));
    found.extend(resurrected(history));
    found
}

/// What may be so at the end.
struct Expected {
    may_stand: bool,
    may_be_gone: bool,
    /// Values that the retention may have; empty: nothing is known of it.
    retention_ms: BTreeSet<u64>,
}

impl Expected {
    /// The changes of a topic are made by one process, one after the other.
    fn of(topic: &TopicHistory) -> Self {
        let mut expected = Self { may_stand: false, may_be_gone: true, retention_ms: BTreeSet::new() };
        for change in &topic.changes {
            match (change.kind, change.outcome) {
                (_, Outcome::Fail) => {}
                (ChangeKind::Create, Outcome::Ok { .. }) => (expected.may_stand, expected.may_be_gone) = (true, false),
                (ChangeKind::Create, Outcome::Unknown) => expected.may_stand = true,
                (ChangeKind::Delete, Outcome::Ok { .. }) => (expected.may_stand, expected.may_be_gone) = (false, true),
                (ChangeKind::Delete, Outcome::Unknown) => expected.may_be_gone = true,
                (ChangeKind::Alter(to), Outcome::Ok { .. }) => {
                    // An unknown one before it may have been on its way still.
                    let late: Vec<u64> = topic
                        .changes
                        .iter()
                        .filter(|other| other.outcome == Outcome::Unknown && other.invoked < change.invoked)
                        .filter_map(|other| match other.kind {
                            ChangeKind::Alter(to) => Some(to),
                            _ => None,
                        })
                        .collect();
                    expected.retention_ms = late.into_iter().chain([to]).collect();
                }
                (ChangeKind::Alter(to), Outcome::Unknown) => {
                    // Before the first acknowledged one nothing is known of the retention.
                    if !expected.retention_ms.is_empty() {
                        expected.retention_ms.insert(to);
                    }
                }
            }
        }
        expected
    }

    fn compare(&self, name: &str, listing: &Listing) -> Option<Anomaly> {
        let node = listing.node.map_or(String::new(), |node| format!(" by node {node}"));
        let (kind, detail) = match listing.topics.get(name) {
            None if !self.may_be_gone => {
                ("topic-lost", format!("topic {name} was created and not deleted, and is not listed{node} at the end"))
            }
            Some(_) if !self.may_stand => {
                ("topic-resurrected", format!("topic {name} was deleted, and is listed{node} at the end"))
            }
            Some(retention_ms) if !self.retention_ms.is_empty() && !self.retention_ms.contains(retention_ms) => (
                "topic-altered-back",
                format!(
                    "topic {name} has the retention {retention_ms} ms at the end; allowed: {:?}",
                    self.retention_ms
                ),
            ),
            _ => return None,
        };
        Some(Anomaly { node: listing.node, ..Anomaly::new(kind, name, detail) })
    }
}

fn created_twice(name: &str, topic: &TopicHistory) -> Option<Anomaly> {
    let mut stands = false;
    for change in &topic.changes {
        match (change.kind, change.outcome) {
            (ChangeKind::Create, Outcome::Ok { .. }) if stands => {
                let detail = format!("two creations of topic {name} were acknowledged, with no deletion between them");
                return Some(Anomaly::new("created-twice", name, detail));
            }
            (ChangeKind::Create, Outcome::Ok { .. }) => stands = true,
            (ChangeKind::Delete, Outcome::Ok { .. } | Outcome::Unknown) => stands = false,
            _ => {}
        }
    }
    None
}

fn differences(history: &History, closing: &[&Listing]) -> Vec<Anomaly> {
    let mut found = Vec::new();
    for node in history.nodes.iter().filter(|node| !history.left.contains(node)) {
        let of_node = closing.iter().find(|listing| listing.node == Some(*node));
        let detail = match (of_node, closing.first()) {
            (None, _) => format!("node {node} did not list its topics at the end"),
            (Some(listing), Some(first)) if listing.topics != first.topics => {
                let differs = |(name, _): &(&String, &u64)| listing.topics.get(*name) != first.topics.get(*name);
                let name = first.topics.iter().chain(&listing.topics).find(differs).map_or("", |(name, _)| name);
                let other = first.node.unwrap_or_default();
                format!("nodes {other} and {node} list different topics at the end, {name} for one")
            }
            _ => continue,
        };
        found.push(Anomaly::new("metadata-differs", "", detail).on(*node));
    }
    found
}

fn from_nowhere(history: &History) -> Vec<Anomaly> {
    let may_exist = |name: &str| {
        let created =
            |change: &crate::history::Change| change.kind == ChangeKind::Create && change.outcome != Outcome::Fail;
        history.topics.get(name).is_some_and(|topic| topic.changes.iter().any(created))
    };
    let mut listed: BTreeMap<&str, &Listing> = BTreeMap::new();
    for listing in &history.listings {
        for name in listing.topics.keys() {
            listed.entry(name).or_insert(listing);
        }
    }
    let strange = listed.into_iter().filter(|(name, _)| !may_exist(name));
    let tell = |(name, listing): (&str, &Listing)| {
        let detail = format!("topic {name} is listed at {} ns, and nobody has created it", listing.time);
        Anomaly { node: listing.node, ..Anomaly::new("topic-from-nowhere", name, detail) }
    };
    strange.map(tell).collect()
}

/// Topics that a node lists again after it had listed without them, their deletion acknowledged.
fn resurrected(history: &History) -> Vec<Anomaly> {
    // By name: when the deletion was acknowledged.
    let mut deleted: Vec<(u64, &str)> = Vec::new();
    for (name, topic) in &history.topics {
        let last = topic.changes.iter().rfind(|change| change.outcome != Outcome::Fail);
        if let Some(change) = last.filter(|change| change.kind == ChangeKind::Delete)
            && let Outcome::Ok { time, .. } = change.outcome
        {
            deleted.push((time, name));
        }
    }
    let deleted: BTreeMap<&str, u64> = deleted.into_iter().map(|(time, name)| (name, time)).collect();
    let mut found = Vec::new();
    for node in &history.nodes {
        let mut gone: BTreeSet<&str> = BTreeSet::new();
        for listing in history.listings.iter().filter(|listing| listing.node == Some(*node) && !listing.last) {
            for name in listing.topics.keys().filter(|name| gone.contains(name.as_str())) {
                let detail =
                    format!("node {node} lists topic {name} again, which was deleted and which it had dropped");
                found.push(Anomaly::new("topic-resurrected", name, detail).on(*node));
            }
            let dropped =
                deleted.iter().filter(|(name, time)| **time < listing.invoked && !listing.topics.contains_key(**name));
            gone.extend(dropped.map(|(name, _)| *name));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Change;

    const OK: Outcome = Outcome::Ok { offset: 0, time: 0 };

    fn changes(list: &[(ChangeKind, Outcome)]) -> TopicHistory {
        let change = |(at, (kind, outcome)): (u64, &(ChangeKind, Outcome))| Change {
            process: 1,
            kind: *kind,
            invoked: at * 10,
            answered: Some(at * 10 + 5),
            outcome: match outcome {
                Outcome::Ok { .. } => Outcome::Ok { offset: 0, time: at * 10 + 5 },
                other => *other,
            },
        };
        TopicHistory { changes: (0..).zip(list).map(change).collect() }
    }

    fn listing(node: u64, last: bool, invoked: u64, topics: &[(&str, u64)]) -> Listing {
        let topics = topics.iter().map(|(name, retention)| ((*name).to_owned(), *retention)).collect();
        Listing { process: node, node: Some(node), last, invoked, time: invoked + 1, topics }
    }

    /// Topic `t` with its changes; both nodes list `topics` at the end, node 1 lists `earlier` before.
    fn kinds(list: &[(ChangeKind, Outcome)], topics: &[(&str, u64)], earlier: &[&[(&str, u64)]]) -> Vec<&'static str> {
        let mut history = History { nodes: vec![1, 2], ..History::default() };
        history.topics.insert("t".into(), changes(list));
        for (at, topics) in (0..).zip(earlier) {
            history.listings.push(listing(1, false, 100 + at, topics));
        }
        history.listings.extend([listing(1, true, 1_000, topics), listing(2, true, 1_000, topics)]);
        check(&history).iter().map(|anomaly| anomaly.kind).collect()
    }

    use ChangeKind::{Alter, Create, Delete};

    #[test]
    fn what_was_acknowledged_stands() {
        assert_eq!(kinds(&[(Create, OK)], &[("t", 7)], &[]), [""; 0]);
        assert_eq!(kinds(&[(Create, OK)], &[], &[]), ["topic-lost"]);
        assert_eq!(kinds(&[(Create, OK), (Delete, OK)], &[], &[]), [""; 0]);
        assert_eq!(kinds(&[(Create, OK), (Delete, OK)], &[("t", 7)], &[]), ["topic-resurrected"]);
        assert_eq!(kinds(&[(Create, Outcome::Fail)], &[("t", 7)], &[]), ["topic-resurrected", "topic-from-nowhere"]);
    }

    #[test]
    fn what_is_unknown_may_be_so_or_not() {
        for listed in [&[][..], &[("t", 7)]] {
            assert_eq!(kinds(&[(Create, Outcome::Unknown)], listed, &[]), [""; 0]);
            assert_eq!(kinds(&[(Create, OK), (Delete, Outcome::Unknown)], listed, &[]), [""; 0]);
        }
    }

    #[test]
    fn an_alteration_stands() {
        let altered = [(Create, OK), (Alter(8), OK), (Alter(9), OK)];
        assert_eq!(kinds(&altered, &[("t", 9)], &[]), [""; 0]);
        assert_eq!(kinds(&altered, &[("t", 8)], &[]), ["topic-altered-back"]);
        let unknown = [(Create, OK), (Alter(8), OK), (Alter(9), Outcome::Unknown)];
        assert_eq!(kinds(&unknown, &[("t", 8)], &[]), [""; 0]);
        assert_eq!(kinds(&unknown, &[("t", 9)], &[]), [""; 0]);
        assert_eq!(kinds(&unknown, &[("t", 7)], &[]), ["topic-altered-back"]);
    }

    #[test]
    fn a_name_is_created_once() {
        assert_eq!(kinds(&[(Create, OK), (Create, OK)], &[("t", 7)], &[]), ["created-twice"]);
        assert_eq!(kinds(&[(Create, OK), (Delete, OK), (Create, OK)], &[("t", 7)], &[]), [""; 0]);
    }

    #[test]
    fn a_node_does_not_forget_a_deletion() {
        let gone = [(Create, OK), (Delete, OK)];
        assert_eq!(kinds(&gone, &[], &[&[("t", 7)], &[]]), [""; 0], "an old listing");
        assert_eq!(kinds(&gone, &[], &[&[], &[("t", 7)]]), ["topic-resurrected"]);
    }

    #[test]
    fn nodes_agree_and_answer() {
        let mut history = History { nodes: vec![1, 2], ..History::default() };
        history.topics.insert("t".into(), changes(&[(Create, Outcome::Unknown)]));
        history.listings.extend([listing(1, true, 1_000, &[("t", 7)]), listing(2, true, 1_000, &[])]);
        assert_eq!(check(&history)[0].kind, "metadata-differs");
        history.listings.pop();
        let found = check(&history);
        assert_eq!((found[0].kind, found[0].node), ("metadata-differs", Some(2)));
        history.left.push(2);
        assert!(check(&history).is_empty(), "it has left the cluster");
    }
}
