//! A worker of the kind that leaves a notebook as an HTTP service: it distils a picture of a
//! noisy checkerboard to the few numbers from which the picture can be drawn again.
//!
//! ```text
//!            POST /distill                        draw
//! picture ------------------> Seed + error_rms ---------> picture without its noise
//!    ^                                                            |
//!    +----------- rms of the difference = error_rms --------------+
//! ```
//!
//! It knows nothing of the bus: the HTTP shim leases a job, posts its payload here and
//! publishes the answer. [`DistillAnswer::check`] is how whoever holds the picture finds out
//! whether an answer is true.

mod command;
mod fit;
mod http;
mod message;
mod picture;
mod sample;
mod seed;

pub use command::{Args, Command, DrawArgs, Error, run};
pub use fit::{CELL_PX_MAX, CELL_PX_MIN, NotCheckerboard, distill};
pub use http::{BODY_SIZE_MAX, REQUESTS_IN_FLIGHT_MAX, router, serve};
pub use message::{BadField, DistillAnswer, DistillRequest, FalseAnswer};
pub use picture::{PIXELS_MAX, Picture, PictureError, SIDE_PX_MAX, SIDE_PX_MIN, rms};
pub use sample::{draw_noisy, sample};
pub use seed::{AssetType, InvalidSeed, Seed, draw};
