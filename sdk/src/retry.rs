//! When to try again: pure rules, and the pauses between tries.

use std::time::Duration;

use arqon_proto::wire::ErrorCode;
use rand::RngExt;

use crate::{Error, Options, limits};

/// What an error means for a request that may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The caller must know.
    Final,
    /// Certainly not done: send it again after the pause.
    NotDone,
    /// May or may not be done: send it again only where that is safe.
    Unclear,
}

/// Judges `error`.
///
/// | error | verdict |
/// |---|---|
/// | no server reached, `NOT_LEADER`, `OVERLOADED`, `RATE_LIMIT_EXCEEDED` | not done |
/// | `TOPIC_FULL`, `STORAGE_FULL`: somebody may make room within the request's time | not done |
/// | connection lost, no answer in time, `UNKNOWN_OUTCOME` | unclear |
/// | anything else | final |
pub(crate) fn judge(error: &Error) -> Verdict {
    match error {
        Error::Unreachable { .. } => Verdict::NotDone,
        Error::Lost { .. } | Error::TimedOut { .. } => Verdict::Unclear,
        Error::Server { code, .. } => match code {
            ErrorCode::NotLeader
            | ErrorCode::Overloaded
            | ErrorCode::RateLimitExceeded
            | ErrorCode::TopicFull
            | ErrorCode::StorageFull => Verdict::NotDone,
            ErrorCode::UnknownOutcome => Verdict::Unclear,
            _ => Verdict::Final,
        },
        _ => Verdict::Final,
    }
}

/// The leader that a `NOT_LEADER` answer names.
pub(crate) fn named_leader(error: &Error) -> Option<&str> {
    match error {
        Error::Server { code: ErrorCode::NotLeader, details, .. } if !details.leader_address.is_empty() => {
            Some(&details.leader_address)
        }
        _ => None,
    }
}

/// Capped, doubling pauses with jitter.
#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
    redirects: u32,
}

impl Backoff {
    pub(crate) fn new(options: &Options) -> Self {
        Self { min: options.backoff_min, max: options.backoff_max, failures: 0, redirects: 0 }
    }

    pub(crate) fn reset(&mut self) {
        self.failures = 0;
        self.redirects = 0;
    }

    /// The pause after `error`: none for the first redirections, never less than the server asks.
    pub(crate) fn after(&mut self, error: &Error) -> Duration {
        if named_leader(error).is_some() && self.redirects < limits::REDIRECT_COUNT_MAX {
            self.redirects += 1;
            return Duration::ZERO;
        }
        let factor = 1u32 << self.failures.min(16);
        self.failures += 1;
        let pause = self.min.saturating_mul(factor).min(self.max);
        let jittered = pause.mul_f64(rand::rng().random_range(0.5..=1.0));
        jittered.max(error.retry_after().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use arqon_proto::wire;

    use super::*;

    #[test]
    fn a_topic_or_disk_without_room_is_tried_again_and_a_wrong_request_is_not() {
        let judged = |code: ErrorCode| judge(&wire::Error { code: code.into(), ..Default::default() }.into());
        for code in [ErrorCode::TopicFull, ErrorCode::StorageFull, ErrorCode::Overloaded] {
            assert_eq!(judged(code), Verdict::NotDone, "{code:?}");
        }
        assert_eq!(judged(ErrorCode::ValidationError), Verdict::Final);
        assert_eq!(judged(ErrorCode::UnknownOutcome), Verdict::Unclear);
    }

    #[test]
    fn pauses_grow_to_their_limit_and_start_anew_after_success() {
        let mut options = Options::new(["a:1"], "t");
        options.backoff_min = Duration::from_millis(10);
        options.backoff_max = Duration::from_millis(100);
        let mut backoff = Backoff::new(&options);
        let lost = Error::Lost { server: "a:1".into(), reason: "x".into() };
        let pauses: Vec<_> = (0..40).map(|_| backoff.after(&lost)).collect();
        assert!(pauses[0] <= Duration::from_millis(10));
        assert!(pauses.iter().all(|pause| *pause <= Duration::from_millis(100)));
        assert!(pauses[39] >= Duration::from_millis(50));
        backoff.reset();
        assert!(backoff.after(&lost) <= Duration::from_millis(10));
    }

    #[test]
    fn a_named_leader_is_followed_at_once_but_not_for_ever() {
        let mut backoff = Backoff::new(&Options::new(["a:1"], "t"));
        let error: Error =
            wire::Error { code: ErrorCode::NotLeader.into(), leader_address: "b:1".into(), ..Default::default() }
                .into();
        for _ in 0..limits::REDIRECT_COUNT_MAX {
            assert_eq!(backoff.after(&error), Duration::ZERO);
        }
        assert!(backoff.after(&error) > Duration::ZERO);
    }

    #[test]
    fn the_server_s_wish_to_wait_is_kept() {
        let mut backoff = Backoff::new(&Options::new(["a:1"], "t"));
        let error: Error =
            wire::Error { code: ErrorCode::Overloaded.into(), retry_after_ms: 900, ..Default::default() }.into();
        assert!(backoff.after(&error) >= Duration::from_millis(900));
    }
}
