//! Moments of containers as files and streams, and containers made of them: docs/backup.md.

mod description;
mod file;
mod restore;

pub use file::backup_to_file;
pub use restore::{BackupInfo, Passed, RestoreReport, RestoredState, Source, restore, verify};

use std::io::Write;

use serde::Serialize;
use uuid::Uuid;

use super::changed::{Older, open_snapshot};
use super::device::OpenChain;
use super::progress::BlocksWatch;
use super::seal::How;
use super::snapshot::snapshot;
use description::Description;
use vellum_backup::{Header, Totals, Writer};
use vellum_base::block::{BlockDevice, BlockState, Blocks, Run};
use vellum_base::crash_point;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_base::interrupt;
use vellum_base::moment::unix_time;
use vellum_store::{ContainerRecord, ContainerSnapshot, Store};

/// Blocks that are read at a time.
const PIECE: Blocks = Blocks::new(256);

/// What is to be backed up.
#[derive(Debug, Clone, Copy, Default)]
pub struct BackupOptions<'a> {
    /// Only what changed since this snapshot of the container.
    pub since: Option<&'a str>,
    /// The name of the snapshot that is taken; after the time where it is `None`.
    pub snapshot: Option<&'a str>,
}

/// A backup that was made.
#[derive(Debug, Clone, Serialize)]
pub struct BackupReport {
    /// Its own id.
    pub backup: Uuid,
    /// The container.
    pub container: String,
    /// The snapshot that it holds.
    pub snapshot: String,
    /// That snapshot's id.
    pub state: Uuid,
    /// The snapshot that it is a delta to; `None` for a full backup.
    pub since: Option<String>,
    /// And its id.
    pub base: Option<Uuid>,
    /// The snapshot was taken for it.
    pub taken: bool,
    /// Bytes of it that an interrupted command had written.
    pub resumed_bytes: u64,
    /// Bytes of blocks with data.
    pub data_bytes: u64,
    /// Bytes of blocks that became zero.
    pub zero_bytes: u64,
    /// Bytes that were written for all that.
    pub written_bytes: u64,
}

/// Writes a backup of a container, of which a snapshot is taken, or of a snapshot (`C@NAME`), to a stream.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a name; [`ErrorKind::InvalidInput`] for a snapshot since itself; as
/// [`snapshot`]; where a layer is damaged or the stream fails, which is then cut off.
pub fn backup_to(
    store: &Store,
    name: &str,
    options: &BackupOptions<'_>,
    out: &mut dyn Write,
    watch: &dyn BlocksWatch,
) -> Result<BackupReport> {
    let wish = Wish::new(store, name, options)?;
    let state = wish.state(None)?;
    let header = state.header()?;
    let mut out = Counting { out, bytes: 0 };
    let description = state.description()?;
    let mut write = || {
        let mut writer = Writer::new(&mut out, &header, &description)?;
        state.write(&mut writer, watch)?;
        writer.finish().map(|(totals, _)| totals)
    };
    let totals = write().map_err(|error| match state.taken {
        true => error.context(format!(
            "the snapshot {}@{}, which was taken for this backup, stays",
            state.container.name, state.of.name
        )),
        false => error,
    })?;
    let written = out.bytes;
    Ok(state.report(&header, &totals, 0, written))
}

/// A stream whose bytes are counted.
struct Counting<'a> {
    out: &'a mut dyn Write,
    bytes: u64,
}

impl Write for Counting<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        interrupt::check_io()?;
        let count = self.out.write(buf)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// What somebody wants backed up: all names are there.
struct Wish<'a> {
    store: &'a Store,
    container: ContainerRecord,
    /// A snapshot that is there; `None` where one is to be taken.
    of: Option<ContainerSnapshot>,
    since: Option<ContainerSnapshot>,
    /// The name of the one that is to be taken.
    called: Option<&'a str>,
}

impl<'a> Wish<'a> {
    fn new(store: &'a Store, name: &str, options: &BackupOptions<'a>) -> Result<Self> {
        let (owner, of) = match name.split_once('@') {
            Some((owner, of)) => (owner, Some(of)),
            None => (name, None),
        };
        // Until it is known what the record says.
        let _pin = store.pin_layers()?;
        let container = store.container(owner);
        let container = container.or_else(|no_container| match store.image(name) {
            // Its name may have an @ too.
            Ok(_) => store.container(name),
            Err(_) => Err(no_container),
        })?;
        let container = store.as_settled(container)?;
        let of = of.map(|of| container.snapshot(of).cloned()).transpose()?;
        let since = options
            .since
            .map(|since| container.snapshot(since).cloned());
        let since = since.transpose()?;
        if let (Some(of), Some(called)) = (&of, options.snapshot) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{name} names a snapshot that is there, so none is taken: leave out --snapshot {called}, \
                     or @{}",
                    of.name
                ),
            ));
        }
        let wish = Wish {
            store,
            container,
            of,
            since,
            called: options.snapshot,
        };
        if let Some(of) = &wish.of {
            wish.check_since(of)?;
        }
        Ok(wish)
    }

    fn check_since(&self, of: &ContainerSnapshot) -> Result<()> {
        match &self.since {
            Some(since) if since.id == of.id => Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "nothing changed in {}@{} since itself: give an older snapshot to --since",
                    self.container.name, of.name
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The state that is backed up: that of a backup which was begun, if that is what is wanted; one that is
    /// there; or one that is taken now.
    fn state(&self, begun: Option<&Header>) -> Result<State> {
        let (of, taken) = match (begun, &self.of) {
            (Some(begun), _) => (self.begun(begun)?, false),
            (None, Some(of)) => (of.id, false),
            (None, None) => (self.take()?, true),
        };
        let _pin = self.store.pin_layers()?;
        // Layers may have been joined since.
        let container = self.store.container_by_now(&self.container)?;
        let of = by_id(&container, of)?.clone();
        let since = self.since.as_ref().map(|since| by_id(&container, since.id));
        let since = since.transpose()?.cloned();
        let (older, base) = match &since {
            Some(since) => {
                let open = open_snapshot(self.store, &container, since.id)?;
                (Older::of(open.chain()), Some(open))
            }
            None => (Older::default(), None),
        };
        let open = open_snapshot(self.store, &container, of.id)?;
        let changed = older.changed_in(open.chain());
        Ok(State {
            container,
            of,
            since,
            taken,
            changed,
            open,
            _base: base,
        })
    }

    /// The snapshot of a backup that was begun, where it is of what is wanted.
    fn begun(&self, begun: &Header) -> Result<Uuid> {
        let foreign = |what: &str| Error::new(ErrorKind::AlreadyExists, what.to_owned());
        if begun.container != self.container.id {
            return Err(foreign("it is of another container"));
        }
        let kept = by_id(&self.container, begun.state)
            .map_err(|_| foreign("its snapshot is not there any more"))?;
        if begun.base != self.since.as_ref().map(|since| since.id) {
            return Err(foreign("it is since another snapshot, or full"));
        }
        let same = match (&self.of, self.called) {
            (Some(of), _) => of.id == kept.id,
            (None, Some(called)) => called == kept.name,
            (None, None) => true,
        };
        match same {
            true => Ok(kept.id),
            false => Err(foreign("it is of another snapshot")),
        }
    }

    /// Takes the snapshot.
    fn take(&self) -> Result<Uuid> {
        let name = &self.container.name;
        let report = snapshot(self.store, name, self.called, How::Crash, None).map_err(|error| {
            match (error.kind(), self.called) {
                (ErrorKind::AlreadyExists, Some(called)) => error.context(format!(
                    "no snapshot was taken (`vellum backup {name}@{called}` backs up the one that is there)"
                )),
                _ => error,
            }
        })?;
        crash_point::here("backup: snapshot taken");
        Ok(report.snapshot.id)
    }
}

fn by_id(container: &ContainerRecord, id: Uuid) -> Result<&ContainerSnapshot> {
    container.snapshot_by_id(id).ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!(
                "a snapshot of {} was removed before it could be read",
                container.name
            ),
        )
    })
}

/// A snapshot and its base, open: as long as they are, neither can be removed.
struct State {
    container: ContainerRecord,
    of: ContainerSnapshot,
    since: Option<ContainerSnapshot>,
    taken: bool,
    changed: Vec<Run<BlockState>>,
    open: OpenChain,
    _base: Option<OpenChain>,
}

impl State {
    /// A header of a new backup.
    fn header(&self) -> Result<Header> {
        let virtual_size = self.open.chain().size();
        Ok(Header {
            backup: Uuid::new_v4(),
            container: self.container.id,
            state: self.of.id,
            base: self.since.as_ref().map(|since| since.id),
            virtual_size,
            device_size: self.of.disk.shown_of(virtual_size),
            created: unix_time()?.as_secs(),
        })
    }

    fn description(&self) -> Result<Vec<u8>> {
        Description::new(&self.container, &self.of, self.since.as_ref()).encode()
    }

    /// Writes what the writer does not have yet.
    fn write<W: Write>(&self, writer: &mut Writer<W>, watch: &dyn BlocksWatch) -> Result<()> {
        let from = writer.at();
        let left = self.changed.iter().filter(|run| run.end() > from);
        let left = left.map(|run| Run::new(run.span.from(run.start().max(from)), run.value));
        let left: Vec<Run<BlockState>> = left.collect();
        let data = left.iter().filter(|run| run.value == BlockState::Data);
        watch.begin(data.map(Run::len).sum::<Blocks>().get());
        let mut buf = Vec::new();
        let write = || {
            for run in left {
                if run.value == BlockState::Zero {
                    writer.zero(run.span)?;
                    continue;
                }
                for piece in run.span.pieces(PIECE) {
                    interrupt::check()?;
                    buf.resize(piece.len().buffer_len(), 0);
                    self.open.chain().read_at(&mut buf, piece.offset().get())?;
                    writer.data(piece.start(), &buf)?;
                    crash_point::here("backup: piece written");
                    watch.read(piece.len().get());
                }
            }
            Ok(())
        };
        let done = write();
        watch.end();
        done
    }

    fn report(
        &self,
        header: &Header,
        totals: &Totals,
        resumed_bytes: u64,
        written_bytes: u64,
    ) -> BackupReport {
        BackupReport {
            backup: header.backup,
            container: self.container.name.clone(),
            snapshot: self.of.name.clone(),
            state: header.state,
            since: self.since.as_ref().map(|since| since.name.clone()),
            base: header.base,
            taken: self.taken,
            resumed_bytes,
            data_bytes: totals.data.bytes(),
            zero_bytes: totals.zero.bytes(),
            written_bytes,
        }
    }
}
