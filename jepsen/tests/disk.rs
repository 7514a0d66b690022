//! A FUSE disk as a node sees it: what was synced is there after a cut, what was not may be gone, and trouble
//! shows as the errors of a real disk. Needs root, and a machine that lets it mount.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Lines, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::LazyLock,
    time::{Duration, Instant},
};

use arqon_jepsen::{Machine, Need};
use arqon_storage::RealDisk;
use rustix::fs::{FallocateFlags, OFlags, fallocate, statvfs};

/// Looked at once: what is tried carries the number of this process in its name.
static MACHINE: LazyLock<Machine> = LazyLock::new(|| Machine::look(false, Err(String::new())));

struct Disk {
    child: Child,
    /// Its end is the disk's end.
    orders: Option<ChildStdin>,
    answers: Lines<BufReader<ChildStdout>>,
    dir: tempfile::TempDir,
}

impl Disk {
    /// `None` where it cannot be had.
    fn start() -> Option<Self> {
        if let Err(why) = MACHINE.has(Need::FuseDisk) {
            eprintln!("not run: no disk that is a program can be mounted here: {why}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("disk")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_arqon-jepsen"));
        command.arg("disk").arg(dir.path().join("store")).arg(dir.path().join("disk"));
        let stderr = File::create(dir.path().join("stderr")).unwrap();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let (orders, answers) = (child.stdin.take(), child.stdout.take().unwrap());
        let mut disk = Self { child, orders, answers: BufReader::new(answers).lines(), dir };
        assert_eq!(disk.answer(), r#""ready""#);
        Some(disk)
    }

    fn order(&mut self, text: &str) -> String {
        writeln!(self.orders.as_mut().unwrap(), "{text}").unwrap();
        self.answer()
    }

    fn answer(&mut self) -> String {
        let Some(line) = self.answers.next() else {
            panic!("the disk has ended: {}", fs::read_to_string(self.dir.path().join("stderr")).unwrap());
        };
        line.unwrap()
    }

    fn trouble(&mut self, field: &str, value: &str) {
        let fields = [
            "write_errors_percent",
            "sync_errors_percent",
            "full",
            "rot_percent",
            "delay_ms_min",
            "delay_ms_max",
            "seed",
        ];
        let of = |name: &&str| {
            let none = if *name == "full" { "false" } else { "0" };
            format!("\"{name}\":{}", if *name == field { value } else { none })
        };
        let text = format!("{{\"trouble\":{{{}}}}}", fields.iter().map(of).collect::<Vec<_>>().join(","));
        assert_eq!(self.order(&text), r#""ready""#);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("disk").join(name)
    }

    fn sync_names(&self) {
        File::open(self.path(".")).unwrap().sync_all().unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(self.orders.take());
        self.child.wait().unwrap();
    }
}

#[test]
fn synced_bytes_and_names_survive_cuts_and_the_page_cache_does_not_hide_what_is_lost() {
    let Some(mut disk) = Disk::start() else { return };
    let mut lost_count = 0;
    for seed in 0..20 {
        let path = disk.path(&format!("file-{seed}"));
        // As a log is written: space ahead, then whole blocks past the page cache.
        let flags = OFlags::DIRECT.bits() as i32;
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).custom_flags(flags).open(&path);
        let file = file.unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
        let mut buffer = vec![0u8; 3 * 4096];
        let shift = buffer.as_ptr().align_offset(4096);
        let block = &mut buffer[shift..shift + 4096];
        block.fill(7);
        file.write_all_at(block, 0).unwrap();
        file.sync_data().unwrap();
        disk.sync_names();
        block.fill(9);
        file.write_all_at(block, 4096).unwrap();
        assert_eq!(fs::read(&path).unwrap()[4096], 9);
        drop(file);
        let answer = disk.order(&format!("{{\"cut\":{{\"seed\":{seed}}}}}"));
        assert!(answer.contains("lost"), "{answer}");
        let bytes = fs::read(&path).unwrap();
        assert_eq!((bytes.len(), &bytes[..4096]), (1 << 20, &[7; 4096][..]));
        lost_count += usize::from(bytes[4096..8192].contains(&0));
    }
    assert!((5..20).contains(&lost_count), "{lost_count} of 20");
}

#[test]
fn trouble_is_what_a_bad_disk_says_and_is_counted() {
    let Some(mut disk) = Disk::start() else { return };
    let file = File::create(disk.path("a")).unwrap();
    file.write_all_at(b"before", 0).unwrap();
    disk.trouble("write_errors_percent", "100");
    assert_eq!(file.write_all_at(b"x", 0).unwrap_err().raw_os_error(), Some(5));
    disk.trouble("sync_errors_percent", "100");
    file.write_all_at(b"x", 0).unwrap();
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(5));
    assert!(disk.order("\"count\"").contains("\"sync_errors\":1"));
    disk.trouble("full", "true");
    assert_eq!(file.write_all_at(b"more", 6).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    file.write_all_at(b"BEFORE", 0).unwrap();
    assert_eq!(statvfs(disk.path(".")).unwrap().f_bavail, 0);
    disk.trouble("delay_ms_max", "300");
    let begin = Instant::now();
    for _ in 0..20 {
        file.write_all_at(b"slow", 0).unwrap();
    }
    assert!(begin.elapsed() > Duration::from_millis(300), "{:?}", begin.elapsed());
    disk.trouble("full", "false");
    file.sync_all().unwrap();
    assert_eq!(disk.order("\"off\""), r#""ready""#);
    assert!(file.write_all_at(b"x", 0).is_err() && File::open(disk.path("a")).is_err());
}

/// The story: a node made its data directory, synced everything in it, and acknowledged. The power went, and the
/// directory was gone with all that was in it, as nobody had synced its own name.
#[test]
fn a_new_data_directory_survives_a_cut() {
    let Some(mut disk) = Disk::start() else { return };
    for seed in 0..12 {
        let root = disk.path(&format!("node-{seed}/data"));
        RealDisk::create(&root).unwrap();
        let answer = disk.order(&format!("{{\"cut\":{{\"seed\":{seed}}}}}"));
        assert!(answer.contains("lost"), "cut {seed}: {answer}");
        assert!(root.metadata().unwrap().is_dir(), "cut {seed}");
    }
}

/// The story: the last files were closed, which the kernel tells the disk later, and the power was cut. One thread
/// of the disk had just been handed such a close when the connection ended, and the disk did not come back.
#[test]
fn a_disk_comes_back_though_files_were_closed_just_before_the_cut() {
    let Some(mut disk) = Disk::start() else { return };
    for seed in 0..150 {
        let files: Vec<File> = (0..64).map(|_| File::create(disk.path("file")).unwrap()).collect();
        drop(files);
        let answer = disk.order(&format!("{{\"cut\":{{\"seed\":{seed}}}}}"));
        assert!(answer.contains("lost"), "cut {seed}: {answer}");
    }
}
