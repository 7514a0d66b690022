//! The token of a granted job: who may write its one result, proven to any broker by a MAC.
//!
//! ```text
//!     0  4  key id, little-endian
//!     4 16  first half of HMAC-SHA256(key, claims)
//!    20  .  claims: protobuf `LeaseClaims`
//! ```

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use ring::hmac;

use crate::wire::LeaseClaims;

/// Size of a lease key's secret in bytes.
pub const LEASE_KEY_SIZE: usize = 32;
const MAC_SIZE: usize = 16;
const CLAIMS_AT: usize = 4 + MAC_SIZE;

/// One of the cluster's replicated keys.
#[derive(Clone)]
pub struct LeaseKey {
    id: u32,
    key: hmac::Key,
}

/// Why a token is refused. Says nothing about the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseRejected {
    /// Not a token at all.
    #[error("lease token is malformed")]
    Malformed,
    /// Signed with a key that this cluster does not have (any more).
    #[error("lease token is signed with the unknown key {0}")]
    UnknownKey(u32),
    /// The MAC does not match.
    #[error("lease token has a wrong signature")]
    Signature,
}

impl LeaseKey {
    /// A key from its replicated state.
    #[must_use]
    pub fn new(id: u32, secret: &[u8; LEASE_KEY_SIZE]) -> Self {
        Self { id, key: hmac::Key::new(hmac::HMAC_SHA256, secret) }
    }

    /// The id that tokens name.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The token for `claims`.
    #[must_use]
    pub fn sign(&self, claims: &LeaseClaims) -> Bytes {
        let mut out = BytesMut::with_capacity(self.token_size(claims));
        self.sign_into(claims, &mut out);
        out.freeze()
    }

    /// Appends the token for `claims` to `out`.
    pub fn sign_into(&self, claims: &LeaseClaims, out: &mut BytesMut) {
        let start = out.len();
        out.put_u32_le(self.id);
        out.put_bytes(0, MAC_SIZE);
        claims.encode(out).expect("a growing buffer has room");
        let (front, claims) = out[start..].split_at_mut(CLAIMS_AT);
        front[4..].copy_from_slice(&hmac::sign(&self.key, claims).as_ref()[..MAC_SIZE]);
    }

    /// Size of the token for `claims` in bytes.
    #[must_use]
    pub fn token_size(&self, claims: &LeaseClaims) -> usize {
        CLAIMS_AT + claims.encoded_len()
    }

    /// The claims of `token`, if one of `keys` signed it.
    ///
    /// # Errors
    /// [`LeaseRejected`].
    pub fn verify(keys: &[Self], token: &[u8]) -> Result<LeaseClaims, LeaseRejected> {
        if token.len() < CLAIMS_AT {
            return Err(LeaseRejected::Malformed);
        }
        let id = u32::from_le_bytes([token[0], token[1], token[2], token[3]]);
        let key = keys.iter().find(|key| key.id == id).ok_or(LeaseRejected::UnknownKey(id))?;
        let (mac, claims) = (&token[4..CLAIMS_AT], &token[CLAIMS_AT..]);
        let expected = hmac::sign(&key.key, claims);
        // Constant time: the position of the first wrong byte must not show.
        let difference = expected.as_ref().iter().zip(mac).fold(0u8, |acc, (a, b)| acc | (a ^ b));
        if std::hint::black_box(difference) != 0 {
            return Err(LeaseRejected::Signature);
        }
        LeaseClaims::decode(claims).map_err(|_| LeaseRejected::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_proves_its_claims_and_nothing_else() {
        let keys = [LeaseKey::new(1, &[1; 32]), LeaseKey::new(2, &[2; 32])];
        let claims = LeaseClaims { topic: "a.jobs".into(), offset: 9, attempt: 2, ..Default::default() };
        let token = keys[1].sign(&claims);
        let mut two = BytesMut::from(&b"one"[..]);
        keys[1].sign_into(&claims, &mut two);
        assert_eq!((&two[..3], &two[3..], token.len()), (&b"one"[..], &token[..], keys[1].token_size(&claims)));
        assert_eq!(LeaseKey::verify(&keys, &token), Ok(claims));
        for at in 0..token.len() {
            let mut forged = token.to_vec();
            forged[at] ^= 1;
            assert!(LeaseKey::verify(&keys, &forged).is_err(), "byte {at}");
        }
        assert_eq!(LeaseKey::verify(&keys[..1], &token), Err(LeaseRejected::UnknownKey(2)));
        assert_eq!(LeaseKey::verify(&keys, &token[..10]), Err(LeaseRejected::Malformed));
    }
}
