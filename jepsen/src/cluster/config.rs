//! The configurations that `arqon up --prepare` writes, moved to hosts of their own.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::Error;

/// Where a node is to be.
pub(super) struct Place {
    /// Nodes up to this number form the cluster; the others know everybody and wait to be added.
    pub members: u64,
    /// Address of each node, from the first on, unless all stay on the loopback.
    pub hosts: Option<Vec<String>>,
    /// Data directory.
    pub data: PathBuf,
}

/// What a node listens on.
#[derive(Debug, Deserialize)]
pub(super) struct Listen {
    pub client: String,
    pub peer: String,
    pub control: String,
    pub admin: String,
}

/// Moves the configuration of node `number` in `dir`; gives its file and what it listens on.
pub(super) fn place(dir: &Path, number: u64, place: &Place) -> Result<(PathBuf, Listen), Error> {
    let path = dir.join(format!("node-{number}.toml"));
    let wrong = |text: &str| Error::new(format!("{}: {text}", path.display()));
    let text = std::fs::read_to_string(&path)
        .map_err(|error| wrong(&format!("{error}; arqon up --prepare should have written it")))?;
    let mut config: Table = toml::from_str(&text).map_err(|error| wrong(error.message()))?;
    move_to(&mut config, number, place).ok_or_else(|| wrong("is not what arqon up --prepare writes"))?;
    let listen = config.get("listen").cloned().ok_or_else(|| wrong("has no [listen]"))?;
    let listen: Listen = listen.try_into().map_err(|error: toml::de::Error| wrong(error.message()))?;
    let text = toml::to_string(&config).map_err(|error| wrong(&error.to_string()))?;
    std::fs::write(&path, text).map_err(|error| wrong(&error.to_string()))?;
    Ok((path, listen))
}

/// `None` where something is missing.
fn move_to(config: &mut Table, number: u64, place: &Place) -> Option<()> {
    config.insert("data".to_owned(), Value::String(place.data.to_str()?.to_owned()));
    if let Some(hosts) = &place.hosts {
        // Outside of this mode a node listens on the loopback alone, or wants certificates.
        config.insert("dev".to_owned(), Value::Boolean(true));
        let host_of = |node: u64| hosts.get(usize::try_from(node).ok()?.checked_sub(1)?);
        rehost(config.get_mut("listen")?.as_table_mut()?, host_of(number)?);
        for peer in config.get_mut("peers").and_then(Value::as_array_mut).into_iter().flatten() {
            let peer = peer.as_table_mut()?;
            let node = u64::try_from(peer.get("node")?.as_integer()?).ok()?;
            rehost(peer, host_of(node)?);
        }
    }
    if number <= place.members
        && let Some(peers) = config.get_mut("peers").and_then(Value::as_array_mut)
    {
        let is_member = |peer: &Value| {
            let node = peer.get("node").and_then(Value::as_integer).and_then(|node| u64::try_from(node).ok());
            node.is_none_or(|node| node <= place.members)
        };
        peers.retain(is_member);
    }
    Some(())
}

/// Puts all addresses of a table on another host.
fn rehost(table: &mut Table, host: &str) {
    for (_, value) in table.iter_mut() {
        if let Value::String(address) = value
            && let Some((_, port)) = address.rsplit_once(':')
        {
            *address = format!("{host}:{port}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
node = 1
data = "node-1"
[listen]
client = "127.0.0.1:10"
peer = "127.0.0.1:11"
control = "127.0.0.1:12"
admin = "127.0.0.1:13"
[[peers]]
node = 1
peer = "127.0.0.1:11"
[[peers]]
node = 2
peer = "127.0.0.1:21"
"#;

    fn placed(members: u64, number: u64) -> Table {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(format!("node-{number}.toml")), TEXT).unwrap();
        let hosts = Some(vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()]);
        let (path, listen) = place(dir.path(), number, &Place { members, hosts, data: "/disk/data".into() }).unwrap();
        assert_eq!(listen.admin, format!("10.0.0.{number}:13"));
        toml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn addresses_move_and_members_do_not_know_the_spares() {
        let member = placed(1, 1);
        assert_eq!(member["data"].as_str(), Some("/disk/data"));
        assert_eq!(member["peers"].as_array().unwrap().len(), 1);
        let spare = placed(1, 2);
        assert_eq!(spare["peers"].as_array().unwrap().len(), 2);
        assert_eq!(spare["peers"][1]["peer"].as_str(), Some("10.0.0.2:21"));
    }

    #[test]
    fn a_file_of_another_form_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("node-1.toml"), "node = 1\n").unwrap();
        let error = place(dir.path(), 1, &Place { members: 1, hosts: None, data: "d".into() }).unwrap_err();
        assert!(error.to_string().contains("node-1.toml"), "{error}");
    }
}
