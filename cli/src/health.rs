//! Asks a server's admin port whether it is ready.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// Longest answer that is read, in bytes.
const ANSWER_SIZE_MAX: u64 = 64 << 10;
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(25);

/// One GET over HTTP/1.0: the status and the body's first line.
async fn get(address: &str, path: &str) -> Result<(u16, String), String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_SIZE_MAX).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = timeout(ATTEMPT_TIMEOUT, exchange).await.map_err(|_| "no answer in time".to_owned())?;
    let answer = answer.map_err(|error| error.to_string())?;
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.split_ascii_whitespace().nth(1).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).lines().next().unwrap_or_default();
    Ok((status.ok_or("the answer is not HTTP")?, body.to_owned()))
}

/// Waits until `/readyz` at `address` (`host:port`) answers 200.
///
/// # Errors
/// The last answer, one line, when it was not ready within `limit`.
pub async fn wait_ready(address: &str, limit: Duration) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    loop {
        let problem = match get(address, "/readyz").await {
            Ok((200, _)) => return Ok(()),
            Ok((status, body)) => format!("/readyz at {address} answers {status} {body}"),
            Err(problem) => format!("/readyz at {address}: {problem}"),
        };
        if Instant::now() >= deadline {
            return Err(problem);
        }
        sleep(PAUSE).await;
    }
}
