//! What the disk gives one writer without a bus: the measure for every other figure.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Instant,
};

use serde::Serialize;

use crate::report::{median, percentile};

/// Size of the file that is written over.
const FILE_SIZE: usize = 64 << 20;
/// Size of one sequential write.
const GROUP_SIZE: usize = 1 << 20;
/// Size of one small write.
const SMALL_SIZE: usize = 4 << 10;
/// Small writes per round.
const SMALL_COUNT: usize = 200;
/// `f_type` of tmpfs, as in statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Medians of the rounds, which are spread over the whole run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Disk {
    /// Sequential 1 MiB writes over zero-filled blocks, fdatasync after each; MB (10^6 bytes) per second.
    pub mb_per_s: f64,
    /// 4 KiB write and fdatasync over written blocks, median in microseconds.
    pub p50_us: f64,
    /// The same, 99th percentile.
    pub p99_us: f64,
    /// The smallest median of a round; far from the largest, others use the machine too.
    pub p50_us_min: f64,
    /// The largest median of a round.
    pub p50_us_max: f64,
    /// The directory lies in memory: nothing here says anything about a disk.
    pub tmpfs: bool,
}

/// What one round measured; fields as in [`Disk`].
#[derive(Clone, Copy, Debug)]
struct Round {
    mb_per_s: f64,
    p50_us: f64,
    p99_us: f64,
}

/// The disk below a directory, measured again and again while the nodes are idle.
#[derive(Clone, Debug)]
pub struct Gauge {
    dir: PathBuf,
    tmpfs: bool,
    rounds: Vec<Round>,
}

impl Gauge {
    /// # Errors
    /// A directory that is not there.
    pub fn new(dir: &Path) -> Result<Self, String> {
        let stat = rustix::fs::statfs(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let tmpfs = i128::from(stat.f_type) == i128::from(TMPFS_MAGIC);
        Ok(Self { dir: dir.to_owned(), tmpfs, rounds: Vec::new() })
    }

    /// Whether the directory lies in memory.
    pub fn is_tmpfs(&self) -> bool {
        self.tmpfs
    }

    /// One round more; blocks the thread for about a second.
    ///
    /// # Errors
    /// A file that cannot be written there.
    pub fn measure(&mut self) -> Result<(), String> {
        let failed = |error: io::Error| format!("{}: {error}", self.dir.display());
        let path = self.dir.join("disk-baseline");
        let file = zero_filled(&path).map_err(failed)?;
        let mb_per_s = sequential_mb_per_s(&file).map_err(failed)?;
        let mut times = small_us(&file).map_err(failed)?;
        times.sort_by(f64::total_cmp);
        std::fs::remove_file(&path).map_err(failed)?;
        self.rounds.push(Round { mb_per_s, p50_us: percentile(&times, 0.5), p99_us: percentile(&times, 0.99) });
        Ok(())
    }

    /// The medians of all rounds so far.
    pub fn disk(&self) -> Disk {
        let of = |figure: fn(&Round) -> f64| self.rounds.iter().map(figure).collect::<Vec<_>>();
        let p50 = of(|round| round.p50_us);
        Disk {
            mb_per_s: median(&of(|round| round.mb_per_s)),
            p50_us: median(&p50),
            p99_us: median(&of(|round| round.p99_us)),
            p50_us_min: p50.iter().copied().reduce(f64::min).unwrap_or(0.0),
            p50_us_max: p50.iter().copied().reduce(f64::max).unwrap_or(0.0),
            tmpfs: self.tmpfs,
        }
    }
}

fn zero_filled(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
    let zeros = vec![0; GROUP_SIZE];
    for offset in (0..FILE_SIZE).step_by(GROUP_SIZE) {
        file.write_all_at(&zeros, offset as u64)?;
    }
    file.sync_all()?;
    Ok(file)
}

fn sequential_mb_per_s(file: &File) -> io::Result<f64> {
    let group = vec![0x5a; GROUP_SIZE];
    let begin = Instant::now();
    for offset in (0..FILE_SIZE).step_by(GROUP_SIZE) {
        file.write_all_at(&group, offset as u64)?;
        file.sync_data()?;
    }
    Ok(FILE_SIZE as f64 / 1e6 / begin.elapsed().as_secs_f64())
}

fn small_us(file: &File) -> io::Result<Vec<f64>> {
    let small = vec![0xa5; SMALL_SIZE];
    let mut times = Vec::with_capacity(SMALL_COUNT);
    for index in 0..SMALL_COUNT {
        let begin = Instant::now();
        file.write_all_at(&small, (index * SMALL_SIZE) as u64)?;
        file.sync_data()?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_baseline_is_measured_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut gauge = Gauge::new(dir.path()).unwrap();
        gauge.measure().unwrap();
        let disk = gauge.disk();
        assert!(disk.mb_per_s > 0.0 && disk.p50_us > 0.0 && disk.p99_us >= disk.p50_us, "{disk:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Gauge::new(&dir.path().join("none")).unwrap_err().contains("none"));
    }

    #[test]
    fn one_disturbed_round_does_not_move_the_figures_and_shows() {
        let round = |p50_us| Round { mb_per_s: 100.0, p50_us, p99_us: p50_us };
        let rounds = vec![round(4_000.0), round(120.0), round(110.0)];
        let disk = Gauge { dir: PathBuf::new(), tmpfs: false, rounds }.disk();
        assert_eq!((disk.p50_us, disk.p50_us_min, disk.p50_us_max), (120.0, 110.0, 4_000.0));
    }
}
