//! Another try for what passes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};

use super::failure::Failure;
use vellum_base::error::{Error, ErrorKind, Result};

/// How often something is tried again.
const RETRIES: usize = 5;
/// The first pause, which doubles, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long a transfer may stand still.
const STALL: Duration = Duration::from_secs(60);

/// Does something until it goes well, or fails in a way that stays, or has failed too often.
///
/// # Errors
/// The last failure.
pub(crate) async fn retried<T, F: Future<Output = Result<T, Failure>>>(
    attempt: impl FnMut() -> F,
) -> Result<T, Failure> {
    let pauses = ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_max_times(RETRIES);
    attempt
        .retry(pauses)
        .sleep(tokio::time::sleep)
        .when(|failure| failure.passes)
        // What the registry asks for goes before what we would do; no more tries are no more tries.
        .adjust(|failure, pause| pause.map(|pause| failure.after.unwrap_or(pause)))
        .notify(|failure, pause| tracing::warn!("{}; once more in {pause:?}", failure.error))
        .await
}

/// Waits for a transfer that counts its bytes in `moved`, as long as some come.
///
/// # Errors
/// A failure that passes, where none has come for a minute.
pub(crate) async fn unless_stalled<T>(
    doing: &str,
    moved: &AtomicU64,
    transfer: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let mut transfer = std::pin::pin!(transfer);
    loop {
        let before = moved.load(Ordering::Relaxed);
        if let Ok(done) = tokio::time::timeout(STALL, transfer.as_mut()).await {
            return done;
        }
        if moved.load(Ordering::Relaxed) == before {
            let text = format!("{doing}: nothing has moved for {} seconds", STALL.as_secs());
            return Err(Failure::passing(Error::new(ErrorKind::Timeout, text)));
        }
    }
}
