//! Commits that wait for company.
//!
//! openraft tells a follower of each commit with an append of its own when no entries are there
//! to carry it: at a low rate that is a second frame, a second wake-up and a second answer for
//! every entry. Nobody waits for a follower of a partition to apply something, so such an append
//! is kept back for a while, and the next entries carry the commit instead.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream::Fuse};
use openraft::raft::AppendEntriesRequest;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::types::{LogId, TypeConfig};

type Append = AppendEntriesRequest<TypeConfig>;

/// The appends of one session, without those that only tell of a commit and are overtaken by
/// entries within `patience`.
///
/// What is left out has no answer: an answer to a later append stands for all before it.
pub(crate) struct Held<S> {
    appends: Fuse<S>,
    patience: Duration,
    /// Last entry that was let through.
    sent: Option<LogId>,
    held: Option<Append>,
    /// When what is held leaves.
    leaves_at: Instant,
    /// Rings then or before.
    timer: Pin<Box<Sleep>>,
}

impl<S: Stream<Item = Append> + Unpin> Held<S> {
    pub fn new(appends: S, patience: Duration) -> Self {
        let leaves_at = Instant::now();
        Self {
            appends: appends.fuse(),
            patience,
            sent: None,
            held: None,
            timer: Box::pin(sleep_until(leaves_at)),
            leaves_at,
        }
    }

    /// Whether an append says nothing but what is committed. The first of a session also asks
    /// where the follower's log stands.
    fn is_commit(&self, append: &Append) -> bool {
        let may_wait = !self.patience.is_zero() && self.sent.is_some();
        may_wait && append.entries.is_empty() && append.prev_log_id == self.sent
    }

    /// The timer is set anew when it rings and not when something is held, so that a busy group
    /// does not move it for every entry.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= self.leaves_at {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(self.leaves_at);
        }
        Poll::Pending
    }
}

impl<S: Stream<Item = Append> + Unpin> Stream for Held<S> {
    type Item = Append;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Append>> {
        loop {
            match self.appends.poll_next_unpin(cx) {
                Poll::Ready(Some(append)) if self.is_commit(&append) => {
                    if self.held.is_none() {
                        self.leaves_at = Instant::now() + self.patience;
                    }
                    self.held = Some(append);
                }
                Poll::Ready(Some(append)) => {
                    self.held = None;
                    self.sent = append.entries.last().map(|entry| entry.log_id).or(self.sent);
                    return Poll::Ready(Some(append));
                }
                // The session ends; what was held leaves first.
                Poll::Ready(None) => return Poll::Ready(self.held.take()),
                Poll::Pending => break,
            }
        }
        if self.held.is_some() && self.poll_timer(cx).is_ready() {
            return Poll::Ready(self.held.take());
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{CommittedLeaderId, Entry, Vote};
    use openraft::EntryPayload;
    use tokio::sync::mpsc;

    const SHORT: Duration = Duration::from_millis(20);
    /// A test that waits for this does not end.
    const LONG: Duration = Duration::from_secs(3_600);

    fn id(index: u64) -> LogId {
        LogId::new(CommittedLeaderId::new(1), index)
    }

    fn append(prev: u64, last: u64, commit: u64) -> Append {
        let entry = |index| Entry { log_id: id(index), payload: EntryPayload::Blank };
        Append {
            vote: Vote::new(1, 1),
            prev_log_id: Some(id(prev)),
            entries: (prev + 1..=last).map(entry).collect(),
            leader_commit: Some(id(commit)),
        }
    }

    /// What leaves: last index and commit.
    fn seen(append: &Append) -> (u64, u64) {
        let last = append.entries.last().map(|entry| entry.log_id).or(append.prev_log_id);
        (last.unwrap().index, append.leader_commit.unwrap().index)
    }

    fn session(patience: Duration) -> (mpsc::UnboundedSender<Append>, Held<impl Stream<Item = Append> + Unpin>) {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let appends = futures_util::stream::poll_fn(move |cx| receiver.poll_recv(cx));
        (sender, Held::new(appends, patience))
    }

    #[tokio::test]
    async fn entries_carry_the_commit_that_waits() {
        let (leader, follower) = session(LONG);
        leader.send(append(0, 1, 0)).unwrap();
        leader.send(append(1, 1, 1)).unwrap();
        leader.send(append(1, 3, 1)).unwrap();
        drop(leader);
        let left: Vec<_> = follower.map(|append| seen(&append)).collect().await;
        assert_eq!(left, [(1, 0), (3, 1)]);
    }

    #[tokio::test]
    async fn a_commit_without_company_leaves_in_time_and_is_the_newest() {
        let (leader, mut follower) = session(SHORT);
        leader.send(append(0, 3, 0)).unwrap();
        assert_eq!(seen(&follower.next().await.unwrap()), (3, 0));
        let begin = Instant::now();
        leader.send(append(3, 3, 1)).unwrap();
        leader.send(append(3, 3, 3)).unwrap();
        assert_eq!(seen(&follower.next().await.unwrap()), (3, 3));
        assert!(begin.elapsed() >= SHORT);
        // And again, with the timer that has rung.
        leader.send(append(3, 4, 3)).unwrap();
        leader.send(append(4, 4, 4)).unwrap();
        assert_eq!(seen(&follower.next().await.unwrap()), (4, 3));
        assert_eq!(seen(&follower.next().await.unwrap()), (4, 4));
        assert!(begin.elapsed() >= SHORT * 2);
    }

    #[tokio::test]
    async fn a_question_about_the_log_and_the_end_of_a_session_do_not_wait() {
        let (leader, mut follower) = session(LONG);
        leader.send(append(5, 5, 4)).unwrap();
        assert_eq!(seen(&follower.next().await.unwrap()), (5, 4));
        leader.send(append(5, 6, 4)).unwrap();
        leader.send(append(6, 6, 6)).unwrap();
        drop(leader);
        let left: Vec<_> = follower.map(|append| seen(&append)).collect().await;
        assert_eq!(left, [(6, 4), (6, 6)]);
    }
}
