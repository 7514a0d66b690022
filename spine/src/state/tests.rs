//! The state against simple models, and its bytes.

use std::collections::{BTreeMap, BTreeSet};

use arqon_proto::{
    Header, Offset, RaftIndex, Term, encode_stamps, limits,
    wire::{
        ControlRecord, Duplicate, JobScopeState, LeaseState, OffsetRange, ProducerState, QueueAck, QueueBury,
        QueueCommand, QueueDelete, QueueExpire, QueueGrant, QueueNack, QueueRenew, QueueState, StampSource, Stamps,
        queue_command,
    },
};
use proptest::prelude::*;

use super::*;

const GROUP: &str = "workers";

fn data(state: &PartitionState, producer: u8, epoch: u32, base_sequence: u64, count: u32, offset: u64) -> Batch {
    let mut header = Header::new(BatchKind::Data);
    header.producer_id = [producer; 16];
    header.producer_epoch = epoch;
    header.base_sequence = base_sequence;
    header.record_count = count;
    header.base_offset = Offset(offset);
    header.time_ms = state.last_time_ms() + 1;
    header.term = Term(1);
    header.index = RaftIndex(offset);
    Batch { header, stamps: Bytes::new(), records: Bytes::new() }
}

fn control(commands: Vec<queue_command::Command>) -> Batch {
    let queue = commands.into_iter().map(|command| QueueCommand { group: GROUP.into(), command: Some(command) });
    Batch::internal(
        BatchKind::Control,
        ControlRecord { queue: queue.collect(), log_start: None }.encode_to_vec().into(),
    )
}

fn run(state: &mut PartitionState, command: queue_command::Command) -> Vec<OffsetRange> {
    let outcome = QueueOutcome::decode(state.apply(&control(vec![command])).unwrap()).unwrap();
    outcome.commands.into_iter().next().unwrap().lost
}

fn grant(offsets: impl IntoIterator<Item = (u64, u32)>) -> queue_command::Command {
    let holder = QueueGrant { worker: "w".into(), lease_ms: 1_000, ..Default::default() };
    queue_command::Command::Grant(QueueGrant { ranges: ranges_of(offsets), ..holder })
}

fn check(state: &PartitionState, in_flight: &InFlight, batch: &Batch) -> Result<(), Refused> {
    in_flight.check(state, &batch.header, None)
}

fn restored(state: &PartitionState) -> PartitionState {
    PartitionState::restore(&state.checkpoint()).unwrap()
}

#[test]
fn a_queue_command_of_a_newer_program_changes_nothing_and_is_not_passed_over() {
    let mut state = PartitionState::default();
    state.apply(&data(&state, 1, 0, 0, 2, 0)).unwrap();
    run(&mut state, grant([(0, 1)]));
    let before = state.checkpoint();
    let known = QueueCommand { group: GROUP.into(), command: Some(grant([(1, 1)])) };
    let newer = QueueCommand { group: GROUP.into(), command: None };
    let record = ControlRecord { queue: vec![known, newer], log_start: None };
    let mut batch = Batch::internal(BatchKind::Control, record.encode_to_vec().into());
    batch.header.time_ms = state.last_time_ms() + 1;
    assert_eq!(state.apply(&batch), Err(DecodeError::Unknown { what: "queue command" }));
    assert_eq!(state.checkpoint(), before);
}

#[test]
fn a_resent_batch_is_a_duplicate_with_its_offsets_and_a_gap_is_refused() {
    let mut state = PartitionState::default();
    let nothing = InFlight::default();
    assert_eq!(check(&state, &nothing, &data(&state, 1, 0, 3, 1, 0)), Err(Refused::UnknownProducer));
    let first = data(&state, 1, 0, 0, 3, 100);
    check(&state, &nothing, &first).unwrap();
    state.apply(&first).unwrap();
    for state in [restored(&state), state] {
        let Err(Refused::Duplicate(known)) = check(&state, &nothing, &data(&state, 1, 0, 1, 4, 0)) else { panic!() };
        let wanted = [(1, 101), (2, 102)].map(|(sequence, offset)| Duplicate { sequence, offset: Some(offset) });
        assert_eq!(known, wanted);
        assert_eq!(check(&state, &nothing, &data(&state, 1, 0, 4, 1, 0)), Err(Refused::OutOfOrder { expected: 3 }));
        assert_eq!(check(&state, &nothing, &data(&state, 1, 0, 3, 1, 0)), Ok(()));
        let overflow = data(&state, 1, 0, u64::MAX, 1, 0);
        assert_eq!(check(&state, &nothing, &overflow), Err(Refused::SequenceOverflow));
    }
}

#[test]
fn offsets_of_the_last_five_batches_are_remembered() {
    let mut state = PartitionState::default();
    for at in 0..7u64 {
        state.apply(&data(&state, 1, 0, at, 1, at * 10)).unwrap();
    }
    let Err(Refused::Duplicate(known)) = check(&state, &InFlight::default(), &data(&state, 1, 0, 0, 7, 0)) else {
        panic!()
    };
    let offsets: Vec<_> = known.iter().map(|known| known.offset).collect();
    assert_eq!(offsets, [None, None, Some(20), Some(30), Some(40), Some(50), Some(60)]);
}

#[test]
fn a_new_epoch_starts_at_zero_and_fences_the_old_one() {
    let mut state = PartitionState::default();
    let nothing = InFlight::default();
    state.apply(&data(&state, 1, 4, 0, 2, 0)).unwrap();
    assert_eq!(check(&state, &nothing, &data(&state, 1, 5, 2, 1, 2)), Err(Refused::OutOfOrder { expected: 0 }));
    state.apply(&data(&state, 1, 5, 0, 1, 2)).unwrap();
    assert_eq!(check(&state, &nothing, &data(&state, 1, 4, 2, 1, 3)), Err(Refused::Fenced { epoch: 5 }));
    assert_eq!(check(&state, &nothing, &data(&state, 1, 5, 1, 1, 3)), Ok(()));
}

#[test]
fn a_producer_is_forgotten_after_silence_by_batch_times_or_by_too_many_others() {
    let mut state = PartitionState::default();
    state.apply(&data(&state, 1, 0, 0, 1, 0)).unwrap();
    let mut later = data(&state, 2, 0, 0, 1, 1);
    later.header.time_ms += limits::PRODUCER_EXPIRY_MS;
    state.apply(&later).unwrap();
    let resent = data(&state, 1, 0, 1, 1, 2);
    assert_eq!(check(&state, &InFlight::default(), &resent), Err(Refused::UnknownProducer));

    let mut state = PartitionState::default();
    for at in 0..=limits::PRODUCER_COUNT_MAX as u64 {
        let mut batch = data(&state, 0, 0, 0, 1, at);
        batch.header.producer_id[..8].copy_from_slice(&(at + 1).to_le_bytes());
        state.apply(&batch).unwrap();
        if at == 5 {
            // The second producer is used again, so the first and the third are older.
            batch.header.producer_id[..8].copy_from_slice(&2u64.to_le_bytes());
            batch.header.base_sequence = 1;
            state.apply(&batch).unwrap();
        }
    }
    let next_of = |id: u64| {
        let mut batch = data(&state, 0, 0, 2, 1, 0);
        batch.header.producer_id[..8].copy_from_slice(&id.to_le_bytes());
        check(&state, &InFlight::default(), &batch)
    };
    assert_eq!(next_of(1), Err(Refused::UnknownProducer));
    assert_eq!(next_of(2), Ok(()));
    assert_eq!(next_of(3), Err(Refused::OutOfOrder { expected: 1 }));
}

#[test]
#[should_panic(expected = "is a duplicate")]
fn a_duplicate_that_was_committed_stops_the_program() {
    let mut state = PartitionState::default();
    state.apply(&data(&state, 1, 0, 0, 2, 0)).unwrap();
    state.apply(&data(&state, 1, 0, 1, 1, 2)).unwrap();
}

#[test]
fn batches_in_flight_count_as_written_until_they_are_applied_or_withdrawn() {
    let mut state = PartitionState::default();
    let mut in_flight = InFlight::default();
    in_flight.begin(Term(1), Offset(0));
    let [a, b] = [data(&state, 1, 0, 0, 2, 0), data(&state, 1, 0, 2, 2, 2)];
    in_flight.admit(&state, &a.header, None, 5).unwrap();
    let admission = in_flight.admit(&state, &b.header, None, 3).unwrap();
    assert_eq!((admission.time_ms, admission.base_offset), (5, Offset(2)));
    assert_eq!(check(&state, &in_flight, &a), Err(Refused::InFlight));
    in_flight.withdraw(&b.header, None, admission);
    assert_eq!(check(&state, &in_flight, &b), Ok(()));
    in_flight.admit(&state, &b.header, None, 3).unwrap();
    state.apply(&a).unwrap();
    in_flight.applied(&a);
    assert!(matches!(check(&state, &in_flight, &a), Err(Refused::Duplicate(_))));
    assert_eq!(check(&state, &in_flight, &b), Err(Refused::InFlight));
    // Another leader's entry of a newer term: b is gone, and may be sent again.
    let mut other = data(&state, 2, 0, 0, 1, 2);
    other.header.term = Term(2);
    state.apply(&other).unwrap();
    in_flight.applied(&other);
    in_flight.begin(Term(3), Offset(3));
    assert_eq!(check(&state, &in_flight, &b), Ok(()));
}

fn results(offsets: &[u64], acked_floor: u64) -> (Batch, Stamps) {
    let source = StampSource { topic: "a.jobs".into(), group: GROUP.into(), acked_floor, ..Default::default() };
    let mut header = Header::new(BatchKind::Data);
    header.record_count = offsets.len() as u32;
    header.term = Term(1);
    let mut batch = Batch { header, stamps: Bytes::new(), records: Bytes::new() };
    batch.set_stamps(encode_stamps(offsets.iter().map(|offset| (source.clone(), *offset, 1))));
    let stamps = decode_stamps(&batch.stamps, batch.header.record_count).unwrap().unwrap();
    (batch, stamps)
}

#[test]
fn a_job_has_one_result_below_the_floor_and_above_it() {
    let mut state = PartitionState::default();
    let mut in_flight = InFlight::default();
    in_flight.begin(Term(1), Offset(0));
    let check = |state: &PartitionState, in_flight: &InFlight, offsets: &[u64]| {
        let (batch, stamps) = results(offsets, 0);
        in_flight.check(state, &batch.header, Some(&stamps))
    };
    let (batch, stamps) = results(&[7, 3], 2);
    in_flight.admit(&state, &batch.header, Some(&stamps), 1).unwrap();
    assert_eq!(check(&state, &in_flight, &[3, 4]), Err(Refused::InFlight));
    assert_eq!(check(&state, &in_flight, &[1]), Err(Refused::InFlight), "the floor in flight counts");
    assert_eq!(check(&state, &in_flight, &[4]), Ok(()));
    state.apply(&batch).unwrap();
    in_flight.applied(&batch);
    for state in [restored(&state), state] {
        let Err(Refused::Duplicate(known)) = check(&state, &in_flight, &[1, 3, 4, 7]) else { panic!() };
        assert_eq!(known.iter().map(|known| known.sequence).collect::<Vec<_>>(), [1, 3, 7]);
        assert_eq!(check(&state, &in_flight, &[2, 4]), Ok(()));
    }
}

#[test]
fn a_group_starts_where_it_is_first_granted_and_passes_over_what_is_gone() {
    use queue_command::Command::Ack;
    let mut state = PartitionState::default();
    let stale = Ack(QueueAck { ranges: ranges_of([(40, 1)]) });
    assert_eq!(run(&mut state, stale), ranges_of([(40, 1)]));
    assert!(state.queue(GROUP).is_none());
    assert!(run(&mut state, grant([(50, 1), (51, 1), (60, 1)])).is_empty());
    let queue = state.queue(GROUP).unwrap();
    assert_eq!((queue.floor(), queue.next(), queue.leases().len()), (50, 61, 3));
    run(&mut state, Ack(QueueAck { ranges: ranges_of([(50, 1), (51, 1)]) }));
    assert_eq!(state.queue(GROUP).unwrap().floor(), 60);
}

#[test]
fn bytes_that_no_checkpoint_made_are_errors() {
    let whole = PartitionState {
        last_time_ms: 3,
        ..PartitionState::restore(
            &wire::PartitionState {
                queues: vec![QueueState { group: GROUP.into(), next: 5, floor: 2, ..Default::default() }],
                ..Default::default()
            }
            .encode_to_vec(),
        )
        .unwrap()
    };
    assert_eq!(restored(&whole).checkpoint(), whole.checkpoint());
    let broken = [
        wire::PartitionState { producers: vec![ProducerState::default()], ..Default::default() },
        wire::PartitionState { job_scopes: vec![JobScopeState::default(); 2], ..Default::default() },
        wire::PartitionState { queues: vec![QueueState::default(); 2], ..Default::default() },
        wire::PartitionState {
            queues: vec![QueueState {
                leases: vec![LeaseState { offset: 9, ..Default::default() }],
                ..Default::default()
            }],
            ..Default::default()
        },
        wire::PartitionState {
            queues: vec![QueueState { settled: Bytes::from_static(b"junk"), ..Default::default() }],
            ..Default::default()
        },
    ];
    for state in broken {
        assert!(PartitionState::restore(&state.encode_to_vec()).is_err(), "{state:?}");
    }
    assert!(PartitionState::restore(b"\xff\xff\xff").is_err());
}

/// What a job may be, told in the simplest way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Model {
    Leased(u32),
    Pending(u32),
    Settled,
}

#[derive(Clone, Debug)]
enum Step {
    GrantNew(u64),
    GrantAgain(prop::sample::Index),
    Ack(u64, u32),
    Nack(u64, u32),
    Renew(u64, u32),
    Expire(u64, u32),
    Bury(u64, u32),
    Delete,
    Data(u8, u32),
    Restart,
}

fn any_step() -> impl Strategy<Value = Step> {
    let (offset, attempt) = (0u64..30, 1u32..4);
    prop_oneof![
        3 => (1u64..5).prop_map(Step::GrantNew),
        3 => any::<prop::sample::Index>().prop_map(Step::GrantAgain),
        4 => (offset.clone(), attempt.clone()).prop_map(|(o, a)| Step::Ack(o, a)),
        2 => (offset.clone(), attempt.clone()).prop_map(|(o, a)| Step::Nack(o, a)),
        1 => (offset.clone(), attempt.clone()).prop_map(|(o, a)| Step::Renew(o, a)),
        2 => (offset.clone(), attempt.clone()).prop_map(|(o, a)| Step::Expire(o, a)),
        1 => (offset, attempt).prop_map(|(o, a)| Step::Bury(o, a)),
        1 => (1u8..4, 1u32..4).prop_map(|(producer, count)| Step::Data(producer, count)),
        1 => Just(Step::Restart),
        1 => Just(Step::Delete),
    ]
}

/// The command of a step and what the model says of it.
fn take_step(step: &Step, model: &mut BTreeMap<u64, Model>) -> Option<(queue_command::Command, bool)> {
    use queue_command::Command::{Ack, Bury, Delete, Expire, Nack, Renew};
    let ranges = |offset: u64, attempt: u32| ranges_of([(offset, attempt)]);
    let before = model.clone();
    let mut change = |offset: u64, from: Model, to: Model| {
        let fits = model.get(&offset) == Some(&from);
        if fits {
            model.insert(offset, to);
        }
        fits
    };
    Some(match *step {
        Step::GrantNew(count) => {
            let next = model.last_key_value().map_or(0, |(offset, _)| offset + 1);
            let offsets = next..next + count;
            model.extend(offsets.clone().map(|offset| (offset, Model::Leased(1))));
            (grant(offsets.map(|offset| (offset, 1))), true)
        }
        Step::GrantAgain(ref at) => {
            let pending: Vec<_> = before
                .iter()
                .filter_map(
                    |(offset, job)| if let Model::Pending(attempt) = job { Some((*offset, *attempt)) } else { None },
                )
                .collect();
            if pending.is_empty() {
                return None;
            }
            let (offset, attempt) = pending[at.index(pending.len())];
            change(offset, Model::Pending(attempt), Model::Leased(attempt + 1));
            (grant([(offset, attempt + 1)]), true)
        }
        Step::Ack(offset, attempt) => {
            let ack = Ack(QueueAck { ranges: ranges(offset, attempt) });
            (ack, change(offset, Model::Leased(attempt), Model::Settled))
        }
        Step::Nack(offset, attempt) => {
            let nack = Nack(QueueNack { ranges: ranges(offset, attempt), delay_ms: 7 });
            (nack, change(offset, Model::Leased(attempt), Model::Pending(attempt)))
        }
        Step::Renew(offset, attempt) => {
            let renew = Renew(QueueRenew { ranges: ranges(offset, attempt) });
            (renew, change(offset, Model::Leased(attempt), Model::Leased(attempt)))
        }
        Step::Expire(offset, attempt) => {
            let expire = Expire(QueueExpire { ranges: ranges(offset, attempt) });
            (expire, change(offset, Model::Leased(attempt), Model::Pending(attempt)))
        }
        Step::Bury(offset, attempt) => {
            let bury = Bury(QueueBury { ranges: ranges(offset, attempt) });
            (bury, change(offset, Model::Pending(attempt), Model::Settled))
        }
        Step::Delete => {
            model.clear();
            (Delete(QueueDelete {}), true)
        }
        Step::Data(..) | Step::Restart => return None,
    })
}

fn compare(queue: &Queue, model: &BTreeMap<u64, Model>) {
    let of = |wanted: fn(&Model) -> Option<u32>| -> BTreeMap<u64, u32> {
        model.iter().filter_map(|(offset, job)| wanted(job).map(|attempt| (*offset, attempt))).collect()
    };
    let leased = of(|job| if let Model::Leased(attempt) = job { Some(*attempt) } else { None });
    let pending = of(|job| if let Model::Pending(attempt) = job { Some(*attempt) } else { None });
    let leases: BTreeMap<_, _> = queue.leases().each().map(|(offset, lease)| (offset, lease.attempt)).collect();
    let waiting: BTreeMap<_, _> = queue.pending().iter().map(|(offset, job)| (*offset, job.attempt)).collect();
    assert_eq!((leases, waiting), (leased, pending));
    let unsettled: BTreeSet<_> =
        model.iter().filter(|(_, job)| **job != Model::Settled).map(|(offset, _)| *offset).collect();
    let next = model.last_key_value().map_or(0, |(offset, _)| offset + 1);
    assert_eq!(queue.next(), next);
    assert_eq!(queue.floor(), unsettled.first().copied().unwrap_or(next));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Jobs go the ways of the drawing in queue.rs and no other, attempts only grow, the floor
    /// never goes back, and a replica that restarts anywhere has the same bytes as one that
    /// does not.
    #[test]
    fn queues_follow_the_model(steps in prop::collection::vec(any_step(), 1..80)) {
        let mut state = PartitionState::default();
        let mut other = PartitionState::default();
        let mut model = BTreeMap::new();
        let mut sequences = BTreeMap::new();
        let (mut floor, mut offset) = (0, 0);
        for step in &steps {
            match step {
                Step::Restart => other = restored(&other),
                Step::Data(producer, count) => {
                    let sequence = sequences.entry(*producer).or_insert(0);
                    let batch = data(&state, *producer, 0, *sequence, *count, offset);
                    *sequence += u64::from(*count);
                    offset += u64::from(*count);
                    state.apply(&batch).unwrap();
                    other.apply(&batch).unwrap();
                }
                step => {
                    let Some((command, takes_effect)) = take_step(step, &mut model) else { continue };
                    let lost = run(&mut state, command.clone());
                    prop_assert_eq!(lost.is_empty(), takes_effect, "{:?}", step);
                    prop_assert_eq!(run(&mut other, command), lost);
                }
            }
            if matches!(step, Step::Delete) {
                prop_assert!(state.queue(GROUP).is_none());
                floor = 0;
            }
            if let Some(queue) = state.queue(GROUP) {
                compare(queue, &model);
                prop_assert!(queue.floor() >= floor);
                floor = queue.floor();
            }
            prop_assert_eq!(state.checkpoint(), other.checkpoint());
        }
    }

    /// Whatever a client sends in whatever order, the log holds every sequence at most once and
    /// without a gap, because a batch is proposed only if the check lets it.
    #[test]
    fn what_the_check_lets_through_never_stops_the_program(
        sends in prop::collection::vec((0u8..3, 0u32..3, 0u64..12, 1u32..4, 0usize..3), 1..60),
    ) {
        let mut state = PartitionState::default();
        let mut in_flight = InFlight::default();
        in_flight.begin(Term(1), Offset(0));
        let mut line = std::collections::VecDeque::new();
        let mut written: BTreeMap<(u8, u32), Vec<u64>> = BTreeMap::new();
        let mut next_offset = 0;
        for (producer, epoch, sequence, count, applied_count) in sends {
            let batch = data(&state, producer + 1, epoch, sequence, count, next_offset);
            if in_flight.admit(&state, &batch.header, None, 0).is_ok() {
                next_offset += u64::from(count);
                written.entry((producer, epoch)).or_default().extend(sequence..sequence + u64::from(count));
                line.push_back(batch);
            }
            for batch in line.drain(..applied_count.min(line.len())) {
                state.apply(&batch).unwrap();
                in_flight.applied(&batch);
            }
        }
        for sequences in written.values() {
            prop_assert!(sequences.iter().copied().eq(0..sequences.len() as u64), "{:?}", sequences);
        }
    }
}
