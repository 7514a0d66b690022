//! How openraft is configured, and the settings that safety rests on.

use std::sync::Arc;

use arqon_proto::planted::{self, Bug};
use openraft::{Config, SnapshotPolicy};

/// Leaders show life this often, in milliseconds.
pub(crate) const HEARTBEAT_MS: u64 = 250;
/// A leader is given up after its lease ([`ELECTION_MS_MAX`] since its last sign of life) and then
/// a random time between the two, so a dead leader is replaced after 1.6 to 2 s. A live one must
/// miss six heartbeats before anybody asks for votes, and pre-votes are refused meanwhile.
pub(crate) const ELECTION_MS_MIN: u64 = 600;
/// See [`ELECTION_MS_MIN`].
pub(crate) const ELECTION_MS_MAX: u64 = 1_000;

pub(crate) fn raft_config(cluster: &str) -> Arc<Config> {
    let config = Config {
        cluster_name: cluster.to_owned(),
        heartbeat_interval: HEARTBEAT_MS,
        heartbeat_min_interval: Some(HEARTBEAT_MS),
        election_timeout_min: ELECTION_MS_MIN,
        election_timeout_max: ELECTION_MS_MAX,
        // Switched on by `pulse.rs` for groups that need an election.
        enable_tick: false,
        enable_pre_vote: Some(true),
        enable_leader_restore: Some(planted::has(Bug::LeaderRestore)),
        allow_log_reversion: Some(false),
        // Retention decides what is dropped, not the number of entries.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: 0,
        install_snapshot_timeout: 10_000,
        // Entries are bounded in bytes by the reader; these only bound the vectors.
        max_payload_entries: 1_024,
        max_append_entries: Some(1_024),
        // Rings of a statistic that is not compiled in.
        log_stage_capacity: Some(1),
        ..Config::default()
    };
    let config = config.validate().expect("constants above satisfy openraft's rules");
    assert_safe(&config);
    Arc::new(config)
}

/// What must hold whatever else is tuned.
fn assert_safe(config: &Config) {
    // A leader that replicated before its own fsync, crashed and came back inside its lease would
    // reissue the same log ids with other payloads.
    let restores = config.enable_leader_restore != Some(planted::has(Bug::LeaderRestore));
    assert!(!restores, "a restarted leader must win an election again");
    // A replica whose log went backwards must be removed and re-added under a new id.
    assert_eq!(config.allow_log_reversion, Some(false), "a shorter log must never be accepted");
    assert_eq!(config.enable_pre_vote, Some(true), "an isolated node must not raise terms");
    assert_eq!(config.snapshot_policy, SnapshotPolicy::Never, "a snapshot at last-applied would drop retained history");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unsafe_settings_are_off() {
        raft_config("lab");
    }

    #[test]
    #[should_panic(expected = "a restarted leader must win an election again")]
    fn leader_restore_is_refused() {
        let mut config = (*raft_config("lab")).clone();
        config.enable_leader_restore = Some(true);
        assert_safe(&config);
    }
}
