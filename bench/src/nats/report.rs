//! Medians, ratios and whether the targets are met; as a table and as JSON.

use serde::Serialize;

use super::{
    cases::{Case, Setting, Target, Work},
    measure::HalfRound,
    server::Sync,
};
use crate::report::{date_now, median};

/// One side of one case: each figure is the median of the rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Messages acknowledged, read or confirmed, a second.
    pub msgs_per_s: f64,
    /// Payload in MB (10^6 bytes) a second.
    pub mb_per_s: f64,
    /// Median latency in microseconds, where one is measured.
    pub p50_us: Option<f64>,
    /// 99th percentile in microseconds.
    pub p99_us: Option<f64>,
    /// CPU seconds of all servers per million messages.
    pub cpu_s_per_million: f64,
    /// CPU seconds of the clients per million messages.
    pub client_cpu_s_per_million: f64,
    /// Most memory of all servers together in a round, in MB (10^6 bytes).
    pub memory_mb: f64,
    /// Slowest and fastest round, in messages a second.
    pub msgs_per_s_spread: [f64; 2],
    /// Lowest and highest median latency of a round, in microseconds.
    pub p50_us_spread: Option<[f64; 2]>,
    /// Bytes that the replica with the least has allocated, over the bytes of payload.
    pub disk_ratio: Option<f64>,
    /// What an acknowledgement promises.
    pub durability: String,
    /// The client and its settings, the best of those tried.
    pub client: String,
}

impl Figures {
    /// The medians of `rounds`.
    pub fn new(case: &Case, durability: &str, client: String, rounds: &[HalfRound]) -> Self {
        let of = |figure: &dyn Fn(&HalfRound) -> f64| rounds.iter().map(figure).collect::<Vec<_>>();
        let rates = of(&|round| round.measured.messages as f64 / round.measured.seconds);
        let p50 = of(&|round| round.measured.p50_us);
        let has_latency = p50.iter().any(|p50| *p50 > 0.0);
        let per_million = |seconds: f64, round: &HalfRound| seconds * 1e6 / round.measured.messages.max(1) as f64;
        let disk = of(&|round| round.disk_size as f64 / (round.measured.messages.max(1) * case.size as u64) as f64);
        let msgs_per_s = median(&rates);
        Self {
            msgs_per_s,
            mb_per_s: msgs_per_s * case.size as f64 / 1e6,
            p50_us: has_latency.then(|| median(&p50)),
            p99_us: has_latency.then(|| median(&of(&|round| round.measured.p99_us))),
            cpu_s_per_million: median(&of(&|round| per_million(round.server_seconds, round))),
            client_cpu_s_per_million: median(&of(&|round| per_million(round.client_seconds, round))),
            memory_mb: median(&of(&|round| round.memory_size as f64 / 1e6)),
            msgs_per_s_spread: spread(&rates),
            p50_us_spread: has_latency.then(|| spread(&p50)),
            disk_ratio: rounds.iter().any(|round| round.disk_size > 0).then(|| median(&disk)),
            durability: durability.to_owned(),
            client,
        }
    }
}

fn spread(values: &[f64]) -> [f64; 2] {
    let least = values.iter().copied().reduce(f64::min).unwrap_or_default();
    [least, values.iter().copied().reduce(f64::max).unwrap_or_default()]
}

/// One target and whether it is met.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// What is compared.
    pub what: &'static str,
    /// This bus's figure over the other's.
    pub ratio: f64,
    /// In words, for example `at least 5x`.
    pub target: String,
    /// Whether it is.
    pub met: bool,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { what, ratio, target, met } = self;
        let word = if *met { "met" } else { "NOT MET" };
        write!(out, "    {what}: {ratio:.2}x, {target}: {word}")
    }
}

/// One case against one way of NATS.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The case's name.
    pub name: String,
    /// `default` or `always`.
    pub nats_sync: &'static str,
    /// Payload of one message, in bytes.
    pub size: usize,
    /// Nodes on each side.
    pub nodes: usize,
    /// This bus.
    pub arqon: Option<Figures>,
    /// NATS.
    pub nats: Figures,
    /// The first target's ratio: messages a second, or median latency.
    pub ratio: Option<f64>,
    /// The targets.
    pub targets: Vec<Verdict>,
}

impl Row {
    /// Compares the two sides.
    pub fn new(case: &Case, sync: Sync, target: Target, arqon: Option<Figures>, nats: Figures) -> Self {
        let targets = arqon.as_ref().map(|arqon| verdicts(case, target, arqon, &nats)).unwrap_or_default();
        Self {
            name: case.name.to_owned(),
            nats_sync: sync.name(),
            size: case.size,
            nodes: case.nodes,
            ratio: targets.first().map(|verdict| verdict.ratio),
            arqon,
            nats,
            targets,
        }
    }
}

fn verdicts(case: &Case, target: Target, arqon: &Figures, nats: &Figures) -> Vec<Verdict> {
    let part = |own: Option<f64>, other: Option<f64>| own.unwrap_or(f64::NAN) / other.unwrap_or(f64::NAN);
    let at_most = |what, ratio: f64, limit: f64| Verdict {
        what,
        ratio,
        target: format!("at most {limit}x"),
        met: ratio <= limit,
    };
    match target {
        Target::Times(times) => {
            let ratio = arqon.msgs_per_s / nats.msgs_per_s;
            let throughput =
                Verdict { what: "messages a second", ratio, target: format!("at least {times}x"), met: ratio >= times };
            let cpu = arqon.cpu_s_per_million / nats.cpu_s_per_million;
            let below = Verdict { what: "servers' CPU", ratio: cpu, target: "below 1x".into(), met: cpu < 1.0 };
            vec![throughput, below]
        }
        Target::Latency(p50, p99) => {
            let mut out = vec![at_most("p50", part(arqon.p50_us, nats.p50_us), p50)];
            out.extend(p99.map(|p99| at_most("p99", part(arqon.p99_us, nats.p99_us), p99)));
            debug_assert!(matches!(case.work, Work::OneAtATime | Work::Consume));
            out
        }
    }
}

/// One setting that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct Try {
    /// The case's name.
    pub case: &'static str,
    /// `arqon`, `nats default` or `nats always`.
    pub side: String,
    /// In words.
    pub setting: String,
    /// Messages a second.
    pub msgs_per_s: f64,
    /// Median latency in microseconds; 0 where none is measured.
    pub p50_us: f64,
    /// 99th percentile in microseconds.
    pub p99_us: f64,
}

impl Try {
    /// What the try of a setting measured.
    pub fn new(case: &Case, side: &str, setting: &Setting, measured: &crate::load::Measured) -> Self {
        Self {
            case: case.name,
            side: side.to_owned(),
            setting: setting.text(),
            msgs_per_s: measured.messages as f64 / measured.seconds,
            p50_us: measured.p50_us,
            p99_us: measured.p99_us,
        }
    }
}

/// Everything, and what it was measured on.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The comparisons.
    pub cases: Vec<Row>,
    /// Every setting that was tried.
    pub tries: Vec<Try>,
    /// CPU seconds a second of the servers whose turn it was not, at most.
    pub idle_cpu: f64,
    /// As `uname -r` says.
    pub kernel: String,
    /// CPUs of the machine.
    pub cpus: usize,
    /// RFC 3339, UTC.
    pub date: String,
    /// Version of arqon.
    pub arqon_version: &'static str,
    /// Version of nats-server.
    pub nats_version: String,
    /// Rounds of each case.
    pub rounds: u32,
    /// Length of a round of one side, in seconds.
    pub round_s: f64,
    /// This bus's linger, in ms.
    pub linger_ms: f64,
    /// On both sides.
    pub compression: &'static str,
}

impl Report {
    /// A report of this moment and machine.
    pub fn new(nats_version: String, rounds: u32, round_s: f64, linger_ms: f64) -> Self {
        Self {
            cases: Vec::new(),
            tries: Vec::new(),
            idle_cpu: 0.0,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            date: date_now(),
            arqon_version: env!("CARGO_PKG_VERSION"),
            nats_version,
            rounds,
            round_s,
            linger_ms,
            compression: "none",
        }
    }

    /// One JSON document on one line.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers and text only")
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut lines = vec![figures_head()];
        for row in &self.cases {
            if let Some(arqon) = &row.arqon {
                lines.push(figures_line(&row.name, "arqon", arqon));
            }
            lines.push(figures_line(&row.name, &format!("nats {}", row.nats_sync), &row.nats));
            lines.extend(row.targets.iter().map(ToString::to_string));
        }
        lines.push(format!("{}; nats-server {}", self.foot(), self.nats_version));
        lines.join("\n")
    }

    /// What all figures were measured with.
    pub fn foot(&self) -> String {
        format!(
            "no compression, linger {} ms, median of {} rounds of {} s; servers whose turn it is not use {:.3} CPUs; \
             {} CPUs, Linux {}, {}",
            self.linger_ms, self.rounds, self.round_s, self.idle_cpu, self.cpus, self.kernel, self.date
        )
    }
}

/// The columns of [`figures_line`].
pub fn figures_head() -> String {
    format!(
        "{:<27} {:<12} {:>9} {:>7} {:>8} {:>8} {:>7} {:>7} {:>6}  {}",
        "case", "side", "msg/s", "MB/s", "p50 us", "p99 us", "CPU s/M", "client", "MB", "setting; spread"
    )
}

/// One side of one case, for people.
pub fn figures_line(name: &str, side: &str, figures: &Figures) -> String {
    let optional = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.0}"));
    format!(
        "{:<27} {:<12} {:>9.0} {:>7.1} {:>8} {:>8} {:>7.2} {:>7.2} {:>6.0}  {}; {:.0} to {:.0} msg/s",
        name,
        side,
        figures.msgs_per_s,
        figures.mb_per_s,
        optional(figures.p50_us),
        optional(figures.p99_us),
        figures.cpu_s_per_million,
        figures.client_cpu_s_per_million,
        figures.memory_mb,
        figures.client,
        figures.msgs_per_s_spread[0],
        figures.msgs_per_s_spread[1],
    )
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::{load::Measured, nats::cases::CASES};

    pub fn half_round(messages: u64, p50_us: f64) -> HalfRound {
        HalfRound {
            measured: Measured { messages, seconds: 1.0, p50_us, p99_us: p50_us * 3.0 },
            server_seconds: 0.5,
            client_seconds: 0.25,
            idle_seconds: 0.0,
            memory_size: 50_000_000,
            disk_size: messages * 150,
        }
    }

    pub fn report() -> Report {
        let case = &CASES[0];
        let own = Figures::new(case, "fsync on a majority", "sdk".into(), &[half_round(1_000_000, 100.0)]);
        let nats = Figures::new(case, "page cache", "windowed".into(), &[half_round(50_000, 400.0)]);
        let mut report = Report::new("2.15.1".into(), 5, 6.0, 1.0);
        for (sync, target) in case.against {
            report.cases.push(Row::new(case, *sync, *target, Some(own.clone()), nats.clone()));
        }
        report
    }

    #[test]
    fn figures_are_medians_and_show_their_spread() {
        let rounds = [half_round(100, 10.0), half_round(900, 30.0), half_round(500, 20.0)];
        let figures = Figures::new(&CASES[0], "d", "c".into(), &rounds);
        assert_eq!((figures.msgs_per_s, figures.p50_us, figures.p99_us), (500.0, Some(20.0), Some(60.0)));
        assert_eq!((figures.msgs_per_s_spread, figures.p50_us_spread), ([100.0, 900.0], Some([10.0, 30.0])));
        assert_eq!((figures.mb_per_s, figures.cpu_s_per_million), (0.064, 1_000.0));
        assert_eq!(figures.disk_ratio, Some(150.0 / 128.0));
        let reading = HalfRound { disk_size: 0, ..half_round(10, 0.0) };
        let figures = Figures::new(&CASES[0], "d", "c".into(), &[reading]);
        assert_eq!((figures.p50_us, figures.disk_ratio), (None, None));
    }

    #[test]
    fn targets_are_met_or_not() {
        let rows = report().cases;
        assert_eq!(rows[0].ratio, Some(20.0));
        let of = |row: &Row| row.targets.iter().map(|verdict| verdict.met).collect::<Vec<_>>();
        assert_eq!((of(&rows[0]), of(&rows[1])), (vec![true, true], vec![true, true]));
        let case = &CASES[3];
        let figures = |p50| Figures::new(case, "d", "c".into(), &[half_round(10, p50)]);
        for (own, is_met) in [(100.0, true), (126.0, false)] {
            let row = Row::new(case, Sync::Default, case.against[0].1, Some(figures(own)), figures(100.0));
            assert_eq!((row.targets.len(), row.targets[0].met), (1, is_met));
        }
    }

    #[test]
    fn the_document_and_the_table_have_what_was_promised() {
        let report = report();
        let document: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        let case = &document["cases"][0];
        for field in ["msgs_per_s", "mb_per_s", "p50_us", "p99_us", "cpu_s_per_million", "durability"] {
            assert!(!case["arqon"][field].is_null() && !case["nats"][field].is_null(), "{field}");
        }
        assert_eq!((case["name"].as_str(), case["ratio"].as_f64()), (Some("publish-r3-128"), Some(20.0)));
        assert!(report.table().contains("messages a second: 20.00x, at least 10x: met"), "{}", report.table());
    }
}
