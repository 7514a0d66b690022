//! Why a session ends, as the client sees it.

use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};

/// The reason of an end that the client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Close {
    Stopping,
    NotAFrame,
    Text,
    BadHeader,
    TooLarge,
    Expired,
    Silent,
}

impl Close {
    /// The WebSocket close code; 4000 and above are this project's own.
    pub(crate) fn code(self) -> u16 {
        match self {
            Self::Stopping => 1001,
            Self::NotAFrame => 1002,
            Self::Text => 1003,
            Self::BadHeader => 1007,
            Self::TooLarge => 1009,
            Self::Expired => 4401,
            Self::Silent => 4408,
        }
    }

    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Stopping => "the Shield stops",
            Self::NotAFrame => "the message is not a frame that can come here",
            Self::Text => "only binary messages carry frames",
            Self::BadHeader => "the frame's header is not protobuf",
            Self::TooLarge => "the message is over the size limit",
            Self::Expired => "the token has expired",
            Self::Silent => "no sign of life",
        }
    }

    pub(crate) fn frame(self) -> CloseFrame {
        CloseFrame { code: CloseCode::from(self.code()), reason: self.reason().into() }
    }
}
