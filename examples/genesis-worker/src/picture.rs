//! Pictures in memory, and PNG and raw bytes to and from them.

use std::io::Cursor;

use png::{BitDepth, ColorType, Decoder, Encoder, Limits, Transformations};

/// Shortest side of a picture, in pixels: less holds too little to tell cells from noise.
pub const SIDE_PX_MIN: u32 = 8;
/// Longest side of a picture, in pixels.
pub const SIDE_PX_MAX: u32 = 2048;
/// Most pixels in one picture. The sums of [`crate::distill`] stay inside 32 bits below it.
pub const PIXELS_MAX: u32 = 1 << 21;
/// What the PNG decoder may allocate, in bytes: `PIXELS_MAX` at 16 bits a channel, twice.
const DECODER_ALLOC_SIZE_MAX: usize = PIXELS_MAX as usize * 8 * 2;

/// Why bytes are not a picture that this crate takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    /// A side is too short or too long, or there are too many pixels.
    #[error(
        "{width}x{height} pixels are out of range: sides {SIDE_PX_MIN} to {SIDE_PX_MAX}, at most {PIXELS_MAX} pixels"
    )]
    Size {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// Raw bytes of the wrong length for the size given with them.
    #[error("{size} bytes are neither a PNG file nor {width}x{height} RGBA pixels ({expected} bytes)")]
    Length {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Bytes that so many pixels take.
        expected: u64,
        /// Bytes given.
        size: usize,
    },
    /// The PNG decoder or encoder refused.
    #[error("not a PNG file that can be read: {0}")]
    Png(String),
}

/// An opaque picture of 8 bits a channel. Alpha is dropped when one is read: a checkerboard
/// has none.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    /// Rows from the top, three bytes a pixel.
    rgb: Vec<u8>,
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({}x{})", self.width, self.height)
    }
}

impl Picture {
    /// Whether `bytes` start as a PNG file does.
    #[must_use]
    pub fn is_png(bytes: &[u8]) -> bool {
        bytes.starts_with(b"\x89PNG\r\n\x1a\n")
    }

    /// Reads a PNG file of any colour type and depth.
    ///
    /// # Errors
    /// [`PictureError::Png`] for damage or another format, [`PictureError::Size`] before any
    /// pixel is unpacked.
    pub fn from_png(bytes: &[u8]) -> Result<Self, PictureError> {
        let png_error = |error: png::DecodingError| PictureError::Png(error.to_string());
        let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), Limits { bytes: DECODER_ALLOC_SIZE_MAX });
        let (width, height) = decoder.read_header_info().map_err(png_error)?.size();
        check_size(width, height)?;
        // Palettes and depths below 8 bits become 8 bits a channel; of 16 bits the upper 8 are kept.
        decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
        let mut reader = decoder.read_info().map_err(png_error)?;
        let size = reader.output_buffer_size().ok_or(PictureError::Size { width, height })?;
        let mut pixels = vec![0; size];
        let colour = reader.next_frame(&mut pixels).map_err(png_error)?.color_type;
        let rgb = match colour {
            ColorType::Rgb => pixels,
            ColorType::Rgba => pixels.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect(),
            ColorType::Grayscale => pixels.iter().flat_map(|&grey| [grey; 3]).collect(),
            ColorType::GrayscaleAlpha => pixels.chunks_exact(2).flat_map(|pixel| [pixel[0]; 3]).collect(),
            ColorType::Indexed => return Err(PictureError::Png("its palette is missing".to_owned())),
        };
        Ok(Self { width, height, rgb })
    }

    /// Takes `width * height` pixels of four bytes, rows from the top.
    ///
    /// # Errors
    /// [`PictureError::Size`] or [`PictureError::Length`].
    pub fn from_rgba(width: u32, height: u32, rgba: &[u8]) -> Result<Self, PictureError> {
        check_size(width, height)?;
        let expected = u64::from(width) * u64::from(height) * 4;
        if rgba.len() as u64 != expected {
            return Err(PictureError::Length { width, height, expected, size: rgba.len() });
        }
        let rgb = rgba.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
        Ok(Self { width, height, rgb })
    }

    /// Makes a picture by asking for the colour of each pixel, `colour(x, y)`, row by row.
    /// The size must have passed [`check_size`].
    pub(crate) fn from_fn(width: u32, height: u32, mut colour: impl FnMut(u32, u32) -> [u8; 3]) -> Self {
        let mut rgb = Vec::with_capacity(width as usize * height as usize * 3);
        for y in 0..height {
            for x in 0..width {
                rgb.extend_from_slice(&colour(x, y));
            }
        }
        Self { width, height, rgb }
    }

    /// Width in pixels.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Three bytes a pixel, rows from the top.
    #[must_use]
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Four bytes a pixel, opaque, as [`Picture::from_rgba`] takes them.
    #[must_use]
    pub fn to_rgba(&self) -> Vec<u8> {
        self.rgb.chunks_exact(3).flat_map(|pixel| [pixel[0], pixel[1], pixel[2], u8::MAX]).collect()
    }

    /// The picture as a PNG file of 8-bit RGB.
    ///
    /// # Errors
    /// [`PictureError::Png`] with the encoder's reason.
    pub fn to_png(&self) -> Result<Vec<u8>, PictureError> {
        let png_error = |error: png::EncodingError| PictureError::Png(error.to_string());
        let mut file = Vec::new();
        let mut encoder = Encoder::new(&mut file, self.width, self.height);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(png_error)?;
        writer.write_image_data(&self.rgb).map_err(png_error)?;
        writer.finish().map_err(png_error)?;
        Ok(file)
    }

    /// Root mean square of the difference from the picture's own mean colour, 0 to 255: the
    /// error that the best picture of one single colour would have.
    #[must_use]
    pub fn spread(&self) -> f64 {
        let pixel_count = (self.rgb.len() / 3) as f64;
        let mut sums = [0u64; 3];
        let mut squares = 0u64;
        for pixel in self.rgb.chunks_exact(3) {
            for (sum, &value) in sums.iter_mut().zip(pixel) {
                *sum += u64::from(value);
                squares += u64::from(value) * u64::from(value);
            }
        }
        let means: f64 = sums.iter().map(|&sum| (sum as f64).powi(2)).sum();
        ((squares as f64 - means / pixel_count) / self.rgb.len() as f64).max(0.0).sqrt()
    }
}

/// Checks sides and pixel count against the limits above.
pub(crate) fn check_size(width: u32, height: u32) -> Result<(), PictureError> {
    let sides = SIDE_PX_MIN..=SIDE_PX_MAX;
    let fits = sides.contains(&width) && sides.contains(&height) && width * height <= PIXELS_MAX;
    fits.then_some(()).ok_or(PictureError::Size { width, height })
}

/// Root mean square of the difference over all RGB channels, 0 to 255. `None` when the two
/// pictures differ in size.
#[must_use]
pub fn rms(left: &Picture, right: &Picture) -> Option<f64> {
    if (left.width, left.height) != (right.width, right.height) {
        return None;
    }
    let squares: u64 = left.rgb.iter().zip(&right.rgb).map(|(&a, &b)| u64::from(a.abs_diff(b)).pow(2)).sum();
    Some((squares as f64 / left.rgb.len() as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp() -> Picture {
        Picture::from_fn(10, 8, |x, y| [x as u8 * 20, y as u8 * 30, 7])
    }

    #[test]
    fn png_and_rgba_give_the_same_picture_back() {
        let picture = ramp();
        assert_eq!(Picture::from_png(&picture.to_png().unwrap()).unwrap(), picture);
        assert_eq!(Picture::from_rgba(10, 8, &picture.to_rgba()).unwrap(), picture);
    }

    #[test]
    fn sizes_out_of_range_are_refused_before_unpacking() {
        for (width, height) in [(0, 8), (7, 8), (8, 2049), (2048, 1025), (u32::MAX, 8)] {
            let error = Picture::from_rgba(width, height, &[]).unwrap_err();
            assert_eq!(error, PictureError::Size { width, height });
        }
        // A small file that unpacks to 36 million pixels.
        let bomb = png_of(6000, 6000, ColorType::Grayscale, BitDepth::Eight, &vec![0; 6000 * 6000]);
        assert_eq!(Picture::from_png(&bomb).unwrap_err(), PictureError::Size { width: 6000, height: 6000 });
    }

    /// A PNG file that another program may have written.
    fn png_of(width: u32, height: u32, colour: ColorType, depth: BitDepth, pixels: &[u8]) -> Vec<u8> {
        let mut file = Vec::new();
        let mut encoder = Encoder::new(&mut file, width, height);
        encoder.set_color(colour);
        encoder.set_depth(depth);
        if colour == ColorType::Indexed {
            encoder.set_palette(vec![0, 0, 0, 200, 100, 50]);
        }
        encoder.write_header().unwrap().write_image_data(pixels).unwrap();
        file
    }

    #[test]
    fn every_colour_type_and_depth_is_read() {
        let ones = |size: usize| vec![u8::MAX; size];
        let all = [
            (ColorType::Grayscale, BitDepth::One, ones(8), [255; 3]),
            (ColorType::Grayscale, BitDepth::Eight, vec![77; 64], [77; 3]),
            (ColorType::GrayscaleAlpha, BitDepth::Eight, [77, 0].repeat(64), [77; 3]),
            (ColorType::Rgb, BitDepth::Sixteen, [10, 200, 20, 200, 30, 200].repeat(64), [10, 20, 30]),
            (ColorType::Rgba, BitDepth::Eight, [10, 20, 30, 0].repeat(64), [10, 20, 30]),
            (ColorType::Indexed, BitDepth::One, ones(8), [200, 100, 50]),
        ];
        for (colour, depth, pixels, expected) in all {
            let picture = Picture::from_png(&png_of(8, 8, colour, depth, &pixels)).unwrap();
            assert_eq!(picture, Picture::from_fn(8, 8, |_, _| expected), "{colour:?} {depth:?}");
        }
    }

    #[test]
    fn any_cut_or_flipped_file_is_an_error_or_a_picture_and_never_a_panic() {
        let file = ramp().to_png().unwrap();
        for end in 0..file.len() {
            let _ = Picture::from_png(&file[..end]);
            let mut flipped = file.clone();
            flipped[end] ^= 0x55;
            let _ = Picture::from_png(&flipped);
        }
        assert!(Picture::from_png(&file[..40]).is_err());
        assert!(Picture::from_png(b"GIF89a").is_err());
    }

    #[test]
    fn rms_is_over_channels_and_needs_equal_sizes() {
        let black = Picture::from_fn(8, 8, |_, _| [0, 0, 0]);
        let red = Picture::from_fn(8, 8, |_, _| [30, 0, 0]);
        assert_eq!(rms(&black, &red), Some((900.0f64 / 3.0).sqrt()));
        assert_eq!(rms(&black, &ramp()), None);
        assert_eq!(red.spread(), 0.0);
    }
}
