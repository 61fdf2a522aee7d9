//! Ending what runs in a container, from outside, and waiting for its end.

use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::activity::{Activity, Owner, activity, settled_activity};
use super::exec::can_be_entered;
use crate::lock_renamed;
use crate::teardown::end_for_good;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_store::{ContainerRecord, Store};

/// How often it is looked whether something has ended.
const LOOK: Duration = Duration::from_millis(20);
/// From signal(7); the C library keeps the first two for itself.
const FIRST_REAL_TIME: i32 = 34;
const LAST_SIGNAL: i32 = 64;

/// A signal by its number, the real-time ones among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopSignal(i32);

impl FromStr for StopSignal {
    type Err = String;

    /// As images name them: `SIGTERM`, `term`, `15`, `SIGRTMIN+3`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let upper = text.trim().to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let real_time = name.strip_prefix("RTMIN").map(|more| match more {
            "" => Ok(FIRST_REAL_TIME),
            more => more.parse::<i32>().map(|more| FIRST_REAL_TIME + more),
        });
        let number = match real_time {
            Some(number) => number.ok(),
            None => name.parse().ok().or_else(|| {
                let signal = Signal::from_str(&format!("SIG{name}"));
                signal.ok().map(|signal| signal as i32)
            }),
        };
        number
            .filter(|number| (1..=LAST_SIGNAL).contains(number))
            .map(StopSignal)
            .ok_or_else(|| format!("{text:?} is no signal: write one like TERM, SIGHUP or 15"))
    }
}

/// Sends a signal to the first process of what runs in a container.
///
/// # Errors
/// [`ErrorKind::NotFound`] where nothing runs in it.
pub fn kill(store: &Store, name: &str, signal: StopSignal) -> Result<()> {
    let container = store.container(name)?;
    match send(store, &container, signal)? {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::NotFound,
            format!("nothing runs in {name}: `vellum start {name}` starts its command"),
        )),
    }
}

/// False where nothing runs.
fn send(store: &Store, container: &ContainerRecord, signal: StopSignal) -> Result<bool> {
    let run_dir = store.run_dir(container);
    let Activity::Running { .. } = settled_activity(&run_dir)? else {
        return Ok(false);
    };
    let (true, Some(owner)) = (can_be_entered(&run_dir)?, Owner::read(&run_dir)?) else {
        return Ok(false);
    };
    let runtime = owner.runtime(&run_dir);
    let mut command = runtime.command();
    command.args(["kill", &owner.id, &signal.0.to_string()]);
    match runtime.call(&mut command)? {
        (true, _) => Ok(true),
        // It has ended meanwhile.
        (false, _) if owner.process(&run_dir)?.is_none() => Ok(false),
        (false, said) => Err(Error::new(
            ErrorKind::Command,
            format!(
                "{} cannot signal what runs in {}: {said}",
                runtime.program.display(),
                container.name
            ),
        )),
    }
}

/// Asks what runs in a container to end, by `signal`, or the one that its image names, or SIGTERM; kills it after
/// `grace`; and waits until the container is put back. False where nothing ran.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] where the image names a signal that is none.
pub fn stop(
    store: &Store,
    name: &str,
    signal: Option<StopSignal>,
    grace: Duration,
) -> Result<bool> {
    let container = store.container(name)?;
    let signal = match (signal, &container.config.config.stop_signal) {
        (Some(signal), _) => signal,
        (None, Some(text)) => text.parse().map_err(|error| {
            let text = format!("the image of {name}, on what stops it: {error}");
            Error::new(ErrorKind::InvalidInput, text)
        })?,
        (None, None) => StopSignal(Signal::SIGTERM as i32),
    };
    let ran = send(store, &container, signal)?;
    if ran && !ends_within(store, &container, grace)? {
        send(store, &container, StopSignal(Signal::SIGKILL as i32))?;
    }
    while is_attended(store, &container)? {
        interrupt::check()?;
        std::thread::sleep(LOOK);
    }
    match lock_renamed(store, &container) {
        // Removed by its waiter, or by force.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        other => {
            // Where nobody waited for it.
            let (container, _busy) = other?;
            end_for_good(store, &container, false)?;
        }
    }
    Ok(ran)
}

/// Whether no process of a container is left, within some time.
fn ends_within(store: &Store, container: &ContainerRecord, time: Duration) -> Result<bool> {
    let run_dir = store.run_dir(container);
    let deadline = Instant::now() + time;
    loop {
        let runs = match Owner::read(&run_dir)? {
            Some(owner) => owner.process(&run_dir)?.is_some(),
            None => false,
        };
        if !runs || Instant::now() > deadline {
            return Ok(!runs);
        }
        interrupt::check()?;
        std::thread::sleep(LOOK);
    }
}

/// True while a process of the container lives, or who waits for it puts back what it made.
fn is_attended(store: &Store, container: &ContainerRecord) -> Result<bool> {
    let activity = activity(store, container)?;
    Ok(!matches!(activity, Activity::Idle | Activity::Leftover))
}

/// Waits until a container's command has ended; its exit status.
///
/// # Errors
/// [`ErrorKind::NotFound`] of one that was never run, or was removed, or whose end nobody saw.
pub fn wait(store: &Store, name: &str) -> Result<u8> {
    let container = store.container(name)?;
    let mut status = None;
    loop {
        let attended = is_attended(store, &container)?;
        let run = match store.find_container(&(&container).into()) {
            // With `--rm` it goes with its command.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return status.ok_or(error);
            }
            other => other?.last_run,
        };
        status = run
            .as_ref()
            .and_then(|run| run.ended.as_ref())
            .map(|end| end.status);
        if !attended {
            return status.ok_or_else(|| {
                let text = match run {
                    None => format!("{name} was never run: `vellum start {name}` starts its command"),
                    Some(_) => format!(
                        "nobody saw how the command of {name} ended: its waiter was killed, or the host went down"
                    ),
                };
                Error::new(ErrorKind::NotFound, text)
            });
        }
        interrupt::check()?;
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_read_as_images_and_people_write_them() {
        let read = |text: &str| text.parse::<StopSignal>().map(|signal| signal.0);
        for text in ["SIGTERM", "term", "15", " TERM"] {
            assert_eq!(read(text), Ok(15), "{text}");
        }
        assert_eq!(read("SIGRTMIN+3"), Ok(37));
        assert_eq!(read("RTMIN"), Ok(34));
        for bad in ["", "SIG", "0", "65", "RTMIN+31", "TERMS", "-1"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
