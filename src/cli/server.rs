//! What commands have in common that serve until a signal ends them.

use nix::sys::signal::{SigSet, Signal};

use super::Context;
use vellum_base::error::{Result, ResultExt};
use vellum_base::{crash_point, fault};
use vellum_store::Store;

/// What is said after a panic, whose own message comes before it.
const FAULT: &str = "vellum: this is a fault of Vellum's own, and the server ends: nothing that was \
    acknowledged is lost. Start it again, and please report the lines above";

/// Opens the store for a server, which says where it cannot be written. SIGTERM, SIGINT and SIGHUP come to
/// whoever waits for the signals that are returned. Before any thread is started.
pub(super) fn prepare(context: &Context, read_only: bool) -> Result<(Store, SigSet)> {
    crash_point::arm()?;
    fault::abort_on_panic(FAULT);
    let store = context.store()?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGHUP);
    signals.thread_block().context(|| "cannot block signals")?;
    if store.is_read_only() && !read_only {
        context
            .out
            .note("the store cannot be written, so what is served is read-only");
    }
    Ok((store, signals))
}
