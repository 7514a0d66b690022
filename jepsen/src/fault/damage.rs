//! Damage to files, on a minority of the nodes, or to one record on all of them.
//!
//! The nodes whose files are damaged are the same ones in a whole run: what two different minorities lost one
//! after the other could be a majority's loss, before the first one is repaired.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rand::{RngExt, rngs::StdRng, seq::IndexedRandom};
use tokio::time::{Instant, sleep};

use super::{Fault, active::Active, nemesis::Nemesis, script::Way};
use crate::{cluster::Error, history::Line, payload};

/// Time for a node to meet the damage.
const MEET_TIME_MAX: Duration = Duration::from_millis(1_500);
/// Time for a node to be ready, or to end because of what it found.
const START_TIME_MAX: Duration = Duration::from_secs(5);
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// What a node's log says, in small letters, when it has met something that is not as it should be.
const SIGNS: [&str; 8] =
    ["damage", "quarantine", "torn", "does not open", "cannot be read", "an older one", "is lost", "cut at"];
/// Where the batches of a segment begin; before it stand its header and its two marks.
const BATCHES: u64 = 12_288;
/// Tries to find a file that can be harmed in the way that was chosen.
const TRY_COUNT_MAX: usize = 5;
/// Characters of a log's line that are told.
const LINE_SIZE_MAX: usize = 200;
/// Time for a segment to hold enough, so that a node which is stopped in good order saves its state and need not apply
/// the record again.
const FULL_TIME_MAX: Duration = Duration::from_secs(60);
/// What is enough, in bytes.
const FULL_SIZE: usize = 600_000;
/// Values of the workload stay below it; a number that is not is no value.
const VALUE_MAX: u64 = 1 << 32;

/// What is done to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    Flip,
    Truncate,
    Delete,
    Zero,
    Restore,
}

/// A part of a file as it once was.
pub(super) struct OldChunk {
    path: PathBuf,
    bytes: Vec<u8>,
}

pub(super) fn wrong(path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.display().to_string();
    move |error| Error::new(format!("cannot damage {path}: {error}"))
}

/// All files of a data directory that hold anything, in the order of their names.
fn files(data: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![data.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let is_temporary = path.extension().is_some_and(|extension| extension == "tmp");
            if path.is_dir() {
                folders.push(path);
            } else if !is_temporary && entry.file_name() != "lock" && entry.metadata().is_ok_and(|data| data.len() > 0)
            {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn is_segment(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "seg")
}

fn is_checkpoint(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("checkpoint"))
}

fn is_wanted(path: &Path, way: Way) -> bool {
    match way {
        Way::Segment => is_segment(path),
        Way::Checkpoint => is_checkpoint(path),
        _ => true,
    }
}

/// A segment more often than not; the other kinds of files are as likely as each other.
fn choose(files: &[PathBuf], random: &mut StdRng) -> Option<PathBuf> {
    let kind = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if is_segment(path) {
            "segment".to_owned()
        } else {
            name.split(['-', '.']).next_back().unwrap_or("").to_owned()
        }
    };
    let kind = |path: &PathBuf| if is_checkpoint(path) { "checkpoint".to_owned() } else { kind(path) };
    let mut kinds: Vec<String> = files.iter().map(kind).collect();
    kinds.sort();
    kinds.dedup();
    let has_segments = kinds.iter().any(|kind| kind == "segment");
    let wanted = match has_segments && random.random_bool(0.5) {
        true => "segment".to_owned(),
        false => kinds.choose(random).cloned().unwrap_or_default(),
    };
    let of_kind: Vec<&PathBuf> = files.iter().filter(|path| kind(path) == wanted).collect();
    of_kind.choose(random).map(|path| (*path).clone())
}

/// The end of what is not zero.
fn content_end(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1)
}

/// Harms `path`; says what was done, or `None` when nothing changed.
fn harm(path: &Path, how: Harm, old: Option<&OldChunk>, random: &mut StdRng) -> io::Result<Option<String>> {
    let bytes = fs::read(path)?;
    let end = content_end(&bytes);
    if end == 0 {
        return Ok(None);
    }
    let file = File::options().read(true).write(true).open(path)?;
    let told = match how {
        Harm::Flip => {
            let (at, bit) = (random.random_range(0..end), random.random_range(0..8));
            file.write_all_at(&[bytes[at] ^ (1 << bit)], at as u64)?;
            format!("bit {bit} of byte {at} of {end} flipped")
        }
        Harm::Truncate => {
            let size = random.random_range(0..end);
            file.set_len(size as u64)?;
            format!("truncated from {end} bytes to {size}")
        }
        Harm::Delete => {
            fs::remove_file(path)?;
            "deleted".to_owned()
        }
        Harm::Zero => {
            let at = random.random_range(0..end);
            let size = random.random_range(512..=65_536).min(end - at);
            if bytes[at..at + size].iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            file.write_all_at(&vec![0; size], at as u64)?;
            format!("{size} bytes zeroed at {at} of {end}")
        }
        Harm::Restore => {
            let Some(old) = old.filter(|old| old.path == path) else { return Ok(None) };
            let changed = |at: usize| (bytes.get(at) != old.bytes.get(at)).then_some(at);
            let from = if is_segment(path) { BATCHES as usize } else { 0 };
            let Some(at) = (from..old.bytes.len().min(bytes.len())).find_map(changed) else { return Ok(None) };
            let at = at / 4096 * 4096;
            let upto = (at + 4096).min(old.bytes.len());
            file.write_all_at(&old.bytes[at..upto], at as u64)?;
            format!("{} bytes at {at} are as they were before", upto - at)
        }
    };
    file.sync_all()?;
    Ok(Some(told))
}

/// Where `probe` stands in a segment of this data directory.
pub(super) fn find_probe(data: &Path, probe: &[u8]) -> Option<(PathBuf, u64)> {
    files(data).into_iter().filter(|path| is_segment(path)).find_map(|path| {
        let bytes = fs::read(&path).ok()?;
        let at = bytes.windows(probe.len()).position(|window| window == probe)?;
        Some((path, at as u64))
    })
}

impl Nemesis<'_> {
    /// Damages a file of a node that may be damaged: while it runs, or while it is down. What a running node does
    /// not meet soon it meets when it starts again.
    pub(super) async fn damage(&mut self, fault: Fault) -> Result<Option<Active>, Error> {
        let Some(node) = self.pick(&self.damaged.clone()) else { return Ok(None) };
        // A checkpoint is read at a start.
        let while_down = fault == Fault::FileDamage || self.way == Way::Checkpoint || self.random.random_bool(0.5);
        self.begins(fault, node, &[node]).await;
        let log_before = fs::metadata(self.cluster.log(node)?).map_or(0, |log| log.len());
        let found_before = self.cluster.metric(node, "log_damage_found").await.unwrap_or(0.0);
        if while_down && self.cluster.runs(node) {
            self.cluster.kill(node).await?;
        }
        let data = self.cluster.data(node)?;
        let Some((path, mut story)) = self.harm_some_file(&data, fault)? else {
            if while_down {
                self.cluster.begin(node)?;
            }
            self.struck(fault, node, false, "nothing to damage was found".to_owned());
            return Ok(Some(Self::over(fault, node)));
        };
        let mut met = if while_down { None } else { self.is_met(node, found_before, log_before, &path).await? };
        if met.is_none() {
            if self.cluster.runs(node) {
                self.cluster.kill(node).await?;
            }
            self.history.record(Line { node: Some(node), ..Line::nemesis("restart") });
            self.cluster.begin(node)?;
            if let Some(why) = self.cluster.refuses(node, START_TIME_MAX).await {
                story.push_str(&format!("; the node refused: {why}; it got an empty disk"));
                self.replace_disk(node).await?;
                self.struck(fault, node, true, story);
                return Ok(Some(Self::over(fault, node)));
            }
            // Earlier damage that is not repaired is found again, too: the count alone says nothing.
            met = self.is_met(node, f64::INFINITY, log_before, &path).await?;
        }
        story.push_str(met.as_deref().unwrap_or("; not met so far"));
        self.struck(fault, node, met.is_some(), story);
        Ok(Some(Self::over(fault, node)))
    }

    /// Damages one file below `data`: which, and what was done to it.
    fn harm_some_file(&mut self, data: &Path, fault: Fault) -> Result<Option<(PathBuf, String)>, Error> {
        let harms = [Harm::Truncate, Harm::Delete, Harm::Zero, Harm::Restore];
        let all: Vec<PathBuf> = files(data).into_iter().filter(|path| is_wanted(path, self.way)).collect();
        let mut done = None;
        for _ in 0..TRY_COUNT_MAX {
            let how = if fault == Fault::BitFlip { Some(&Harm::Flip) } else { harms.choose(&mut self.random) };
            let Some(how) = how.copied() else { break };
            let chosen = match (&self.old, how) {
                (Some(old), Harm::Restore) if old.path.starts_with(data) => Some(old.path.clone()),
                _ => choose(&all, &mut self.random),
            };
            let Some(path) = chosen.filter(|path| path.is_file()) else { continue };
            let told = harm(&path, how, self.old.as_ref(), &mut self.random).map_err(wrong(&path))?;
            let name = path.strip_prefix(data).unwrap_or(&path).display().to_string();
            done = told.map(|told| (path, format!("{name}: {told}")));
            if done.is_some() {
                break;
            }
        }
        // For a later time.
        let segments: Vec<&PathBuf> = all.iter().filter(|path| is_segment(path)).collect();
        if let Some(path) = segments.choose(&mut self.random)
            && let Ok(bytes) = fs::read(path)
        {
            self.old = Some(OldChunk { path: (*path).clone(), bytes });
        }
        Ok(done)
    }

    /// Whether a node has met the damage of `path`, and how it shows.
    async fn is_met(
        &mut self,
        node: u64,
        found_before: f64,
        log_before: u64,
        path: &Path,
    ) -> Result<Option<String>, Error> {
        let log = self.cluster.log(node)?.to_owned();
        let end = Instant::now() + MEET_TIME_MAX;
        while Instant::now() < end {
            let found = self.cluster.metric(node, "log_damage_found").await.unwrap_or(0.0);
            // Those are ranges of entries, perhaps of earlier damage: a checkpoint is told by its own line.
            if found > found_before && checkpoint_index(path).is_none() {
                return Ok(Some(format!("; {} damaged ranges found", found - found_before)));
            }
            if let Some(line) = sign(&log, log_before, path) {
                return Ok(Some(format!("; its log says: {line}")));
            }
            sleep(LOOK_PAUSE).await;
        }
        Ok(None)
    }

    /// Empties the disk of a node that does not start any more, as an operator would, and starts it.
    async fn replace_disk(&mut self, node: u64) -> Result<(), Error> {
        if self.cluster.runs(node) {
            self.cluster.kill(node).await?;
        }
        let data = self.cluster.data(node)?;
        fs::remove_dir_all(&data).map_err(wrong(&data))?;
        self.cluster.begin(node)
    }

    /// Flips the same bit of the same record on all nodes, between a stop in good order and the next start.
    pub(super) async fn damage_everywhere(&mut self) -> Result<Option<Active>, Error> {
        let fault = Fault::BadRecordAll;
        let nodes = self.cluster.nodes();
        let datas = nodes.iter().map(|node| self.cluster.data(*node)).collect::<Result<Vec<_>, _>>()?;
        let end = Instant::now() + FULL_TIME_MAX;
        let mut record = None;
        while record.is_none() && Instant::now() < end {
            sleep(LOOK_PAUSE).await;
            record = datas.first().and_then(|data| self.some_record(data));
        }
        let Record { key, bytes } = record.unwrap_or_default();
        let keys = Vec::from_iter(key);
        self.history.record(Line { keys, nodes: nodes.clone(), ..Line::fault(fault.name(), 0) });
        // All at once: a node that goes on would give the others what it still has in memory.
        for node in &nodes {
            self.cluster.stop(*node).await?;
        }
        let places: Vec<(PathBuf, u64)> = datas.iter().filter_map(|data| find_probe(data, &bytes)).collect();
        let is_everywhere = !bytes.is_empty() && places.len() == nodes.len();
        if is_everywhere {
            for (path, at) in &places {
                flip(path, at + bytes.len() as u64 / 2).map_err(wrong(path))?;
            }
        }
        for node in &nodes {
            self.history.record(Line { node: Some(*node), ..Line::nemesis("restart") });
            self.cluster.begin(*node)?;
        }
        self.settle().await;
        let detail = match places.first().filter(|_| is_everywhere) {
            Some((path, at)) => format!("byte {at} of {} and its copies on {} nodes", path.display(), places.len()),
            None => "no record was found on all nodes".to_owned(),
        };
        self.struck(fault, 0, is_everywhere, detail);
        // A second one could fall into the same batch and set it right.
        self.plan.choice.faults.retain(|other| *other != fault);
        Ok(Some(Self::over(fault, 0)))
    }

    /// A record of a workload from the second quarter of a segment.
    fn some_record(&mut self, data: &Path) -> Option<Record> {
        let segments = files(data).into_iter().filter(|path| is_segment(path));
        let contents = segments.filter_map(|path| fs::read(path).ok()).map(|bytes| (content_end(&bytes), bytes));
        let full: Vec<(usize, Vec<u8>)> = contents.filter(|(end, _)| *end > FULL_SIZE).collect();
        let (end, bytes) = full.choose(&mut self.random)?;
        let from = self.random.random_range(end / 4..end / 2);
        (from..*end).find_map(|at| {
            let value = u64::from_le_bytes(*bytes[at..].first_chunk()?);
            if !(1..VALUE_MAX).contains(&value) {
                return None;
            }
            let mut records = self.plan.keys.iter().map(|key| (key, payload::encode(key, value)));
            let (key, bytes) = records.find(|(_, record)| bytes[at..].starts_with(record))?;
            // One that is hardly more than its number could stand in two places.
            (bytes.len() > 64).then(|| Record { key: Some(key.clone()), bytes })
        })
    }
}

/// A record of a workload; empty where none was found.
#[derive(Default)]
struct Record {
    key: Option<String>,
    bytes: Vec<u8>,
}

/// The group in `logs/GROUP-REPLICA/FILE`.
fn group_of(path: &Path) -> Option<u64> {
    path.parent()?.file_name()?.to_str()?.split_once('-')?.0.parse().ok()
}

pub(super) fn flip(path: &Path, at: u64) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1], at)?;
    file.sync_all()
}

/// The index of a checkpoint, by its name: `checkpoint-KIND-INDEX-TERM`.
fn checkpoint_index(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_string_lossy();
    name.strip_prefix("checkpoint-")?.split('-').nth(1)?.parse().ok()
}

/// The first line of a log, after its first `skip` bytes, that speaks of damage as that of `path` shows. A damaged
/// checkpoint is told at every start, so only the line with its group and index counts, and for no other file.
fn sign(log: &Path, skip: u64, path: &Path) -> Option<String> {
    let bytes = fs::read(log).ok()?;
    let text = String::from_utf8_lossy(bytes.get(skip as usize..)?);
    let speaks = |line: &&str| {
        if !["WARN", "ERROR"].iter().any(|level| line.contains(level)) {
            return false;
        }
        let has = |name: &str, value: u64| line.split_whitespace().any(|word| word == format!("{name}={value}"));
        let is_of_checkpoint = line.contains("checkpoint") && line.contains("does not open");
        if let (Some(index), Some(group)) = (checkpoint_index(path), group_of(path)) {
            return is_of_checkpoint && has("index", index) && has("group", group);
        }
        if is_of_checkpoint {
            return false;
        }
        if let Some(group) = group_of(path)
            && !has("group", group)
            && !line.contains(&format!("of group {group} "))
        {
            return false;
        }
        // A kill leaves torn tails, and earlier damage of another file is met again.
        let names_file = path.file_name().is_some_and(|name| line.contains(&*name.to_string_lossy()));
        if is_segment(path) && !names_file && !line.contains("quarantined") {
            return false;
        }
        let line = line.to_lowercase();
        SIGNS.iter().any(|sign| line.contains(sign))
    };
    text.lines().find(speaks).map(|line| line.chars().take(LINE_SIZE_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn each_harm_changes_the_file_and_says_how() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1.seg");
        let before: Vec<u8> = (0..40_000u32).map(|n| (n % 251) as u8 + 1).collect();
        let mut old = before.clone();
        old[20_000..].fill(0);
        let old = OldChunk { path: path.clone(), bytes: old };
        for how in [Harm::Flip, Harm::Truncate, Harm::Zero, Harm::Restore, Harm::Delete] {
            fs::write(&path, &before).unwrap();
            let mut random = StdRng::seed_from_u64(5);
            assert!(harm(&path, how, Some(&old), &mut random).unwrap().is_some(), "{how:?}");
            let after = fs::read(&path).unwrap_or_default();
            assert_ne!(after, before, "{how:?}");
            if how == Harm::Flip {
                let bits: u32 = after.iter().zip(&before).map(|(a, b)| (a ^ b).count_ones()).sum();
                assert_eq!(bits, 1);
            }
        }
    }

    #[test]
    fn a_file_of_zeroes_is_left_alone_and_the_lock_and_temporary_files_are_none() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [("a.seg", vec![0; 10]), ("lock", vec![1]), ("vote.tmp", vec![1])] {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        assert_eq!(files(dir.path()), [dir.path().join("a.seg")]);
        let mut random = StdRng::seed_from_u64(1);
        assert_eq!(harm(&dir.path().join("a.seg"), Harm::Flip, None, &mut random).unwrap(), None);
    }

    #[test]
    fn what_a_log_says_of_damage_is_found_after_the_part_that_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "WARN damage of old\nINFO no damage\nERROR replica does not open: the vote is bad\n").unwrap();
        let vote = Path::new("vote");
        assert_eq!(sign(&log, 0, vote).as_deref(), Some("WARN damage of old"));
        assert_eq!(sign(&log, 14, vote).as_deref(), Some("ERROR replica does not open: the vote is bad"));
        assert_eq!(sign(&log, 70, vote), None);
        let retention = "WARN the checkpoint of the retention point does not open error=bad group=12 index=34";
        for checkpoint in ["WARN checkpoint does not open, an older one error=bad group=12 index=34", retention] {
            fs::write(&log, checkpoint).unwrap();
            let told = |path: &str| sign(&log, 0, Path::new(path));
            assert_eq!(told("logs/12-5/checkpoint-newest-0034-0002").as_deref(), Some(checkpoint));
            assert_eq!(told("logs/12-5/checkpoint-newest-0035-0002"), None, "damaged before");
            assert_eq!(told("logs/11-5/checkpoint-newest-0034-0002"), None, "damage of another group");
            assert_eq!(told("logs/12-5/0034-0002.seg"), None, "damage of another file");
        }
        fs::write(&log, "WARN other damage group=12 index=34").unwrap();
        assert_eq!(sign(&log, 0, Path::new("logs/12-5/checkpoint-newest-0034-0002")), None, "of entries");
    }
}
