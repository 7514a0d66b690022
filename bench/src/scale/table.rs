//! The figures, each with its target where it has one.

use serde::Serialize;

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// Below this; with a stretch goal.
    Stretch(f64, f64),
}

impl Target {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(limit) => value >= limit,
            Self::AtMost(limit) | Self::Stretch(limit, _) => value <= limit,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(limit) => format!(">= {limit}"),
            Self::AtMost(limit) => format!("<= {limit}"),
            Self::Stretch(limit, stretch) => format!("<= {limit} ({stretch})"),
        }
    }
}

/// One figure of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub case: String,
    pub figure: String,
    /// Absent when it was not measured; `remark` says why.
    pub value: Option<f64>,
    pub unit: &'static str,
    pub target: Option<Target>,
    pub met: Option<bool>,
    /// How it was measured, in short.
    pub remark: String,
}

impl Line {
    pub fn new(case: &str, figure: impl Into<String>, value: f64, unit: &'static str) -> Self {
        let (case, figure) = (case.to_owned(), figure.into());
        Self { case, figure, value: Some(value), unit, target: None, met: None, remark: String::new() }
    }

    pub fn not_measured(case: &str, figure: impl Into<String>, reason: String) -> Self {
        Self { value: None, remark: format!("not measured: {reason}"), ..Self::new(case, figure, 0.0, "") }
    }

    pub fn target(self, target: Target) -> Self {
        Self { target: Some(target), met: self.value.map(|value| target.met(value)), ..self }
    }

    pub fn remark(self, remark: impl Into<String>) -> Self {
        Self { remark: remark.into(), ..self }
    }

    /// One row for people.
    pub fn text(&self) -> String {
        let value = match self.value {
            None => "-".to_owned(),
            Some(value) if value.abs() >= 1_000.0 => format!("{value:.0}"),
            Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
            Some(value) => format!("{value:.3}"),
        };
        let target = self.target.map(Target::text).unwrap_or_default();
        let met = self.met.map_or("", |met| if met { "yes" } else { "NO" });
        let row = format!(
            "{:<12} {:<38} {:>10} {:<10} {:<14} {:<4} {}",
            self.case, self.figure, value, self.unit, target, met, self.remark
        );
        row.trim_end().to_owned()
    }
}

/// The figures of a case; each is shown as soon as it is there, since some take minutes.
#[derive(Debug, Default)]
pub struct Lines(Vec<Line>);

impl Lines {
    pub fn push(&mut self, line: Line) {
        eprintln!("{}", line.text());
        self.0.push(line);
    }

    pub fn extend(&mut self, lines: Vec<Line>) {
        lines.into_iter().for_each(|line| self.push(line));
    }

    pub fn into_lines(self) -> Vec<Line> {
        self.0
    }
}

/// Everything that was measured, and on what.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    lines: Vec<Line>,
    kernel: String,
    cpus: usize,
}

impl Table {
    pub fn new(lines: Vec<Line>) -> Self {
        Self {
            lines,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
        }
    }

    /// One JSON document on one line.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers and text only")
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = vec![format!(
            "{:<12} {:<38} {:>10} {:<10} {:<14} {:<4} {}",
            "case", "figure", "value", "unit", "target", "met", "remark"
        )];
        out.extend(self.lines.iter().map(Line::text));
        out.push(format!("{} CPUs, Linux {}", self.cpus, self.kernel));
        out.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_whether_its_target_is_met() {
        let line = |value| Line::new("growth-10", "x", value, "s").target(Target::AtMost(3.0));
        assert_eq!((line(3.0).met, line(3.1).met), (Some(true), Some(false)));
        assert!(line(3.1).text().contains("NO") && line(1.0).text().contains("yes"));
        assert_eq!(Line::new("a", "b", 0.4, "").target(Target::AtLeast(0.5)).met, Some(false));
        let none = Line::not_measured("cgroup", "x", "no cgroups".to_owned()).target(Target::AtMost(1.0));
        assert_eq!((none.met, none.value), (None, None));
        assert!(none.text().contains("not measured: no cgroups"));
        let document: serde_json::Value = serde_json::from_str(&Table::new(vec![none]).json()).unwrap();
        assert!(document["lines"][0]["value"].is_null() && !document["kernel"].is_null());
    }
}
