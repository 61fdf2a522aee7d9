//! Where blobs come from and go to, whichever it is: a registry, or an OCI layout in a directory, a bucket or an
//! archive.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::runtime::Runtime;
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_image::{OciArchive, Platform, Progress, blob_name, familiar_name};

use super::document::{CONTAINERD_NAME, Descriptor, NAME_ANNOTATION, REF_NAME, choose};
use super::failure::Failure;
use super::find::{Found, find};
use super::layout::Layout;
use super::location::{LayoutReference, Location};
use super::ranges::{Flow, Part, Ranges};
use super::retry::{Tries, retried};
use super::session::{Access, Outcome, Push, Session, Upload, drive, places, runtime, several};
use super::source::Seen;

/// Where one command has blobs from, or puts them. Blocks the thread that calls it, and no other is started.
#[derive(Debug)]
pub struct Place(Kind);

#[derive(Debug)]
enum Kind {
    Registry(Session),
    Layout(LayoutSession),
}

/// An image of a layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// What it is called.
    pub name: String,
    /// The digest of what the index leads to.
    pub digest: String,
}

/// What an entry of an index is called: as it was where it was saved, else as Docker shows it, else as the OCI's name
/// for it is.
fn name_of(entry: &Descriptor) -> Option<String> {
    if let Some(name) = entry.annotation(NAME_ANNOTATION) {
        return Some(name.to_owned());
    }
    if let Some(name) = entry.annotation(CONTAINERD_NAME) {
        return Some(familiar_name(name).to_owned());
    }
    entry.annotation(REF_NAME).map(str::to_owned)
}

/// One command's business with one layout.
#[derive(Debug)]
struct LayoutSession {
    runtime: Runtime,
    layout: Layout,
    /// Of an archive there is none.
    reference: Option<LayoutReference>,
    access: Access,
}

impl Place {
    /// Gets ready to speak to the place of a location. Nothing is sent yet.
    ///
    /// # Errors
    /// As [`Session::open`]; [`ErrorKind::InvalidInput`] for an object store of which too little is known.
    pub fn open(location: &Location, access: Access) -> Result<Self> {
        let kind = match location {
            Location::Registry(reference) => Kind::Registry(Session::open(reference, access)?),
            Location::Layout(reference) => Kind::Layout(LayoutSession {
                runtime: runtime()?,
                layout: Layout::open(reference, access)?,
                reference: Some(reference.clone()),
                access,
            }),
        };
        Ok(Place(kind))
    }

    /// An archive, from which images are taken by their digests.
    ///
    /// # Errors
    /// Where a runtime cannot be made.
    pub fn of_archive(archive: OciArchive, shown: &str) -> Result<Self> {
        Ok(Place(Kind::Layout(LayoutSession {
            runtime: runtime()?,
            layout: Layout::in_archive(archive, shown.to_owned()),
            reference: None,
            access: Access::default(),
        })))
    }

    /// The registry and the repository that it is; `None` for a layout.
    pub fn repository(&self) -> Option<(&str, &str)> {
        match &self.0 {
            Kind::Registry(session) => Some(session.place()),
            Kind::Layout(_) => None,
        }
    }

    /// What [`BlobReader`] needs to go on where this is: the location, and how it was spoken to. It says of an object
    /// store where that is, for one whose environment does not, and no secret. `None` for an archive.
    pub fn whereabouts(&self) -> Option<(String, Access)> {
        let session = match &self.0 {
            Kind::Registry(session) => return Some(session.whereabouts()),
            Kind::Layout(session) => session,
        };
        let mut reference = session.reference.clone()?;
        reference.settings = session.layout.settings();
        Some((reference.to_string(), session.access))
    }

    /// What holds the image of `location`, which is here, and those that belong together with it: a registry and namespace, or a
    /// layout, with the endpoint or account that it is at. docs/encryption.md, "The salt".
    pub fn namespace(&self, location: &Location) -> String {
        match (&self.0, location) {
            (Kind::Layout(session), Location::Layout(reference)) => {
                let settings = session.layout.settings().into_iter();
                let settings = settings.filter(|(name, _)| name != "region");
                let settings = settings.map(|(name, value)| format!("?{name}={value}"));
                reference.layout() + &settings.collect::<String>()
            }
            _ => location.namespace(),
        }
    }

    /// The images of a layout that have a name, each once, for a platform.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no index, or nothing of a name for the platform; [`ErrorKind::Internal`] for
    /// a registry.
    pub fn named(&self, platform: &Platform) -> Result<Vec<Named>> {
        let Kind::Layout(session) = &self.0 else {
            return Err(Error::internal("a registry has no index of all images"));
        };
        let entries = session.drive(session.layout.entries())?;
        let mut by_name: BTreeMap<String, Vec<Descriptor>> = BTreeMap::new();
        for entry in entries {
            if let Some(name) = name_of(&entry) {
                by_name.entry(name).or_default().push(entry);
            }
        }
        let each = by_name.into_iter().map(|(name, entries)| {
            let entry = match entries.as_slice() {
                [only] => only,
                several => {
                    choose(several, platform).map_err(|error| error.context(name.clone()))?
                }
            };
            blob_name(&entry.digest)?;
            let digest = entry.digest.clone();
            Ok(Named { name, digest })
        });
        each.collect()
    }

    /// What the location names, for a platform: an image, its block layers, or both.
    ///
    /// # Errors
    /// As [`Session::find`].
    pub fn find(&self, platform: &Platform) -> Result<Found> {
        match &self.0 {
            Kind::Registry(session) => session.find(platform),
            Kind::Layout(session) => {
                let reference = session.reference.as_ref();
                let identifier = reference.and_then(LayoutReference::identifier);
                session.find(identifier, platform)
            }
        }
    }

    /// What a digest of a layout leads to.
    ///
    /// # Errors
    /// As [`Session::find`]; [`ErrorKind::Internal`] for a registry.
    pub fn find_digest(&self, digest: &str, platform: &Platform) -> Result<Found> {
        match &self.0 {
            Kind::Registry(_) => Err(Error::internal("a registry is asked by its reference")),
            Kind::Layout(session) => session.find(Some(digest), platform),
        }
    }

    /// As [`Session::try_push`].
    ///
    /// # Errors
    /// As [`Session::try_push`]; [`ErrorKind::NotFound`] for a bucket that is not there.
    pub fn try_push(&self) -> Result<()> {
        match &self.0 {
            Kind::Registry(session) => session.try_push(),
            Kind::Layout(session) => session.drive(session.layout.try_push()),
        }
    }

    /// As [`Session::try_ranges`].
    ///
    /// # Errors
    /// As [`Session::try_ranges`].
    pub fn try_ranges(&self, blobs: &[Descriptor]) -> Result<()> {
        let session = match &self.0 {
            Kind::Registry(session) => return session.try_ranges(blobs),
            Kind::Layout(session) => session,
        };
        let first = |digest| retried(Tries::Several, move || session.layout.range(digest, 0..1));
        session.drive(async {
            let each = blobs.iter().map(|blob| first(blob.digest.as_str()));
            several(each).await
        })
    }

    /// As [`Session::fetch`].
    ///
    /// # Errors
    /// As [`Session::fetch`].
    pub fn fetch(
        &self,
        wanted: &[Descriptor],
        layout: &Path,
        progress: Option<Progress<'static>>,
    ) -> Result<()> {
        let session = match &self.0 {
            Kind::Registry(session) => return session.fetch(wanted, layout, progress),
            Kind::Layout(session) => session,
        };
        let moved = AtomicU64::new(0);
        let places = places(wanted, layout)?;
        let each = places
            .iter()
            .map(|(blob, path)| session.layout.download(blob, path, &moved));
        drive(&session.runtime, &moved, progress, several(each))
    }

    /// As [`Session::push`]. Of a layout the index comes last.
    ///
    /// # Errors
    /// As [`Session::push`]. What was sent stays there, and no tag names it.
    pub fn push(
        &self,
        push: &Push,
        progress: Option<Progress<'static>>,
        done: &dyn Fn(&Upload, Outcome),
    ) -> Result<()> {
        match &self.0 {
            Kind::Registry(session) => session.push(push, progress, done),
            Kind::Layout(session) => session.push(push, progress, done),
        }
    }
}

impl LayoutSession {
    fn drive<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T> {
        drive(&self.runtime, &AtomicU64::new(0), None, work)
    }

    fn find(&self, identifier: Option<&str>, platform: &Platform) -> Result<Found> {
        self.drive(async {
            let digest = self.layout.resolve(identifier).await?;
            find(&self.layout, &digest, self.layout.shown(), platform).await
        })
    }

    fn push(
        &self,
        push: &Push,
        progress: Option<Progress<'static>>,
        done: &dyn Fn(&Upload, Outcome),
    ) -> Result<()> {
        let (layout, moved) = (&self.layout, AtomicU64::new(0));
        let reference = self.reference.as_ref();
        let (Some(reference), Some(tagged)) = (reference, push.documents.last()) else {
            return Err(Error::internal("a push of nothing, or to an archive"));
        };
        // Held to the end: nobody takes what is under way for left behind.
        let filling = layout.fill()?;
        let each = push.blobs.iter().map(|blob| async {
            let outcome = layout.upload(&filling, blob, &moved).await?;
            done(blob, outcome);
            Ok::<(), Failure>(())
        });
        let work = async {
            several(each).await?;
            for document in &push.documents {
                layout.put_document(&filling, document).await?;
            }
            layout.set_tag(&filling, reference.tag(), tagged).await
        };
        drive(&self.runtime, &moved, progress, work)
    }
}

/// Parts of the blobs of one place. Threads may ask at once; whoever does waits.
#[derive(Debug)]
pub struct BlobReader(Reader);

#[derive(Debug)]
enum Reader {
    Registry(Box<Ranges>),
    Layout { runtime: Runtime, layout: Layout },
}

impl BlobReader {
    /// Gets ready to ask the place of a location. Nothing is sent yet. What requests show of hosts is kept in `seen`.
    ///
    /// # Errors
    /// As [`Place::open`].
    pub fn open(location: &Location, access: Access, seen: &Arc<Seen>) -> Result<Self> {
        Ok(BlobReader(match location {
            Location::Registry(reference) => {
                Reader::Registry(Box::new(Ranges::open(reference, access, seen)?))
            }
            Location::Layout(reference) => Reader::Layout {
                runtime: runtime()?,
                layout: Layout::open(reference, access)?,
            },
        }))
    }

    /// As [`Ranges::get`].
    ///
    /// # Errors
    /// As [`Ranges::get`].
    pub fn get(&self, digest: &str, range: Range<u64>) -> Result<Part, Failure> {
        match &self.0 {
            Reader::Registry(ranges) => ranges.get(digest, range),
            Reader::Layout { runtime, layout } => {
                let range = runtime.block_on(layout.range(digest, range));
                range.map(Part::from)
            }
        }
    }

    /// As [`Ranges::distrust`]; of a layout there is one place alone.
    pub fn distrust(&self, digest: &str, part: &Part, why: &Failure) {
        if let Reader::Registry(ranges) = &self.0 {
            ranges.distrust(digest, part, why);
        }
    }

    /// As [`Ranges::stream`].
    ///
    /// # Errors
    /// As [`Ranges::stream`].
    pub fn stream(
        &self,
        digest: &str,
        range: Range<u64>,
        mut each: impl FnMut(&[u8]) -> Result<Flow, Failure>,
    ) -> Result<(), Failure> {
        let (runtime, layout) = match &self.0 {
            Reader::Registry(ranges) => return ranges.stream(digest, range, each),
            Reader::Layout { runtime, layout } => (runtime, layout),
        };
        let mut left = range.end.saturating_sub(range.start);
        let mut stopped = false;
        let mut bounded = |bytes: &[u8]| {
            left = left.checked_sub(bytes.len() as u64).ok_or_else(|| {
                let text = format!("the blob {digest} has more than {} bytes", range.end);
                Failure::from(Error::new(ErrorKind::Corrupt, text))
            })?;
            let flow = each(bytes)?;
            stopped = flow == Flow::Stop;
            Ok(flow)
        };
        runtime.block_on(layout.stream(digest, range.start, &mut bounded))?;
        if left > 0 && !stopped {
            let text = format!("the blob {digest} is cut off, {left} bytes before its end");
            return Err(Failure::passing(Error::new(ErrorKind::Corrupt, text)));
        }
        Ok(())
    }
}
