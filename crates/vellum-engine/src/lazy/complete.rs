//! `vellum complete`: all of a lazy image is brought.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;
use uuid::Uuid;

use super::client::{FetcherClient, ask_for_the_background, ask_to_complete};
use super::hot::Hot;
use super::{Background, Remote, lazy_layers};
use crate::watch::Watch;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_core::layer::{Fetch, LazyLayer};
use vellum_store::Store;

/// Requests for windows at a time.
const AT_A_TIME: usize = 4;
/// Windows of a request.
const STEP: usize = 32;
/// How often a layer of which windows are missing again is brought.
const ATTEMPTS: u32 = 32;

/// What was brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CompleteReport {
    /// The layers that were lazy, and are whole now.
    pub layers: Vec<Uuid>,
}

/// Brings all blocks of an image's layers, or a container's, that are not here, and makes these layers like any other.
///
/// # Errors
/// [`vellum_base::ErrorKind::NotFound`] without such an image or container; what the registry says: what came stays.
pub fn complete(store: &Store, name: &str, watch: &dyn Watch) -> Result<CompleteReport> {
    let layers = match store.image(name) {
        Ok(image) => image.layers,
        Err(error) => match store.container(name) {
            Ok(container) => container.layers,
            Err(_) => return Err(error),
        },
    };
    let lazy = lazy_layers(store, &layers)?;
    keep(store, &lazy)?;
    for layer in &lazy {
        complete_layer(store, *layer, watch)?;
    }
    Ok(CompleteReport { layers: lazy })
}

/// Has nothing of these layers evicted any more.
fn keep(store: &Store, lazy: &[Uuid]) -> Result<()> {
    let storage = &**store.storage();
    let mut noted = false;
    for layer in lazy {
        let dir = store.layer_dir(*layer);
        if let Some(mut remote) = Remote::read(storage, &dir)?
            && !remote.is_kept()
        {
            remote.keep = true;
            remote.write_again(storage, &dir)?;
            noted = true;
        }
    }
    match noted {
        true => ask_for_the_background(store.root()),
        false => Ok(()),
    }
}

/// Has the fetcher complete those of these layers that are lazy, although nobody waits for them: docs/lazy.md, "In the
/// background".
///
/// # Errors
/// Where it cannot be noted, or no fetcher started.
pub fn complete_in_background(store: &Store, layers: &[Uuid], how: Background) -> Result<()> {
    let storage = &**store.storage();
    let lazy = lazy_layers(store, layers)?;
    for layer in &lazy {
        let dir = store.layer_dir(*layer);
        if let Some(mut remote) = Remote::read(storage, &dir)? {
            remote.background = Some(how);
            remote.write_again(storage, &dir)?;
        }
    }
    match lazy.is_empty() {
        true => Ok(()),
        false => ask_for_the_background(store.root()),
    }
}

/// Has a fetcher go on with those of these layers that are to be completed in the background, and with their hot pack: the one that was at it may be
/// gone, and nobody may want what is not here.
pub(crate) fn go_on_in_background(store: &Store, layers: &[Uuid]) {
    let storage = &**store.storage();
    let is_wanted = |layer: &Uuid| {
        let dir = store.layer_dir(*layer);
        Hot::is_noted(&dir) || Remote::background(storage, &dir).is_some()
    };
    if !layers.iter().any(is_wanted) {
        return;
    }
    if let Err(error) = ask_for_the_background(store.root()) {
        tracing::warn!("the image is not completed in the background yet: {error}");
    }
}

/// Brings all of a layer and has it sealed; again where a fetcher died before it had noted all that came.
fn complete_layer(store: &Store, layer: Uuid, watch: &dyn Watch) -> Result<()> {
    let mut attempts = 0;
    loop {
        bring(store, layer, watch)?;
        attempts += 1;
        match ask_to_complete(store.root(), layer) {
            Err(error) if error.kind() == ErrorKind::InvalidInput && attempts < ATTEMPTS => {
                interrupt::check()?;
            }
            other => return other,
        }
    }
}

/// Brings all windows of a layer.
fn bring(store: &Store, layer: Uuid, watch: &dyn Watch) -> Result<()> {
    let dir = store.layer_dir(layer);
    let Some(open) = LazyLayer::open(&**store.storage(), &dir)? else {
        return Ok(());
    };
    let missing = open.missing();
    let window = open.power().blocks().bytes();
    drop(open);
    let mut progress = watch.begin(&layer.to_string(), Some(missing.len() as u64 * window));
    let pieces: Vec<&[u32]> = missing.chunks(STEP).collect();
    let next = AtomicUsize::new(0);
    let (tell, told) = std::sync::mpsc::channel();
    let work = || -> Result<()> {
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            interrupt::check()?;
            // Windows without data lie between them, which are not fetched.
            if let (Some(first), Some(last)) = (piece.first(), piece.last()) {
                FetcherClient.fetch(&dir, *first..last + 1)?;
            }
            let _ = tell.send(piece.len() as u64);
        }
        Ok(())
    };
    let work = &work;
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(work)).collect();
        let mut left = pieces.len();
        while left > 0 && threads.iter().any(|thread| !thread.is_finished()) {
            if let Ok(windows) = told.recv_timeout(std::time::Duration::from_millis(100)) {
                left -= 1;
                if let Some(progress) = &mut progress {
                    progress(windows * window);
                }
            }
        }
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            let joined = thread.join();
            joined.unwrap_or_else(|_| Err(Error::internal("a thread that fetches panicked")))
        };
        threads.into_iter().map(join).collect()
    });
    watch.done();
    results.into_iter().collect()
}
