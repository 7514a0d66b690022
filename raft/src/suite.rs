//! openraft's own tests of a log store, run on ours.
//!
//! Left out are `snapshot_meta` and `transfer_snapshot`: they want a snapshot at the last applied
//! entry, which would make an installing follower drop history that is still retained. The rest
//! of the suite runs whole; snapshots have tests of their own in `tests/groups.rs`.

use arqon_proto::{Batch, DecodeError, GroupId, NodeId, ReplicaId};
use arqon_storage::{Identity, Options, Store};
use bytes::Bytes;
use openraft::{
    StorageError,
    testing::log::{StoreBuilder, Suite},
};
use tokio::sync::watch;

use crate::{
    machine::{Machine, Readable, StateMachine},
    store::{InstalledSlot, LogStore},
    types::TypeConfig,
};

struct Nothing;

impl StateMachine for Nothing {
    fn apply(&mut self, _batch: &Batch) -> Bytes {
        Bytes::new()
    }

    fn checkpoint(&self) -> Bytes {
        Bytes::new()
    }

    fn restore(&mut self, _state: &[u8]) -> Result<(), DecodeError> {
        Ok(())
    }
}

struct Builder;

/// Keeps the directory and the store for as long as a test runs.
struct Guard {
    _store: Store,
    _dir: tempfile::TempDir,
}

impl StoreBuilder<TypeConfig, LogStore, Machine, Guard> for Builder {
    async fn build(&self) -> Result<(Guard, LogStore, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("a temp directory");
        let identity = Identity { cluster: "suite".into(), node: NodeId(1) };
        let store = Store::open(dir.path(), identity, Options::default()).expect("an empty directory opens");
        let (log, _) = store.open_log(GroupId(1), ReplicaId(1)).expect("a new log opens");
        let installed = InstalledSlot::default();
        let (readable, _) = watch::channel(Readable::default());
        let machine =
            Machine::open(Box::new(Nothing), log.clone(), installed.clone(), readable).expect("a new machine opens");
        Ok((Guard { _store: store, _dir: dir }, LogStore::new(log, installed), machine))
    }
}

macro_rules! suite {
    ($($name:ident)*) => {$(
        #[tokio::test]
        async fn $name() {
            let (_guard, store, machine) = Builder.build().await.unwrap();
            Suite::<TypeConfig, LogStore, Machine, Builder, Guard>::$name(store, machine).await.unwrap();
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
