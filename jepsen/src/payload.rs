//! Payloads that prove what they are: a value, and bytes that follow from it.

/// Bytes of the value itself.
const VALUE_SIZE: usize = 8;
/// Longest filler, in bytes.
const FILLER_SIZE_MAX: u64 = 700;

/// The payload of `value` in the partition `key` (`TOPIC/NUMBER`): up to 700 bytes besides the value.
#[must_use]
pub fn encode(key: &str, value: u64) -> Vec<u8> {
    let mut state = key.bytes().fold(mix(value), |state, byte| mix(state ^ u64::from(byte)));
    let size = VALUE_SIZE + (state % FILLER_SIZE_MAX) as usize;
    let mut out = Vec::with_capacity(size + VALUE_SIZE);
    out.extend_from_slice(&value.to_le_bytes());
    while out.len() < size {
        state = mix(state);
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(size);
    out
}

/// The value, unless a byte differs from what [`encode`] wrote for this partition.
#[must_use]
pub fn decode(key: &str, payload: &[u8]) -> Option<u64> {
    let value = u64::from_le_bytes(*payload.first_chunk()?);
    (encode(key, value) == payload).then_some(value)
}

/// SplitMix64, by Steele, Lea and Flood (OOPSLA 2014).
fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_and_a_foreign_partition_show() {
        for value in 0..200 {
            let payload = encode("t/1", value);
            assert_eq!(decode("t/1", &payload), Some(value));
            // A short one is little more than its value.
            if payload.len() > 2 * VALUE_SIZE {
                assert_eq!(decode("t/2", &payload), None);
                assert_eq!(decode("u/1", &payload), None);
            }
            for index in 0..payload.len() {
                let mut changed = payload.clone();
                changed[index] ^= 1;
                assert_eq!(decode("t/1", &changed), None, "byte {index} of value {value}");
            }
            assert_eq!(decode("t/1", &payload[..payload.len() - 1]), None);
        }
        assert_eq!(decode("t/1", &[]), None);
    }
}
