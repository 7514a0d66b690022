//! Checkerboards made from numbers: the same numbers give the same picture on any machine.

use crate::picture::Picture;
use crate::seed::{AssetType, Seed, draw};

/// Least distance of the two colours of a sample, on the channel where they differ most.
const CONTRAST_MIN: u8 = 60;

/// Makes the seed of the `index`-th picture of a set, and the picture with its noise: sides of
/// 64 to 128 pixels, at least two cells along each side, every third picture with strong noise.
#[must_use]
pub fn sample(set: u64, index: u64) -> (Seed, Picture) {
    let mut random = Random::new(set, index);
    let width = random.between(64, 128);
    let height = match random.between(0, 2) {
        0 => width,
        _ => random.between(64, 128),
    };
    let cell_px = random.between(4, width.min(height) / 2 - 4);
    let (color_a, color_b) = loop {
        let (a, b) = (random.color(), random.color());
        if a.iter().zip(b).any(|(a, b)| a.abs_diff(b) >= CONTRAST_MIN) {
            break (a, b);
        }
    };
    let noise_tenths = match index % 3 {
        0 => random.between(0, 30),
        1 => random.between(30, 120),
        _ => random.between(120, 300),
    };
    let seed = Seed {
        asset_type: AssetType::NoisyCheckerboard,
        width,
        height,
        cell_px,
        phase_x_px: random.between(0, cell_px - 1),
        phase_y_px: random.between(0, cell_px - 1),
        color_a,
        color_b,
        noise_sigma: f64::from(noise_tenths) / 10.0,
    };
    let picture = draw_noisy(&seed, random.next());
    (seed, picture)
}

/// Draws a seed with noise of its `noise_sigma` on every channel, cut to 0..=255. The same
/// arguments give the same bytes.
///
/// # Panics
/// As [`draw`].
#[must_use]
pub fn draw_noisy(seed: &Seed, noise: u64) -> Picture {
    let clean = draw(seed);
    let mut random = Random::new(noise, 0);
    let mut values = clean.rgb().iter();
    Picture::from_fn(seed.width, seed.height, |_, _| {
        [0; 3].map(|_: u8| {
            let value = values.next().copied().map_or(0.0, f64::from);
            // The cast cuts to 0..=255.
            (value + seed.noise_sigma * random.normal()).round() as u8
        })
    })
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
/// Written out because committed pictures must come out the same with every version of every
/// dependency, which crates for random numbers do not promise.
struct Random {
    state: u64,
}

impl Random {
    fn new(set: u64, index: u64) -> Self {
        let mut random = Self { state: set };
        let offset = random.next();
        random.state = offset ^ index;
        random.state = random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from `low` to `high`, both included.
    fn between(&mut self, low: u32, high: u32) -> u32 {
        let span = u64::from(high - low) + 1;
        low + (((self.next() >> 32) * span) >> 32) as u32
    }

    fn color(&mut self) -> [u8; 3] {
        self.next().to_le_bytes()[..3].try_into().unwrap_or([0; 3])
    }

    /// A number with mean 0 and standard deviation 1: the sum of twelve even ones, close to
    /// the normal distribution up to three deviations and without any function whose last
    /// digit differs between machines.
    fn normal(&mut self) -> f64 {
        let sum: u32 = (0..3)
            .map(|_| self.next())
            .flat_map(|bits| [bits, bits >> 16, bits >> 32, bits >> 48])
            .map(|bits| (bits & 0xffff) as u32)
            .sum();
        // Twelve times the mean of 0..=65535 is 393,210.
        (f64::from(sum) - 393_210.0) / 65_536.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_repeatable_and_differ() {
        let (first, picture) = sample(1, 0);
        assert_eq!(sample(1, 0), (first.clone(), picture));
        assert_ne!(sample(1, 1).0, first);
        assert_ne!(sample(2, 0).0, first);
    }

    #[test]
    fn the_noise_has_the_deviation_that_the_seed_says() {
        let (mut seed, _) = sample(3, 0);
        (seed.color_a, seed.color_b) = ([128; 3], [128; 3]);
        seed.noise_sigma = 20.0;
        let error = crate::rms(&draw_noisy(&seed, 9), &draw(&seed)).unwrap();
        assert!((error - 20.0).abs() < 0.5, "{error}");
    }
}
