//! Plots as SVG, fault windows shaded: latency of every write, and writes per second.
//!
//! The colours follow the reader's choice of light or dark. Nothing outside the file is used.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use super::escaped;
use crate::{
    check::harms,
    history::{History, Outcome},
};

/// Size of a plot and of its margins, in pixels.
const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 36.0;
/// Side of a point, in pixels; several writes that fall on one point are drawn once.
const POINT: f64 = 2.0;
/// Number of stretches over which quantiles and rates are taken.
const STRETCH_COUNT: usize = 120;
/// The axis of latencies: from 0.1 ms to 100 s, one step a power of ten.
const LATENCY_MS_MIN: f64 = 0.1;
const LATENCY_DECADES: f64 = 6.0;
/// Colours for kinds of faults.
const FAULT_COLOURS: [&str; 8] =
    ["#d9480f", "#1971c2", "#2f9e44", "#9c36b5", "#e8590c", "#0c8599", "#e03131", "#5f3dc4"];

/// One write: when it began, and how it ended.
#[derive(Clone, Copy)]
struct Sample {
    begin: f64,
    end: Ending,
}

#[derive(Clone, Copy, PartialEq)]
enum Ending {
    /// Acknowledged after this many ms.
    Ok(f64),
    Refused,
    Unknown,
}

fn samples(history: &History) -> Vec<Sample> {
    let appends = history.keys.values().flat_map(|key| &key.appends).map(|append| (append.invoked, append.outcome));
    let changes = history.topics.values().flat_map(|topic| &topic.changes);
    let changes = changes.map(|change| (change.invoked, change.outcome));
    let sample = |(invoked, outcome): (u64, Outcome)| {
        let end = match outcome {
            Outcome::Ok { time, .. } => Ending::Ok((time.saturating_sub(invoked)) as f64 / 1e6),
            Outcome::Fail => Ending::Refused,
            Outcome::Unknown => Ending::Unknown,
        };
        Sample { begin: invoked as f64 / 1e9, end }
    };
    appends.chain(changes).map(sample).collect()
}

/// The drawing of one plot.
struct Drawing {
    out: String,
    seconds: f64,
}

impl Drawing {
    fn new(title: &str, history: &History) -> Self {
        let mut drawing = Self { out: String::new(), seconds: (history.end as f64 / 1e9).max(0.001) };
        let _ = write!(
            drawing.out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             font-family=\"system-ui, sans-serif\" font-size=\"11\"><title>{title}</title><style>\
             .ink{{fill:#222}}.grid{{stroke:#ddd}}.ok{{stroke:#4dabf7}}.p50{{stroke:#1864ab}}.p99{{stroke:#862e9c}}\
             .max{{stroke:#868e96}}.bad{{stroke:#e03131}}.paper{{fill:#fff}}\
             @media(prefers-color-scheme:dark){{.ink{{fill:#ddd}}.grid{{stroke:#444}}.ok{{stroke:#339af0}}\
             .p50{{stroke:#a5d8ff}}.p99{{stroke:#e599f7}}.max{{stroke:#adb5bd}}.bad{{stroke:#ff8787}}.paper{{fill:#1a1b1e}}}}\
             </style><rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\
             <text class=\"ink\" x=\"{LEFT}\" y=\"14\" font-weight=\"600\">{title}</text>"
        );
        drawing.faults(history);
        drawing.time_axis();
        drawing
    }

    fn x(&self, seconds: f64) -> f64 {
        LEFT + (seconds / self.seconds).clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    /// From 0 at the bottom to 1 at the top.
    fn y(share: f64) -> f64 {
        HEIGHT - BOTTOM - share.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM)
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = escaped(text);
        let _ =
            write!(self.out, "<text class=\"ink\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>");
    }

    fn grid(&mut self, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = write!(self.out, "<line class=\"grid\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>");
    }

    fn faults(&mut self, history: &History) {
        let heal = history.faults.iter().filter(|fault| fault.f == "heal").map(|fault| fault.time).next_back();
        let kinds: BTreeSet<&str> =
            history.faults.iter().filter(|fault| harms(&fault.f)).map(|fault| fault.f.as_str()).collect();
        let colours: BTreeMap<&str, &str> = kinds.into_iter().zip(FAULT_COLOURS.into_iter().cycle()).collect();
        for fault in history.faults.iter().filter(|fault| harms(&fault.f)) {
            let until = fault.ended.or(heal.filter(|heal| *heal >= fault.time)).unwrap_or(history.end);
            let (from, to) = (self.x(fault.time as f64 / 1e9), self.x(until as f64 / 1e9));
            let (top, bottom, colour) = (Self::y(1.0), Self::y(0.0), colours[fault.f.as_str()]);
            let node = fault.node.filter(|node| *node != 0).map_or(String::new(), |node| format!(" node {node}"));
            let _ = write!(
                self.out,
                "<rect x=\"{from:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\" \
                 fill-opacity=\"0.16\"><title>{}{node}, {:.3} s to {:.3} s</title></rect>",
                (to - from).max(1.0),
                bottom - top,
                escaped(&fault.f),
                fault.time as f64 / 1e9,
                until as f64 / 1e9
            );
        }
        let mut x = LEFT;
        for (name, colour) in colours {
            let _ = write!(
                self.out,
                "<rect x=\"{x:.1}\" y=\"20\" width=\"10\" height=\"10\" fill=\"{colour}\" fill-opacity=\"0.5\"/>"
            );
            self.text(x + 14.0, 29.0, "start", name);
            x += 26.0 + name.len() as f64 * 6.5;
        }
    }

    fn time_axis(&mut self) {
        let step = nice_step(self.seconds / 8.0);
        let mut at = 0.0;
        while at <= self.seconds {
            let x = self.x(at);
            self.grid((x, Self::y(0.0)), (x, Self::y(1.0)));
            self.text(x, HEIGHT - BOTTOM + 14.0, "middle", &format!("{at} s"));
            at += step;
        }
    }

    /// An axis from 0 to `most` or a little more, which it gives.
    fn height_axis(&mut self, most: f64) -> f64 {
        let step = nice_step(most / 4.0);
        let top = (most / step).ceil() * step;
        let mut at = 0.0;
        while at <= top {
            let y = Self::y(at / top);
            self.grid((LEFT, y), (WIDTH - RIGHT, y));
            self.text(LEFT - 6.0, y + 4.0, "end", &format!("{at}"));
            at += step;
        }
        top
    }

    /// A line of time in seconds and height from 0 to 1.
    fn line(&mut self, class: &str, points: &[(f64, f64)]) {
        if points.is_empty() {
            return;
        }
        let points: Vec<String> =
            points.iter().map(|(at, share)| format!("{:.1},{:.1}", self.x(*at), Self::y(*share))).collect();
        let points = points.join(" ");
        let _ =
            write!(self.out, "<polyline class=\"{class}\" fill=\"none\" stroke-width=\"1.5\" points=\"{points}\"/>");
    }

    fn key(&mut self, index: usize, class: &str, text: &str) {
        let x = WIDTH - RIGHT - 110.0 * (4 - index) as f64;
        let _ = write!(
            self.out,
            "<line class=\"{class}\" x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{to:.1}\" y2=\"{y:.1}\" stroke-width=\"3\"/>",
            y = HEIGHT - 8.0,
            to = x + 14.0
        );
        self.text(x + 18.0, HEIGHT - 4.0, "start", text);
    }

    fn done(mut self) -> String {
        self.out.push_str("</svg>\n");
        self.out
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn nice_step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(0.1).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= least).unwrap_or(10.0 * power)
}

/// Height of a latency on its axis.
fn latency_share(ms: f64) -> f64 {
    (ms.max(LATENCY_MS_MIN) / LATENCY_MS_MIN).log10() / LATENCY_DECADES
}

/// Every write as a point at its begin, with the median, the 99th percentile and the longest over
/// time. Writes without a known outcome stand at the upper edge.
pub(super) fn latency(history: &History) -> String {
    let samples = samples(history);
    let mut drawing = Drawing::new("Latency of writes", history);
    for decade in 0..=LATENCY_DECADES as i32 {
        let ms = LATENCY_MS_MIN * 10f64.powi(decade);
        let y = Drawing::y(latency_share(ms));
        drawing.grid((LEFT, y), (WIDTH - RIGHT, y));
        let label = if ms >= 1_000.0 { format!("{} s", ms / 1_000.0) } else { format!("{ms} ms") };
        drawing.text(LEFT - 6.0, y + 4.0, "end", &label);
    }
    for (class, wanted) in [("ok", true), ("bad", false)] {
        let mut points: BTreeSet<(i64, i64)> = BTreeSet::new();
        for sample in samples.iter().filter(|sample| matches!(sample.end, Ending::Ok(_)) == wanted) {
            let share = match sample.end {
                Ending::Ok(ms) => latency_share(ms),
                Ending::Refused | Ending::Unknown => 1.0,
            };
            let (x, y) = (drawing.x(sample.begin), Drawing::y(share));
            points.insert(((x / POINT).round() as i64, (y / POINT).round() as i64));
        }
        let mut path = String::new();
        for (x, y) in points {
            let _ = write!(path, "M{} {}h{POINT}", x as f64 * POINT, y as f64 * POINT);
        }
        let _ = write!(
            drawing.out,
            "<path class=\"{class}\" stroke-width=\"{POINT}\" stroke-opacity=\"0.6\" d=\"{path}\"/>"
        );
    }
    let width = drawing.seconds / STRETCH_COUNT as f64;
    let mut stretches: Vec<Vec<f64>> = vec![Vec::new(); STRETCH_COUNT];
    for sample in &samples {
        if let Ending::Ok(ms) = sample.end {
            stretches[((sample.begin / width) as usize).min(STRETCH_COUNT - 1)].push(ms);
        }
    }
    for stretch in &mut stretches {
        stretch.sort_by(f64::total_cmp);
    }
    for (index, (class, quantile, text)) in
        [("max", 1.0, "longest"), ("p99", 0.99, "99th percentile"), ("p50", 0.5, "median")].into_iter().enumerate()
    {
        let of_stretch = |(at, stretch): (usize, &Vec<f64>)| {
            let rank = ((stretch.len() as f64 * quantile) as usize).min(stretch.len().checked_sub(1)?);
            Some(((at as f64 + 0.5) * width, latency_share(stretch[rank])))
        };
        let points: Vec<_> = stretches.iter().enumerate().filter_map(of_stretch).collect();
        drawing.line(class, &points);
        drawing.key(index, class, text);
    }
    drawing.key(3, "bad", "not known");
    drawing.done()
}

/// Acknowledged writes per second, and those refused or not known.
pub(super) fn rate(history: &History) -> String {
    let mut drawing = Drawing::new("Writes per second", history);
    let width = (drawing.seconds / STRETCH_COUNT as f64).max(0.1);
    let count = ((drawing.seconds / width).ceil() as usize).max(1);
    let (mut acked, mut other) = (vec![0.0; count], vec![0.0; count]);
    for sample in samples(history) {
        let (at, counts) = match sample.end {
            Ending::Ok(ms) => (sample.begin + ms / 1_000.0, &mut acked),
            Ending::Refused | Ending::Unknown => (sample.begin, &mut other),
        };
        counts[((at / width) as usize).min(count - 1)] += 1.0 / width;
    }
    let top = drawing.height_axis(acked.iter().chain(&other).copied().fold(1.0, f64::max));
    for (index, (class, counts, text)) in
        [("ok", &acked, "acknowledged"), ("bad", &other, "not known")].into_iter().enumerate()
    {
        let points: Vec<_> =
            counts.iter().enumerate().map(|(at, rate)| ((at as f64 + 0.5) * width, rate / top)).collect();
        drawing.line(class, &points);
        drawing.key(index + 2, class, text);
    }
    drawing.done()
}

/// What the nodes have in memory: the one that has most, and the median.
pub(super) fn memory(history: &History) -> String {
    let mut drawing = Drawing::new("Memory of a node, in MiB, without mapped files", history);
    let width = drawing.seconds / STRETCH_COUNT as f64;
    let mut stretches: Vec<Vec<f64>> = vec![Vec::new(); STRETCH_COUNT];
    for look in &history.memory {
        let at = look.time as f64 / 1e9 / width;
        stretches[(at as usize).min(STRETCH_COUNT - 1)].push(look.bytes as f64 / f64::from(1 << 20));
    }
    for stretch in &mut stretches {
        stretch.sort_by(f64::total_cmp);
    }
    let top = drawing.height_axis(stretches.iter().flatten().copied().fold(1.0, f64::max));
    for (index, (class, text)) in [("max", "most"), ("p50", "median")].into_iter().enumerate() {
        let of_stretch = |(at, stretch): (usize, &Vec<f64>)| {
            let rank = if class == "max" { stretch.len().checked_sub(1)? } else { stretch.len() / 2 };
            Some(((at as f64 + 0.5) * width, stretch.get(rank)? / top))
        };
        let points: Vec<_> = stretches.iter().enumerate().filter_map(of_stretch).collect();
        drawing.line(class, &points);
        drawing.key(index + 2, class, text);
    }
    drawing.done()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round_and_large_enough() {
        for (least, step) in [(0.3, 0.5), (1.0, 1.0), (1.1, 2.0), (7.0, 10.0), (240.0, 500.0)] {
            assert!((nice_step(least) - step).abs() < 1e-9, "{least}: {}", nice_step(least));
        }
    }

    #[test]
    fn latencies_have_their_place_on_the_axis() {
        assert!(latency_share(0.01).abs() < 1e-9);
        assert!((latency_share(100.0) - 0.5).abs() < 1e-9);
        assert!((latency_share(100_000.0) - 1.0).abs() < 1e-9);
    }
}
