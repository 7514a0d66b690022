//! What README.md shows, and what becomes of processes and data when somebody stops or dies.

use std::path::Path;
use std::time::Duration;

use crate::running::{Cluster, arqon, documents, eventually, fail, is_running, succeed};

#[test]
fn events_and_jobs_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let bus = folder.path().join("bus");
    let cluster = Cluster::start(1, &bus);
    succeed(&mut cluster.arqon(&["topic", "create", "demo.events", "--partitions", "2"]), b"");
    let receipts = documents(&mut cluster.arqon(&["publish", "demo.events", "--key", "k", "--json"]), b"one\ntwo\n");
    assert_eq!(receipts.len(), 2);
    assert!(receipts.iter().all(|receipt| receipt["durability"] == "majority-fsync"), "{receipts:?}");
    assert_eq!(receipts[0]["partition"], receipts[1]["partition"], "one key, one partition");

    // Through the Shield, with a schema and bytes that are no text.
    let shield = cluster.text("shield");
    let args = ["publish", "demo.events", "--server", &shield, "--whole", "--schema", "demo.bytes.v1"];
    succeed(&mut cluster.arqon(&args), &[0xff, b'\n', 0]);
    let pids = cluster.pids();
    assert_eq!(pids.len(), 2, "one node and a Shield");
    cluster.stop();
    assert!(pids.iter().all(|pid| !is_running(*pid)));

    let cluster = Cluster::start(1, &bus);
    let args = ["consume", "demo.events", "--from", "earliest", "--limit", "3", "--json"];
    let mut events = documents(&mut cluster.arqon(&args), b"");
    events.sort_by_key(|event| event["time_ms"].as_u64());
    assert_eq!(events[0]["payload"], "one");
    assert_eq!(events[1]["payload"], "two");
    assert_eq!((&events[2]["payload_base64"], &events[2]["schema"]), (&"/woA".into(), &"demo.bytes.v1".into()));
    // Plain output is the payload, and a position is exclusive of what lies before it.
    let partition = events[0]["partition"].to_string();
    let offset = events[1]["offset"].to_string();
    let args = ["consume", "demo.events", "--partition", &partition, "--from", &offset, "--limit", "1"];
    assert_eq!(succeed(&mut cluster.arqon(&args), b""), "two\n");
    cluster.stop();
}

#[test]
fn a_command_works_a_queue() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(1, folder.path());
    succeed(&mut cluster.arqon(&["topic", "create", "demo.jobs"]), b"");
    let topics = &documents(&mut cluster.arqon(&["topic", "list", "--json"]), b"")[0]["topics"];
    let names: Vec<&str> = topics.as_array().unwrap().iter().filter_map(|topic| topic["topic"].as_str()).collect();
    assert_eq!(names, ["demo.jobs", "demo.jobs.dead", "demo.results"]);
    succeed(&mut cluster.arqon(&["publish", "demo.jobs"]), b"ada\ngrace\n");

    // The first attempt of the second job fails; the job comes back.
    let exec = "if [ $ARQON_JOB_OFFSET = 1 ] && [ $ARQON_JOB_ATTEMPT = 1 ]; then exit 3; fi; tr a-z A-Z";
    let args =
        ["work", "demo.jobs", "--group", "upper", "--limit", "2", "--retry-delay", "50ms", "--exec", exec, "--json"];
    let outcomes = documents(&mut cluster.arqon(&args), b"");
    assert_eq!(outcomes.iter().filter(|outcome| outcome["settled"] == true).count(), 2, "{outcomes:?}");
    assert!(outcomes.iter().any(|outcome| outcome["detail"].as_str().unwrap().contains("exit code 3")), "{outcomes:?}");

    let args = ["consume", "demo.results", "--from", "earliest", "--stop-at-end", "--json"];
    let results = documents(&mut cluster.arqon(&args), b"");
    let payloads: Vec<_> = results.iter().map(|result| result["payload"].as_str().unwrap()).collect();
    assert_eq!(payloads, ["ADA", "GRACE"]);
    assert_eq!(results[1]["cause"]["offset"], 1);
    assert_eq!(results[1]["cause"]["attempt"], 2);

    let status = &documents(&mut cluster.arqon(&["cluster", "status", "--json"]), b"")[0];
    assert_eq!((&status["leaderless_count"], &status["nodes"][0]["reachable"]), (&0.into(), &true.into()));
    let told = succeed(&mut arqon(&["--version"]), b"");
    let version = told.split_whitespace().nth(1).unwrap();
    assert_eq!(status["nodes"][0]["program"], version, "a node tells the version of its program");
    assert!(told.contains("between nodes: protocol versions 1 to 2") && version.contains('-'), "{told}");
    assert!(succeed(&mut cluster.arqon(&["topic", "describe", "demo.jobs"]), b"").contains("upper: settled to 2"));
    succeed(&mut cluster.arqon(&["topic", "delete", "demo.jobs"]), b"");
    fail(&mut cluster.arqon(&["topic", "describe", "demo.jobs"]), b"", 1);
    cluster.stop();
}

#[test]
fn a_token_allows_what_it_says_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(1, folder.path());
    succeed(&mut cluster.arqon(&["topic", "create", "a.events"]), b"");
    let key = folder.path().join("token.pem").display().to_string();
    let token = succeed(
        &mut arqon(&["token", "--key", &key, "--tenant", "local", "--subject", "x", "--permission", "publish:a.*"]),
        b"",
    );
    succeed(cluster.arqon(&["publish", "a.events"]).env("ARQON_TOKEN", token.trim()), b"x\n");
    let args = ["consume", "a.events", "--from", "earliest", "--limit", "1"];
    let error = fail(cluster.arqon(&args).env("ARQON_TOKEN", token.trim()), b"", 1);
    assert!(error.contains("AUTHORIZATION_DENIED") && error.contains("a.events"), "{error}");
    cluster.stop();
}

#[test]
fn the_log_can_be_read_without_its_node() {
    let folder = tempfile::tempdir().unwrap();
    let bus = folder.path().join("bus");
    let cluster = Cluster::start(1, &bus);
    succeed(&mut cluster.arqon(&["topic", "create", "a.events"]), b"");
    let input: String = (0..1_000).map(|number| format!("event number {number}\n")).collect();
    succeed(&mut cluster.arqon(&["publish", "a.events"]), input.as_bytes());
    cluster.stop();
    let data = bus.join("node-1").display().to_string();
    let report = &documents(&mut arqon(&["log", "verify", &data, "--json"]), b"")[0];
    assert_eq!((&report["valid"], &report["records"]), (&true.into(), &1_000.into()), "{report}");
    let document = &documents(&mut arqon(&["log", "inspect", &data, "--json", "--batches"]), b"")[0];
    assert_eq!((&document["cluster"], &document["node"]), (&"local".into(), &1.into()));
    assert!(succeed(&mut arqon(&["log", "inspect", &data]), b"").contains("1000 records"));

    let events: Vec<_> = documents(&mut arqon(&["log", "dump", &data, "--json"]), b"");
    let (events, others): (Vec<_>, Vec<_>) = events.into_iter().partition(|line| line["kind"] == "data");
    let payloads: std::collections::BTreeSet<_> = events.iter().map(|event| event["payload"].to_string()).collect();
    assert_eq!((events.len(), payloads.len()), (1_000, 1_000));
    assert!(
        others.iter().any(|line| line["group"] == 0 && line["text"].to_string().contains("a.events")),
        "{others:?}"
    );
    let (group, last) = (events[0]["group"].to_string(), events.last().unwrap()["offset"].as_u64().unwrap());
    let args = ["log", "dump", &data, "--group", &group, "--from", "100", "--limit", "2"];
    let lines = succeed(&mut arqon(&args), b"");
    assert_eq!(lines.lines().count(), 2);
    for (line, offset) in lines.lines().zip(100..) {
        for part in [format!("group {group} "), format!(" data offset {offset} "), "payload \"event number ".to_owned()]
        {
            assert!(line.contains(&part), "{part} in {line}");
        }
    }
    assert!(last >= 102, "the first log has enough events to start in the middle");
    assert!(fail(&mut arqon(&["log", "dump", &data, "--group", "999"]), b"", 1).contains("group 999"));

    // One flipped bit in the middle of the records.
    let segment = segment_with(&document["logs"], &data, b"event number 500");
    let mut bytes = std::fs::read(&segment).unwrap();
    let at = position(&bytes, b"event number 500").unwrap();
    bytes[at] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let place = segment.strip_prefix(&data).unwrap().display().to_string();
    for command in [vec!["verify"], vec!["inspect"], vec!["dump"], vec!["dump", "--json"]] {
        let mut args = vec!["log", command[0], &data];
        args.extend(&command[1..]);
        let output = arqon(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        let (text, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(error.contains("1 place is damaged"), "{command:?}: {error}");
        assert!(text.contains(&place) && text.contains("byte"), "{command:?} names file and byte: {text}");
    }

    // The segment is gone altogether.
    std::fs::remove_file(&segment).unwrap();
    let output = arqon(&["log", "verify", &data, "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &report["valid"]), (Some(1), &false.into()), "{report}");
    assert!(report["damage"].to_string().contains("is missing"), "{report}");
}

fn position(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

fn segment_with(logs: &serde_json::Value, data: &str, text: &[u8]) -> std::path::PathBuf {
    let segments = logs.as_array().unwrap().iter().flat_map(|log| log["segments"].as_array().unwrap());
    let mut paths = segments.map(|segment| Path::new(data).join(segment["path"].as_str().unwrap()));
    paths.find(|path| position(&std::fs::read(path).unwrap(), text).is_some()).unwrap()
}

#[test]
fn nothing_is_left_behind_when_arqon_up_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start_new(3, folder.path());
    let pids = cluster.pids();
    assert_eq!(pids.len(), 4);
    assert!(pids.iter().all(|pid| is_running(*pid)));
    cluster.kill();
    eventually("the end of all processes", Duration::from_secs(60), || pids.iter().all(|pid| !is_running(*pid)));
}

#[test]
fn a_node_that_dies_is_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(3, folder.path());
    succeed(&mut cluster.arqon(&["topic", "create", "a.events"]), b"");
    let pid = rustix::process::Pid::from_raw(cluster.pids()[0]).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    eventually("the return of node 1", Duration::from_secs(30), || {
        let output = cluster.arqon(&["cluster", "status", "--json"]).output().unwrap();
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        status["answered_by"] == 1 && status["leaderless_count"] == 0
    });
    succeed(&mut cluster.arqon(&["publish", "a.events"]), b"still here\n");
    cluster.stop();
}

#[test]
fn prepare_writes_everything_and_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = arqon(&["up", "--nodes", "3", "--prepare", "--json", "--data"]);
    let document = documents(command.arg(folder.path()), b"").remove(0);
    assert_eq!(document["pids"], serde_json::json!([]));
    assert_eq!(document["server"].as_str().unwrap().split(',').count(), 3);
    for name in ["node-1.toml", "node-2.toml", "node-3.toml", "shield.toml", "token"] {
        assert!(folder.path().join(name).exists(), "{name}");
    }
    // The same directory again is the same cluster, and another size is refused.
    let mut command = arqon(&["up", "--nodes", "3", "--prepare", "--json", "--data"]);
    assert_eq!(documents(command.arg(folder.path()), b"")[0]["server"], document["server"]);
    let error = fail(arqon(&["up", "--nodes", "1", "--prepare", "--data"]).arg(folder.path()), b"", 1);
    assert!(error.contains("--nodes 3"), "{error}");
}
