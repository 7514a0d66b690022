//! Time, CPU and device flushes of a number of rounds.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::report::percentile;

/// Rounds that warm up and are not counted.
const WARM_UP_COUNT: usize = 3;
/// Rounds at most, so that times fit in memory.
const ROUND_COUNT_MAX: usize = 200_000;

/// What a number of rounds took; `us` is microseconds, `GB` 10^9 bytes of payload.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    pub rounds: usize,
    pub p50_us: f64,
    pub p99_us: f64,
    pub mb_per_s: f64,
    /// Flushes that the device completed; absent where the kernel does not tell.
    pub flushes_per_round: Option<f64>,
    /// CPU of this process, its threads in the kernel included.
    pub cpu_us_per_round: f64,
    pub cpu_s_per_gb: f64,
    /// CPU of the whole machine, which has the kernel's own threads in it.
    pub machine_cpu_s_per_gb: f64,
}

/// Runs rounds of `size` payload bytes until `time` is over; `round` gets the number of the round
/// and gives the time that counts, or `None` when there is no room for another one.
///
/// # Errors
/// Those of the rounds.
pub fn measure(
    file: &File,
    size: usize,
    time: Duration,
    mut round: impl FnMut(usize) -> io::Result<Option<Duration>>,
) -> io::Result<Sample> {
    let mut number = 0;
    while number < WARM_UP_COUNT && round(number)?.is_some() {
        number += 1;
    }
    let (cpu, machine, flushes) = (process_seconds(), machine_seconds()?, flush_count(file));
    let mut times = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < time && times.len() < ROUND_COUNT_MAX {
        let Some(took) = round(number)? else { break };
        times.push(took.as_secs_f64() * 1e6);
        number += 1;
    }
    let count = times.len().max(1) as f64;
    let cpu = process_seconds() - cpu;
    let machine = machine_seconds()? - machine;
    let flushes = flush_count(file).zip(flushes).map(|(after, before)| (after - before) as f64 / count);
    let seconds = times.iter().sum::<f64>() / 1e6;
    times.sort_by(f64::total_cmp);
    let gb = count * size as f64 / 1e9;
    Ok(Sample {
        rounds: times.len(),
        p50_us: percentile(&times, 0.5),
        p99_us: percentile(&times, 0.99),
        mb_per_s: gb * 1e3 / seconds.max(1e-9),
        flushes_per_round: flushes,
        cpu_us_per_round: cpu * 1e6 / count,
        cpu_s_per_gb: cpu / gb,
        machine_cpu_s_per_gb: machine / gb,
    })
}

fn process_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Time of all CPUs that was neither idle nor waiting, in seconds; proc_stat(5).
fn machine_seconds() -> io::Result<f64> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let fields = text.lines().next().unwrap_or_default().split_ascii_whitespace().skip(1);
    // idle and iowait are fields 4 and 5; guest times are in the others already.
    let busy = fields.take(8).enumerate().filter(|(index, _)| !matches!(index, 3 | 4));
    let ticks: u64 = busy.filter_map(|(_, field)| field.parse::<u64>().ok()).sum();
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Flushes that the device of `file` completed so far: field 16 of its `stat`.
fn flush_count(file: &File) -> Option<u64> {
    let device = file.metadata().ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    text.split_ascii_whitespace().nth(15)?.parse().ok()
}

/// Type and options of the file system that holds `dir`, as /proc/mounts has them.
pub fn file_system(dir: &Path) -> String {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let fields = mounts.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        Some((fields.next()?, fields.next()?, fields.next()?))
    });
    let holding = fields.filter(|(place, _, _)| dir.starts_with(place));
    let longest = holding.max_by_key(|(place, _, _)| place.len());
    longest.map_or("unknown file system".to_owned(), |(_, kind, options)| format!("{kind} ({options})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_end_with_the_room_and_count_their_bytes() {
        let file = tempfile::tempfile().unwrap();
        let room = |number| Ok((number < 13).then_some(Duration::from_millis(2)));
        let sample = measure(&file, 4_000, Duration::from_secs(60), room).unwrap();
        assert_eq!((sample.rounds, sample.p50_us), (10, 2_000.0));
        assert!((sample.mb_per_s - 2.0).abs() < 1e-6, "{sample:?}");
    }

    #[test]
    fn the_file_system_of_proc_is_proc() {
        assert!(file_system(Path::new("/proc/self")).starts_with("proc "));
    }
}
