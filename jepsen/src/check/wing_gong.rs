//! Linearizability by a checker that was not written here: the search of Wing and Gong with
//! Lowe's memory, from the crate `todc-utils`. Its cost grows exponentially, so it sees windows of
//! at most [`STEP_COUNT_MAX`] operations.
//!
//! A window is a stretch of the chain of [`super::linear`], taken as a log that begins empty. If the
//! whole history is linearizable, so is each window: leaving out the operations before and after
//! it leaves the points of the others in order. A window that is not linearizable is therefore an
//! anomaly of the history, `not-linearizable`.

use todc_utils::{
    History, Specification, WGLChecker,
    linearizability::history::Action::{self, Call, Response},
};

use super::{
    Anomaly, Key,
    linear::{Step, chain},
};

/// Operations of one window.
const STEP_COUNT_MAX: usize = 200;
/// Windows of one key, spread over its history.
const WINDOW_COUNT_MAX: usize = 100;

/// An operation with its answer, places counted from the begin of the window.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Operation {
    /// The value, and how many stood before it.
    Append { value: u64, place: usize },
    /// How many values stand, and the last of them from `from` on.
    Read { from: usize, values: Vec<u64>, end: usize },
}

/// A log of values.
struct Log;

impl Specification for Log {
    type State = Vec<u64>;
    type Operation = Operation;

    fn init() -> Vec<u64> {
        Vec::new()
    }

    fn apply(operation: &Operation, state: &Vec<u64>) -> (bool, Vec<u64>) {
        match operation {
            Operation::Append { value, place } if state.len() == *place => {
                let mut after = state.clone();
                after.push(*value);
                (true, after)
            }
            Operation::Append { .. } => (false, state.clone()),
            Operation::Read { from, values, end } => {
                (state.len() == *end && state.get(*from..) == Some(values), state.clone())
            }
        }
    }
}

pub(super) fn check(key: &Key<'_>) -> Vec<Anomaly> {
    if key.jobs.is_some() || !key.excused.is_empty() {
        return Vec::new();
    }
    let chain = chain(key);
    let windows = chain.len().div_ceil(STEP_COUNT_MAX);
    let stride = windows.div_ceil(WINDOW_COUNT_MAX).max(1);
    let looked_at = chain.chunks(STEP_COUNT_MAX).step_by(stride);
    let tell = |window: &[Step]| {
        let (first, last) = (window.first()?, window.last()?);
        let detail = format!(
            "{}: the {} appends and reads of the tail from offset {} to {} have no order that explains their answers",
            key.name,
            window.len(),
            first.offset(),
            last.offset()
        );
        Some(Anomaly { offset: Some(first.offset()), ..Anomaly::new("not-linearizable", key.name, detail) })
    };
    looked_at.filter(|window| !is_linearizable(key, window)).filter_map(tell).collect()
}

/// Whether the search finds an order for the steps.
pub(super) fn is_linearizable(key: &Key<'_>, window: &[Step]) -> bool {
    let values: Vec<(u64, u64)> =
        window.iter().filter(|step| step.is_append()).map(|step| (step.offset(), step.id)).collect();
    let place = |offset: u64| values.partition_point(|(known, _)| *known < offset);
    let begin = values.first().map_or(u64::MAX, |(offset, _)| *offset);
    let operation = |step: &Step| {
        if step.is_append() {
            return Operation::Append { value: step.id, place: place(step.offset()) };
        }
        let read = &key.reads[step.id as usize];
        // Of its values, those that the window has.
        let ours = read.values.iter().filter(|(offset, _)| *offset >= begin && *offset < step.offset());
        let values = ours.map(|(_, value)| value.unwrap_or_default()).collect();
        let end = place(step.offset());
        Operation::Read { from: place(read.offset.unwrap_or(0)).min(end), values, end }
    };
    let mut actions: Vec<(u64, bool, usize, Action<Operation>)> = Vec::new();
    for (process, step) in window.iter().enumerate() {
        let operation = operation(step);
        // At one time, calls come first: operations that touch are concurrent.
        actions.push((step.invoked, false, process, Call(operation.clone())));
        actions.push((step.ended, true, process, Response(operation)));
    }
    if actions.is_empty() {
        return true;
    }
    actions.sort_by_key(|(time, is_response, process, _)| (*time, *is_response, *process));
    let actions = actions.into_iter().map(|(_, _, process, action)| (process, action)).collect();
    WGLChecker::<Log>::is_linearizable(History::from_actions(actions))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{linear, order::Order, story},
        *,
    };
    use crate::history::{self, KeyHistory, Read};
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    /// A small history of a real log: every operation takes effect at a point between its begin and
    /// its end. With `planted`, the answers or times of one operation are then changed.
    fn random_history(random: &mut StdRng, planted: bool) -> KeyHistory {
        let mut key = KeyHistory::default();
        let mut points: Vec<u64> = (0..random.random_range(1..14)).map(|_| random.random_range(0..100)).collect();
        points.sort_unstable();
        let (mut offset, mut log) = (0, Vec::new());
        for (value, point) in (1..).zip(points) {
            let begun = point.saturating_sub(random.random_range(0..25));
            let ended = point + random.random_range(0..25);
            if random.random_bool(0.6) {
                // Control entries take offsets as well.
                offset += random.random_range(0..2);
                key.appends.push(story::acked(value, offset, begun, ended));
                log.push((offset, value));
                offset += 1;
            } else {
                let from = random.random_range(0..=offset);
                let shown: Vec<_> = log.iter().copied().filter(|(at, _)| *at >= from).collect();
                key.reads.push(Read {
                    tail: true,
                    offset: Some(from),
                    hw: Some(offset),
                    invoked: begun,
                    time: ended,
                    ..story::poll(100 + value, &shown)
                });
            }
        }
        if planted {
            plant(random, &mut key);
        }
        key
    }

    fn plant(random: &mut StdRng, key: &mut KeyHistory) {
        let reads = key.reads.len();
        match random.random_range(0..4) {
            0 if reads > 0 => {
                // A read that does not see the newest values.
                let read = &mut key.reads[random.random_range(0..reads)];
                let hw = read.hw.unwrap_or_default().saturating_sub(random.random_range(1..3));
                read.hw = Some(hw.max(read.offset.unwrap_or_default()));
                read.values = read.values.iter().filter(|(offset, _)| *offset < hw).collect();
            }
            1 if reads > 0 => {
                // A read with a hole.
                let read = &mut key.reads[random.random_range(0..reads)];
                let hole = random.random_range(0..=read.values.len());
                read.values = read.values.iter().enumerate().filter(|(at, _)| *at != hole).map(|(_, it)| it).collect();
            }
            2 if reads > 0 => {
                let read = &mut key.reads[random.random_range(0..reads)];
                let late = random.random_range(1..60);
                (read.invoked, read.time) = (read.invoked + late, read.time + late);
            }
            _ if !key.appends.is_empty() => {
                let index = random.random_range(0..key.appends.len());
                let append = &mut key.appends[index];
                let late = random.random_range(1..60);
                if let Some((offset, time)) = append.acked() {
                    append.invoked += late;
                    append.outcome = history::Outcome::Ok { offset, time: time + late };
                }
            }
            _ => {}
        }
    }

    #[test]
    fn both_checkers_agree_on_random_small_histories() {
        let (mut good, mut bad) = (0, 0);
        for seed in 0..4_000 {
            let mut random = StdRng::seed_from_u64(seed);
            let planted = seed % 2 == 1;
            let key = random_history(&mut random, planted);
            let order = Order::of(&key);
            let whole = history::History::default();
            let key = Key::new("t/0", &key, &whole, &order);
            let (ours, theirs) = (linear::check(&key), is_linearizable(&key, &chain(&key)));
            assert_eq!(ours.is_empty(), theirs, "seed {seed}: {ours:?} in {key:?}", key = (key.appends, key.reads));
            assert!(planted || theirs, "seed {seed}: a real log is linearizable");
            *(if theirs { &mut good } else { &mut bad }) += 1;
        }
        assert!(good > 2_000 && bad > 500, "{good} good and {bad} bad histories");
    }

    #[test]
    fn a_stale_read_has_no_order() {
        let history = KeyHistory {
            appends: vec![story::acked(1, 0, 0, 10), story::acked(2, 4, 20, 30)],
            reads: vec![Read { tail: true, offset: Some(0), hw: Some(3), ..story::poll(9, &[(0, 1)]) }],
            ..KeyHistory::default()
        };
        let found = story::run(check, &history);
        assert_eq!(found.iter().map(|anomaly| anomaly.kind).collect::<Vec<_>>(), ["not-linearizable"]);
    }

    #[test]
    fn a_window_in_the_middle_of_a_log_begins_where_it_begins() {
        let appends: Vec<_> = (0..500).map(|at| story::acked(at + 1, at, at * 10, at * 10 + 15)).collect();
        let tail = |hw: u64| {
            let values: Vec<_> = (hw - 3..hw).map(|at| (at, at + 1)).collect();
            let invoked = hw * 10 - 1;
            Read {
                tail: true,
                offset: Some(hw - 3),
                hw: Some(hw),
                invoked,
                time: invoked + 2,
                ..story::poll(hw, &values)
            }
        };
        let history = KeyHistory { appends, reads: (3..500).map(tail).collect(), ..KeyHistory::default() };
        assert_eq!(story::run(check, &history), []);
    }
}
