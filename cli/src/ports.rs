//! Loopback ports for the servers of a local cluster.
//!
//! The ports of one node lie around a base as the defaults do around 7700:
//!
//! ```text
//!   base + 0 client   + 1 peers   + 5 control plane   + 10 Shield   + 20 admin   + 21 admin of the Shield
//! ```
//!
//! A node that was killed comes back on the same ports, so they are taken from below the range
//! that the kernel gives to outgoing connections.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use uuid::Uuid;

use crate::Failure;

/// Where the first node of `arqon up` goes when those ports are free.
pub const BASE_DEFAULT: u16 = 7700;
/// From the client port to the control plane.
pub const CONTROL_STEP: u16 = 5;
/// From the client port to the Shield.
pub const SHIELD_STEP: u16 = 10;

const PEER_STEP: u16 = 1;
const ADMIN_STEP: u16 = 20;
const SHIELD_ADMIN_STEP: u16 = 21;
const STEPS: [u16; 6] = [0, PEER_STEP, CONTROL_STEP, SHIELD_STEP, ADMIN_STEP, SHIELD_ADMIN_STEP];
/// Distance between the bases of two nodes.
const STRIDE: u16 = 30;
const FIRST: u16 = 20_000;
const SLOT_COUNT: u16 = 400;
const TRY_COUNT_MAX: usize = 200;

/// The ports of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    base: u16,
}

impl Ports {
    /// `host:port` for clients.
    pub fn client(self) -> String {
        loopback(self.base)
    }

    /// `host:port` for the other nodes.
    pub fn peer(self) -> String {
        loopback(self.base + PEER_STEP)
    }

    /// `host:port` of the gRPC control plane.
    pub fn control(self) -> String {
        loopback(self.base + CONTROL_STEP)
    }

    /// `host:port` of metrics and health.
    pub fn admin(self) -> String {
        loopback(self.base + ADMIN_STEP)
    }

    /// `host:port` of the Shield.
    pub fn shield(self) -> String {
        loopback(self.base + SHIELD_STEP)
    }

    /// `host:port` of the Shield's metrics and health.
    pub fn shield_admin(self) -> String {
        loopback(self.base + SHIELD_ADMIN_STEP)
    }

    /// Whether all ports are free right now.
    fn free(self) -> bool {
        // All are held together, so that a port that two steps share would show.
        let held: Option<Vec<TcpListener>> = STEPS.iter().map(|step| listen(self.base + step)).collect();
        held.is_some()
    }
}

fn loopback(port: u16) -> String {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port)).to_string()
}

fn listen(port: u16) -> Option<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()
}

/// Ports for `count` nodes: the default ones when `prefer_default` and all are free, else any.
///
/// # Errors
/// No free ports were found.
pub fn find(count: u16, prefer_default: bool) -> Result<Vec<Ports>, Failure> {
    if prefer_default {
        let ports: Vec<Ports> = (0..count).map(|node| Ports { base: BASE_DEFAULT + node * STRIDE }).collect();
        if ports.iter().all(|ports| ports.free()) {
            return Ok(ports);
        }
    }
    let mut found: Vec<Ports> = Vec::new();
    for _ in 0..TRY_COUNT_MAX {
        if found.len() == usize::from(count) {
            break;
        }
        let slot = (Uuid::new_v4().as_u128() % u128::from(SLOT_COUNT)) as u16;
        let ports = Ports { base: FIRST + slot * STRIDE };
        if !found.contains(&ports) && ports.free() {
            found.push(ports);
        }
    }
    if found.len() < usize::from(count) {
        return Err(Failure::failed(format!("no free loopback ports for {count} nodes")));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_server_gets_a_port_of_its_own() {
        let nodes = find(5, false).unwrap();
        let all: HashSet<String> = nodes
            .iter()
            .flat_map(|ports| {
                [ports.client(), ports.peer(), ports.control(), ports.admin(), ports.shield(), ports.shield_admin()]
            })
            .collect();
        assert_eq!(all.len(), 5 * STEPS.len());
    }

    #[test]
    fn a_taken_port_is_passed_over() {
        let ports = find(1, false).unwrap()[0];
        let _held = TcpListener::bind(ports.control()).unwrap();
        assert!(!ports.free());
    }
}
