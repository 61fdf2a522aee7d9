//! `vellum trace`: what a command touches first of the layers that it starts on. docs/registry.md, "Traces".

mod recorder;

pub use recorder::Recorder;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::export::layers::digest_of_layer;
use super::export::subject::Subject;
use super::registry::digest_of;
use super::run::{self, CommandOptions, RunOptions, Traced};
use recorder::{Request, Touched};
use vellum_base::block::WindowPower;
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};
use vellum_store::{ContainerRecord, Fork, Scaffold, Store};

const VERSION: u32 = 1;

/// Which ranges of layers were touched, in the order of first touch. As JSON: docs/registry.md.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    version: u32,
    /// Digests of layers.
    layers: Vec<String>,
    /// The index of a layer among these, and the number of one of its ranges of 64 KiB.
    touched: Vec<(u32, u32)>,
}

/// What is run for a trace, and for how long.
#[derive(Debug, Clone, Default)]
pub struct TraceOptions {
    /// The command; the image's where it is empty.
    pub command: Vec<String>,
    /// After so long it is asked to end; it may take as long as it wants where it is `None`.
    pub limit: Option<Duration>,
}

impl Trace {
    /// Reads what anybody may have written.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`].
    pub fn decode(json: &[u8]) -> Result<Self> {
        let trace: Trace = serde_json::from_slice(json).map_err(|error| {
            let text = "not a trace that `vellum trace` wrote";
            Error::with_source(ErrorKind::Corrupt, text, error)
        })?;
        if trace.version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the trace is of version {}; this build reads version {VERSION}: record it again",
                    trace.version
                ),
            ));
        }
        let layers = trace.layers.len();
        match trace
            .touched
            .iter()
            .find(|(layer, _)| *layer as usize >= layers)
        {
            Some((layer, _)) => Err(Error::new(
                ErrorKind::Corrupt,
                format!("the trace names the layer {layer} of {layers}"),
            )),
            None => Ok(trace),
        }
    }

    /// As the format has it.
    ///
    /// # Errors
    /// Never for what is in memory.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(self);
        json.map_err(|error| Error::internal(format!("a trace cannot be described: {error}")))
    }

    /// What was touched: the digest of a layer, and the number of one of its ranges of [`WindowPower::LEAST`].
    pub fn touched(&self) -> impl Iterator<Item = (&str, u32)> {
        let touched = self.touched.iter();
        touched
            .filter_map(|(layer, range)| Some((self.layers.get(*layer as usize)?.as_str(), *range)))
    }

    /// How many bytes of layers it is about, at most.
    pub fn bytes(&self) -> u64 {
        self.touched.len() as u64 * WindowPower::LEAST.blocks().bytes()
    }

    /// How many ranges were touched.
    pub fn len(&self) -> usize {
        self.touched.len()
    }

    /// True where nothing was touched.
    pub fn is_empty(&self) -> bool {
        self.touched.is_empty()
    }

    fn of(store: &Store, touched: Vec<Touched>) -> Result<Self> {
        let mut numbers: HashMap<Uuid, u32> = HashMap::new();
        let mut trace = Trace {
            version: VERSION,
            layers: Vec::new(),
            touched: Vec::new(),
        };
        for (layer, range) in touched {
            let number = match numbers.get(&layer) {
                Some(number) => *number,
                None => {
                    let number = numbers.len() as u32;
                    trace.layers.push(digest_of(digest_of_layer(store, layer)?));
                    numbers.insert(layer, number);
                    number
                }
            };
            trace.touched.push((number, range));
        }
        Ok(trace)
    }
}

/// Runs a command in a container of its own on the layers of an image, container or snapshot, and returns what it
/// touched of these.
///
/// # Errors
/// [`ErrorKind::Command`] for a command that cannot be started, or fails; as [`run::run`] and
/// [`super::registry::push`].
pub fn trace(store: &Store, name: &str, options: &TraceOptions) -> Result<Trace> {
    let subject = Subject::find(store, name, true)?;
    record(&subject, options)
}

/// As [`trace`], of layers that are all sealed.
pub(crate) fn record(subject: &Subject<'_>, options: &TraceOptions) -> Result<Trace> {
    subject
        .need_files()
        .context(|| "a trace is of a command that runs in it")?;
    let store = subject.store;
    let pin = store.pin_layers()?;
    let name = format!("vellum-trace-{}", Uuid::new_v4().simple());
    let fork = fork(subject, &name);
    let mut made = store.create_forks(&fork, &[name], &pin)?;
    let container = made.pop();
    let container = container.ok_or_else(|| Error::internal("a fork of no container"))?;
    let request = Request::new(store.runs().trace(container.id))?;
    let began = Instant::now();
    let run = RunOptions {
        command: CommandOptions {
            command: options.command.clone(),
            ..CommandOptions::default()
        },
        ..RunOptions::default()
    };
    let traced = Traced {
        limit: options.limit,
    };
    let ended = run::run_for_a_trace(store, container, &run, traced)?;
    let in_time = options.limit.is_none_or(|limit| began.elapsed() < limit);
    let failed = |why: String| Err(Error::new(ErrorKind::Command, why));
    match ended.failure {
        Some(failure) => failed(format!(
            "the command of the trace could not be started: {failure}"
        )),
        None if ended.status != 0 && in_time => failed(format!(
            "the command of the trace ended with status {}: what it touched may not be what a start touches, so nothing was \
             recorded",
            ended.status
        )),
        None => Trace::of(store, request.touched()?),
    }
}

/// A container on a subject's layers.
fn fork(subject: &Subject<'_>, name: &str) -> Fork {
    let origin = ContainerRecord {
        name: name.to_owned(),
        id: Uuid::new_v4(),
        image: subject.name.clone(),
        image_id: Uuid::nil(),
        layers: subject.layers.clone(),
        top: Uuid::nil(),
        next: None,
        next_snapshot: None,
        snapshots: Vec::new(),
        at: None,
        disk: subject.disk.clone(),
        config: subject.config.clone(),
        volumes: Vec::new(),
        scaffold: Scaffold::default(),
        atime: None,
        confinement: vellum_store::Confinement::default(),
        last_run: None,
        created: vellum_store::now(),
    };
    Fork::of_container(origin, Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_read_as_it_was_written_and_nothing_else_is() {
        let trace = Trace {
            version: 1,
            layers: vec!["sha256:a".into(), "sha256:b".into()],
            touched: vec![(1, 3), (0, 0)],
        };
        assert_eq!(Trace::decode(&trace.encode().unwrap()).unwrap(), trace);
        let touched: Vec<_> = trace.touched().collect();
        assert_eq!(touched, [("sha256:b", 3), ("sha256:a", 0)]);
        for (json, says) in [
            ("", "not a trace"),
            (r#"{"version":1}"#, "not a trace"),
            (r#"{"version":2,"layers":[],"touched":[]}"#, "version 2"),
            (
                r#"{"version":1,"layers":[],"touched":[[0,1]]}"#,
                "the layer 0 of 0",
            ),
        ] {
            let error = Trace::decode(json.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
