//! The commands that a worker takes over its control socket.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv};
use serde_json::{Value, json};

use super::context::{Context, report};
use super::elders::adopt;
use crate::device::control_server::converse;
use crate::device::event::Event;
use vellum_base::error::{Error, ErrorKind, Result};

/// Control connections served at once; the next ones wait.
const MAX_CONNECTIONS: usize = 8;
/// How long commands that are being carried out may go on when the worker is told to stop.
const FINISH: Duration = Duration::from_secs(5);
/// How long a connection that was just taken may be without a command then.
const FINISH_FRESH: Duration = Duration::from_millis(100);

/// Takes a control connection where one waits, and serves it on a thread of its own.
pub(super) fn accept(context: &Arc<Context>) {
    if context.connections.load(Ordering::Acquire) >= MAX_CONNECTIONS {
        // Rare, and not worth a queue: the kernel's backlog holds the next ones.
        std::thread::sleep(Duration::from_millis(5));
        return;
    }
    match context.worker.listener.accept() {
        // Most only ask whether somebody listens, several of each command: a thread costs more than that.
        Ok((stream, _)) if is_closed(&stream) => {}
        Ok((stream, _)) => {
            context.connections.fetch_add(1, Ordering::AcqRel);
            context.fresh.fetch_add(1, Ordering::AcqRel);
            let held = Arc::clone(context);
            let spawned = std::thread::Builder::new()
                .name("control".to_string())
                .spawn(move || {
                    // It was counted as fresh when it was taken.
                    let mut fresh = Some(Counted(&held.fresh));
                    let begin = || (Counted::new(&held.busy), fresh.take());
                    let answer = |verb: &str, args| command(&held, verb, args);
                    if let Err(error) = converse(&stream, begin, answer) {
                        tracing::debug!("control connection: {error}");
                    }
                    held.connections.fetch_sub(1, Ordering::AcqRel);
                });
            if spawned.is_err() {
                context.fresh.fetch_sub(1, Ordering::AcqRel);
                context.connections.fetch_sub(1, Ordering::AcqRel);
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
        Err(error) => tracing::warn!("the control socket: {error}"),
    }
}

/// True where the other side has closed the connection, and sent nothing before.
fn is_closed(stream: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags) == Ok(0)
}

/// Waits for commands that are being carried out, so that no caller is left without an answer
/// when the next worker takes over.
pub(super) fn finish_commands(context: &Context) {
    let stopped = Instant::now();
    let waiting = |count: &AtomicUsize, limit: Duration| {
        count.load(Ordering::Acquire) > 0 && stopped.elapsed() < limit
    };
    while waiting(&context.fresh, FINISH_FRESH) || waiting(&context.busy, FINISH) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Is counted until it is dropped.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Carries out `verb`.
fn command(context: &Context, verb: &str, args: Value) -> Result<Value> {
    match verb {
        "status" => Ok(report_status(context)),
        "flush" => {
            context.opened.device.flush()?;
            Ok(Value::Null)
        }
        "stop" => {
            if !report(&context.worker, &Event::Stop) {
                context.stop.store(true, Ordering::Release);
                let _ = context.wake.write(1);
            }
            Ok(Value::Null)
        }
        "upgrade" => {
            let program = args.get("program").and_then(Value::as_str).ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, "upgrade: no program is named")
            })?;
            let after = args.get("after").and_then(Value::as_u64);
            if after.is_some_and(|after| after < context.worker.generation.into()) {
                // The order came twice, and was carried out.
                return Ok(Value::Null);
            }
            if report(&context.worker, &Event::Upgrade(PathBuf::from(program))) {
                Ok(Value::Null)
            } else {
                Err(Error::new(
                    ErrorKind::NotFound,
                    "upgrade: the device has no supervisor",
                ))
            }
        }
        "adopt" => adopt(&context.worker),
        _ => context.opened.control.handle(verb, args),
    }
}

fn report_status(context: &Context) -> Value {
    let worker = &context.worker;
    let table = worker.shared.table();
    let micros = |ns: &AtomicU64| ns.load(Ordering::Relaxed) / 1000;
    json!({
        "pid": nix::unistd::getpid().as_raw(),
        "supervisor": worker.supervisor.pid,
        "uptime_ms": context.started.elapsed().as_millis() as u64,
        "served": worker.shared.served(),
        "resent": worker.shared.resent(),
        "failures": context.failures.load(Ordering::Relaxed),
        "restarts": table.restarts.load(Ordering::Relaxed),
        "hangs": table.hangs.load(Ordering::Relaxed),
        "longest_wait_ms": worker.shared.longest_wait().unwrap_or_default() / 1_000_000,
        "last_pause_us": micros(&table.last_pause_ns),
        "longest_pause_us": micros(&table.longest_pause_ns),
        "size": context.opened.device.size(),
        "read_only": context.opened.device.is_read_only(),
        "threads": worker.threads,
        "fuse_minor": worker.features.minor,
        "resend": worker.use_resend,
        "transport": if worker.ring.is_some() { "ring" } else { "classic" },
        "generation": worker.generation,
        "version": env!("CARGO_PKG_VERSION"),
        // Not every path is text that JSON can carry.
        "log": worker.run_dir.now().log().display().to_string(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_connection_closed_without_a_word_is_told_from_one_that_brings_a_command() {
        let (mut client, server) = UnixStream::pair().unwrap();
        assert!(!is_closed(&server));
        client.write_all(b"{").unwrap();
        drop(client);
        assert!(!is_closed(&server));
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert!(is_closed(&server));
    }
}
