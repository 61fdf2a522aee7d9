//! `vellum nbd` as a process.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use crate::common::{Running, TestStore, wait_until};

/// `vellum nbd`, always on the same socket.
pub struct Server {
    pub process: Running,
    pub socket: PathBuf,
}

impl Server {
    pub fn start(store: &TestStore, names: &[&str]) -> Server {
        Server::started(store, names, |_| {})
    }

    pub fn started(store: &TestStore, names: &[&str], with: impl FnOnce(&mut Command)) -> Server {
        let socket = store.path("nbd.sock");
        let mut command = store.command();
        command
            .args(["-q", "nbd"])
            .args(names)
            .arg("--socket")
            .arg(&socket);
        with(&mut command);
        let child = command.spawn().unwrap();
        let server = Server {
            process: Running(child),
            socket,
        };
        wait_until("the server listens", || {
            UnixStream::connect(&server.socket).is_ok()
        });
        server
    }

    /// SIGKILL, and another one that serves the same. The dead one's socket is in its way.
    pub fn replaced(self, store: &TestStore, names: &[&str]) -> Server {
        self.kill();
        assert!(store.path("nbd.sock").exists());
        Server::start(store, names)
    }

    pub fn kill(mut self) {
        self.process.0.kill().unwrap();
        self.process.0.wait().unwrap();
    }
}
