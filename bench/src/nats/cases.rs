//! What is compared, with which settings, and what should come out.

use super::{publish, server::Sync};

/// Most bytes in flight; a window of large messages is cut to this, on both sides.
const IN_FLIGHT_SIZE_MAX: usize = 32 << 20;
/// Messages in flight that both sides are offered.
const WINDOWS: [usize; 3] = [500, 4_096, 16_384];
/// Sizes of this bus's batches, in bytes; the others have theirs in the methods.
const BATCH_SIZES: [usize; 2] = [256 << 10, 1 << 20];
/// Messages that a queue may hand out before they are acknowledged; the SDK's most is 10,000.
const QUEUE_WINDOWS: [usize; 3] = [500, 2_000, 10_000];

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Publish with many in flight.
    Publish,
    /// The same over WebSocket.
    PublishWebSocket,
    /// Publish, the next when the last is acknowledged.
    OneAtATime,
    /// Send at a fixed rate to a waiting consumer.
    Consume,
    /// Read from the start.
    Fetch,
    /// Take and acknowledge.
    Queue,
}

/// What this bus should reach, as a part of the other's figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// At least so many times the messages a second.
    Times(f64),
    /// At most this part of the median latency, and of the 99th percentile.
    Latency(f64, Option<f64>),
}

/// One case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Name.
    pub name: &'static str,
    /// Nodes, of which all have a copy.
    pub nodes: usize,
    /// Payload of one message, in bytes.
    pub size: usize,
    /// What the clients do.
    pub work: Work,
    /// Whom it is compared with.
    pub against: &'static [(Sync, Target)],
}

use Sync::{Always, Default as Lazy};
use Target::{Latency, Times};

/// All cases.
pub const CASES: [Case; 9] = [
    Case {
        name: "publish-r3-128",
        nodes: 3,
        size: 128,
        work: Work::Publish,
        against: &[(Lazy, Times(10.0)), (Always, Times(20.0))],
    },
    Case {
        name: "publish-r3-1024",
        nodes: 3,
        size: 1_024,
        work: Work::Publish,
        against: &[(Lazy, Times(5.0)), (Always, Times(10.0))],
    },
    Case {
        name: "publish-r3-16384",
        nodes: 3,
        size: 16_384,
        work: Work::Publish,
        against: &[(Lazy, Times(2.0)), (Always, Times(4.0))],
    },
    Case {
        name: "one-at-a-time-r3-1024",
        nodes: 3,
        size: 1_024,
        work: Work::OneAtATime,
        against: &[(Lazy, Latency(1.25, None)), (Always, Latency(0.5, None))],
    },
    Case {
        name: "publish-to-consume-r3-1024",
        nodes: 3,
        size: 1_024,
        work: Work::Consume,
        against: &[(Lazy, Latency(0.5, Some(0.3)))],
    },
    Case { name: "queue-r3-1024", nodes: 3, size: 1_024, work: Work::Queue, against: &[(Lazy, Times(4.0))] },
    Case {
        name: "shield-r3-1024",
        nodes: 3,
        size: 1_024,
        work: Work::PublishWebSocket,
        against: &[(Lazy, Times(2.0))],
    },
    Case {
        name: "publish-r1-1024",
        nodes: 1,
        size: 1_024,
        work: Work::Publish,
        against: &[(Lazy, Times(3.0)), (Always, Times(50.0))],
    },
    Case { name: "fetch-r1-1024", nodes: 1, size: 1_024, work: Work::Fetch, against: &[(Lazy, Times(4.0))] },
];

/// The cases whose name contains one of `parts`; all when there are none.
///
/// # Errors
/// A part that is in no name.
pub fn chosen(parts: &[String]) -> Result<Vec<Case>, String> {
    for part in parts {
        if !CASES.iter().any(|case| case.name.contains(part.as_str())) {
            let names: Vec<_> = CASES.iter().map(|case| case.name).collect();
            return Err(format!("--cases {part}: there are {}", names.join(", ")));
        }
    }
    let is_chosen = |case: &Case| parts.is_empty() || parts.iter().any(|part| case.name.contains(part.as_str()));
    Ok(CASES.into_iter().filter(is_chosen).collect())
}

/// How a client works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The way of publishing or reading.
    pub method: &'static str,
    /// Messages in flight, at most; for reading, messages asked for at once.
    pub window: usize,
    /// Bytes of one batch, where the client has batches.
    pub batch_size: usize,
}

impl Setting {
    /// For tables.
    pub fn text(&self) -> String {
        let mut parts = vec![self.method.to_owned()];
        if self.window > 1 {
            parts.push(format!("window {}", self.window));
        }
        if self.batch_size > 0 {
            parts.push(format!("{} KiB a batch", self.batch_size >> 10));
        }
        parts.join(", ")
    }
}

impl Case {
    fn windows(&self) -> Vec<usize> {
        let mut windows: Vec<usize> = match self.work {
            Work::Publish | Work::PublishWebSocket | Work::Fetch => {
                WINDOWS.iter().map(|window| (*window).min(IN_FLIGHT_SIZE_MAX / self.size)).collect()
            }
            Work::Queue => QUEUE_WINDOWS.to_vec(),
            Work::OneAtATime | Work::Consume => vec![1],
        };
        windows.dedup();
        windows
    }

    /// What this bus's client is tried with.
    pub fn own_settings(&self) -> Vec<Setting> {
        let with = |batch_sizes: &[usize]| {
            let windows = self.windows();
            let all = windows.iter().flat_map(|window| {
                batch_sizes.iter().map(|size| Setting { method: "sdk", window: *window, batch_size: *size })
            });
            all.collect()
        };
        match self.work {
            Work::Publish | Work::PublishWebSocket => with(&BATCH_SIZES),
            Work::Fetch => {
                BATCH_SIZES.iter().map(|size| Setting { method: "sdk", window: 1, batch_size: size * 4 }).collect()
            }
            _ => with(&[0]),
        }
    }

    /// What the NATS client is tried with.
    pub fn nats_settings(&self) -> Vec<Setting> {
        let methods: &[&'static str] = match self.work {
            Work::Publish | Work::PublishWebSocket => &publish::METHODS,
            Work::OneAtATime => &["windowed"],
            Work::Consume | Work::Fetch | Work::Queue => &["pull"],
        };
        let windows = self.windows();
        let all = windows
            .iter()
            .flat_map(|window| methods.iter().map(|method| Setting { method, window: *window, batch_size: 0 }));
        all.collect()
    }

    /// Whether latency is what counts, and not messages a second.
    pub fn is_about_latency(&self) -> bool {
        matches!(self.work, Work::OneAtATime | Work::Consume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_chosen_by_a_part_of_their_name() {
        assert_eq!(chosen(&[]).unwrap().len(), CASES.len());
        let names = |parts: &[&str]| {
            let parts: Vec<_> = parts.iter().map(ToString::to_string).collect();
            chosen(&parts).map(|cases| cases.iter().map(|case| case.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["queue", "fetch"]).unwrap(), ["queue-r3-1024", "fetch-r1-1024"]);
        assert!(names(&["quueue"]).unwrap_err().starts_with("--cases quueue: there are publish-r3-128, "));
    }

    #[test]
    fn both_sides_are_offered_the_same_windows_and_no_more_bytes_than_allowed() {
        for case in CASES {
            let windows = |settings: &[Setting]| {
                let mut windows: Vec<usize> = settings.iter().map(|setting| setting.window).collect();
                windows.sort_unstable();
                windows.dedup();
                windows
            };
            let (own, nats) = (windows(&case.own_settings()), windows(&case.nats_settings()));
            assert!(case.work == Work::Fetch || own == nats, "{}: {own:?} {nats:?}", case.name);
            assert!(nats.iter().all(|window| window * case.size <= IN_FLIGHT_SIZE_MAX), "{}", case.name);
        }
    }
}
