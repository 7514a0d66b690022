//! Work that may wait for the disk, away from the threads that others wait for.

use std::io;

/// Runs `work` on a thread of its own; where the store has no threads, on this one.
///
/// # Errors
/// `work` panicked.
pub(crate) async fn aside<T: Send + 'static>(
    has_threads: bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    if has_threads { tokio::task::spawn_blocking(work).await.map_err(io::Error::other) } else { Ok(work()) }
}
