//! Ends a command that does not end by itself.

use std::process::Child;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::activity::Owner;
use vellum_base::error::Result;
use vellum_fs::run_dir::RunDir;

/// How long a command may take to end once it is asked to.
const GRACE: Duration = Duration::from_secs(10);

/// The end of a command, when its time is over.
pub(super) struct End<'a> {
    owner: &'a Owner,
    run_dir: &'a RunDir,
    at: Instant,
    asked: bool,
}

impl<'a> End<'a> {
    /// The end of an owner's command after that time.
    pub fn after(limit: Duration, owner: &'a Owner, run_dir: &'a RunDir) -> Self {
        End {
            owner,
            run_dir,
            at: Instant::now() + limit,
            asked: false,
        }
    }

    /// Asks the command to end when its time is over, and kills it when it has not.
    ///
    /// # Errors
    /// Where it cannot be told which process it is.
    pub fn look(&mut self, child: &Child) -> Result<()> {
        if Instant::now() < self.at {
            return Ok(());
        }
        if !self.asked {
            self.asked = true;
            self.at = Instant::now() + GRACE;
            // The runtime passes it on. It is ours and not reaped yet, so the pid is still its.
            let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
            return Ok(());
        }
        if let Some(init) = self.owner.init(self.run_dir)? {
            // Its end is that of the container; it may have come by itself.
            let _ = kill(Pid::from_raw(init.pid), Signal::SIGKILL);
        }
        Ok(())
    }
}
