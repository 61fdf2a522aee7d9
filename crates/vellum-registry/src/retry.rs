//! Another try for what passes.

use std::sync::Arc;
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
/// How many times as long a registry may take to answer that has all of a blob.
const COMMIT_STALLS: u32 = 15;

/// Whether what fails in a way that passes is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tries {
    /// It is.
    Several,
    /// Somebody can do without, and does not wait.
    One,
}

/// Does something until it goes well, or fails in a way that stays, or has failed too often.
///
/// # Errors
/// The last failure.
pub(crate) async fn retried<T, F: Future<Output = Result<T, Failure>>>(
    tries: Tries,
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
        .when(|failure| failure.passes && tries == Tries::Several)
        // What the registry asks for goes before what we would do; no more tries are no more tries.
        .adjust(|failure, pause| pause.map(|pause| failure.after.unwrap_or(pause)))
        .notify(|failure, pause| tracing::warn!("{}; once more in {pause:?}", failure.error))
        .await
}

/// How many bytes a transfer has moved.
#[derive(Debug)]
pub(crate) struct Moved {
    count: Arc<AtomicU64>,
    /// Of a request that carries bytes: how many, and who gets them may think for long once it has all.
    all: Option<u64>,
}

impl Moved {
    /// Of one that carries nothing to speak of, or receives.
    pub fn none() -> Self {
        Moved {
            count: Arc::default(),
            all: None,
        }
    }

    /// Of one that sends so many.
    pub fn sending(all: u64) -> Self {
        Moved {
            count: Arc::default(),
            all: Some(all),
        }
    }

    /// What counts them.
    pub fn counter(&self) -> &Arc<AtomicU64> {
        &self.count
    }

    /// So many.
    pub fn get(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// How long it may stand still now, in [`STALL`]s.
    fn patience(&self) -> u32 {
        match self.all {
            Some(all) if self.get() >= all => COMMIT_STALLS,
            _ => 1,
        }
    }
}

/// Waits for a transfer that counts its bytes in `moved`, as long as some come.
///
/// # Errors
/// A failure that passes, where none has come for a minute; or for 15, once a registry has all of a blob, which it
/// may have to copy and to hash.
pub(crate) async fn unless_stalled<T>(
    doing: &str,
    moved: &Moved,
    transfer: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let mut transfer = std::pin::pin!(transfer);
    let mut stalls = 0;
    loop {
        let before = moved.get();
        if let Ok(done) = tokio::time::timeout(STALL, transfer.as_mut()).await {
            return done;
        }
        stalls = if moved.get() == before { stalls + 1 } else { 0 };
        if stalls >= moved.patience() {
            let waited = STALL.as_secs() * u64::from(stalls);
            let text = format!("{doing}: nothing has moved for {waited} seconds");
            return Err(Failure::passing(Error::new(ErrorKind::Timeout, text)));
        }
    }
}
