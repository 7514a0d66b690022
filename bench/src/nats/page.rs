//! `nats.md` and its charts.

use std::{fmt::Write, path::Path};

use super::{
    chart::{Bar, Group, svg},
    report::{Figures, Report, Row},
};

/// Writes the page and its charts into `dir`, which is made when missing.
///
/// # Errors
/// A file that cannot be written.
pub fn write(dir: &Path, report: &Report) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("--page {}: {error}", dir.display());
    std::fs::create_dir_all(dir).map_err(failed)?;
    for (file, title, groups) in charts(report) {
        std::fs::write(dir.join(file), svg(title, &groups)).map_err(failed)?;
    }
    std::fs::write(dir.join("nats.md"), markdown(report)).map_err(failed)
}

/// File, title and bars of each chart that has any.
fn charts(report: &Report) -> Vec<(&'static str, &'static str, Vec<Group>)> {
    let throughput = |figures: &Figures| Some(figures.msgs_per_s);
    let rate = |value: f64| format!("{} msg/s", thousands(value));
    let time = |value: f64| format!("{value:.0} us");
    let cpu = |value: f64| format!("{value:.1} s");
    let is_latency = |row: &&Row| row.targets.iter().any(|verdict| verdict.what == "p50");
    let of = |wanted: bool| report.cases.iter().filter(|row| is_latency(row) == wanted).collect::<Vec<_>>();
    let (fast, quick) = (of(false), of(true));
    let all = vec![
        ("nats-throughput.svg", "Messages a second (longer is better)", groups(&fast, throughput, rate)),
        ("nats-latency.svg", "Median latency (shorter is better)", groups(&quick, |figures| figures.p50_us, time)),
        (
            "nats-cpu.svg",
            "CPU seconds of all servers per million messages (shorter is better)",
            groups(&fast, |figures| Some(figures.cpu_s_per_million), cpu),
        ),
    ];
    all.into_iter().filter(|(_, _, groups)| !groups.is_empty()).collect()
}

/// One group a case: this bus once, and each way of NATS.
fn groups(rows: &[&Row], figure: impl Fn(&Figures) -> Option<f64>, text: impl Fn(f64) -> String) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for row in rows {
        let bar = |label: String, figures: &Figures, is_own| {
            figure(figures).map(|value| Bar { label, value, text: text(value), is_own })
        };
        if groups.last().is_none_or(|group| group.title != row.name) {
            let own = row.arqon.as_ref().and_then(|figures| bar("ArqonBus (fsync)".into(), figures, true));
            groups.push(Group { title: row.name.clone(), bars: own.into_iter().collect() });
        }
        if let Some(group) = groups.last_mut() {
            group.bars.extend(bar(format!("JetStream ({})", sync_text(row)), &row.nats, false));
        }
    }
    groups
}

fn sync_text(row: &Row) -> &'static str {
    if row.nats_sync == "always" { "sync always" } else { "no fsync" }
}

/// `1234567` as `1,234,567`.
fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn markdown(report: &Report) -> String {
    let mut out = format!(
        "# ArqonBus beside NATS JetStream\n\n\
         Written by `arqon-bench nats --page docs/bench`; [README.md](README.md) says what is measured and how.\n\n\
         - {date}, Linux {kernel}, {cpus} CPUs; clients and all servers on this one machine and disk\n\
         - ArqonBus {arqon}, nats-server {nats}\n\
         - medians of {rounds} rounds of {round_s} s a side, in turn; spread is the slowest and the fastest round\n\
         - random payloads, no compression, linger {linger} ms\n\n",
        date = report.date,
        kernel = report.kernel,
        cpus = report.cpus,
        arqon = report.arqon_version,
        nats = report.nats_version,
        rounds = report.rounds,
        round_s = report.round_s,
        linger = report.linger_ms,
    );
    // Writing to a string cannot fail, here and below.
    for (file, title, _) in charts(report) {
        let _ = writeln!(out, "![{title}]({file})\n");
    }
    out.push_str("## Targets\n\n| case | JetStream | | ratio | target | |\n|---|---|---|---|---|---|\n");
    for row in &report.cases {
        for verdict in &row.targets {
            let (name, sync) = (&row.name, sync_text(row));
            let word = if verdict.met { "met" } else { "**not met**" };
            let (what, ratio, target) = (verdict.what, verdict.ratio, &verdict.target);
            let _ = writeln!(out, "| {name} | {sync} | {what} | {ratio:.2} | {target} | {word} |");
        }
    }
    out.push_str(
        "\n## Figures\n\n| case | side | msg/s | spread | MB/s | p50 us | p99 us | servers' CPU s/M | clients' CPU s/M \
         | memory MB | an acknowledgement means | client |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut last = "";
    for row in &report.cases {
        if last != row.name
            && let Some(own) = &row.arqon
        {
            out.push_str(&line(&row.name, "ArqonBus", own));
        }
        last = &row.name;
        out.push_str(&line(&row.name, "JetStream", &row.nats));
    }
    out.push_str(
        "\n## Settings tried\n\n| case | side | setting | msg/s | p50 us | p99 us |\n|---|---|---|---|---|---|\n",
    );
    for one in &report.tries {
        let (rate, case, side, setting) = (thousands(one.msgs_per_s), one.case, &one.side, &one.setting);
        let _ = writeln!(out, "| {case} | {side} | {setting} | {rate} | {:.0} | {:.0} |", one.p50_us, one.p99_us);
    }
    out
}

fn line(name: &str, side: &str, figures: &Figures) -> String {
    let optional = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.0}"));
    let [least, most] = figures.msgs_per_s_spread.map(thousands);
    format!(
        "| {name} | {side} | {} | {least} to {most} | {:.1} | {} | {} | {:.2} | {:.2} | {:.0} | {} | {} |\n",
        thousands(figures.msgs_per_s),
        figures.mb_per_s,
        optional(figures.p50_us),
        optional(figures.p99_us),
        figures.cpu_s_per_million,
        figures.client_cpu_s_per_million,
        figures.memory_mb,
        figures.durability,
        figures.client,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nats::report::tests::report;

    #[test]
    fn the_page_has_every_figure_once_and_its_charts() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &report()).unwrap();
        let page = std::fs::read_to_string(dir.path().join("nats.md")).unwrap();
        assert_eq!(page.matches("| publish-r3-128 | ArqonBus |").count(), 1, "{page}");
        assert_eq!(page.matches("| publish-r3-128 | JetStream |").count(), 2, "{page}");
        assert!(page.contains("| 1,000,000 |") && page.contains("| 20.00 | at least 10x | met |"), "{page}");
        assert!(page.contains("(nats-throughput.svg)") && !page.contains("nats-latency.svg"), "{page}");
        let chart = std::fs::read_to_string(dir.path().join("nats-throughput.svg")).unwrap();
        assert!(chart.contains("1,000,000 msg/s") && chart.contains("JetStream (sync always)"), "{chart}");
    }

    #[test]
    fn numbers_are_grouped_by_three_digits() {
        assert_eq!([0.0, 999.0, 1_000.0, 1_234_567.4].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }
}
