//! Whatever a user gets wrong is answered with one line that names it, and the right exit code.

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use crate::running::{Cluster, arqon, documents, fail, succeed};
use arqon_proto::{TokenAlgorithm, TokenKeyPair, TokenSigner};

/// A configuration of one node on ports that the system chooses.
fn node_config(folder: &Path, rest: &str) -> String {
    let pair = TokenKeyPair::generate().unwrap();
    fs::write(folder.join("token.pub.pem"), pair.public_key_pem).unwrap();
    let path = folder.join("node.toml");
    let text = format!(
        "node = 1\ncluster = \"one\"\ndata = \"data\"\ncluster_secret = \"0123456789abcdefghijklmnopqrstuv\"\n{rest}\n\
         [auth]\n[[auth.keys]]\nalgorithm = \"EdDSA\"\npublic_key_file = \"token.pub.pem\"\n"
    );
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn listen(client: &str) -> String {
    let other = |name: &str| format!("{name} = \"127.0.0.1:0\"\n");
    format!("[listen]\nclient = \"{client}\"\n{}{}{}", other("peer"), other("control"), other("admin"))
}

#[test]
fn without_a_server() {
    let folder = tempfile::tempdir().unwrap();
    // Below the ports that others are given: nobody listens there.
    let closed = "127.0.0.1:9".to_owned();
    let notes = folder.path().join("notes.png");
    fs::write(&notes, "no picture").unwrap();
    let input = folder.path().display().to_string();
    let key = folder.path().join("none.pem").display().to_string();
    let token = |command: &mut std::process::Command| {
        command.env("ARQON_TOKEN", "t");
    };
    let cases: [(&[&str], i32, &[&str]); 9] = [
        (&["publish", "a.b", "--server", &closed], 1, &["cannot reach", &closed]),
        (&["topic", "list", "--server", "127.0.0.1:1"], 1, &["cannot reach the control plane", "127.0.0.1:6"]),
        (&["topic", "list", "--server", "ws://127.0.0.1:7710"], 2, &["ws://127.0.0.1:7710", "--control"]),
        (&["publish", "a.b", "--schema", "nope"], 2, &["schema \"nope\"", "version"]),
        (&["demo", "--input", &input], 1, &["notes.png", "not a picture"]),
        (&["demo", "--input", "/nonexistent"], 1, &["/nonexistent"]),
        (&["log", "verify", &input], 1, &[&input]),
        (&["node", "--config", "/nonexistent.toml"], 1, &["/nonexistent.toml"]),
        (&["token", "--key", &key, "--tenant", "a", "--subject", "b"], 1, &["none.pem"]),
    ];
    for (args, code, parts) in cases {
        let mut command = arqon(args);
        token(&mut command);
        let error = fail(&mut command, b"", code);
        for part in parts {
            assert!(error.contains(part), "{args:?}: {error} should name {part}");
        }
    }
    let error = fail(&mut arqon(&["publish", "a.b"]), b"", 2);
    assert!(error.contains("ARQON_TOKEN"), "{error}");
}

#[test]
fn a_key_that_nobody_knows() {
    let folder = tempfile::tempdir().unwrap();
    let path = node_config(folder.path(), "colour = \"red\"");
    let error = fail(&mut arqon(&["node", "--config", &path]), b"", 1);
    assert!(error.contains("node.toml") && error.contains("colour"), "{error}");
    assert!(!folder.path().join("data").exists(), "nothing may be written");
}

#[test]
fn a_port_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let path = node_config(folder.path(), &listen(&address));
    let error = fail(&mut arqon(&["node", "--config", &path]), b"", 1);
    assert!(error.contains(&address) && error.contains("in use"), "{error}");
}

/// It may be one of a cluster that has lost its disk.
#[test]
fn an_empty_data_directory_and_nobody_to_ask() {
    let folder = tempfile::tempdir().unwrap();
    let path = node_config(folder.path(), &listen("127.0.0.1:0"));
    let error = fail(&mut arqon(&["node", "--config", &path]), b"", 1);
    assert!(error.contains("bootstrap") && error.contains("[[peers]]"), "{error}");
}

#[test]
fn a_data_directory_of_somebody_else() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(1, &folder.path().join("bus"));
    let data = Path::new(&cluster.text("data")).join("node-1");
    cluster.stop();
    let used = |text: &str| text.replace("data = \"data\"", &format!("data = \"{}\"", data.display()));
    let path = node_config(folder.path(), &listen("127.0.0.1:0"));
    fs::write(&path, used(&fs::read_to_string(&path).unwrap())).unwrap();
    let error = fail(&mut arqon(&["node", "--config", &path]), b"", 1);
    assert!(error.contains("node-1") && error.contains("\"local\""), "{error}");

    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("letters.txt"), "dear").unwrap();
    let path = node_config(folder.path(), &listen("127.0.0.1:0"));
    let text = fs::read_to_string(&path).unwrap().replace("data = \"data\"", "data = \"foreign\"");
    fs::write(&path, text).unwrap();
    let error = fail(&mut arqon(&["node", "--config", &path]), b"", 1);
    assert!(error.contains("foreign") && error.contains("letters.txt"), "{error}");
    let error = fail(arqon(&["up", "--data"]).arg(&foreign), b"", 1);
    assert!(error.contains("foreign") && error.contains("not empty"), "{error}");
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1, "nothing may be written");
}

#[test]
fn a_data_directory_of_a_newer_program() {
    let folder = tempfile::tempdir().unwrap();
    let bus = folder.path().join("bus");
    Cluster::start(1, &bus).stop();
    let identity = bus.join("node-1").join("identity");
    let mut bytes = fs::read(&identity).unwrap();
    // docs/format.md, sealed blocks: the version stands at byte 8, the CRC-32 in the last four.
    bytes[8] = 9;
    let end = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&crc);
    fs::write(&identity, &bytes).unwrap();
    let config = bus.join("node-1.toml").display().to_string();
    let error = fail(&mut arqon(&["node", "--config", &config]), b"", 1);
    assert!(error.contains("version 9") && error.contains("identity"), "{error}");
    assert_eq!(fs::read(&identity).unwrap(), bytes, "nothing may be touched");
}

#[test]
fn against_a_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(1, folder.path());
    let error = fail(&mut cluster.arqon(&["publish", "no.such"]), b"x\n", 1);
    assert!(error.contains("TARGET_NOT_FOUND") && error.contains("no.such"), "{error}");
    let error = fail(&mut cluster.arqon(&["topic", "describe", "no.such"]), b"", 1);
    assert!(error.contains("TARGET_NOT_FOUND") && error.contains("no.such"), "{error}");
    let error = fail(&mut cluster.arqon(&["topic", "create", "a b"]), b"", 1);
    assert!(error.contains("VALIDATION_ERROR") && error.contains("a b"), "{error}");

    // What stands before and after an oversized line is told apart.
    succeed(&mut cluster.arqon(&["topic", "create", "a.events"]), b"");
    let error = fail(&mut cluster.arqon(&["topic", "create", "a.events"]), b"", 1);
    assert!(error.contains("ALREADY_EXISTS") && error.contains("a.events"), "{error}");
    let mut input = b"first\n".to_vec();
    input.extend(vec![b'x'; (1 << 20) + 1]);
    input.extend(b"\nthird\n");
    let error = fail(&mut cluster.arqon(&["publish", "a.events"]), &input, 1);
    assert!(error.contains("line 2: payload") && error.contains("1048576"), "{error}");
    assert!(error.contains("1 published before"), "{error}");
    let events =
        documents(&mut cluster.arqon(&["consume", "a.events", "--from", "earliest", "--stop-at-end", "--json"]), b"");
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["payload"], "first");

    let pair = TokenKeyPair::generate().unwrap();
    let signer = TokenSigner::from_pem(TokenAlgorithm::EdDSA, None, pair.private_key_pem.as_bytes()).unwrap();
    let claims = arqon_proto::Claims {
        sub: "eve".into(),
        tenant_id: "local".into(),
        aud: arqon_proto::AUDIENCE_DEFAULT.into(),
        exp: 4_000_000_000,
        iat: 0,
        role: "admin".into(),
        permissions: vec![],
    };
    let forged = signer.mint(&claims).unwrap();
    for args in [&["publish", "a.events"][..], &["topic", "list"], &["consume", "a.events"]] {
        let error = fail(cluster.arqon(args).env("ARQON_TOKEN", &forged), b"x\n", 1);
        assert!(error.contains("AUTHENTICATION_FAILED") && error.contains("signature"), "{args:?}: {error}");
        assert!(!error.contains(&forged), "the token must not be repeated");
    }
    let shield = cluster.text("shield");
    let error =
        fail(cluster.arqon(&["publish", "a.events", "--server", &shield]).env("ARQON_TOKEN", &forged), b"x\n", 1);
    assert!(error.contains("AUTHENTICATION_FAILED") && error.contains("signature"), "{error}");
    cluster.stop();
}
