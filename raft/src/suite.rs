//! openraft's own tests of a log store, run on ours.
//!
//! Left out are `snapshot_meta` and `transfer_snapshot`: they want a snapshot at the last applied
//! entry, which would make an installing follower drop history that is still retained. The rest
//! of the suite runs whole; snapshots have tests of their own in `tests/groups.rs`.
//!
//! Many of its tests begin a log at index 1, which Raft never does and our log refuses. The
//! adapter here fills the entries before with blanks and hides them from reads.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use arqon_proto::{Batch, DecodeError, GroupId, NodeId, ReplicaId};
use arqon_storage::{Identity, Options, Store};
use bytes::Bytes;
use futures_util::Stream;
use openraft::{
    EntryPayload, StorageError,
    storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage},
    testing::log::{StoreBuilder, Suite},
};
use tokio::sync::watch;

use crate::{
    machine::{Machine, Readable, StateMachine},
    store::{InstalledSlot, LogStore},
    types::{CommittedLeaderId, Entry, LogId, TypeConfig, Vote},
};

struct Nothing;

impl StateMachine for Nothing {
    fn apply(&mut self, _batch: &Batch) -> Result<Bytes, DecodeError> {
        Ok(Bytes::new())
    }

    fn checkpoint(&self) -> Bytes {
        Bytes::new()
    }

    fn restore(&mut self, _state: &[u8]) -> Result<(), DecodeError> {
        Ok(())
    }

    fn fresh(&self) -> Box<dyn StateMachine> {
        Box::new(Nothing)
    }
}

#[derive(Clone)]
struct Adapter {
    store: LogStore,
    /// Entries below are the adapter's own.
    first: Arc<AtomicU64>,
}

impl Adapter {
    fn visible(&self, range: &impl RangeBounds<u64>) -> (Bound<u64>, Bound<u64>) {
        let first = self.first.load(Relaxed);
        let start = match range.start_bound() {
            Bound::Included(start) => (*start).max(first),
            Bound::Excluded(start) => (start + 1).max(first),
            Bound::Unbounded => first,
        };
        let end = range.end_bound().cloned();
        let is_empty = match end {
            Bound::Included(end) => end < start,
            Bound::Excluded(end) => end <= start,
            Bound::Unbounded => false,
        };
        (Bound::Included(start), if is_empty { Bound::Excluded(start) } else { end })
    }
}

impl RaftLogReader<TypeConfig> for Adapter {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let range = self.visible(&range);
        self.store.try_get_log_entries(range).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        self.store.read_vote().await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.store.limited_get_log_entries(start.max(self.first.load(Relaxed)), end).await
    }

    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + Send
    where
        RB: RangeBounds<u64> + Clone + Debug + Send,
    {
        let range = self.visible(&range);
        self.store.entries_stream(range).await
    }
}

impl RaftLogStorage<TypeConfig> for Adapter {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        self.store.get_log_state().await
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.store.save_vote(vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.store.save_committed(committed).await
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        self.store.read_committed().await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let mut entries: Vec<Entry> = entries.into_iter().collect();
        let is_empty = self.store.get_log_state().await?.last_log_id.is_none();
        if let (true, Some(first)) = (is_empty, entries.first().map(|entry| entry.log_id.index())) {
            let blank =
                |index| Entry { log_id: LogId::new(CommittedLeaderId::new(0), index), payload: EntryPayload::Blank };
            self.first.store(first, Relaxed);
            entries.splice(0..0, (0..first).map(blank));
        }
        self.store.append(entries, callback).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        self.store.truncate_after(last).await
    }

    async fn purge(&mut self, through: LogId) -> Result<(), io::Error> {
        self.store.purge(through).await
    }
}

struct Builder;

/// Keeps the directory and the store for as long as a test runs.
struct Guard {
    _store: Store,
    _dir: tempfile::TempDir,
}

impl StoreBuilder<TypeConfig, Adapter, Machine, Guard> for Builder {
    async fn build(&self) -> Result<(Guard, Adapter, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("a temp directory");
        let identity = Identity { cluster: "suite".into(), node: NodeId(1) };
        let store = Store::open(dir.path(), identity, Options::default()).expect("an empty directory opens");
        let (log, _) = store.open_log(GroupId(1), ReplicaId(1)).expect("a new log opens");
        let installed = InstalledSlot::default();
        let (readable, _) = watch::channel(Readable::default());
        let machine =
            Machine::open(Box::new(Nothing), log.clone(), installed.clone(), readable).expect("a new machine opens");
        let store_handle =
            Adapter { store: LogStore::new(log, installed, true, Arc::default()), first: Arc::default() };
        Ok((Guard { _store: store, _dir: dir }, store_handle, machine))
    }
}

macro_rules! suite {
    ($($name:ident)*) => {$(
        #[tokio::test]
        async fn $name() {
            let (_guard, store, machine) = Builder.build().await.unwrap();
            Suite::<TypeConfig, Adapter, Machine, Builder, Guard>::$name(store, machine).await.unwrap();
        }
    )*};
}

suite! {
    last_membership_in_log_initial
    last_membership_in_log
    last_membership_in_log_multi_step
    get_membership_initial
    get_membership_from_log_and_empty_sm
    get_membership_from_empty_log_and_sm
    get_membership_from_log_le_sm_last_applied
    get_membership_from_log_gt_sm_last_applied_1
    get_membership_from_log_gt_sm_last_applied_2
    get_initial_state_without_init
    get_initial_state_membership_from_empty_log_and_sm
    get_initial_state_membership_from_sm_inlog_is_smaller
    get_initial_state_membership_from_log_insm_is_smaller
    get_initial_state_with_state
    get_initial_state_last_log_gt_sm
    get_initial_state_last_log_lt_sm
    get_initial_state_inverted_log_order
    get_initial_state_conflict_at_same_index
    get_initial_state_log_ids
    get_initial_state_re_apply_committed
    save_vote
    get_log_entries
    limited_get_log_entries
    leader_bounded_stream
    entries_stream
    try_get_log_entry
    log_reader_reads_new_entries
    initial_logs
    get_log_state
    get_log_id
    last_id_in_log
    last_applied_state
    purge_logs_upto_0
    purge_logs_upto_5
    purge_logs_upto_20
    delete_logs_after_11
    delete_logs_after_5
    delete_logs_after_0
    delete_logs_after_none
    append_to_log
    snapshot_meta_optional
    apply_single
    apply_multiple
}
