//! Files of zeroes that are on the disk already, and the ways to write a round over them.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{
        Barrier, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use arqon_storage::{Disk, RealDisk};
use rustix::{
    fs::{Advice, OFlags, fadvise, fdatasync, syncfs},
    io::{ReadWriteFlags, pwritev2},
};

use super::meter::{self, Sample};

/// What O_DIRECT wants buffers, offsets and sizes to be multiples of, on any device.
const ALIGNMENT: usize = 4096;

/// How a round is made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// pwrite and fdatasync of one file after the other, on so many threads.
    Each(usize),
    /// pwrite of all, then one syncfs.
    Syncfs,
    /// O_DIRECT pwrite of all on so many threads, then one fdatasync of one of the files.
    DirectOne(usize),
    /// As `DirectOne` on one thread, over zeroes that are in the page cache.
    DirectOneCached,
    /// O_DIRECT pwrite and fdatasync of each, on so many threads.
    DirectEach(usize),
    /// O_DIRECT pwritev2 with RWF_DSYNC, on so many threads.
    DirectDsync(usize),
}

impl Way {
    pub fn all() -> Vec<Self> {
        let mut ways: Vec<Self> = [1, 4, 16, 64].map(Self::Each).into();
        ways.push(Self::Syncfs);
        ways.extend([1, 4, 16, 64].map(Self::DirectOne));
        ways.push(Self::DirectOneCached);
        ways.extend([1, 16].map(Self::DirectEach));
        ways.extend([1, 16].map(Self::DirectDsync));
        ways
    }

    pub fn single() -> [Self; 4] {
        [Self::Each(1), Self::DirectOne(1), Self::DirectOneCached, Self::DirectDsync(1)]
    }

    pub fn threads(self) -> usize {
        match self {
            Self::Each(threads) | Self::DirectOne(threads) | Self::DirectEach(threads) | Self::DirectDsync(threads) => {
                threads
            }
            Self::Syncfs | Self::DirectOneCached => 1,
        }
    }

    pub fn name(self) -> String {
        match self {
            Self::Each(threads) => format!("fdatasync each, {threads} thr"),
            Self::Syncfs => "one syncfs".to_owned(),
            Self::DirectOne(threads) => format!("direct, 1 flush, {threads} thr"),
            Self::DirectOneCached => "direct, 1 flush, cached".to_owned(),
            Self::DirectEach(threads) => format!("direct, sync each, {threads} thr"),
            Self::DirectDsync(threads) => format!("direct, dsync, {threads} thr"),
        }
    }

    fn direct(self) -> bool {
        !matches!(self, Self::Each(_) | Self::Syncfs)
    }

    /// Whether the zeroes lie in the page cache when the rounds begin.
    fn cached(self) -> bool {
        !self.direct() || self == Self::DirectOneCached
    }

    fn write(self, file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
        match self {
            Self::DirectDsync(_) => {
                let written = pwritev2(file, &[IoSlice::new(bytes)], at, ReadWriteFlags::DSYNC)?;
                if written == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
            }
            _ => file.write_all_at(bytes, at),
        }?;
        match self {
            Self::Each(_) | Self::DirectEach(_) => Ok(fdatasync(file)?),
            _ => Ok(()),
        }
    }

    /// What follows when all files are written.
    fn finish(self, any: &File) -> io::Result<()> {
        match self {
            Self::Syncfs => Ok(syncfs(any)?),
            Self::DirectOne(_) | Self::DirectOneCached => Ok(fdatasync(any)?),
            Self::Each(_) | Self::DirectEach(_) | Self::DirectDsync(_) => Ok(()),
        }
    }
}

/// Bytes at an address that O_DIRECT takes.
struct Aligned {
    bytes: Vec<u8>,
    begin: usize,
    size: usize,
}

impl Aligned {
    fn new(size: usize, fill: u8) -> Self {
        let bytes = vec![fill; size + ALIGNMENT];
        let begin = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, begin, size }
    }

    fn get(&self) -> &[u8] {
        &self.bytes[self.begin..self.begin + self.size]
    }
}

/// The files of a case, open in both manners. They are removed with this.
pub struct Files {
    dir: tempfile::TempDir,
    buffered: Vec<File>,
    direct: Vec<File>,
    file_size: usize,
    /// Bytes that each file gets in a round.
    size: usize,
}

impl Files {
    pub fn create(dir: &Path, count: usize, file_size: usize, size: usize) -> io::Result<Self> {
        let dir = tempfile::tempdir_in(dir)?;
        let zeroes = Aligned::new(file_size.min(1 << 20), 0);
        let (mut buffered, mut direct) = (Vec::new(), Vec::new());
        for number in 0..count {
            let path = dir.path().join(number.to_string());
            let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path)?;
            let flags = OFlags::DIRECT.bits() as i32;
            let straight = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path)?;
            for at in (0..file_size).step_by(zeroes.size) {
                file.write_all_at(&zeroes.get()[..zeroes.size.min(file_size - at)], at as u64)?;
            }
            file.sync_all()?;
            buffered.push(file);
            direct.push(straight);
        }
        Ok(Self { dir, buffered, direct, file_size, size })
    }

    fn files(&self, way: Way) -> &[File] {
        if way.direct() { &self.direct } else { &self.buffered }
    }

    /// Brings the page cache into the state that the way is to be measured in.
    fn prepare(&self, way: Way) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        for file in &self.buffered {
            fadvise(file, 0, None, Advice::DontNeed)?;
            if way.cached() {
                for at in (0..self.file_size).step_by(buffer.len()) {
                    file.read_at(&mut buffer, at as u64)?;
                }
            }
        }
        Ok(())
    }

    fn place(&self, number: usize) -> u64 {
        ((number * self.size) % (self.file_size / self.size * self.size)) as u64
    }

    /// Rounds in `way` for `time`.
    pub fn measure(&self, way: Way, time: Duration) -> io::Result<Sample> {
        self.prepare(way)?;
        let files = self.files(way);
        let bytes = Aligned::new(self.size, 0x5a);
        let round_size = self.size * files.len();
        let threads = way.threads();
        if threads == 1 {
            return meter::measure(&files[0], round_size, time, |number| {
                let begin = Instant::now();
                for file in files {
                    way.write(file, bytes.get(), self.place(number))?;
                }
                way.finish(&files[0])?;
                Ok(Some(begin.elapsed()))
            });
        }
        let team = Team::new(threads);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| team.work(files, |file, number| way.write(file, bytes.get(), self.place(number))));
            }
            let sample = meter::measure(&files[0], round_size, time, |number| {
                let begin = Instant::now();
                team.round(number)?;
                way.finish(&files[0])?;
                Ok(Some(begin.elapsed()))
            });
            team.end();
            sample
        })
    }

    /// Rounds of a single file, where a map of it reads each group as soon as it is durable: the
    /// rounds, and the reads.
    pub fn measure_with_reader(&self, way: Way, time: Duration) -> io::Result<(Sample, Sample)> {
        self.prepare(way)?;
        let file = &self.files(way)[0];
        let disk = RealDisk::read_only(self.dir.path());
        let mapped = disk.open("0")?;
        let mut reads = Vec::new();
        let mut bytes = Aligned::new(self.size, 0);
        let begin = bytes.begin;
        let written = meter::measure(file, self.size, time, |number| {
            // A fresh value, so that stale pages show. Once through the file: what was handed out
            // by `view` must not be written again.
            if (number + 1) * self.size > self.file_size {
                return Ok(None);
            }
            bytes.bytes[begin..begin + self.size].fill((number % 251 + 1) as u8);
            let started = Instant::now();
            way.write(file, bytes.get(), self.place(number))?;
            way.finish(file)?;
            let durable = started.elapsed();
            let view = mapped.view(self.place(number), self.size, self.file_size as u64)?;
            if view != bytes.get() {
                return Err(io::Error::other("a map shows other bytes than were written"));
            }
            reads.push(started.elapsed() - durable);
            Ok(Some(durable))
        })?;
        let mut each = reads.into_iter();
        let read = meter::measure(file, self.size, time, |_| Ok(each.next()))?;
        // Only the times were played back; the CPU went into the rounds.
        let read = Sample { cpu_us_per_round: 0.0, cpu_s_per_gb: 0.0, machine_cpu_s_per_gb: 0.0, ..read };
        // The next way is to find zeroes that are written, not these bytes in another state.
        Ok((written, Sample { flushes_per_round: None, ..read }))
    }
}

/// Threads that share the files of a round.
struct Team {
    begin: Barrier,
    end: Barrier,
    number: AtomicUsize,
    next: AtomicUsize,
    over: AtomicBool,
    failed: Mutex<Option<io::Error>>,
}

impl Team {
    fn new(threads: usize) -> Self {
        Self {
            begin: Barrier::new(threads + 1),
            end: Barrier::new(threads + 1),
            number: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            failed: Mutex::new(None),
        }
    }

    fn work(&self, files: &[File], write: impl Fn(&File, usize) -> io::Result<()>) {
        loop {
            self.begin.wait();
            if self.over.load(Ordering::SeqCst) {
                return;
            }
            let number = self.number.load(Ordering::SeqCst);
            while let Some(file) = files.get(self.next.fetch_add(1, Ordering::SeqCst)) {
                if let Err(error) = write(file, number) {
                    *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            }
            self.end.wait();
        }
    }

    fn round(&self, number: usize) -> io::Result<()> {
        self.number.store(number, Ordering::SeqCst);
        self.next.store(0, Ordering::SeqCst);
        self.begin.wait();
        self.end.wait();
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.begin.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// O_DIRECT is refused by some file systems, tmpfs of older kernels among them.
    #[test]
    fn every_way_writes_every_file_and_maps_see_it() {
        let dir = tempfile::tempdir().unwrap();
        let size = 4096;
        let files = match Files::create(dir.path(), 4, 64 << 10, size) {
            Ok(files) => files,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            Err(error) => panic!("{error}"),
        };
        for way in Way::all().into_iter().filter(|way| way.threads() <= 4) {
            let zeroes = vec![0; 64 << 10];
            files.buffered.iter().for_each(|file| file.write_all_at(&zeroes, 0).unwrap());
            let sample = files.measure(way, Duration::from_millis(20)).unwrap();
            assert!(sample.rounds > 0, "{way:?}");
            for file in &files.buffered {
                let mut first = [0; 1];
                file.read_at(&mut first, 0).unwrap();
                assert_eq!(first, [0x5a], "{way:?}");
            }
        }
        for way in Way::single() {
            let (write, read) = files.measure_with_reader(way, Duration::from_millis(20)).unwrap();
            assert!(write.rounds > 0 && read.rounds > 0, "{way:?}");
        }
    }
}
