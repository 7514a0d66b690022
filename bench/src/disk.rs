//! What the disk gives one writer without a bus: the measure for every other figure.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
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
const ROUND_COUNT: usize = 3;
/// `f_type` of tmpfs, as in statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Medians of three rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Disk {
    /// Sequential 1 MiB writes over zero-filled blocks, fdatasync after each; MB (10^6 bytes) per second.
    pub mb_per_s: f64,
    /// 4 KiB write and fdatasync over written blocks, median in microseconds.
    pub p50_us: f64,
    /// The same, 99th percentile.
    pub p99_us: f64,
    /// The directory lies in memory: nothing here says anything about a disk.
    pub tmpfs: bool,
}

/// Measures the disk of `dir`; blocks the thread for some seconds.
///
/// # Errors
/// A file that cannot be written there.
pub fn measure(dir: &Path) -> Result<Disk, String> {
    let failed = |error: io::Error| format!("{}: {error}", dir.display());
    let stat = rustix::fs::statfs(dir).map_err(|error| failed(error.into()))?;
    let path = dir.join("disk-baseline");
    let (mut sequential, mut p50, mut p99) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUND_COUNT {
        let file = zero_filled(&path).map_err(failed)?;
        sequential.push(sequential_mb_per_s(&file).map_err(failed)?);
        let mut times = small_us(&file).map_err(failed)?;
        times.sort_by(f64::total_cmp);
        p50.push(percentile(&times, 0.5));
        p99.push(percentile(&times, 0.99));
    }
    std::fs::remove_file(&path).map_err(failed)?;
    let tmpfs = i128::from(stat.f_type) == i128::from(TMPFS_MAGIC);
    Ok(Disk { mb_per_s: median(&sequential), p50_us: median(&p50), p99_us: median(&p99), tmpfs })
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
        let disk = measure(dir.path()).unwrap();
        assert!(disk.mb_per_s > 0.0 && disk.p50_us > 0.0 && disk.p99_us >= disk.p50_us, "{disk:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(measure(&dir.path().join("none")).unwrap_err().contains("none"));
    }
}
