//! The sample configurations in `staging/` are accepted by the programs that they are for.

use std::path::PathBuf;

use arqon_operators::HttpShimConfig;

fn sample(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../staging").join(name)
}

#[test]
fn the_node_starts_from_its_sample() {
    let config = arqon_spine::Config::load(&sample("node.toml")).unwrap();
    assert_eq!(config.peers.len(), 3);
    assert!(!config.dev);
}

#[test]
fn the_shield_starts_from_its_sample() {
    let config = arqon_shield::Config::load(&sample("shield.toml")).unwrap();
    assert!(!config.dev);
}

#[test]
fn the_http_shim_starts_from_its_sample() {
    HttpShimConfig::load(&sample("http-shim.toml")).unwrap();
}
