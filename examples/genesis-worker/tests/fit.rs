//! What a user of `distill` relies on: the exact grid, true colours, a true statement of the
//! error, and a refusal of what is no checkerboard.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Instant;

use genesis_worker::{AssetType, NotCheckerboard, Picture, Seed, distill, draw, draw_noisy, rms};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// A seed with three or more visible cells along each side, hence with a size and phase that
/// the picture determines.
fn any_seed() -> impl Strategy<Value = Seed> {
    let contrast = (0..3usize, 40..=255u8, any::<bool>());
    (
        (4..=64u32, 0..64u32, 0..64u32),
        (0..=60u32, 0..=60u32),
        (any::<[u8; 3]>(), any::<[u8; 3]>(), contrast),
        prop_oneof![Just(0.0), 0.0..40.0f64],
    )
        .prop_map(|((cell_px, x, y), (more_x, more_y), colors, noise_sigma)| {
            let (color_a, mut color_b, (channel, contrast, up)) = colors;
            // One channel differs by at least 40, in whichever direction there is room.
            let a = color_a[channel];
            color_b[channel] = match (a.checked_add(contrast), a.checked_sub(contrast)) {
                (Some(b), None) => b,
                (None, Some(b)) => b,
                (Some(above), Some(below)) => {
                    if up {
                        above
                    } else {
                        below
                    }
                }
                (None, None) => {
                    if a < 128 {
                        255
                    } else {
                        0
                    }
                }
            };
            let side_min = (2 * cell_px + 1).max(96);
            Seed {
                asset_type: AssetType::NoisyCheckerboard,
                width: side_min + more_x,
                height: side_min + more_y,
                cell_px,
                phase_x_px: x % cell_px,
                phase_y_px: y % cell_px,
                color_a,
                color_b,
                noise_sigma,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1500,
        rng_seed: RngSeed::Fixed(20),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_grid_is_exact_and_the_colours_are_close(seed in any_seed(), noise in any::<u64>()) {
        let picture = draw_noisy(&seed, noise);
        let found = distill(&picture).unwrap();
        prop_assert_eq!(
            (found.cell_px, found.phase_x_px, found.phase_y_px),
            (seed.cell_px, seed.phase_x_px, seed.phase_y_px)
        );
        for (found, made) in [(found.color_a, seed.color_a), (found.color_b, seed.color_b)] {
            for (found, made) in found.iter().zip(made) {
                prop_assert!(found.abs_diff(made) <= 3, "{found} for {made}");
            }
        }
        let noise_error = (found.noise_sigma - seed.noise_sigma).abs();
        prop_assert!(noise_error <= 0.5 + seed.noise_sigma * 0.06, "{}", found.noise_sigma);
        // The redraw is as far from the picture as the noise is, and no further.
        let ideal = rms(&draw(&seed), &picture).unwrap();
        let error = rms(&draw(&found), &picture).unwrap();
        prop_assert!(error <= ideal * 1.02 + 0.5, "{error} against {ideal}");
    }

    #[test]
    fn without_noise_the_seed_comes_back_whole(mut seed in any_seed()) {
        seed.noise_sigma = 0.0;
        prop_assert_eq!(distill(&draw(&seed)), Ok(seed));
    }

    #[test]
    fn noise_alone_is_no_checkerboard(color in any::<[u8; 3]>(), sigma in 0.0..40.0f64, noise in any::<u64>()) {
        let seed = Seed {
            asset_type: AssetType::NoisyCheckerboard,
            width: 64, height: 40, cell_px: 8, phase_x_px: 0, phase_y_px: 0,
            color_a: color, color_b: color, noise_sigma: sigma,
        };
        prop_assert_eq!(distill(&draw_noisy(&seed, noise)), Err(NotCheckerboard::OneColor));
    }
}

fn rgba(width: u32, height: u32, color: impl Fn(f64, f64) -> f64) -> Picture {
    let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (f64::from(x), f64::from(y))));
    let bytes: Vec<u8> =
        pixels.map(|(x, y)| color(x, y) as u8).flat_map(|value| [value, value / 2, 255 - value, 255]).collect();
    Picture::from_rgba(width, height, &bytes).unwrap()
}

#[test]
fn pictures_with_other_shapes_are_refused() {
    let pictures = [
        ("ramp", rgba(96, 80, |x, y| x + y)),
        ("disc", rgba(96, 96, |x, y| if (x - 48.0).hypot(y - 48.0) < 30.0 { 220.0 } else { 20.0 })),
        ("stripes", rgba(96, 96, |x, _| if (x as u32 / 8).is_multiple_of(2) { 200.0 } else { 50.0 })),
        ("waves", rgba(96, 96, |x, y| 128.0 + 100.0 * (x / 9.0).sin() * (y / 5.0).cos())),
        ("bricks", rgba(96, 96, |x, y| if (x as u32 / 12 + y as u32 / 7).is_multiple_of(2) { 200.0 } else { 50.0 })),
    ];
    for (name, picture) in pictures {
        let result = distill(&picture);
        assert!(matches!(result, Err(NotCheckerboard::Structured { .. })), "{name}: {result:?}");
    }
    let flat = rgba(64, 64, |_, _| 90.0);
    assert_eq!(distill(&flat), Err(NotCheckerboard::OneColor));
}

#[test]
fn a_picture_with_few_edges_is_still_drawn_exactly() {
    // One edge along each side, and cells taller than the picture: many sizes draw the same.
    for (width, height, cell_px, phase_x_px) in [(20, 20, 13, 2), (100, 12, 30, 7), (8, 8, 2, 1)] {
        let seed = Seed {
            asset_type: AssetType::NoisyCheckerboard,
            width,
            height,
            cell_px,
            phase_x_px,
            phase_y_px: 0,
            color_a: [10, 20, 30],
            color_b: [0, 200, 30],
            noise_sigma: 0.0,
        };
        let picture = draw(&seed);
        let found = distill(&picture).unwrap();
        assert!(found.cell_px <= cell_px);
        assert_eq!(draw(&found), picture);
    }
}

/// Not a benchmark, but the line of output tells the time of one fit; the bound is far above
/// it and only catches a loss of the running sums.
#[test]
fn a_small_picture_takes_little_time() {
    let (_, picture) = (0..).map(|index| genesis_worker::sample(1, index)).find(|(seed, _)| seed.width > 100).unwrap();
    let start = Instant::now();
    let rounds = 20;
    for _ in 0..rounds {
        distill(&picture).unwrap();
    }
    let each = start.elapsed() / rounds;
    println!("{picture:?}: {each:?}");
    assert!(each.as_millis() < 100, "{each:?}");
}
