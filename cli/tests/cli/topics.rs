//! `arqon topic alter`, `trim`, `backup` and `restore`.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::running::{Cluster, arqon, documents, fail, run, succeed};

/// What a command line that cannot be understood is answered with.
fn usage(args: &[&str]) -> String {
    let output = run(&mut arqon(args), b"");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    stderr
}

#[test]
fn a_flag_that_is_wrong_is_named() {
    for (args, parts) in [
        (&["topic", "alter", "a"] as &[&str], &["--retention", "--partitions"] as &[&str]),
        (&["topic", "alter", "a", "--partitions", "0"], &["--partitions"]),
        (&["topic", "alter", "a", "--retention", "soon"], &["--retention", "soon"]),
        (&["topic", "trim", "a"], &["--before-time"]),
        (&["topic", "trim", "a", "--before", "7"], &["--partition"]),
        (&["topic", "trim", "a", "--before-time", "yesterday"], &["--before-time", "yesterday"]),
        (&["topic", "backup", "a"], &["--out"]),
    ] {
        let error = usage(args);
        assert!(parts.iter().all(|part| error.contains(part)), "{args:?}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().display().to_string();
    let error = fail(&mut arqon(&["topic", "restore", &dir]), b"", 1);
    assert!(error.contains("manifest.json") && error.contains("not finished"), "{error}");
}

#[test]
fn a_topic_is_altered_and_trimmed_while_it_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(1, folder.path());
    succeed(&mut cluster.arqon(&["topic", "create", "a.events"]), b"");
    succeed(&mut cluster.arqon(&["publish", "a.events"]), b"one\ntwo\n");
    let args = ["topic", "alter", "a.events", "--retention", "1h", "--retention-bytes", "5000000", "--partitions", "3"];
    let told = succeed(&mut cluster.arqon(&args), b"");
    assert_eq!(told, "a.events has 3 partitions, keeps 1h or 5000000 bytes\n");
    let described = &documents(&mut cluster.arqon(&["topic", "describe", "a.events", "--json"]), b"")[0];
    assert_eq!((&described["retention_ms"], &described["retention_bytes"]), (&3_600_000.into(), &5_000_000.into()));
    assert_eq!(described["leaders"].as_array().unwrap().len(), 3);
    assert_eq!((&described["leaders"][0]["committed"], &described["leaders"][0]["refuses"]), (&2.into(), &Value::Null));
    let error = fail(&mut cluster.arqon(&["topic", "alter", "a.events", "--partitions", "2"]), b"", 1);
    assert!(error.contains("VALIDATION_ERROR") && error.contains("never fewer"), "{error}");

    // The segment that is written stays: nothing goes of a small topic, and the answer says so.
    let args = ["topic", "trim", "a.events", "--before-time", "0s", "--json"];
    let trimmed = &documents(&mut cluster.arqon(&args), b"")[0];
    assert_eq!(trimmed["partitions"][0]["log_start"], 0);
    assert_eq!(trimmed["partitions"].as_array().unwrap().len(), 3);
    let error = fail(&mut cluster.arqon(&["topic", "trim", "a.events", "--partition", "0", "--before", "9"]), b"", 1);
    assert!(error.contains("OFFSET_OUT_OF_RANGE") && error.contains("a.events/0 ends at offset 2"), "{error}");

    succeed(&mut cluster.arqon(&["topic", "create", "a.jobs"]), b"");
    succeed(&mut cluster.arqon(&["publish", "a.jobs"]), b"x\n");
    let error = fail(&mut cluster.arqon(&["topic", "alter", "a.jobs", "--partitions", "2"]), b"", 1);
    assert!(error.contains("holds jobs"), "{error}");
    succeed(&mut cluster.arqon(&["work", "a.jobs", "--group", "g", "--limit", "1", "--exec", "cat"]), b"");
    let described = succeed(&mut cluster.arqon(&["topic", "describe", "a.jobs"]), b"");
    assert!(described.contains("queue g: 0 events from offset 1 on, 0 bytes"), "{described}");
    cluster.stop();
}

/// A group that nobody works in any more is found, looked at and deleted; the jobs stay.
#[test]
fn a_group_is_listed_described_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(1, folder.path());
    succeed(&mut cluster.arqon(&["topic", "create", "a.jobs", "--partitions", "2"]), b"");
    succeed(&mut cluster.arqon(&["topic", "create", "a.events"]), b"");
    succeed(&mut cluster.arqon(&["publish", "a.jobs", "--key", "k"]), b"one\ntwo\nthree\n");
    succeed(&mut cluster.arqon(&["work", "a.jobs", "--group", "g", "--limit", "2", "--exec", "cat"]), b"");
    let listed = &documents(&mut cluster.arqon(&["group", "list", "a.jobs", "--json"]), b"")[0];
    assert_eq!((&listed["groups"][0]["group"], &listed["groups"][0]["lag"]), (&"g".into(), &1.into()), "{listed}");
    assert_eq!(listed["partitions_without_answer"], Value::Array(Vec::new()));
    let described = succeed(&mut cluster.arqon(&["group", "describe", "a.jobs", "g"]), b"");
    assert!(described.starts_with("PARTITION") && described.contains("LAG"), "{described}");
    let error = fail(&mut cluster.arqon(&["group", "describe", "a.jobs", "h"]), b"", 1);
    assert!(error.contains("\"h\"") && error.contains("it has g"), "{error}");
    let error = fail(&mut cluster.arqon(&["group", "list", "a.events"]), b"", 1);
    assert!(error.contains("only a jobs topic has groups"), "{error}");

    let error = fail(&mut cluster.arqon(&["group", "delete", "a.jobs", "g"]), b"g\n", 2);
    assert!(error.contains("--yes") && error.contains("nothing was changed"), "{error}");
    let told = succeed(&mut cluster.arqon(&["group", "delete", "a.jobs", "g", "--yes"]), b"");
    assert_eq!(told, "deleted group g of a.jobs in 1 partitions\n");
    let error = fail(&mut cluster.arqon(&["group", "delete", "a.jobs", "g", "--yes"]), b"", 1);
    assert!(error.contains("TARGET_NOT_FOUND") && error.contains("group \"g\""), "{error}");
    assert_eq!(content(&cluster, "a.jobs").len(), 3, "the jobs stay");
    cluster.stop();
}

/// Everything in a topic but what the bus sets anew, in order.
fn content(cluster: &Cluster, topic: &str) -> Vec<Value> {
    let args = ["consume", topic, "--from", "earliest", "--stop-at-end", "--json"];
    let mut events = documents(&mut cluster.arqon(&args), b"");
    for event in &mut events {
        let event = event.as_object_mut().unwrap();
        ["topic", "time_ms", "producer_id", "sequence"].iter().for_each(|name| drop(event.remove(*name)));
    }
    let place = |event: &Value| (event["partition"].as_u64(), event["offset"].as_u64());
    events.sort_by_key(place);
    events
}

fn publish(cluster: &Cluster, topic: &str, range: std::ops::Range<u32>) {
    let lines: String = range.clone().map(|number| format!("event {number}\n")).collect();
    let key = format!("key-{}", range.start);
    succeed(&mut cluster.arqon(&["publish", topic, "--key", &key, "--schema", "a.b.v1"]), lines.as_bytes());
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// The story: a topic is backed up, and made again of the backup under another name. The restore
/// is interrupted and run again; a damaged backup is not restored at all.
#[test]
fn a_backup_brings_back_every_event_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(1, &folder.path().join("bus"));
    let dir = |name: &str| folder.path().join(name).display().to_string();
    let (first, second) = (dir("first"), dir("second"));
    succeed(&mut cluster.arqon(&["topic", "create", "a.events", "--partitions", "3", "--retention", "9h"]), b"");
    for start in [0, 100, 200, 300] {
        publish(&cluster, "a.events", start..start + 100);
    }
    succeed(&mut cluster.arqon(&["publish", "a.events", "--whole"]), &[0xff, b'\n', 0]);
    let told = &documents(&mut cluster.arqon(&["topic", "backup", "a.events", "--out", &first, "--json"]), b"")[0];
    assert_eq!(told["events"], 401);
    let error = fail(&mut cluster.arqon(&["topic", "backup", "a.events", "--out", &first]), b"", 2);
    assert!(error.contains("--out") && error.contains("finished backup"), "{error}");
    publish(&cluster, "a.events", 400..450);
    let before = content(&cluster, "a.events");
    assert_eq!(before.len(), 451);
    succeed(&mut cluster.arqon(&["topic", "backup", "a.events", "--out", &second]), b"");

    // As one backup whose restore stopped after the first part.
    let manifest = |dir: &str| Path::new(dir).join("manifest.json");
    let id_of = |dir: &str| {
        let document: Value = serde_json::from_slice(&fs::read(manifest(dir)).unwrap()).unwrap();
        document["id"].as_str().unwrap().to_owned()
    };
    let (id, other) = (id_of(&first), id_of(&second));
    edit(&manifest(&second), |text| *text = String::from_utf8(text.clone()).unwrap().replace(&other, &id).into());
    succeed(&mut cluster.arqon(&["topic", "restore", &first, "--as", "b.events"]), b"");
    let restore = |dir: &str, name: &str| {
        documents(&mut cluster.arqon(&["topic", "restore", dir, "--as", name, "--json"]), b"").remove(0)
    };
    let told = restore(&second, "b.events");
    assert_eq!((&told["events"], &told["written"]), (&451.into(), &50.into()));
    assert_eq!(content(&cluster, "b.events"), before);
    assert_eq!(restore(&second, "b.events")["written"], 0, "a second restore writes nothing");
    assert_eq!(content(&cluster, "b.events").len(), 451);
    let described = &documents(&mut cluster.arqon(&["topic", "describe", "b.events", "--json"]), b"")[0];
    assert_eq!(described["retention_ms"], 9 * 3_600_000);

    // Another topic's events are not mixed with those of the backup.
    let error = fail(&mut cluster.arqon(&["topic", "restore", &first]), b"", 1);
    assert!(error.contains("a.events/") && error.contains("other events"), "{error}");
    let error = fail(&mut cluster.arqon(&["topic", "restore", &first, "--as", "b.results"]), b"", 2);
    assert!(error.contains("--as") && error.contains("results"), "{error}");
    let sizes: Vec<u64> = (0..3)
        .map(|partition| fs::metadata(Path::new(&first).join(format!("partition-{partition}.batches"))).unwrap().len())
        .collect();
    let largest = (0..3).max_by_key(|at| sizes[*at]).unwrap();
    let path = Path::new(&first).join(format!("partition-{largest}.batches"));
    edit(&path, |bytes| bytes[150] ^= 1);
    let error = fail(&mut cluster.arqon(&["topic", "restore", &first, "--as", "c.events"]), b"", 1);
    assert!(error.contains(&path.display().to_string()) && error.contains("byte 0 is damaged"), "{error}");
    edit(&path, |bytes| {
        bytes[150] ^= 1;
        bytes.pop();
    });
    let error = fail(&mut cluster.arqon(&["topic", "restore", &first, "--as", "c.events"]), b"", 1);
    assert!(error.contains("damaged"), "{error}");
    fail(&mut cluster.arqon(&["topic", "describe", "c.events"]), b"", 1);
    cluster.stop();
}
