//! Addresses for servers that are stopped and started again.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    net::Ipv4Addr,
};

/// A loopback address that nobody else uses: connections leave from 127.0.0.1, so the port of a
/// node that is down is still free when it comes back, whatever else runs on this machine.
pub fn own_loopback() -> Ipv4Addr {
    let [.., high, middle, low] = RandomState::new().build_hasher().finish().to_be_bytes();
    Ipv4Addr::new(127, high | 1, middle, low | 1)
}
