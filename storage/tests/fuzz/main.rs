//! The fuzz targets of `fuzz/`, for some seconds each and without a fuzzer: the committed inputs, then
//! mutations of them by a seed, which is the same each time where none is named. `FUZZ_SECONDS` (of each
//! target) and `FUZZ_SEED` change how long and which.

#[path = "../../../fuzz/src/lib.rs"]
mod targets;

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Largest input, in bytes.
const SIZE_MAX: usize = 4_096;
/// Seed of the mutations where `FUZZ_SEED` names none. It is always the same, so that nobody meets by chance a
/// fault that is not of the change under test.
const SEED: u64 = 1;
/// Numbers at which sizes and counts break.
const EDGES: [u64; 12] =
    [0, 1, 4, 127, 128, 4_096, 12_288, 1 << 16, (1 << 22) + 1, (1 << 31) - 1, u32::MAX as u64, u64::MAX];

/// splitmix64 (Steele et al. 2014): a seed replays a run exactly.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, or 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    /// Few of them, seldom many.
    fn few(&mut self, end: usize) -> usize {
        let end = 1 + self.below(end);
        self.below(end)
    }
}

fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = match random.below(16) {
        0 => (0..random.few(600)).map(|_| random.next() as u8).collect(),
        _ => corpus[random.below(corpus.len())].clone(),
    };
    for _ in 0..1 + random.few(8) {
        let at = random.below(bytes.len());
        match random.below(8) {
            _ if bytes.is_empty() => bytes.push(random.next() as u8),
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.next() as u8,
            3 | 4 => {
                let number = EDGES[random.below(EDGES.len())].to_le_bytes();
                let size = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
                bytes[at..at + size].copy_from_slice(&number[..size]);
            }
            5 => bytes.truncate(at),
            6 => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len());
                let size = random.few(64).min(other.len() - from);
                bytes.splice(at..at, other[from..from + size].iter().copied());
            }
            _ => {
                let size = random.few(64).min(bytes.len() - at);
                bytes.drain(at..at + size);
            }
        }
    }
    bytes.truncate(SIZE_MAX);
    bytes
}

fn number_of(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// The committed inputs of a target.
fn corpus_of(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a folder is read").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).expect("an input is read"))).collect()
}

fn fuzz(name: &str) {
    let (_, target) = targets::TARGETS.into_iter().find(|(other, _)| *other == name).expect("a target of this name");
    let corpus = corpus_of(name);
    for (path, input) in &corpus {
        assert!(catch_unwind(|| target(input)).is_ok(), "{} breaks a rule", path.display());
    }
    let corpus: Vec<_> = corpus.into_iter().map(|(_, input)| input).collect();
    assert!(!corpus.is_empty(), "target {name} has no inputs");

    let seed = number_of("FUZZ_SEED").unwrap_or(SEED);
    let (mut random, mut count) = (Random(seed), 0_u64);
    let end = Instant::now() + Duration::from_secs(number_of("FUZZ_SECONDS").unwrap_or(4));
    while Instant::now() < end {
        let input = mutate(&mut random, &corpus);
        count += 1;
        if catch_unwind(|| target(&input)).is_err() {
            let path = std::env::temp_dir().join(format!("arqon-fuzz-{name}-{seed}-{count}"));
            let kept = std::fs::write(&path, &input).map(|()| path.display().to_string());
            // It ends at this input, however long a slower machine takes until there.
            let command = "FUZZ_SECONDS=3600 cargo test --release -p arqon-storage --test fuzz";
            let replay = format!("FUZZ_SEED={seed} {command} {name}");
            panic!("input {count} of target {name} breaks a rule: {kept:?} holds it\nreplay with: {replay}");
        }
    }
    println!("target {name}: {} committed inputs and {count} mutations, FUZZ_SEED={seed}", corpus.len());
}

#[test]
fn batches() {
    fuzz("batch");
}

#[test]
fn records() {
    fuzz("records");
}

#[test]
fn stamps() {
    fuzz("stamps");
}

#[test]
fn frames() {
    fuzz("frame");
}

#[test]
fn recovery() {
    fuzz("recovery");
}

#[test]
fn indexes() {
    fuzz("index");
}
