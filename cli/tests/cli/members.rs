//! A cluster that changes its nodes, as an operator does it.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::running::{Cluster, arqon, documents, eventually, fail, own_host, succeed};

/// A node started beside `arqon up`; killed when dropped.
struct Another(Child);

impl Drop for Another {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The configuration of node 4, on addresses that nobody else has.
fn write_config(folder: &Path) -> [String; 3] {
    let text = std::fs::read_to_string(folder.join("node-3.toml")).unwrap();
    let mut config: toml::Table = text.parse().unwrap();
    let host = own_host();
    let address = |port: u16| format!("{host}:{port}");
    let [client, peer, control, admin] = [7700, 7701, 7705, 7720].map(address);
    config.insert("node".into(), 4.into());
    config.insert("data".into(), "node-4".into());
    let listen = [("client", &client), ("peer", &peer), ("control", &control), ("admin", &admin)];
    let listen: toml::Table = listen.into_iter().map(|(key, at)| (key.to_owned(), at.clone().into())).collect();
    config.insert("listen".into(), listen.into());
    let mut own = toml::Table::new();
    own.insert("node".into(), 4.into());
    for (key, at) in [("client", &client), ("peer", &peer), ("control", &control)] {
        own.insert(key.into(), at.clone().into());
    }
    config["peers"].as_array_mut().unwrap().push(own.into());
    std::fs::write(folder.join("node-4.toml"), config.to_string()).unwrap();
    [client, peer, control]
}

#[test]
fn a_node_is_added_filled_and_the_one_it_stands_in_for_removed() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(3, folder.path());
    succeed(&mut cluster.arqon(&["topic", "create", "a.events", "--partitions", "2"]), b"");
    let input: String = (0..500).map(|number| format!("event {number}\n")).collect();
    succeed(&mut cluster.arqon(&["publish", "a.events"]), input.as_bytes());

    let refused = fail(&mut cluster.arqon(&["cluster", "decommission", "2"]), b"", 1);
    assert!(refused.contains("3 copies and 2 nodes would be left"), "{refused}");
    let refused = fail(&mut cluster.arqon(&["cluster", "remove-node", "2"]), b"", 1);
    assert!(refused.contains("decommission it first"), "{refused}");
    let [client, peer, control] = write_config(folder.path());
    let mut node = arqon(&["node", "--config"]);
    let node = node.arg(folder.path().join("node-4.toml")).stdout(Stdio::null()).stderr(Stdio::null());
    let _node = Another(node.spawn().unwrap());
    let add = ["cluster", "add-node", "4", "--client", &client, "--peer", &peer, "--control-address", &control];
    let refused = fail(
        &mut cluster.arqon(&["cluster", "add-node", "4", "--client", "x", "--peer", "x", "--control-address", "x"]),
        b"",
        1,
    );
    assert!(refused.contains("client_address"), "{refused}");
    assert_eq!(succeed(&mut cluster.arqon(&add), b""), "node 4 is in the cluster\n");
    succeed(&mut cluster.arqon(&["cluster", "decommission", "2"]), b"");
    let removed = &documents(&mut cluster.arqon(&["cluster", "remove-node", "2", "--json"]), b"")[0];
    assert_eq!(removed["removed"], true);
    let status = || documents(&mut cluster.arqon(&["cluster", "status", "--json"]), b"").remove(0);
    eventually("the metadata has three voters", Duration::from_secs(30), || {
        let status = status();
        let nodes = status["nodes"].as_array().unwrap();
        nodes.iter().all(|node| node["metadata_voter"] == true && node["node"] != 2) && nodes.len() == 3
    });
    let topic = &documents(&mut cluster.arqon(&["topic", "describe", "a.events", "--json"]), b"")[0];
    for partition in topic["partitions"].as_array().unwrap() {
        let nodes = partition["replica_nodes"].as_array().unwrap();
        assert!(nodes.contains(&4.into()) && !nodes.contains(&2.into()), "{topic}");
    }
    let to = topic["partitions"][0]["replica_nodes"][2].to_string();
    succeed(&mut cluster.arqon(&["cluster", "transfer-leader", "a.events", "--to", &to]), b"");
    let args = ["consume", "a.events", "--from", "earliest", "--limit", "500", "--json"];
    assert_eq!(documents(&mut cluster.arqon(&args), b"").len(), 500);
    cluster.stop();
}

#[test]
fn what_may_be_lost_is_shown_and_must_be_confirmed() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(3, folder.path());
    succeed(&mut cluster.arqon(&["topic", "create", "a.events"]), b"");
    succeed(&mut cluster.arqon(&["publish", "a.events"]), b"one\ntwo\n");
    let config = folder.path().join("node-1.toml").display().to_string();
    let args = ["cluster", "recover", "--unsafe", "--config", &config, "--lost", "2,3"];
    let running = fail(&mut arqon(&args), b"", 1);
    assert!(running.contains("in use by another process"), "{running}");
    cluster.stop();
    let unconfirmed = fail(&mut arqon(&args), b"", 2);
    assert!(unconfirmed.contains("--confirm local") && unconfirmed.contains("nothing was changed"), "{unconfirmed}");
    let with = |confirm: &str| {
        let mut command = arqon(&args);
        command.args(["--confirm", confirm, "--json"]);
        command
    };
    assert!(fail(&mut with("other"), b"", 1).contains("not the name of the cluster"));
    let partitions = documents(&mut with("local"), b"").remove(0)["partitions"].clone();
    let events = partitions.as_array().unwrap().iter().find(|lost| lost["topic"] == "a.events").unwrap().clone();
    assert_eq!((&events["log_start"], &events["lost_from"]), (&0.into(), &2.into()), "{events}");
}
