//! What every backend must do: the same cases on the disk in memory, on files, and on files
//! through io_uring.

use crate::support::*;
use arqon_proto::{GroupId, Offset, RaftIndex, ReplicaId};
use arqon_storage::{CheckpointKind, LogPosition, OpenError, Options, ReadError};
use bytes::Bytes;

#[test]
fn entries_are_readable_at_once_and_the_same_after_a_restart() {
    for fixture in Fixture::all() {
        let (store, log, recovery) = fixture.open();
        assert!(recovery.created);
        assert_eq!((log.last(), log.purged(), log.flushed()), (None, None, None));
        let batches =
            vec![control(1, 0, "members"), data(1, 1, 3, 200, 10), control(1, 2, "x"), data(1, 3, 2, 50_000, 20)];
        let flushed = append(&log, batches.clone());
        assert_eq!(log.last(), Some(position(1, 3)));
        assert_eq!(
            read_entries(&log, 0, usize::MAX).iter().map(essence).collect::<Vec<_>>(),
            batches.iter().map(essence).collect::<Vec<_>>()
        );
        flushed.recv().unwrap().unwrap();
        assert_eq!(log.flushed(), Some(position(1, 3)));
        assert_eq!(log.next_offset(), Offset(5));
        let before = read_entries(&log, 0, usize::MAX);
        // Somebody may still have the store and the log in hand.
        let (old_store, old) = (store.clone(), log);
        block_on(store.close());

        let (_store, log, recovery) = fixture.open();
        // The directory is another's now.
        assert!(old_store.open_log(GroupId(77), ReplicaId(77)).is_err());
        assert!(old_store.delete_log(old.group(), old.replica()).is_err());
        assert!(old_store.set_placed(ReplicaId(77)).is_err());
        assert_eq!((recovery.created, &recovery.cut, recovery.last), (false, &None, Some(position(1, 3))));
        assert_eq!(read_entries(&log, 0, usize::MAX), before);
        assert_eq!(log.next_offset(), Offset(5));
        assert_eq!(before.iter().map(|batch| batch.header.base_offset.0).collect::<Vec<_>>(), [0, 0, 3, 3]);
        assert_eq!(read_entries(&old, 0, usize::MAX), before);
    }
}

#[test]
fn reads_cross_segments_and_the_border_to_memory() {
    for fixture in Fixture::all() {
        let (_store, log, _) = fixture.open();
        append_many(&log, 1, 300, 700);
        for size_max in [1, 1_000, 5_000, usize::MAX] {
            let all = read_entries(&log, 0, size_max);
            assert_eq!(all.len(), 300);
            let all = read_data(&log, 0, size_max);
            assert_eq!(all.len(), 300);
        }
        for start in 0..300 {
            let one = log.entries(RaftIndex(start)..RaftIndex(start + 1), 1).unwrap();
            assert_eq!(essence(&one[0]), essence(&data(1, start, 1, 700, 0)));
            let one = log.read_data(Offset(start), RaftIndex(300), 1).unwrap();
            assert_eq!(one[0].header.base_offset, Offset(start));
        }
        assert!(log.entries(RaftIndex(300)..RaftIndex(400), 10).unwrap().is_empty());
        assert!(log.entries(RaftIndex(5)..RaftIndex(5), 10).unwrap().is_empty());
        assert!(log.read_data(Offset(300), RaftIndex(300), 10).unwrap().is_empty());
        let through = log.read_data(Offset(0), RaftIndex(10), usize::MAX).unwrap();
        assert_eq!(through.last().unwrap().header.index, RaftIndex(10));
    }
}

/// Large reads go past the page cache, small ones through it; writes go past it all the time. All
/// of them must show the same bytes, also around the blocks that are written more than once.
#[test]
fn large_and_small_reads_and_writes_see_each_other() {
    for fixture in Fixture::all() {
        let options = Options { segment_size_first: 4 << 20, segment_size_max: 8 << 20, ..fixture.options };
        let fixture = Fixture { options, ..fixture };
        let (_store, log, _) = fixture.open();
        let mut expected = Vec::new();
        for step in 0..60_u64 {
            let size = [100, 5_000, 70_000, 600_000, 1_300_000][(step * step % 5) as usize];
            let batches: Vec<_> = (0..1 + step % 3).map(|at| data(1, next_index(&log) + at, 1, size, 0)).collect();
            expected.extend(batches.iter().map(essence));
            append_flushed(&log, batches);
            // The last entries again and again, so that their pages are mapped when more is written.
            let from = (expected.len() as u64).saturating_sub(4);
            for size_max in [1, 1 << 20] {
                let found: Vec<_> = read_entries(&log, from, size_max).iter().map(essence).collect();
                assert_eq!(found, expected[from as usize..], "after step {step}, {size_max} bytes at a time");
            }
        }
        for size_max in [10_000, 300_000, 1 << 20, 8 << 20] {
            assert!(read_data(&log, 0, size_max).iter().map(essence).eq(expected.iter().cloned()), "{size_max}");
        }
    }
}

#[test]
fn reads_stop_at_the_size_and_give_at_least_one() {
    for fixture in Fixture::all() {
        let (_store, log, _) = fixture.open();
        append_many(&log, 1, 40, 1_000);
        let size = 1_000 + 128;
        for (size_max, count) in [(0, 1), (size, 1), (2 * size - 1, 1), (2 * size, 2), (5 * size + 3, 5)] {
            assert_eq!(log.entries(RaftIndex(0)..RaftIndex(40), size_max).unwrap().len(), count);
            assert_eq!(log.entries(RaftIndex(38)..RaftIndex(40), size_max).unwrap().len(), count.min(2));
            assert_eq!(log.read_data(Offset(3), RaftIndex(40), size_max).unwrap().len(), count);
        }
    }
}

#[test]
fn callbacks_run_in_order_and_flushed_follows() {
    for fixture in Fixture::all() {
        let (_store, log, _) = fixture.open();
        let (sender, receiver) = std::sync::mpsc::channel();
        for index in 0..500 {
            let sender = sender.clone();
            let watched = log.clone();
            let on_flushed = move |result: std::io::Result<()>| {
                result.unwrap();
                sender.send((index, watched.flushed().unwrap().index.0)).unwrap();
            };
            log.append(vec![data(1, index, 1, 300, 5)], Box::new(on_flushed)).unwrap();
        }
        for expected in 0..500 {
            let (index, flushed) = receiver.recv().unwrap();
            assert_eq!(index, expected);
            assert!(flushed >= index, "{flushed} is behind {index}");
        }
    }
}

#[test]
fn truncated_entries_are_gone_and_offsets_rewind() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        append_many(&log, 1, 100, 700);
        for keep in [95, 60, 59, 3] {
            block_on(log.truncate_from(RaftIndex(keep))).unwrap();
            assert_eq!(log.last(), Some(position(log.last().unwrap().term.0, keep - 1)));
            assert_eq!(log.flushed(), log.last());
            assert_eq!(log.next_offset(), Offset(keep));
            assert_eq!(read_entries(&log, 0, usize::MAX).len() as u64, keep);
            append_many(&log, 2, 1, 10);
            block_on(log.truncate_from(RaftIndex(keep))).unwrap();
        }
        append_many(&log, 3, 20, 900);
        let expected = read_entries(&log, 0, usize::MAX);
        assert_eq!(expected.len(), 23);
        assert_eq!(expected[3].header.term.0, 3);
        block_on(store.close());
        drop(log);
        let (_store, log, recovery) = fixture.open();
        assert_eq!(recovery.cut, None);
        assert_eq!(read_entries(&log, 0, usize::MAX), expected);
    }
}

#[test]
fn a_truncation_right_behind_appends_keeps_its_order() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        append_many(&log, 1, 5, 100);
        let first = append(&log, (5..60).map(|index| data(1, index, 1, 900, 0)).collect());
        block_on(async {
            log.truncate_from(RaftIndex(7)).await.unwrap();
        });
        first.recv().unwrap().unwrap();
        append_many(&log, 2, 4, 100);
        assert_eq!(log.flushed(), Some(position(2, 10)));
        let expected = read_entries(&log, 0, 100);
        block_on(store.close());
        drop(log);
        let (_store, log, _) = fixture.open();
        assert_eq!(read_entries(&log, 0, 100), expected);
    }
}

#[test]
fn a_log_truncated_to_nothing_takes_entries_again() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        append_many(&log, 1, 80, 700);
        block_on(log.truncate_from(RaftIndex(0))).unwrap();
        assert_eq!((log.last(), log.flushed(), log.next_offset()), (None, None, Offset(0)));
        append_many(&log, 2, 3, 10);
        block_on(store.close());
        drop(log);
        let (_store, log, _) = fixture.open();
        let all = read_entries(&log, 0, usize::MAX);
        assert_eq!(all.iter().map(|batch| batch.header.term.0).collect::<Vec<_>>(), [2, 2, 2]);
    }
}

#[test]
fn a_purge_drops_whole_segments_and_raises_the_log_start() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        append_many(&log, 1, 200, 700);
        for at in [0, 30, 31, 150, 199] {
            block_on(log.purge_through(position(1, at))).unwrap();
            assert_eq!(log.purged(), Some(position(1, at)));
            assert_eq!(log.log_start(), Offset(at + 1));
            assert!(
                matches!(log.entries(RaftIndex(at)..RaftIndex(200), 10), Err(ReadError::Purged { first }) if first.0 == at + 1)
            );
            let out = log.read_data(Offset(at), RaftIndex(200), 10);
            assert!(matches!(out, Err(ReadError::OutOfRange { log_start }) if log_start.0 == at + 1));
            assert_eq!(read_entries(&log, at + 1, usize::MAX).len() as u64, 199 - at);
        }
        append_many(&log, 1, 3, 50);
        block_on(store.close());
        drop(log);
        let (_store, log, recovery) = fixture.open();
        assert_eq!(recovery.cut, None);
        assert_eq!(
            (log.purged(), log.log_start(), log.next_offset()),
            (Some(position(1, 199)), Offset(200), Offset(203))
        );
        assert_eq!(read_data(&log, 200, 1).len(), 3);
        block_on(log.truncate_from(RaftIndex(200))).unwrap();
        assert_eq!(log.last(), Some(position(1, 199)));
    }
}

#[test]
fn an_installed_snapshot_restarts_the_log_behind_it() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        append_many(&log, 1, 50, 700);
        let checkpoints = vec![(CheckpointKind::Newest, Bytes::from("state"))];
        block_on(log.install(position(4, 1_000), Offset(777), checkpoints)).unwrap();
        assert_eq!(
            (log.purged(), log.last(), log.flushed()),
            (Some(position(4, 1_000)), Some(position(4, 1_000)), Some(position(4, 1_000)))
        );
        append_flushed(&log, vec![data(4, 1_001, 2, 30, 0)]);
        block_on(store.close());
        drop(log);
        let (_store, log, _) = fixture.open();
        assert_eq!((log.log_start(), log.next_offset()), (Offset(777), Offset(779)));
        assert_eq!(read_data(&log, 777, 1)[0].header.base_offset, Offset(777));
        assert_eq!(log.checkpoints(), [(CheckpointKind::Newest, position(4, 1_000))]);
        assert_eq!(log.load_checkpoint(CheckpointKind::Newest, position(4, 1_000)).unwrap(), "state");

        block_on(log.purge_through(position(5, 2_000))).unwrap();
        assert_eq!((log.last(), log.log_start()), (Some(position(5, 2_000)), Offset(779)));
    }
}

#[test]
fn a_vote_is_a_barrier_and_is_there_after_a_restart() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        assert_eq!(log.vote(), None);
        let flushed = append(&log, (0..40).map(|index| data(1, index, 1, 2_000, 0)).collect());
        block_on(log.save_vote(Bytes::from("term 2 for node 1"))).unwrap();
        assert!(flushed.try_recv().unwrap().is_ok(), "the vote did not wait for the append before it");
        block_on(log.save_vote(Bytes::from("term 3 for node 2"))).unwrap();
        block_on(store.close());
        drop(log);
        let (_store, log, _) = fixture.open();
        assert_eq!(log.vote().unwrap(), "term 3 for node 2");
    }
}

#[test]
fn the_committed_position_comes_back_and_never_passes_the_end() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        append_many(&log, 1, 20, 100);
        log.save_committed(position(1, 12));
        block_on(store.close());
        drop(log);
        let (store, log, _) = fixture.open();
        assert_eq!(log.committed(), Some(position(1, 12)));
        log.save_committed(position(1, 90));
        assert_eq!(log.committed(), Some(position(1, 19)));
        block_on(store.close());
        drop(log);
        let (_store, log, _) = fixture.open();
        assert_eq!(log.committed(), Some(position(1, 19)));
    }
}

#[test]
fn two_newest_checkpoints_and_the_retention_one_are_kept() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        append_many(&log, 1, 20, 100);
        for index in [3, 5, 9] {
            let bytes = Bytes::from(format!("state at {index}"));
            block_on(log.save_checkpoint(CheckpointKind::Newest, position(1, index), bytes.clone())).unwrap();
            block_on(log.save_checkpoint(CheckpointKind::Retention, position(1, index), bytes)).unwrap();
        }
        let beyond = block_on(log.save_checkpoint(CheckpointKind::Newest, position(1, 20), Bytes::new()));
        assert_eq!(beyond.unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
        block_on(store.close());
        drop(log);
        let (_store, log, _) = fixture.open();
        let mut kept = log.checkpoints();
        kept.sort_by_key(|(kind, position)| (format!("{kind:?}"), position.index));
        let expected = [(CheckpointKind::Newest, 5), (CheckpointKind::Newest, 9), (CheckpointKind::Retention, 9)];
        assert_eq!(kept, expected.map(|(kind, index)| (kind, position(1, index))));
        for (kind, at) in kept {
            assert_eq!(log.load_checkpoint(kind, at).unwrap(), format!("state at {}", at.index));
        }
    }
}

#[test]
fn offsets_are_found_by_time() {
    for fixture in Fixture::all() {
        let (_store, log, _) = fixture.open();
        // Times 1000, 1000, 1010, 1010, ... with a control batch between pairs.
        let mut batches = Vec::new();
        for step in 0..150 {
            let index = step * 3;
            batches.push(data(1, index, 1, 300, 1_000 + step * 10));
            batches.push(control(1, index + 1, "x"));
            batches.push(data(1, index + 2, 1, 300, 1_000 + step * 10));
        }
        append_flushed(&log, batches);
        let end = RaftIndex(u64::MAX - 1);
        assert_eq!(log.offset_at_time(0, end).unwrap(), Offset(0));
        for step in 0..150 {
            assert_eq!(log.offset_at_time(1_000 + step * 10, end).unwrap(), Offset(step * 2));
            assert_eq!(log.offset_at_time(1_000 + step * 10 - 9, end).unwrap(), Offset(step * 2));
        }
        assert_eq!(log.offset_at_time(9_999, end).unwrap(), Offset(300));
        assert_eq!(log.offset_at_time(9_999, RaftIndex(30)).unwrap(), Offset(21));
        assert_eq!(log.offset_at_time(1_400, RaftIndex(30)).unwrap(), Offset(21));
        block_on(log.purge_through(position(1, 100))).unwrap();
        assert_eq!(log.offset_at_time(0, end).unwrap(), log.log_start());
    }
}

#[test]
fn retention_takes_whole_segments_by_time_and_size() {
    for fixture in Fixture::all() {
        let (_store, log, _) = fixture.open();
        append_many(&log, 1, 200, 1_000);
        let everything = Offset(u64::MAX);
        assert_eq!(log.retention_point(1 << 40, Some(1), None, everything), None, "nothing is committed");
        log.save_committed(position(1, 199));
        assert_eq!(log.retention_point(1_000, Some(1_000), None, everything), None);
        assert_eq!(log.retention_point(1 << 40, None, Some(1 << 40), everything), None);
        let (last, start) = log.retention_point(1 << 40, Some(1), None, everything).unwrap();
        assert_eq!(start.0, last.index.0 + 1);
        assert!(last.index.0 > 100 && last.index.0 < 199, "{last}");
        assert_eq!(log.last_segment_boundary(RaftIndex(199)), Some(last));
        let (by_size, _) = log.retention_point(0, None, Some(100_000), everything).unwrap();
        assert!((199 - by_size.index.0) * 1_128 >= 100_000 && by_size.index.0 > 30, "{by_size}");
        let (held, _) = log.retention_point(1 << 40, Some(1), None, Offset(60)).unwrap();
        assert!(held.index.0 < 60);
        block_on(log.purge_through(last)).unwrap();
        assert_eq!(log.log_start(), start);
        assert_eq!(log.retention_point(1 << 40, Some(1), None, everything), None);
    }
}

#[test]
fn many_logs_share_a_store_and_one_can_be_deleted() {
    for fixture in Fixture::all() {
        let store = fixture.store();
        let logs: Vec<_> = (0..20).map(|group| store.open_log(group.into(), 1.into()).unwrap().0).collect();
        for _ in 0..10 {
            let waiting: Vec<_> =
                logs.iter().map(|log| append(log, vec![data(1, next_index(log), 1, 500, 0)])).collect();
            waiting.into_iter().for_each(|receiver| receiver.recv().unwrap().unwrap());
        }
        assert!(matches!(store.open_log(3.into(), 1.into()), Err(OpenError::LogOpen { .. })));
        store.delete_log(3.into(), 1.into()).unwrap();
        assert!(logs[3].append(vec![], Box::new(drop)).is_err());
        assert_eq!(store.logs().unwrap().len(), 19);
        let (fresh, recovery) = store.open_log(3.into(), 1.into()).unwrap();
        assert!(recovery.created && fresh.last().is_none());
        for log in logs.iter().filter(|log| log.group().0 != 3) {
            assert_eq!(read_entries(log, 0, usize::MAX).len(), 10);
        }
        assert_eq!(
            store.metrics().flush_count.load(std::sync::atomic::Ordering::Relaxed),
            store.metrics().flush_latency.count()
        );
    }
}

#[test]
fn a_directory_is_refused_when_it_is_not_ours_to_open() {
    for fixture in Fixture::all() {
        let store = fixture.store();
        let refusal = |result: Result<_, OpenError>| result.err().map(|error| error.to_string()).unwrap();
        assert!(refusal(fixture.try_store()).contains("is in use by another process"));
        block_on(store.close());

        let mut other = identity();
        other.cluster = "prod".to_owned();
        let text = refusal(arqon_storage::Store::open_on(fixture.disk(), other, small_options()));
        assert!(text.contains(r#"belongs to cluster "test", not "prod""#), "{text}");
        let mut other = identity();
        other.node = 9.into();
        let text = refusal(arqon_storage::Store::open_on(fixture.disk(), other, small_options()));
        assert!(text.contains("belongs to node 1, not 9"), "{text}");
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("photo.jpg"), "x").unwrap();
    let error = arqon_storage::Store::open(dir.path(), identity(), small_options()).err().unwrap();
    assert!(error.to_string().contains("photo.jpg"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something was left in a foreign directory");
}

#[test]
#[should_panic(expected = "without gap")]
fn a_gap_in_the_indexes_is_a_broken_rule() {
    let (_store, log, _) = Fixture::memory().open();
    let _ = log.append(vec![data(1, 5, 1, 10, 0)], Box::new(drop));
}

#[test]
fn an_append_beyond_what_may_wait_is_refused_whole() {
    let mut fixture = Fixture::memory();
    fixture.options.pending_size_max = 10_000;
    let (_store, log, _) = fixture.open();
    let big: Vec<_> = (0..200).map(|index| data(1, index, 1, 1_000, 0)).collect();
    log.append(big, Box::new(drop)).unwrap();
    let mut refused = false;
    for index in 200..5_000 {
        refused |= log.append(vec![data(1, next_index(&log), 1, 9_000, 0)], Box::new(drop)).is_err();
        if refused {
            assert!(log.last().unwrap().index.0 < index);
            break;
        }
    }
    assert!(refused, "nothing was refused");
    block_on(log.save_vote(Bytes::from("everything before is flushed now"))).unwrap();
    append_many(&log, 1, 1, 10);
    assert_eq!(log.flushed(), log.last());
    let last: LogPosition = log.last().unwrap();
    assert_eq!(read_entries(&log, 0, usize::MAX).len() as u64, last.index.0 + 1);
}
