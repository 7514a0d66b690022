//! When damage of one log is attempted next, who waits for it, and whether leadership is given away because of it.
//! Without clock or disk.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use arqon_proto::{RaftIndex, Term};

/// Damage that could not be repaired is tried again after this time, which doubles up to the longest.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(250);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// Leadership that came back is not given away again before this time, for whatever reason: where nobody has what
/// is missing it would go round.
const GIVE_WAY_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// What is known of the attempts at the damage of one log.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    problem: Option<String>,
    failed_count: u64,
    /// When the next one is made; none: at once.
    retry_at: Option<Instant>,
    /// How long the one after a failure waits, if nobody asks.
    retry_after: Duration,
    ended_at: Option<Instant>,
    /// Somebody has asked since the last one began.
    is_asked: bool,
    /// How many wait for each damaged entry, without which Raft cannot go on, or a trim.
    waiting: BTreeMap<RaftIndex, usize>,
    gave_way: Option<(Term, Instant)>,
}

impl Attempts {
    /// Why the last attempt failed; none when it did not.
    pub(crate) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Attempts that failed since the last one that did not.
    pub(crate) fn failed_count(&self) -> u64 {
        self.failed_count
    }

    /// Somebody begins to wait for an entry: the next attempt is made soon, the first one at once.
    pub(crate) fn wait_for(&mut self, index: RaftIndex) {
        *self.waiting.entry(index).or_default() += 1;
        self.is_asked = true;
        self.retry_at = self.retry_at.min(self.ended_at.map(|ended| ended + RETRY_AFTER_MIN));
    }

    /// Somebody who waited for an entry does so no more.
    pub(crate) fn leave(&mut self, index: RaftIndex) {
        if let Some(count) = self.waiting.get_mut(&index) {
            *count -= 1;
            if *count == 0 {
                self.waiting.remove(&index);
            }
        }
    }

    /// Whether somebody waits for one of these entries.
    pub(crate) fn is_needed(&self, entries: RangeInclusive<RaftIndex>) -> bool {
        self.waiting.range(entries).next().is_some()
    }

    /// When the next attempt is due; none: at once.
    pub(crate) fn due_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// An attempt begins. What is listed as damaged from now on is not among what it is about.
    pub(crate) fn begin(&mut self) {
        self.is_asked = false;
    }

    /// An attempt has ended. Whoever waits goes on waiting, and whoever began to meanwhile may wait for something
    /// that this attempt knew nothing of: another one follows soon.
    pub(crate) fn end(&mut self, problem: Option<String>, now: Instant) {
        self.ended_at = Some(now);
        self.problem = problem;
        if self.problem.is_none() {
            (self.failed_count, self.retry_after, self.retry_at) = (0, Duration::ZERO, None);
            return;
        }
        self.failed_count += 1;
        self.retry_after = (self.retry_after * 2).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX);
        self.retry_at = Some(now + if self.is_asked { RETRY_AFTER_MIN } else { self.retry_after });
    }

    /// Whether the leader of `term` gives leadership away, which is remembered: once in a term, and not soon again.
    pub(crate) fn gives_way(&mut self, term: Term, now: Instant) -> bool {
        let may = self.gave_way.is_none_or(|(before, at)| before < term && now >= at + GIVE_WAY_AGAIN_AFTER);
        if may {
            self.gave_way = Some((term, now));
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: RaftIndex = RaftIndex(4);
    const SECOND: RaftIndex = RaftIndex(9);

    fn failed() -> Option<String> {
        Some("node 2 has not got it".to_owned())
    }

    /// The story: while one range is being repaired, apply meets the next one. Whoever waits for that is not
    /// forgotten when the first one is repaired, so the replica can still be given up for it.
    #[test]
    fn who_begins_to_wait_during_an_attempt_is_remembered_whatever_comes_of_it() {
        let start = Instant::now();
        for problem in [None, failed()] {
            let mut attempts = Attempts::default();
            attempts.wait_for(FIRST);
            attempts.begin();
            attempts.wait_for(SECOND);
            attempts.end(problem.clone(), start);
            attempts.leave(FIRST);
            assert!(attempts.is_needed(RaftIndex(8)..=RaftIndex(10)), "{problem:?}");
            assert!(!attempts.is_needed(FIRST..=FIRST));
            assert!(attempts.due_at() <= Some(start + RETRY_AFTER_MIN), "{problem:?}");
        }
    }

    #[test]
    fn who_begins_to_wait_during_a_late_attempt_does_not_wait_for_its_long_pause() {
        let mut now = Instant::now();
        let mut attempts = Attempts::default();
        for _ in 0..10 {
            attempts.begin();
            attempts.end(failed(), now);
            now = attempts.due_at().unwrap();
        }
        attempts.begin();
        attempts.wait_for(SECOND);
        attempts.end(failed(), now);
        assert_eq!(attempts.due_at(), Some(now + RETRY_AFTER_MIN));
        // And between attempts it is not later either.
        attempts.begin();
        attempts.end(failed(), now);
        assert!(attempts.due_at() > Some(now + RETRY_AFTER_MIN));
        attempts.wait_for(RaftIndex(12));
        assert_eq!(attempts.due_at(), Some(now + RETRY_AFTER_MIN));
        assert_eq!(attempts.failed_count(), 12);
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_after_a_success() {
        let now = Instant::now();
        let mut attempts = Attempts::default();
        assert_eq!(attempts.due_at(), None, "the first one is made at once");
        for pause_ms in [250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000] {
            attempts.begin();
            attempts.end(failed(), now);
            assert_eq!(attempts.due_at(), Some(now + Duration::from_millis(pause_ms)));
        }
        attempts.begin();
        attempts.end(None, now);
        assert_eq!((attempts.due_at(), attempts.problem(), attempts.failed_count()), (None, None, 0));
        attempts.begin();
        attempts.end(failed(), now);
        assert_eq!(attempts.due_at(), Some(now + RETRY_AFTER_MIN));
    }

    /// The story: a trim gives up waiting. Nobody needs the entry any more, and the replica is worth more than that.
    #[test]
    fn an_entry_that_nobody_waits_for_any_more_is_not_needed() {
        let mut attempts = Attempts::default();
        attempts.wait_for(FIRST);
        attempts.wait_for(FIRST);
        attempts.leave(FIRST);
        assert!(attempts.is_needed(FIRST..=SECOND), "one waits still");
        attempts.leave(FIRST);
        assert!(!attempts.is_needed(FIRST..=SECOND));
        attempts.leave(FIRST);
    }

    /// The story: the checkpoint at the log's start is lost, and this replica leads again later. Then it has to give
    /// way again; but where all replicas have lost theirs, leadership must not go round.
    #[test]
    fn leadership_is_given_away_in_a_later_term_again_but_not_soon() {
        let start = Instant::now();
        let mut attempts = Attempts::default();
        assert!(attempts.gives_way(Term(3), start));
        assert!(!attempts.gives_way(Term(3), start + GIVE_WAY_AGAIN_AFTER * 2), "it was asked for in this term");
        assert!(!attempts.gives_way(Term(5), start + GIVE_WAY_AGAIN_AFTER / 2), "it would go round");
        assert!(attempts.gives_way(Term(5), start + GIVE_WAY_AGAIN_AFTER));
        assert!(!attempts.gives_way(Term(7), start + GIVE_WAY_AGAIN_AFTER));
        // Whatever is repaired meanwhile.
        attempts.begin();
        attempts.end(None, start + GIVE_WAY_AGAIN_AFTER);
        assert!(!attempts.gives_way(Term(7), start + GIVE_WAY_AGAIN_AFTER));
    }
}
