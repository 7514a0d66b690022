//! Values of ranges of offsets: jobs that are handed out together cost one entry together.

use std::collections::BTreeMap;

#[derive(Clone, Debug)]
struct Span<V> {
    end: u64,
    value: V,
}

/// A value for each offset of some ranges, which do not overlap. How the offsets are divided into
/// ranges does not count: equal means the same offsets with the same values.
#[derive(Clone, Debug)]
pub(crate) struct Ranges<V> {
    by_first: BTreeMap<u64, Span<V>>,
    len: u64,
}

impl<V> Default for Ranges<V> {
    fn default() -> Self {
        Self { by_first: BTreeMap::new(), len: 0 }
    }
}

impl<V: PartialEq> PartialEq for Ranges<V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.each().eq(other.each())
    }
}

impl<V> Ranges<V> {
    /// How many offsets have a value.
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    pub(crate) fn get(&self, offset: u64) -> Option<&V> {
        let (_, span) = self.by_first.range(..=offset).next_back()?;
        (offset < span.end).then_some(&span.value)
    }

    /// The offset after the last of the range that begins with `first`.
    pub(crate) fn end_of(&self, first: u64) -> Option<u64> {
        self.by_first.get(&first).map(|span| span.end)
    }

    /// Each offset with its value, in order.
    pub(crate) fn each(&self) -> impl Iterator<Item = (u64, &V)> {
        self.iter().flat_map(|(first, end, value)| (first..end).map(move |offset| (offset, value)))
    }

    /// Each range: first offset, offset after the last, value.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64, &V)> {
        self.by_first.iter().map(|(first, span)| (*first, span.end, &span.value))
    }

    /// The parts of `first..end` that have a value, in order.
    pub(crate) fn within(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, u64, &V)> {
        let before = self.by_first.range(..first).next_back().filter(|(_, span)| span.end > first);
        let inside = (first < end).then(|| self.by_first.range(first..end)).into_iter().flatten();
        let cut = move |(from, span): (&u64, &'_ Span<V>)| ((*from).max(first), span.end.min(end));
        before.filter(|_| first < end).into_iter().chain(inside).map(move |entry| {
            let (from, to) = cut(entry);
            (from, to, &entry.1.value)
        })
    }

    /// Gives `first..end` a value.
    ///
    /// # Panics
    /// When one of the offsets has a value, or there are none.
    pub(crate) fn insert(&mut self, first: u64, end: u64, value: V) {
        assert!(first < end && self.within(first, end).next().is_none(), "offsets {first} to {end} are not free");
        self.len += end - first;
        self.by_first.insert(first, Span { end, value });
    }
}

impl<V: Clone> Ranges<V> {
    /// Makes a range begin at `offset` where one goes on over it, and gives its value then.
    pub(crate) fn cut(&mut self, offset: u64) -> Option<V> {
        let (_, span) = self.by_first.range_mut(..offset).next_back()?;
        if span.end <= offset {
            return None;
        }
        let rest = Span { end: span.end, value: span.value.clone() };
        span.end = offset;
        let value = rest.value.clone();
        self.by_first.insert(offset, rest);
        Some(value)
    }

    /// Takes the values of `first..end` away, range by range; `each` gets what was there.
    pub(crate) fn remove(&mut self, first: u64, end: u64, mut each: impl FnMut(u64, V)) {
        self.cut(first);
        self.cut(end);
        while let Some((from, _)) = self.by_first.range(first..end.max(first)).next() {
            let from = *from;
            if let Some(span) = self.by_first.remove(&from) {
                self.len -= span.end - from;
                each(from, span.value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn ranges_hold_what_a_map_of_single_offsets_holds() {
        let mut ranges = Ranges::default();
        let mut map = BTreeMap::new();
        let mut random = 1u64;
        for _ in 0..20_000 {
            // A generator of Lehmer's: the same on every run.
            random = random.wrapping_mul(48_271) % 0x7fff_ffff;
            let (first, len, value) = (random % 200, random / 200 % 20, random / 4_000 % 3);
            let end = first + len;
            let inside: Vec<_> = ranges.within(first, end).flat_map(|(a, b, v)| (a..b).map(|o| (o, *v))).collect();
            assert_eq!(inside, map.range(first..end).map(|(o, v)| (*o, *v)).collect::<Vec<_>>());
            if inside.is_empty() && len > 0 {
                ranges.insert(first, end, value);
                map.extend((first..end).map(|offset| (offset, value)));
            } else {
                ranges.remove(first, end, |_, _| {});
                map.retain(|offset, _| !(first..end).contains(offset));
            }
            assert_eq!(ranges.len(), map.len());
            assert_eq!(ranges.get(first), map.get(&first));
        }
        assert!(ranges.each().map(|(o, v)| (o, *v)).eq(map.into_iter()));
    }

    #[test]
    fn how_the_offsets_are_divided_does_not_count() {
        let (mut one, mut two) = (Ranges::default(), Ranges::default());
        one.insert(3, 6, 'a');
        two.insert(3, 5, 'a');
        assert_ne!(one, two);
        two.insert(5, 6, 'a');
        assert_eq!(one, two);
        assert_eq!((one.cut(4), one.cut(4), one.cut(6)), (Some('a'), None, None));
        assert_eq!(one, two);
    }

    #[test]
    #[should_panic(expected = "not free")]
    fn an_offset_has_one_value() {
        let mut ranges = Ranges::default();
        ranges.insert(3, 6, 'a');
        ranges.insert(5, 7, 'a');
    }
}
