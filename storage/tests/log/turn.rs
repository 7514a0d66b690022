//! An append that finds the store at rest may get the turn to make itself durable.

use std::sync::mpsc::{TryRecvError, channel};
use std::time::Duration;

use crate::support::*;
use arqon_proto::{GroupId, ReplicaId};

/// Whatever becomes of a turn, what was appended becomes durable, in order and after it.
#[test]
fn what_waits_for_a_turn_is_durable_when_it_was_run_or_dropped() {
    for fixture in Fixture::all() {
        let (store, log, _) = fixture.open();
        let (other, _) = store.open_log(GroupId(8), ReplicaId(1)).unwrap();
        append_many(&log, 1, 1, 100);
        append_many(&other, 1, 1, 100);
        let mut turn_count = 0;
        for round in 0..200 {
            // The rest that a turn takes.
            std::thread::sleep(Duration::from_millis(1));
            let (sender, receiver) = channel();
            let (first, second) = (next_index(&log), next_index(&log) + 1);
            let say = |index| {
                let sender = sender.clone();
                Box::new(move |result: std::io::Result<()>| {
                    result.unwrap();
                    sender.send(index).unwrap();
                })
            };
            let batch = |index| vec![data(1, index, 1, 100, 1_000 + index)];
            let turn = log.append_or_turn(batch(first), say(first)).unwrap();
            if let Some(turn) = turn {
                turn_count += 1;
                // Nobody else may write it; other logs go on meanwhile, and get no second turn.
                append_many(&other, 1, 1, 100);
                assert!(other.append_or_turn(Vec::new(), Box::new(|_| ())).unwrap().is_none());
                log.append(batch(second), say(second)).unwrap();
                assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
                if round % 2 == 0 {
                    turn.run()
                } else {
                    drop(turn)
                }
                assert_eq!((receiver.recv(), receiver.recv()), (Ok(first), Ok(second)));
            } else {
                assert_eq!(receiver.recv(), Ok(first));
            }
            assert!(log.flushed() >= Some(position(1, first)));
        }
        assert!(turn_count > 0, "the store never was at rest");
        let count = next_index(&log);
        drop((log, other));
        block_on(store.close());
        let (_store, log, _) = fixture.open();
        assert_eq!(read_entries(&log, 0, usize::MAX).len() as u64, count);
    }
}
