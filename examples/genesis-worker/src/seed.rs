//! The seed: what a checkerboard is made of, and the drawing of it.

use serde::{Deserialize, Serialize};

use crate::fit::{CELL_PX_MAX, CELL_PX_MIN};
use crate::picture::{Picture, PictureError, check_size};

/// The kinds of picture that can be distilled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AssetType {
    /// Square cells of two colours with independent noise on every channel.
    #[default]
    NoisyCheckerboard,
}

/// All that is needed to draw a checkerboard again, but for its noise.
///
/// ```text
///   phase_x_px
///   <-->
///   +--+-----------+   The cell at the top left has color_a and shows its last
///   |  | color_a   |   cell_px - phase_x_px columns and cell_px - phase_y_px rows.
///   |  |  +--------+   Pixel (x, y) has color_a where
///   |  |  | picture    (x + phase_x_px) / cell_px + (y + phase_y_px) / cell_px
///   +--+--+            is even (whole-number division).
/// ```
///
/// Reading one from JSON refuses unknown fields and values out of range, so that a seed from
/// elsewhere is safe to draw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Seed {
    /// The kind of picture.
    pub asset_type: AssetType,
    /// Width of the picture in pixels.
    pub width: u32,
    /// Height of the picture in pixels.
    pub height: u32,
    /// Side of a cell in pixels.
    pub cell_px: u32,
    /// Columns of the first cell that lie left of the picture: 0 to `cell_px - 1`.
    pub phase_x_px: u32,
    /// Rows of the first cell that lie above the picture: 0 to `cell_px - 1`.
    pub phase_y_px: u32,
    /// Red, green and blue of the cell at the top left.
    pub color_a: [u8; 3],
    /// Red, green and blue of its neighbours.
    pub color_b: [u8; 3],
    /// Standard deviation of the noise on a channel before it was cut to 0..=255.
    pub noise_sigma: f64,
}

/// A seed whose values are out of range: which field, and what it may be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InvalidSeed {
    /// Width or height.
    #[error("width and height: {0}")]
    Size(PictureError),
    /// The cell's side.
    #[error("cell_px must be {CELL_PX_MIN} to {CELL_PX_MAX}, not {0}")]
    Cell(u32),
    /// One of the phases.
    #[error("{field} must be below cell_px ({cell_px}), not {phase_px}")]
    Phase {
        /// `phase_x_px` or `phase_y_px`.
        field: &'static str,
        /// Its value in pixels.
        phase_px: u32,
        /// The cell's side in pixels.
        cell_px: u32,
    },
    /// The noise.
    #[error("noise_sigma must be 0 to 255, not {0}")]
    Noise(f64),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchecked {
    asset_type: AssetType,
    width: u32,
    height: u32,
    cell_px: u32,
    phase_x_px: u32,
    phase_y_px: u32,
    color_a: [u8; 3],
    color_b: [u8; 3],
    noise_sigma: f64,
}

impl TryFrom<Unchecked> for Seed {
    type Error = InvalidSeed;

    fn try_from(unchecked: Unchecked) -> Result<Self, InvalidSeed> {
        let seed = Self {
            asset_type: unchecked.asset_type,
            width: unchecked.width,
            height: unchecked.height,
            cell_px: unchecked.cell_px,
            phase_x_px: unchecked.phase_x_px,
            phase_y_px: unchecked.phase_y_px,
            color_a: unchecked.color_a,
            color_b: unchecked.color_b,
            noise_sigma: unchecked.noise_sigma,
        };
        seed.check().map(|()| seed)
    }
}

impl Seed {
    /// Checks that every value is in range.
    ///
    /// # Errors
    /// [`InvalidSeed`] naming the first field that is not.
    pub fn check(&self) -> Result<(), InvalidSeed> {
        check_size(self.width, self.height).map_err(InvalidSeed::Size)?;
        if !(CELL_PX_MIN..=CELL_PX_MAX).contains(&self.cell_px) {
            return Err(InvalidSeed::Cell(self.cell_px));
        }
        for (field, phase_px) in [("phase_x_px", self.phase_x_px), ("phase_y_px", self.phase_y_px)] {
            if phase_px >= self.cell_px {
                return Err(InvalidSeed::Phase { field, phase_px, cell_px: self.cell_px });
            }
        }
        if !(0.0..=255.0).contains(&self.noise_sigma) {
            return Err(InvalidSeed::Noise(self.noise_sigma));
        }
        Ok(())
    }

    /// The colour of a pixel without noise.
    pub(crate) fn color_at(&self, x: u32, y: u32) -> [u8; 3] {
        let column = (x + self.phase_x_px) / self.cell_px;
        let row = (y + self.phase_y_px) / self.cell_px;
        if (column + row).is_multiple_of(2) { self.color_a } else { self.color_b }
    }
}

/// Draws the picture of a seed without its noise: the same seed gives the same bytes.
///
/// # Panics
/// When a seed that was put together by hand breaks [`Seed::check`].
#[must_use]
pub fn draw(seed: &Seed) -> Picture {
    assert_eq!(seed.check(), Ok(()), "a seed to draw must be valid");
    Picture::from_fn(seed.width, seed.height, |x, y| seed.color_at(x, y))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json() -> serde_json::Value {
        serde_json::json!({
            "asset_type": "NoisyCheckerboard", "width": 9, "height": 8, "cell_px": 4,
            "phase_x_px": 3, "phase_y_px": 0, "color_a": [1, 2, 3], "color_b": [200, 100, 50],
            "noise_sigma": 2.5,
        })
    }

    #[test]
    fn phase_shifts_the_cells_to_the_left_and_up() {
        let seed: Seed = serde_json::from_value(json()).unwrap();
        let picture = draw(&seed);
        let reds: Vec<u8> = (0..9).map(|x| picture.rgb()[x * 3]).collect();
        assert_eq!(reds, [1, 200, 200, 200, 200, 1, 1, 1, 1]);
        let column: Vec<u8> = (0..8).map(|y| picture.rgb()[y * 27]).collect();
        assert_eq!(column, [1, 1, 1, 1, 200, 200, 200, 200]);
    }

    #[test]
    fn a_seed_out_of_range_is_refused_by_name() {
        for (field, value, expected) in [
            ("cell_px", serde_json::json!(0), "cell_px"),
            ("width", serde_json::json!(4_000_000_000u32), "width"),
            ("phase_x_px", serde_json::json!(4), "phase_x_px"),
            ("phase_y_px", serde_json::json!(9), "phase_y_px"),
            ("noise_sigma", serde_json::json!(-1.0), "noise_sigma"),
            ("surprise", serde_json::json!(1), "surprise"),
            ("asset_type", serde_json::json!("Plasma"), "Plasma"),
        ] {
            let mut json = json();
            json[field] = value;
            let error = serde_json::from_value::<Seed>(json).unwrap_err().to_string();
            assert!(error.contains(expected), "{field}: {error}");
        }
    }
}
