//! What was measured: medians of the rounds, as a table and as JSON.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::{disk::Disk, load::Measured};

/// One round of one case.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// What the client saw.
    pub measured: Measured,
    /// CPU time of all nodes meanwhile, in seconds.
    pub cpu_seconds: f64,
}

/// One case: each figure is the median of its rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// `publish`, `publish-one-at-a-time`, `fetch` or `publish-to-consume`.
    pub name: &'static str,
    /// Payload of one message, in bytes.
    pub size: usize,
    /// Nodes of the cluster.
    pub nodes: u32,
    /// Messages of one round.
    pub messages: u64,
    /// Messages per second.
    pub msgs_per_s: f64,
    /// Payload in MB (10^6 bytes) per second.
    pub mb_per_s: f64,
    /// Median latency in microseconds, where one is measured.
    pub p50_us: Option<f64>,
    /// 99th percentile in microseconds.
    pub p99_us: Option<f64>,
    /// CPU seconds of all nodes per million messages.
    pub cpu_s_per_million: f64,
    /// What an acknowledgement promises.
    pub durability: &'static str,
    /// `publish`: MB/s over the disk's; one at a time and to consume: p50 over the disk's 4 KiB p50.
    pub ratio_to_disk: Option<f64>,
}

impl Case {
    /// The medians of `rounds`.
    pub fn new(name: &'static str, size: usize, nodes: u32, rounds: &[Round], disk: &Disk) -> Self {
        let of = |figure: fn(&Round) -> f64| median(&rounds.iter().map(figure).collect::<Vec<_>>());
        let msgs_per_s = of(|round| round.measured.messages as f64 / round.measured.seconds);
        let mb_per_s = msgs_per_s * size as f64 / 1e6;
        let (p50, p99) = (of(|round| round.measured.p50_us), of(|round| round.measured.p99_us));
        let ratio_to_disk = match name {
            "publish" => Some(mb_per_s / disk.mb_per_s),
            "fetch" => None,
            _ => Some(p50 / disk.p50_us),
        };
        Self {
            name,
            size,
            nodes,
            messages: of(|round| round.measured.messages as f64) as u64,
            msgs_per_s,
            mb_per_s,
            p50_us: (p50 > 0.0).then_some(p50),
            p99_us: (p99 > 0.0).then_some(p99),
            cpu_s_per_million: of(|round| round.cpu_seconds * 1e6 / (round.measured.messages.max(1)) as f64),
            durability: "majority-fsync",
            ratio_to_disk,
        }
    }
}

/// Everything, and what it was measured on.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    cases: Vec<Case>,
    disk: Disk,
    kernel: String,
    cpus: usize,
    date: String,
    rounds: u32,
    window: u32,
    linger_ms: f64,
    compression: &'static str,
}

impl Report {
    /// A report of this moment and machine.
    pub fn new(cases: Vec<Case>, disk: Disk, window: u32, linger: Duration, rounds: u32) -> Self {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Self {
            cases,
            disk,
            kernel,
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            date: date_now(),
            rounds,
            window,
            linger_ms: linger.as_secs_f64() * 1e3,
            compression: "none",
        }
    }

    /// One JSON document on one line.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers and text only")
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut lines = vec![format!(
            "{:<22} {:>6} {:>5} {:>10} {:>8} {:>10} {:>10} {:>9} {:>7}",
            "case", "bytes", "nodes", "msg/s", "MB/s", "p50 us", "p99 us", "CPU s/M", "x disk"
        )];
        let optional =
            |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
        for case in &self.cases {
            lines.push(format!(
                "{:<22} {:>6} {:>5} {:>10.0} {:>8.1} {:>10} {:>10} {:>9.2} {:>7}",
                case.name,
                case.size,
                case.nodes,
                case.msgs_per_s,
                case.mb_per_s,
                optional(case.p50_us, 0),
                optional(case.p99_us, 0),
                case.cpu_s_per_million,
                optional(case.ratio_to_disk, 2)
            ));
        }
        let disk = &self.disk;
        lines.push(format!(
            "disk alone: 1 MiB write + fdatasync {:.0} MB/s; 4 KiB write + fdatasync p50 {:.0} us (rounds {:.0} to {:.0}), p99 {:.0} us{}",
            disk.mb_per_s,
            disk.p50_us,
            disk.p50_us_min,
            disk.p50_us_max,
            disk.p99_us,
            if disk.tmpfs { " (tmpfs: this is memory)" } else { "" }
        ));
        lines.push(format!(
            "majority-fsync, no compression, window {}, linger {} ms, median of {} rounds; {} CPUs, Linux {}, {}",
            self.window, self.linger_ms, self.rounds, self.cpus, self.kernel, self.date
        ));
        lines.join("\n")
    }
}

/// The middle one; the upper of two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    percentile(&sorted, 0.5)
}

/// The value at `part` (0 to 1) of a sorted list; 0 of an empty one.
pub fn percentile(sorted: &[f64], part: f64) -> f64 {
    let index = (sorted.len() as f64 * part) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

/// Now, in RFC 3339 and UTC.
pub fn date_now() -> String {
    date_text(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// RFC 3339 in UTC. Days to date as in "chrono-Compatible Low-Level Date Algorithms" (Hinnant).
fn date_text(unix_seconds: u64) -> String {
    let days = unix_seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let seconds = unix_seconds % 86_400;
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(messages: u64, seconds: f64, p50_us: f64) -> Round {
        Round { measured: Measured { messages, seconds, p50_us, p99_us: p50_us * 2.0 }, cpu_seconds: 0.5 }
    }

    const DISK: Disk =
        Disk { mb_per_s: 100.0, p50_us: 200.0, p99_us: 400.0, p50_us_min: 190.0, p50_us_max: 300.0, tmpfs: false };

    #[test]
    fn a_case_is_the_median_of_its_rounds_and_stands_beside_the_disk() {
        let rounds = [round(1_000, 1.0, 10.0), round(500_000, 1.0, 400.0), round(3_000_000, 1.0, 900.0)];
        let publish = Case::new("publish", 100, 3, &rounds, &DISK);
        assert_eq!((publish.msgs_per_s, publish.mb_per_s, publish.ratio_to_disk), (500_000.0, 50.0, Some(0.5)));
        assert_eq!((publish.p50_us, publish.cpu_s_per_million), (Some(400.0), 1.0));
        let single = Case::new("publish-one-at-a-time", 100, 3, &rounds, &DISK);
        assert_eq!(single.ratio_to_disk, Some(2.0));
        let fetch = Case::new("fetch", 100, 3, &[round(10, 1.0, 0.0)], &DISK);
        assert_eq!((fetch.p50_us, fetch.ratio_to_disk), (None, None));
    }

    #[test]
    fn the_document_has_the_promised_fields() {
        let case = Case::new("publish", 128, 1, &[round(10, 1.0, 5.0)], &DISK);
        let report = Report::new(vec![case], DISK, 500, Duration::from_millis(1), 3);
        let document: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        for field in ["cases", "disk", "kernel", "cpus", "date"] {
            assert!(!document[field].is_null(), "{field}");
        }
        assert_eq!(document["cases"][0]["durability"], "majority-fsync");
        assert!(report.table().contains("publish"));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date_text(0), "1970-01-01T00:00:00Z");
        assert_eq!(date_text(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(date_text(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(date_text(1_767_225_599), "2025-12-31T23:59:59Z");
    }
}
