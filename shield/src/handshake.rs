//! The HTTP upgrade: who is let in, and how the others are told.

use arqon_proto::{Session, Verifier};
use tokio_tungstenite::tungstenite::{
    handshake::server::{ErrorResponse, Request, Response},
    http::{HeaderValue, StatusCode, header},
};

/// The path of the one service here.
pub(crate) const PATH: &str = "/v1/ws";
/// The subprotocol that a client must offer.
pub(crate) const SUBPROTOCOL: &str = "arqonbus.v1";

/// A client that was let in.
pub(crate) struct Admitted {
    pub(crate) token: String,
    pub(crate) session: Session,
}

/// Why a client is not let in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) reason: &'static str,
    pub(crate) text: String,
}

/// Judges the request of a client at `now` (seconds since 1970).
///
/// | what is wrong | status |
/// |---|---|
/// | another path | 404 |
/// | the subprotocol `arqonbus.v1` is not offered | 426 |
/// | no token, or one that is not valid | 401 |
pub(crate) fn admit(verifier: &Verifier, request: &Request, now: u64) -> Result<Admitted, Refusal> {
    if request.uri().path() != PATH {
        let text = format!("there is nothing here, use {PATH}");
        return Err(Refusal { status: StatusCode::NOT_FOUND, reason: "path", text });
    }
    let offered = request.headers().get_all(header::SEC_WEBSOCKET_PROTOCOL);
    let offers = |value: &HeaderValue| {
        value.to_str().is_ok_and(|value| value.split(',').any(|protocol| protocol.trim() == SUBPROTOCOL))
    };
    if !offered.iter().any(offers) {
        let text = format!("offer the subprotocol {SUBPROTOCOL}");
        return Err(Refusal { status: StatusCode::UPGRADE_REQUIRED, reason: "subprotocol", text });
    }
    let token = token(request).unwrap_or_default();
    match verifier.verify(token, now) {
        Ok(session) => Ok(Admitted { token: token.to_owned(), session }),
        Err(error) => Err(Refusal { status: StatusCode::UNAUTHORIZED, reason: "token", text: error.to_string() }),
    }
}

/// The token of the `Authorization` header, or of the query, since browsers set no headers.
fn token(request: &Request) -> Option<&str> {
    if let Some(header) = request.headers().get(header::AUTHORIZATION) {
        let (scheme, token) = header.to_str().ok()?.split_once(' ')?;
        return scheme.eq_ignore_ascii_case("bearer").then_some(token.trim());
    }
    let mut pairs = request.uri().query()?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.find(|(name, _)| *name == "access_token").map(|(_, token)| token)
}

/// The answer to a client that is let in.
pub(crate) fn accepted(mut response: Response) -> Response {
    response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
    response
}

/// The answer to a client that is not.
pub(crate) fn refused(refusal: Refusal) -> ErrorResponse {
    let text = format!("{}\n", refusal.text);
    let mut response = ErrorResponse::new(None);
    *response.status_mut() = refusal.status;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(text.len()));
    match refusal.status {
        StatusCode::UNAUTHORIZED => {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        StatusCode::UPGRADE_REQUIRED => {
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        }
        _ => {}
    }
    *response.body_mut() = Some(text);
    response
}
