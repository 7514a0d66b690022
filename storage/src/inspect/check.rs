//! Whether the segments of an inspected log make one log, without gaps and with every byte as written.

use std::ops::ControlFlow;

use arqon_proto::{BatchKind, Header, RaftIndex, Term};

use super::{BatchInspection, LogInspection, SegmentInspection};

/// What the segments of one log add up to.
#[derive(Debug, Default)]
pub struct LogCheck {
    /// Batches whose place is right.
    pub batch_count: u64,
    /// Records of the data batches among them that are whole.
    pub record_count: u64,
    /// Bytes of the whole batches.
    pub size: u64,
    /// First and last entry of each term, in order.
    pub terms: Vec<TermSpan>,
    /// What is wrong, in the order of the log.
    pub faults: Vec<Fault>,
}

/// The entries of one term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TermSpan {
    /// The term.
    pub term: Term,
    /// Its first entry that is kept.
    pub first: RaftIndex,
    /// Its last entry.
    pub last: RaftIndex,
}

/// Entries that are missing or damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// File in which it shows, below the data directory.
    pub path: String,
    /// First bad byte in that file, where there is one.
    pub at: Option<u64>,
    /// First entry that is affected.
    pub first: RaftIndex,
    /// Last one that is known to be.
    pub last: RaftIndex,
    /// What is wrong.
    pub reason: String,
    /// Whether promised data is affected. Otherwise it is a torn tail, which the next start cuts off,
    /// or in entries that are purged.
    pub is_damage: bool,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path)?;
        if let Some(at) = self.at {
            write!(f, " at byte {at}")?;
        }
        match self.last.0.checked_sub(self.first.0) {
            None => write!(f, ", before entry {}", self.first)?,
            Some(0) => write!(f, ", entry {}", self.first)?,
            Some(_) => write!(f, ", entries {} to {}", self.first, self.last)?,
        }
        write!(f, ": {}", self.reason)
    }
}

/// Where the log stands while its segments are followed.
struct Follower<'a> {
    log: &'a LogInspection,
    /// Index that the next entry must have, and chain value that it must carry, once known.
    next: u64,
    chain: Option<u64>,
    /// The bad byte at which the segment before ended.
    broken: Option<(String, u64, String)>,
    check: LogCheck,
}

impl LogInspection {
    /// Follows the log through its segments; `visit` sees every batch on the way, with the place
    /// of its segment among [`LogInspection::segments`], and may end the check there. Stale
    /// segments are passed over.
    pub fn check(&self, mut visit: impl FnMut(usize, &BatchInspection) -> ControlFlow<()>) -> LogCheck {
        let start = self.start();
        let mut follower = Follower { log: self, next: start, chain: None, broken: None, check: LogCheck::default() };
        let valid = || self.segments.iter().enumerate().filter(|(_, segment)| !segment.is_stale);
        let first = valid().next().map(|(number, _)| number);
        for (number, segment) in valid() {
            // The first one may begin with entries that are purged.
            if Some(number) == first && segment.base.0 < start {
                follower.next = segment.base.0;
            }
            follower.enter(segment);
            for batch in segment.batches() {
                follower.take(segment, &batch);
                if visit(number, &batch).is_break() {
                    return follower.check;
                }
            }
        }
        follower.end();
        follower.check
    }

    /// First index that is kept.
    fn start(&self) -> u64 {
        self.purged.map_or(0, |purged| purged.index.0 + 1)
    }
}

impl Follower<'_> {
    fn fault(&mut self, path: &str, at: Option<u64>, entries: (u64, u64), reason: String) {
        let (first, last) = entries;
        let marked = self.log.marked_next_index.unwrap_or(0);
        let is_damage = first < marked && last >= self.log.start();
        let (path, first, last) = (path.to_owned(), RaftIndex(first), RaftIndex(last));
        self.check.faults.push(Fault { path, at, first, last, reason, is_damage });
    }

    /// Goes on in a segment, which must begin where the log stands.
    fn enter(&mut self, segment: &SegmentInspection) {
        let (base, _, chain) = segment.base;
        let broken = self.broken.take();
        if base > self.next {
            let entries = (self.next, base - 1);
            match broken {
                Some((path, at, reason)) => self.fault(&path, Some(at), entries, reason),
                None => self.fault(&segment.path, None, entries, "missing before this segment".to_owned()),
            }
        } else if base < self.next {
            let reason = format!("the segment begins with entry {base}, which another one holds");
            self.fault(&segment.path, None, (base, self.next - 1), reason);
        } else if self.chain.is_some_and(|before| before != chain) {
            let reason = "the segment does not continue the chain of the one before".to_owned();
            self.fault(&segment.path, Some(0), (base, base), reason);
        }
        (self.next, self.chain) = (base, Some(chain));
    }

    fn take(&mut self, segment: &SegmentInspection, batch: &BatchInspection) {
        let header = match batch {
            BatchInspection::FirstBadByte { at, reason } => {
                self.broken = Some((segment.path.clone(), *at, reason.clone()));
                return;
            }
            BatchInspection::Whole { batch, .. } => {
                self.check.size += batch.header.batch_size() as u64;
                if batch.header.kind == BatchKind::Data {
                    self.check.record_count += u64::from(batch.header.record_count);
                }
                &batch.header
            }
            BatchInspection::DamagedRecords { at, header, reason } => {
                self.fault(&segment.path, Some(*at), (header.index.0, header.index.0), reason.clone());
                header
            }
        };
        self.check.batch_count += 1;
        self.next = header.index.0 + 1;
        self.chain = Some(Header::chain_value(&header.encode()));
        match self.check.terms.last_mut() {
            Some(span) if span.term == header.term => span.last = header.index,
            _ => self.check.terms.push(TermSpan { term: header.term, first: header.index, last: header.index }),
        }
    }

    /// Compares the end of the log with what is promised.
    fn end(&mut self) {
        let tail = self.log.tail.filter(|tail| !self.log.segments.iter().any(|segment| segment.base.0 == tail.0));
        let marked = self.log.marked_next_index.unwrap_or(0);
        let broken = self.broken.take();
        if let Some(tail) = tail {
            let entries = (self.next, tail.0.max(self.next));
            let reason = format!("the segment that begins with entry {tail} is missing");
            self.fault(&self.log.dir.clone(), None, entries, reason);
            // It held acknowledged entries, or might have: no mark says how many.
            if let Some(fault) = self.check.faults.last_mut() {
                fault.is_damage = true;
            }
        }
        let last = marked.max(self.next + 1) - 1;
        match broken {
            Some((path, at, reason)) => self.fault(&path, Some(at), (self.next, last), reason),
            None if self.next < marked => {
                let reason = "the segments end before the durable mark".to_owned();
                self.fault(&self.log.dir.clone(), None, (self.next, last), reason);
            }
            None => {}
        }
    }
}
