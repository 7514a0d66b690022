//! What goes over HTTP: the request of `POST /distill` and its answer.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::picture::{Picture, PictureError, rms};
use crate::seed::{AssetType, Seed, draw};

/// Longest `job_id`, in bytes.
const JOB_ID_SIZE_MAX: usize = 256;
/// Difference between two computations of the same error, for the rounding of decimal digits.
const ERROR_RMS_TOLERANCE: f64 = 1e-6;
/// How browsers begin a picture that was taken from a canvas.
const DATA_URL_PREFIX: &str = "data:image/png;base64,";

/// A request that cannot be understood: which field, and why. The field is `body` when the
/// whole is no JSON object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct BadField {
    /// Name of the field as it stands in the request.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

impl BadField {
    fn new(field: &str, reason: impl Into<String>) -> Self {
        Self { field: shorten(field), reason: reason.into() }
    }
}

/// Asks for the seed of a picture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DistillRequest {
    /// Given back in the answer. At most 256 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
    /// Base64 (standard alphabet, padded) of a PNG file, or of raw RGBA pixels: four bytes a
    /// pixel, rows from the top. Alpha is ignored.
    #[serde(rename = "imageData")]
    pub image_data: String,
    /// Width of the picture in pixels.
    pub width: u32,
    /// Height of the picture in pixels.
    pub height: u32,
    /// The kind of picture; may be left out in JSON.
    #[serde(rename = "assetType")]
    pub asset_type: AssetType,
}

impl DistillRequest {
    /// Makes the request for a PNG file.
    ///
    /// # Errors
    /// [`PictureError`] when the bytes are not a PNG file of a size that is taken.
    pub fn for_png(job_id: Option<String>, png: &[u8]) -> Result<Self, PictureError> {
        let picture = Picture::from_png(png)?;
        Ok(Self {
            job_id,
            image_data: BASE64_STANDARD.encode(png),
            width: picture.width(),
            height: picture.height(),
            asset_type: AssetType::NoisyCheckerboard,
        })
    }

    /// Reads a request from JSON. Written out by hand because every error has to name its
    /// field, which a derived reader does not do for a value of the wrong type.
    ///
    /// # Errors
    /// [`BadField`] for the first field that is missing, unknown, or of a wrong type or value.
    pub fn from_json(body: &[u8]) -> Result<Self, BadField> {
        let value: Value =
            serde_json::from_slice(body).map_err(|error| BadField::new("body", format!("not JSON: {error}")))?;
        let Value::Object(fields) = value else {
            return Err(BadField::new("body", "must be a JSON object"));
        };
        let (mut job_id, mut image_data, mut width, mut height) = (None, None, None, None);
        let mut asset_type = AssetType::default();
        for (name, value) in fields {
            match name.as_str() {
                "job_id" => job_id = read_job_id(value)?,
                "imageData" => image_data = Some(read_text(&name, value)?),
                "width" => width = Some(read_px(&name, &value)?),
                "height" => height = Some(read_px(&name, &value)?),
                "assetType" => asset_type = read_asset_type(value)?,
                _ => return Err(BadField::new(&name, "is not a field of this request")),
            }
        }
        let missing = |name| BadField::new(name, "is missing");
        Ok(Self {
            job_id,
            image_data: image_data.ok_or_else(|| missing("imageData"))?,
            width: width.ok_or_else(|| missing("width"))?,
            height: height.ok_or_else(|| missing("height"))?,
            asset_type,
        })
    }

    /// Decodes the picture.
    ///
    /// # Errors
    /// [`BadField`] naming `imageData`, or `width` or `height` where the picture has others.
    pub fn picture(&self) -> Result<Picture, BadField> {
        let text = self.image_data.strip_prefix(DATA_URL_PREFIX);
        let bytes = BASE64_STANDARD
            .decode(text.unwrap_or(&self.image_data))
            .map_err(|error| BadField::new("imageData", format!("not base64: {error}")))?;
        let (width, height) = (self.width, self.height);
        let picture =
            if Picture::is_png(&bytes) { Picture::from_png(&bytes) } else { Picture::from_rgba(width, height, &bytes) };
        let picture = picture.map_err(|error| match error {
            PictureError::Size { .. } => BadField::new("width and height", error.to_string()),
            PictureError::Length { .. } | PictureError::Png(_) => BadField::new("imageData", error.to_string()),
        })?;
        for (name, stated, found) in [("width", width, picture.width()), ("height", height, picture.height())] {
            if stated != found {
                let reason = format!("is {stated}, but the PNG file in imageData has {found}");
                return Err(BadField::new(name, reason));
            }
        }
        Ok(picture)
    }
}

fn read_text(name: &str, value: Value) -> Result<String, BadField> {
    match value {
        Value::String(text) => Ok(text),
        _ => Err(BadField::new(name, "must be a string")),
    }
}

fn read_job_id(value: Value) -> Result<Option<String>, BadField> {
    if value.is_null() {
        return Ok(None);
    }
    let job_id = read_text("job_id", value)?;
    if job_id.len() > JOB_ID_SIZE_MAX {
        let reason = format!("is {} bytes long, at most {JOB_ID_SIZE_MAX}", job_id.len());
        return Err(BadField::new("job_id", reason));
    }
    Ok(Some(job_id))
}

fn read_px(name: &str, value: &Value) -> Result<u32, BadField> {
    value
        .as_u64()
        .and_then(|pixels| u32::try_from(pixels).ok())
        .ok_or_else(|| BadField::new(name, "must be a whole number of pixels"))
}

fn read_asset_type(value: Value) -> Result<AssetType, BadField> {
    match read_text("assetType", value)?.as_str() {
        "NoisyCheckerboard" => Ok(AssetType::NoisyCheckerboard),
        other => {
            let reason = format!("{:?} is unknown, use NoisyCheckerboard", shorten(other));
            Err(BadField::new("assetType", reason))
        }
    }
}

/// Keeps what a client sent from filling an error message.
fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

/// The seed of a picture and how well it fits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillAnswer {
    /// The `job_id` of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
    /// What the picture is drawn from.
    pub seed: Seed,
    /// Root mean square of the difference between the picture and the drawing of its seed,
    /// over all RGB channels, 0 to 255.
    pub error_rms: f64,
}

/// How an answer turned out not to be true of a picture.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FalseAnswer {
    /// The seed is out of range.
    #[error("seed: {0}")]
    Seed(#[from] crate::seed::InvalidSeed),
    /// The seed is of a picture of another size.
    #[error("the seed draws {seed_width}x{seed_height} pixels, the picture has {width}x{height}")]
    Size {
        /// Width of the seed in pixels.
        seed_width: u32,
        /// Height of the seed in pixels.
        seed_height: u32,
        /// Width of the picture in pixels.
        width: u32,
        /// Height of the picture in pixels.
        height: u32,
    },
    /// The redrawn picture differs by more than the answer says.
    #[error("the redrawn picture differs by {found:.3} rms, error_rms says {stated:.3}")]
    Error {
        /// What the answer says, 0 to 255.
        stated: f64,
        /// What redrawing shows, 0 to 255.
        found: f64,
    },
    /// One single colour would be as good, so the seed says nothing.
    #[error("the redrawn picture differs by {found:.3} rms, no better than one colour would")]
    Vacuous {
        /// What redrawing shows, 0 to 255.
        found: f64,
    },
}

impl DistillAnswer {
    /// Distils nothing, only states the error of a seed for a picture of its size.
    pub(crate) fn new(job_id: Option<String>, seed: Seed, picture: &Picture) -> Self {
        let error_rms = rms(&draw(&seed), picture).unwrap_or(f64::from(u8::MAX));
        Self { job_id, seed, error_rms }
    }

    /// Draws the seed and compares it with the picture that the request was about. Answers
    /// the difference found, as root mean square from 0 to 255.
    ///
    /// # Errors
    /// [`FalseAnswer`] when the difference exceeds `error_rms` or the seed says nothing.
    pub fn check(&self, picture: &Picture) -> Result<f64, FalseAnswer> {
        self.seed.check()?;
        let found = rms(&draw(&self.seed), picture).ok_or(FalseAnswer::Size {
            seed_width: self.seed.width,
            seed_height: self.seed.height,
            width: picture.width(),
            height: picture.height(),
        })?;
        // Written so that an `error_rms` that is not a number fails.
        let holds = found <= self.error_rms + ERROR_RMS_TOLERANCE;
        if !holds {
            return Err(FalseAnswer::Error { stated: self.error_rms, found });
        }
        if found >= picture.spread() {
            return Err(FalseAnswer::Vacuous { found });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn error_of(json: serde_json::Value) -> String {
        let request = DistillRequest::from_json(json.to_string().as_bytes());
        let error = request.and_then(|request| request.picture());
        error.unwrap_err().to_string()
    }

    #[test]
    fn every_bad_request_names_its_field() {
        let png = BASE64_STANDARD.encode(sample(1, 0).1.to_png().unwrap());
        let good = serde_json::json!({"imageData": png, "width": 1, "height": 1});
        for (field, value, expected) in [
            ("imageData", serde_json::json!(7), "imageData: must be a string"),
            ("imageData", serde_json::json!("%%"), "imageData: not base64"),
            ("imageData", serde_json::json!("AAAA"), "width and height: 1x1"),
            ("width", serde_json::json!(-1), "width: must be a whole number"),
            ("width", serde_json::json!(5e9), "width: must be a whole number"),
            ("height", serde_json::json!("96"), "height: must be a whole"),
            ("assetType", serde_json::json!("Plasma"), "assetType: \"Plasma\""),
            ("job_id", serde_json::json!(["x"]), "job_id: must be a string"),
            ("job_id", serde_json::json!("x".repeat(300)), "job_id: is 300"),
            ("widht", serde_json::json!(96), "widht: is not a field"),
            ("height", serde_json::json!(1), "width: is 1, but the PNG"),
        ] {
            let mut json = good.clone();
            json[field] = value;
            let error = error_of(json);
            assert!(error.starts_with(expected), "{field}: {error}");
        }
        for missing in ["imageData", "width", "height"] {
            let mut json = good.clone();
            json.as_object_mut().unwrap().remove(missing);
            assert_eq!(error_of(json), format!("{missing}: is missing"));
        }
        assert_eq!(error_of(serde_json::json!([])), "body: must be a JSON object");
        let raw = serde_json::json!({"imageData": "AAAA", "width": 8, "height": 8});
        assert!(error_of(raw).contains("3 bytes are neither a PNG file nor 8x8 RGBA pixels (256"));
    }

    #[test]
    fn png_data_url_and_rgba_are_the_same_picture() {
        let (_, picture) = sample(1, 1);
        let png = picture.to_png().unwrap();
        let mut request = DistillRequest::for_png(None, &png).unwrap();
        let json = serde_json::to_vec(&request).unwrap();
        assert_eq!(DistillRequest::from_json(&json).unwrap(), request);
        assert_eq!(request.picture().unwrap(), picture);
        request.image_data.insert_str(0, DATA_URL_PREFIX);
        assert_eq!(request.picture().unwrap(), picture);
        request.image_data = BASE64_STANDARD.encode(picture.to_rgba());
        assert_eq!(request.picture().unwrap(), picture);
    }

    #[test]
    fn a_false_answer_does_not_pass_the_check() {
        let (seed, picture) = sample(1, 2);
        let answer = DistillAnswer::new(None, seed, &picture);
        assert_eq!(answer.check(&picture), Ok(answer.error_rms));

        let mut shifted = answer.clone();
        shifted.seed.phase_x_px = (shifted.seed.phase_x_px + 1) % shifted.seed.cell_px;
        assert!(matches!(shifted.check(&picture), Err(FalseAnswer::Error { .. })));
        shifted.error_rms = f64::NAN;
        assert!(matches!(shifted.check(&picture), Err(FalseAnswer::Error { .. })));

        let mut vacuous = answer.clone();
        vacuous.seed.color_b = vacuous.seed.color_a;
        vacuous.error_rms = 255.0;
        assert!(matches!(vacuous.check(&picture), Err(FalseAnswer::Vacuous { .. })));

        let mut invalid = answer.clone();
        invalid.seed.cell_px = 0;
        assert!(matches!(invalid.check(&picture), Err(FalseAnswer::Seed(_))));
        let smaller = sample(1, 3).1;
        assert!(matches!(answer.check(&smaller), Err(FalseAnswer::Size { .. })));
    }
}
