//! Takes JSON apart without reading its values, so that they can be passed on byte by byte: a
//! number of forty digits stays what it is.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Deserializer, Error};

/// A whole JSON document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Document<'a> {
    /// An object: its members in order, with their values as they are written.
    Object(Vec<(String, &'a str)>),
    /// Anything else, as it is written.
    Other(&'a str),
}

/// Reads one document.
///
/// # Errors
/// Not UTF-8, not JSON, or more than one document.
pub(crate) fn parse(bytes: &[u8]) -> Result<Document<'_>, Error> {
    let text = std::str::from_utf8(bytes).map_err(<Error as serde::de::Error>::custom)?.trim_ascii();
    serde_json::from_str::<IgnoredAny>(text)?;
    // From here on the grammar is known to be right: only positions are looked for.
    let Some(mut rest) = text.strip_prefix('{') else { return Ok(Document::Other(text)) };
    let mut members = Vec::new();
    while !rest.trim_ascii_start().starts_with('}') {
        let (name, _, tail) = value::<String>(rest)?;
        let tail = tail.trim_ascii_start().trim_start_matches(':');
        let (_, written, tail) = value::<IgnoredAny>(tail)?;
        members.push((name, written));
        rest = tail.trim_ascii_start();
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    Ok(Document::Object(members))
}

/// The value at the front of `text`, how it is written, and what follows.
fn value<T: DeserializeOwned>(text: &str) -> Result<(T, &str, &str), Error> {
    let text = text.trim_ascii_start();
    let mut values = Deserializer::from_str(text).into_iter::<T>();
    let Some(value) = values.next() else {
        return Err(serde::de::Error::custom("a value is missing"));
    };
    let (written, rest) = text.split_at(values.byte_offset());
    Ok((value?, written, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn values_stay_as_they_are_written() {
        let text =
            r#" { "a" : 340282366920938463463374607431768211455.50 ,"b\u0041":[1, {"x":2}],"c":"}\"," ,"d":{}} "#;
        let Document::Object(members) = parse(text.as_bytes()).unwrap() else { panic!("not an object") };
        let members: Vec<_> = members.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        assert_eq!(
            members,
            [
                ("a", "340282366920938463463374607431768211455.50"),
                ("bA", "[1, {\"x\":2}]"),
                ("c", r#""}\",""#),
                ("d", "{}"),
            ]
        );
        assert_eq!(parse(b"{ }").unwrap(), Document::Object(Vec::new()));
        assert_eq!(parse(b" [1] ").unwrap(), Document::Other("[1]"));
    }

    #[test]
    fn what_is_not_json_is_an_error() {
        for bytes in
            [&b""[..], b"{", b"{}x", b"{\"a\"}", b"{\"a\":}", b"{\"a\":1,}", b"{,}", b"\"\xff\"", b"NaN", b"{}{}"]
        {
            assert!(parse(bytes).is_err(), "{bytes:?}");
        }
        let deep = [b"[".repeat(1_000_000), b"]".repeat(1_000_000)].concat();
        assert!(matches!(parse(&deep), Ok(Document::Other(_))), "nesting does not use up the stack");
    }

    proptest! {
        #[test]
        fn members_are_those_that_the_library_reads(
            members in prop::collection::btree_map(".{0,6}", prop::sample::select(vec!["1", "-2.5e3", "null", "[[],{}]", "\"a,}:\\\\\"", "{\"a\":{}}"]), 0..6),
            gap in "[ \n\t]{0,2}",
        ) {
            let inner: Vec<String> = members.iter().map(|(name, value)| format!("{gap}{}{gap}:{gap}{value}{gap}", Value::from(name.as_str()))).collect();
            let text = format!("{gap}{{{}}}{gap}", inner.join(","));
            let Document::Object(found) = parse(text.as_bytes()).unwrap() else { panic!("not an object") };
            let expected: Vec<(String, &str)> = members.into_iter().collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn junk_never_panics(bytes in prop::collection::vec(prop::sample::select(b"{}[]\",:\\ 1a-.e\xff".to_vec()), 0..24)) {
            prop_assert_eq!(parse(&bytes).is_ok(), serde_json::from_slice::<IgnoredAny>(&bytes).is_ok() && std::str::from_utf8(&bytes).is_ok());
        }
    }
}
