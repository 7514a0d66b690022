//! `arqon-bench rounds`: what it costs to make a round of writes to many files durable, each way
//! that the disk can be asked. The measurement behind the flush scheduler of storage/.
//!
//! ```text
//!   one round: SIZE bytes to each of N files, over blocks that are written and synced already,
//!              then durable, all of them
//!   a single file: the same for groups from 4 KiB to 1 MiB, with CPU per GB
//!   reader: a map of the same file reads each group as soon as it is durable
//! ```

mod files;
mod meter;
mod store;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arqon_jepsen::parse_time;
use serde::Serialize;

use self::{
    files::{Files, Way},
    meter::Sample,
    store::Logs,
};

/// Sizes of one group in the cases of a single file, in bytes.
const GROUP_SIZES: [usize; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// Largest file of a case, so that all of them fit on a small disk.
const FILE_SIZE_MAX: usize = 64 << 20;
/// Bytes of all files of a case together.
const FILES_SIZE: usize = 1 << 30;

/// Arguments of `rounds`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  arqon-bench rounds --files 1000 --sizes 4096\n\n\
    docs/adr/0004-flush-many-files.md says what follows from the figures.")]
pub struct RoundsArgs {
    /// Dirty files in a round
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,10,100,1000")]
    files: Vec<usize>,
    /// Bytes that each file gets in a round, a multiple of 4096
    #[arg(long, value_name = "BYTES,...", value_delimiter = ',', default_value = "4096,65536", value_parser = parse_size)]
    sizes: Vec<usize>,
    /// Only ways whose name holds one of these
    #[arg(long, value_name = "TEXT,...", value_delimiter = ',')]
    ways: Vec<String>,
    /// Time of each figure
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_time)]
    time: Duration,
    /// Directory on the disk to measure, made when missing [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

fn parse_size(text: &str) -> Result<usize, String> {
    match text.trim().parse() {
        Ok(size) if (4096..=1 << 20).contains(&size) && size % 4096 == 0 => Ok(size),
        _ => Err("must be a multiple of 4096 up to 1048576".to_owned()),
    }
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
struct Line {
    case: &'static str,
    files: usize,
    size: usize,
    way: String,
    #[serde(flatten)]
    sample: Sample,
}

/// What was measured, and on what.
#[derive(Clone, Debug, Serialize)]
pub struct Rounds {
    lines: Vec<Line>,
    kernel: String,
    cpus: usize,
    file_system: String,
}

/// Measures every way.
///
/// # Errors
/// The disk refuses something.
pub async fn run(args: RoundsArgs) -> Result<Rounds, String> {
    let stop = Arc::new(AtomicBool::new(false));
    // Dropped when the run is given up: the thread ends with its figure then, and cleans up.
    let _stop = StopOnDrop(Arc::clone(&stop));
    let measuring = tokio::task::spawn_blocking(move || measure(&args, &stop));
    measuring.await.map_err(|error| error.to_string())?
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn measure(args: &RoundsArgs, stop: &AtomicBool) -> Result<Rounds, String> {
    let temporary = crate::own::temporary_directory(args.dir.as_deref())?;
    let dir = temporary.path();
    let failed = |error: std::io::Error| format!("{}: {error}", dir.display());
    let wanted = |way: &str| args.ways.is_empty() || args.ways.iter().any(|text| way.contains(text.as_str()));
    let mut lines = Vec::new();
    let mut add = |case, files, size, way: String, sample| {
        let line = Line { case, files, size, way, sample };
        eprintln!("{}", text(&line));
        lines.push(line);
        if stop.load(Ordering::SeqCst) { Err("stopped".to_owned()) } else { Ok(()) }
    };
    eprintln!("{HEAD}");
    for &size in &args.sizes {
        for &count in &args.files {
            if Way::all().iter().any(|way| wanted(&way.name())) {
                let file_size = (FILES_SIZE / count).clamp(size, FILE_SIZE_MAX);
                let files = Files::create(dir, count, file_size, size).map_err(failed)?;
                for way in Way::all().into_iter().filter(|way| wanted(&way.name()) && way.threads() <= count) {
                    let sample = files.measure(way, args.time).map_err(failed)?;
                    add("round", count, size, way.name(), sample)?;
                }
            }
            for backend in store::BACKENDS.into_iter().filter(|(name, _)| wanted(name)) {
                let logs = Logs::open(dir, count, backend.1)?;
                add("round", count, size, backend.0.to_owned(), logs.measure(size, args.time)?)?;
                logs.remove()?;
            }
        }
    }
    for size in GROUP_SIZES {
        let files = Files::create(dir, 1, FILE_SIZE_MAX, size).map_err(failed)?;
        for way in Way::single().into_iter().filter(|way| wanted(&way.name())) {
            add("one file", 1, size, way.name(), files.measure(way, args.time).map_err(failed)?)?;
            let (write, read) = files.measure_with_reader(way, args.time).map_err(failed)?;
            add("one file, read", 1, size, way.name(), write)?;
            add("its map reader", 1, size, way.name(), read)?;
        }
    }
    Ok(Rounds {
        lines,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism().map_or(0, usize::from),
        file_system: meter::file_system(dir),
    })
}

const HEAD: &str = "case            files    bytes way                        rounds   p50 us   p99 us     MB/s  \
    flushes  CPU us/round  CPU s/GB  machine s/GB";

fn text(line: &Line) -> String {
    let sample = &line.sample;
    format!(
        "{:<15} {:>5} {:>8} {:<25} {:>7} {:>8.0} {:>8.0} {:>8.1} {:>8} {:>13.0} {:>9.2} {:>13.2}",
        line.case,
        line.files,
        line.size,
        line.way,
        sample.rounds,
        sample.p50_us,
        sample.p99_us,
        sample.mb_per_s,
        sample.flushes_per_round.map_or("-".to_owned(), |count| format!("{count:.1}")),
        sample.cpu_us_per_round,
        sample.cpu_s_per_gb,
        sample.machine_cpu_s_per_gb,
    )
}

impl Rounds {
    /// One JSON document on one line.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers and text only")
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out: Vec<String> = vec![HEAD.to_owned()];
        out.extend(self.lines.iter().map(text));
        out.push(format!("{} CPUs, Linux {}, {}", self.cpus, self.kernel, self.file_system));
        out.join("\n")
    }
}
