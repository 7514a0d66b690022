//! The WebSocket edge of ArqonBus: it checks tokens, permissions and limits, and passes frames
//! on to the Spine with the client's own token. It holds no business state: killing it loses
//! nothing.
//!
//! ```text
//!   accept ── handshake ── reader ── limits, permissions ──┬─ produces, in order ─┐
//!             (token,      (one per                        └─ others, beside ─────┤ arqon-sdk
//!              401..)       session)                                              │ to the Spine
//!                           writer ── send queue, credit ── answers ──────────────┘
//! ```
//!
//! | close code | why |
//! |---|---|
//! | 1001 | the Shield stops |
//! | 1002 | a message that is no frame, or a first frame other than `Hello` |
//! | 1003 | a text message |
//! | 1007 | a frame whose header is not protobuf |
//! | 1009 | a message over the size limit |
//! | 4401 | the token has expired |
//! | 4408 | no sign of life from the client |

mod admin;
mod close;
mod config;
mod handshake;
mod metrics;
mod permission;
mod rates;
mod requests;
mod server;
mod session;
mod tls;

pub use config::{Auth, AuthKey, Config, ConfigError, Limits};
pub use server::{Shield, StartError};
pub use tls::Tls;
