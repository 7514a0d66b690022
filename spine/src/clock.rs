//! The wall clock, and whether to believe it. Leases and time-outs never use it.
//!
//! | clocks known, own included | the own one is wrong when |
//! |---|---|
//! | three or more | it is over 5 s from their median; of an even number, from both in the middle |
//! | two | it is over 5 s from the other, and moved over 5 s against the monotonic clock |
//! | none but the own | it moved over 5 s against the monotonic clock, for ten minutes after that |
//!
//! So a majority of sound clocks always has leaders, and two nodes that differ do not both stop
//! leading. The movement against the monotonic clock is counted from the last time at which other
//! clocks confirmed the own one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A clock further off than this is wrong.
const ERROR_MS_MAX: i64 = 5_000;
/// A clock that nobody can confirm is believed again after it ran evenly for this long.
const EVEN_PATIENCE: Duration = Duration::from_secs(600);

/// The wall clock of a node. Clones are the same clock.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    ahead_ms: Arc<AtomicI64>,
}

impl Clock {
    /// Lets the clock of this node alone differ from the machine's, in ms: to see what a wrong clock
    /// does without setting that of the machine.
    pub fn set_ahead_ms(&self, ahead_ms: i64) {
        self.ahead_ms.store(ahead_ms, Relaxed);
    }

    /// Milliseconds since 1970; 0 when the clock stands before that.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        now_ms().saturating_add_signed(self.ahead_ms.load(Relaxed))
    }
}

/// Milliseconds since 1970 by the machine's clock; 0 when it stands before that.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// What the other clocks say of the own one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Judgement {
    /// Whether the own clock is wrong.
    pub is_off: bool,
    /// The best guess at the time is the own clock plus this, in ms.
    pub correction_ms: i64,
    /// Whether another clock agrees with the own one.
    is_confirmed: bool,
}

/// `moved_ms`: how far the wall clock moved against the monotonic one. `others_ms`: each other clock
/// minus the own one. Pure.
fn judge(moved_ms: i64, mut others_ms: Vec<i64>) -> Judgement {
    let is_large = |ms: i64| ms.saturating_abs() > ERROR_MS_MAX;
    others_ms.push(0);
    others_ms.sort_unstable();
    match others_ms.as_slice() {
        [_] => Judgement { is_off: is_large(moved_ms), correction_ms: moved_ms.saturating_neg(), is_confirmed: false },
        [first, second] => {
            // One of the two is the own clock.
            let other = first.saturating_add(*second);
            let is_off = is_large(other) && is_large(moved_ms);
            Judgement { is_off, correction_ms: if is_off { other } else { 0 }, is_confirmed: !is_large(other) }
        }
        all => {
            let middle = all.len() / 2;
            if all.len() % 2 == 1 {
                let median = all[middle];
                return Judgement { is_off: is_large(median), correction_ms: median, is_confirmed: !is_large(median) };
            }
            // Where the clocks fall into two equal halves, nobody can say which half is wrong: neither is, or all
            // nodes would stop leading.
            let (low, high) = (all[middle - 1], all[middle]);
            Judgement {
                is_off: is_large(low) && is_large(high),
                correction_ms: i64::midpoint(low, high),
                is_confirmed: !is_large(low) && !is_large(high),
            }
        }
    }
}

/// Compares the wall clock with the monotonic one and with those of other nodes. Times are given to
/// it: it reads no clock.
#[derive(Debug)]
pub(crate) struct ClockWatch {
    /// The wall clock in ms since 1970, and the monotonic clock at that moment.
    base: (u64, Duration),
    /// How far the wall clock had moved when it was last seen to jump, and when that was.
    jumped: Option<(i64, Duration)>,
}

impl ClockWatch {
    pub(crate) fn new(wall_ms: u64, monotonic: Duration) -> Self {
        Self { base: (wall_ms, monotonic), jumped: None }
    }

    /// What to think of the wall clock now; `others_ms` is each other clock minus the own one.
    pub(crate) fn observe(&mut self, wall_ms: u64, monotonic: Duration, others_ms: Vec<i64>) -> Judgement {
        let passed_ms = i64::try_from(monotonic.saturating_sub(self.base.1).as_millis()).unwrap_or(i64::MAX);
        let moved_ms = wall_ms.wrapping_sub(self.base.0).cast_signed().saturating_sub(passed_ms);
        let is_alone = others_ms.is_empty();
        let judgement = judge(moved_ms, others_ms);
        if judgement.is_confirmed {
            *self = Self::new(wall_ms, monotonic);
        } else if !judgement.is_off {
            self.jumped = None;
        } else {
            let (moved_before, since) = *self.jumped.get_or_insert((moved_ms, monotonic));
            if moved_ms.saturating_sub(moved_before).saturating_abs() > ERROR_MS_MAX {
                self.jumped = Some((moved_ms, monotonic));
            } else if is_alone && monotonic.saturating_sub(since) >= EVEN_PATIENCE {
                *self = Self::new(wall_ms, monotonic);
                return Judgement::default();
            }
        }
        judgement
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_decides_where_three_clocks_are_known() {
        // Own clock right, one other wrong; own clock wrong; own clock jumped to where it should be.
        for (moved_ms, others_ms, is_off, correction_ms) in [
            (0, vec![0, 60_000], false, 0),
            (0, vec![-60_000, -60_100], true, -60_000),
            (0, vec![5_000, 5_000], false, 5_000),
            (0, vec![5_001, 5_001], true, 5_001),
            (60_000, vec![3, -4], false, 0),
            (0, vec![-9_000, 9_000, -9_000, 10, 20], false, 5),
            (0, vec![i64::MAX, i64::MAX, i64::MIN], false, i64::MAX / 2),
            (0, vec![i64::MAX, i64::MAX, 6_000], true, i64::MAX / 2 + 3_000),
        ] {
            let judgement = judge(moved_ms, others_ms.clone());
            assert_eq!((judgement.is_off, judgement.correction_ms), (is_off, correction_ms), "{others_ms:?}");
        }
    }

    #[test]
    fn of_two_equal_halves_neither_is_wrong() {
        // Both nodes of each half judge so: leaders go on, whichever half is right.
        for others_ms in [vec![0, 60_000, 60_000], vec![0, -60_000, -60_000], vec![1, -2, 60_000, 60_001, 60_002]] {
            let judgement = judge(0, others_ms.clone());
            assert!(!judgement.is_off && !judgement.is_confirmed, "{others_ms:?}");
        }
        let judgement = judge(0, vec![60_000, 60_002, 60_004]);
        assert_eq!((judgement.is_off, judgement.correction_ms), (true, 60_001), "a clock alone against three is wrong");
        assert!(judge(0, vec![1, 2, 60_000]).is_confirmed);
    }

    #[test]
    fn of_two_clocks_the_one_that_moved_is_wrong() {
        assert!(!judge(0, vec![60_000]).is_off, "the other one may have jumped");
        let judgement = judge(-60_000, vec![60_000]);
        assert_eq!((judgement.is_off, judgement.correction_ms), (true, 60_000));
        assert!(!judge(60_000, vec![100]).is_off, "both moved, or it was set right");
    }

    #[test]
    fn a_clock_alone_is_believed_again_when_it_ran_evenly_for_a_while() {
        let seconds = Duration::from_secs;
        let mut watch = ClockWatch::new(1_000_000, seconds(10));
        assert!(!watch.observe(1_001_000, seconds(11), vec![]).is_off);
        let jumped = watch.observe(1_062_000, seconds(12), vec![]);
        assert_eq!((jumped.is_off, jumped.correction_ms), (true, -60_000));
        // It jumps again: the patience begins anew.
        assert!(watch.observe(1_662_000, seconds(312), vec![]).is_off);
        assert!(watch.observe(1_962_000, seconds(611), vec![]).is_off);
        assert!(watch.observe(1_962_000, seconds(911), vec![]).is_off);
        assert!(watch.observe(2_262_000, seconds(1_212), vec![]).is_off);
        assert!(!watch.observe(2_562_000, seconds(1_512), vec![]).is_off);
        assert!(!watch.observe(2_563_000, seconds(1_513), vec![]).is_off);
    }

    #[test]
    fn slow_correction_over_months_is_no_jump_where_others_confirm_it() {
        let mut watch = ClockWatch::new(0, Duration::ZERO);
        for day in 1..200u64 {
            // A second a day against the monotonic clock.
            let judgement = watch.observe(day * 86_401_000, Duration::from_secs(day * 86_400), vec![1]);
            assert!(!judgement.is_off);
        }
        assert!(!watch.observe(200 * 86_401_000, Duration::from_secs(200 * 86_400), vec![]).is_off);
    }
}
