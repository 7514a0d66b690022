//! Fitting a checkerboard to a picture by exhaustive least squares.
//!
//! A checkerboard with cells of side `c` is `mean ± step` with the sign `sx(x) * sy(y)`, two
//! square waves. For every `c` and every pair of phases the least-squares fit needs only one
//! sum over the picture, `S = Σ sx sy I`, and the square waves change sign only every `c`
//! pixels, so that running sums make it cheap:
//!
//! ```text
//! columns[y][x]  running sums down each column, once                     w*h
//!   per (c, phase_y): line[x] = Σy sy I, h/c rows of `columns`           w*h/c
//!     per phase_x: S = Σx sx line[x], w/c entries of its running sum     w/c
//! ```
//!
//! All candidates together cost about `CELL_PX_MAX * w * h` additions, each on the three
//! channels at once. Nothing is sampled or guessed, hence the best fit is found under any
//! noise, and whether it is good enough is a separate question.

use crate::picture::Picture;
use crate::seed::{AssetType, Seed};

/// Smallest cell that is looked for, in pixels.
pub const CELL_PX_MIN: u32 = 2;
/// Largest cell that is looked for, in pixels.
pub const CELL_PX_MAX: u32 = 64;

/// The two colours must explain this many times the variance of one residual value. The best
/// of all candidates on noise alone reaches about 30.
const SIGNIFICANCE_MIN: f64 = 60.0;
/// Largest correlation of the residual between neighbouring pixels. Noise has none, whereas
/// the shapes of any other picture stay behind in the residual.
const RESIDUAL_CORRELATION_MAX: f64 = 0.2;
/// A residual below this share of the distance of the two colours is let pass even when it is
/// correlated: softened edges and traces of compression.
const RESIDUAL_SHARE_MAX: f64 = 0.05;
/// Share of a class at 0 or 255 above which that end counts as cut off.
const CUT_OFF_SHARE: f64 = 0.01;

/// Why a picture has no seed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum NotCheckerboard {
    /// No two colours that stand out.
    #[error("not a checkerboard: one colour, or two that do not stand out of the noise")]
    OneColor,
    /// What is left over after the best fit has shapes of its own.
    #[error(
        "not a checkerboard: after the best fit (cell {cell_px} px) neighbouring pixels still correlate by {correlation:.2}, noise stays below {RESIDUAL_CORRELATION_MAX}"
    )]
    Structured {
        /// Cell of the best fit, in pixels.
        cell_px: u32,
        /// Correlation of the residual between neighbours, -1 to 1.
        correlation: f64,
    },
}

/// Finds the seed of a noisy checkerboard.
///
/// Cells of [`CELL_PX_MIN`] to [`CELL_PX_MAX`] pixels are found. Where a picture shows too
/// few edges to tell the cell's size, the smallest that draws the same picture is answered.
///
/// # Errors
/// [`NotCheckerboard`] when the best fit does not describe the picture.
pub fn distill(picture: &Picture) -> Result<Seed, NotCheckerboard> {
    let grid = best_grid(picture).ok_or(NotCheckerboard::OneColor)?;
    let classes = Classes::of(picture, &grid);
    let correlation = classes.residual_correlation(picture, &grid);
    let residual_rms = classes.residual_variance().sqrt();
    if grid.explained < SIGNIFICANCE_MIN * classes.residual_variance() {
        return Err(NotCheckerboard::OneColor);
    }
    if correlation > RESIDUAL_CORRELATION_MAX && residual_rms > RESIDUAL_SHARE_MAX * classes.distance() {
        return Err(NotCheckerboard::Structured { cell_px: grid.cell as u32, correlation });
    }
    let [color_a, color_b] = classes.colors();
    if color_a == color_b {
        return Err(NotCheckerboard::OneColor);
    }
    Ok(Seed {
        asset_type: AssetType::NoisyCheckerboard,
        width: picture.width(),
        height: picture.height(),
        cell_px: grid.cell as u32,
        phase_x_px: grid.phase_x as u32,
        phase_y_px: grid.phase_y as u32,
        color_a,
        color_b,
        noise_sigma: classes.noise_sigma(),
    })
}

/// Red, green, blue and an unused lane, so that one vector instruction adds a pixel. Sums may
/// wrap on the way: what is compared in the end is at most `PIXELS_MAX * 255 < 2^31`, and
/// wrapped additions are exact modulo `2^32`.
type Lanes = [i32; 4];

fn add(left: Lanes, right: Lanes) -> Lanes {
    [0, 1, 2, 3].map(|lane| left[lane].wrapping_add(right[lane]))
}

fn subtract(left: Lanes, right: Lanes) -> Lanes {
    [0, 1, 2, 3].map(|lane| left[lane].wrapping_sub(right[lane]))
}

/// Where a square wave of this cell and phase changes sign inside `0..len`.
fn edges(cell: usize, phase: usize, len: usize) -> impl Iterator<Item = usize> {
    (cell - phase..len).step_by(cell)
}

/// Sum of the signs of a square wave over `0..len`.
///
/// Here and below a wave is +1 in its last cell, whichever that is: with the running sums `R`
/// and the edges `e1 < e2 < ... < ek` the signed sum is then
/// `R(len) - 2 * (R(ek) - R(ek-1) + R(ek-2) - ...)`, one subtraction an edge.
fn sign_sum(cell: usize, phase: usize, len: usize) -> f64 {
    let alternating = edges(cell, phase, len).fold(0.0, |sum, edge| edge as f64 - sum);
    len as f64 - 2.0 * alternating
}

#[derive(Debug)]
struct Grid {
    cell: usize,
    phase_x: usize,
    phase_y: usize,
    /// Sum of squares over all values that the two colours take off.
    explained: f64,
}

impl Grid {
    /// Signs along one axis as class bits: 0 or 1 for each position.
    fn bits(&self, phase: usize, len: usize) -> Vec<usize> {
        (0..len).map(|at| (at + phase) / self.cell % 2).collect()
    }
}

/// The grid of all cells and phases that explains most. `None` when the picture has one
/// colour. Of grids that draw the same, the one with the smallest cell and phase.
fn best_grid(picture: &Picture) -> Option<Grid> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    // Whole numbers below 2^53, on which this arithmetic is exact.
    let count = (width * height) as f64;
    let columns = column_sums(picture, width, height);
    let below = &columns[height * width..];
    let total = below.iter().fold([0; 4], |total, &sum| add(total, sum)).map(f64::from);

    let mut best: Option<Grid> = None;
    // The best fit so far as a fraction, so that candidates are compared without division.
    let (mut best_over, mut best_under) = (0.0, 1.0);
    let mut line: Vec<Lanes> = vec![[0; 4]; width];
    let mut running: Vec<Lanes> = vec![[0; 4]; width + 1];
    for cell in CELL_PX_MIN as usize..=(CELL_PX_MAX as usize).min(width.max(height)) {
        let sums_x: Vec<f64> = (0..cell).map(|phase| sign_sum(cell, phase, width)).collect();
        for phase_y in 0..cell {
            fold_rows(&columns, cell, phase_y, height, &mut line);
            let mut sum = [0; 4];
            for (running, &value) in running[1..].iter_mut().zip(&line) {
                sum = add(sum, value);
                *running = sum;
            }
            let sum_y = sign_sum(cell, phase_y, height);
            for (phase_x, &sum_x) in sums_x.iter().enumerate() {
                let signs = sum_x * sum_y;
                let under = count * count - signs * signs;
                if under == 0.0 {
                    continue; // No edge falls into the picture.
                }
                let signed = edges(cell, phase_x, width).fold([0; 4], |sum, edge| subtract(running[edge], sum));
                let signed = subtract(running[width], add(signed, signed));
                let over: f64 = (0..3)
                    .map(|lane| count * f64::from(signed[lane]) - signs * total[lane])
                    .map(|product| product * product)
                    .sum();
                if over * best_under > best_over * under {
                    (best_over, best_under) = (over, under);
                    best = Some(Grid { cell, phase_x, phase_y, explained: over / under / count });
                }
            }
        }
    }
    best
}

/// `sums[y * width + x]`: the sum of the first `y` pixels of column `x`.
fn column_sums(picture: &Picture, width: usize, height: usize) -> Vec<Lanes> {
    let mut sums: Vec<Lanes> = Vec::with_capacity((height + 1) * width);
    sums.resize(width, [0; 4]);
    for (at, pixel) in picture.rgb().chunks_exact(3).enumerate() {
        let pixel = [pixel[0], pixel[1], pixel[2], 0].map(i32::from);
        sums.push(add(sums[at], pixel));
    }
    sums
}

/// Sums each column with the signs of the vertical wave.
fn fold_rows(columns: &[Lanes], cell: usize, phase: usize, height: usize, line: &mut [Lanes]) {
    let width = line.len();
    line.fill([0; 4]);
    for edge in edges(cell, phase, height) {
        for (sum, &value) in line.iter_mut().zip(&columns[edge * width..]) {
            *sum = subtract(value, *sum);
        }
    }
    for (sum, &value) in line.iter_mut().zip(&columns[height * width..]) {
        *sum = subtract(value, add(*sum, *sum));
    }
}

/// How often each value occurs, for each of the two classes of pixels and each channel.
struct Classes {
    histograms: [[Histogram; 3]; 2],
}

impl Classes {
    fn of(picture: &Picture, grid: &Grid) -> Self {
        let mut classes = Self { histograms: Default::default() };
        let bits_x = grid.bits(grid.phase_x, picture.width() as usize);
        let bits_y = grid.bits(grid.phase_y, picture.height() as usize);
        let rows = picture.rgb().chunks_exact(bits_x.len() * 3);
        for (row, bit_y) in rows.zip(&bits_y) {
            for (pixel, bit_x) in row.chunks_exact(3).zip(&bits_x) {
                let histograms = &mut classes.histograms[bit_x ^ bit_y];
                for (histogram, &value) in histograms.iter_mut().zip(pixel) {
                    histogram.counts[usize::from(value)] += 1;
                }
            }
        }
        classes
    }

    fn all(&self) -> impl Iterator<Item = &Histogram> {
        self.histograms.iter().flatten()
    }

    /// Mean square of the difference from the class means.
    fn residual_variance(&self) -> f64 {
        let squares: f64 = self.all().map(|h| h.squares_about(h.mean(), 0..=255)).sum();
        squares / self.all().map(Histogram::count).sum::<f64>()
    }

    /// Root mean square over the channels of the difference of the two class means.
    fn distance(&self) -> f64 {
        let [a, b] = &self.histograms;
        let squares = a.iter().zip(b).map(|(a, b)| (a.mean() - b.mean()).powi(2));
        (squares.sum::<f64>() / 3.0).sqrt()
    }

    fn colors(&self) -> [[u8; 3]; 2] {
        [0, 1].map(|class| [0, 1, 2].map(|lane| self.histograms[class][lane].color()))
    }

    /// Standard deviation of the noise before values were cut to 0..=255.
    fn noise_sigma(&self) -> f64 {
        let (squares, count) =
            self.all().map(Histogram::noise).fold((0.0, 0.0), |sum, next| (sum.0 + next.0, sum.1 + next.1));
        (squares / count).sqrt()
    }

    /// Correlation of the residual between pixels side by side or one above the other.
    fn residual_correlation(&self, picture: &Picture, grid: &Grid) -> f64 {
        let variance = self.residual_variance();
        if variance == 0.0 {
            return 0.0;
        }
        let means = [0, 1].map(|class| [0, 1, 2].map(|lane| self.histograms[class][lane].mean() as f32));
        let bits_x = grid.bits(grid.phase_x, picture.width() as usize);
        let bits_y = grid.bits(grid.phase_y, picture.height() as usize);
        let width = bits_x.len();
        let rows = picture.rgb().chunks_exact(width * 3);
        let (mut above, mut here) = (Vec::new(), Vec::with_capacity(width * 3));
        let (mut products, mut pairs) = (0.0, 0);
        for (row, bit_y) in rows.zip(&bits_y) {
            here.clear();
            for (pixel, bit_x) in row.chunks_exact(3).zip(&bits_x) {
                let mean = means[bit_x ^ bit_y];
                here.extend((0..3).map(|lane| f32::from(pixel[lane]) - mean[lane]));
            }
            let beside = here.iter().zip(&here[3..]).map(|(a, b)| a * b).sum::<f32>();
            let across = here.iter().zip(&above).map(|(a, b): (_, &f32)| a * b).sum::<f32>();
            products += f64::from(beside) + f64::from(across);
            pairs += here.len() - 3 + above.len();
            std::mem::swap(&mut above, &mut here);
        }
        products / pairs as f64 / variance
    }
}

struct Histogram {
    counts: [u32; 256],
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; 256] }
    }
}

impl Histogram {
    fn count(&self) -> f64 {
        f64::from(self.counts.iter().sum::<u32>())
    }

    fn mean(&self) -> f64 {
        let values = self.counts.iter().zip(0u8..);
        let sum: f64 = values.map(|(&count, value)| f64::from(count) * f64::from(value)).sum();
        sum / self.count().max(1.0)
    }

    /// The value with half of the pixels on either side.
    fn median(&self) -> u8 {
        let half = self.count() / 2.0;
        let mut sum = 0.0;
        for (value, &count) in (0u8..=255).zip(&self.counts) {
            sum += f64::from(count);
            if sum > half {
                return value;
            }
        }
        u8::MAX
    }

    fn squares_about(&self, center: f64, values: std::ops::RangeInclusive<u8>) -> f64 {
        values.map(|value| f64::from(self.counts[usize::from(value)]) * (f64::from(value) - center).powi(2)).sum()
    }

    /// Whether noise was cut off at 0 and at 255.
    fn cut_off(&self) -> (bool, bool) {
        let limit = self.count() * CUT_OFF_SHARE;
        (f64::from(self.counts[0]) > limit, f64::from(self.counts[255]) > limit)
    }

    /// The colour under the noise. Cutting moves the mean but not the median, which in turn
    /// is the less exact where nothing is cut.
    fn color(&self) -> u8 {
        match self.cut_off() {
            (false, false) => self.mean().round() as u8,
            _ => self.median(),
        }
    }

    /// Sum of squares of the noise and the number of values that it is over. With one end cut
    /// off, the half that lies on the other side of the median stands for both.
    fn noise(&self) -> (f64, f64) {
        let (count, median) = (self.count(), self.median());
        match self.cut_off() {
            (true, false) => (self.squares_about(f64::from(median), median..=255), count / 2.0),
            (false, true) => (self.squares_about(f64::from(median), 0..=median), count / 2.0),
            _ => (self.squares_about(self.mean(), 0..=255), count),
        }
    }
}
