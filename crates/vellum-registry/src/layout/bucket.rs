//! An OCI layout in a bucket, by the crate `object_store`. docs/object-stores.md, "Object stores".

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path as FilePath;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, GetResult, MultipartId, ObjectStore, PutMode, PutOptions, PutPayload,
    UpdateVersion,
};
use vellum_base::error::{Error, ErrorKind, Result, ResultExt};

use super::super::failure::Failure;
use super::super::location::LayoutReference;
use super::super::ranges::{Flow, patiently};
use super::super::retry::{Tries, retried};
use super::super::session::Access;
use super::provider::{self, Provider};

/// A blob of more bytes goes in parts of so many, and of more where there would be too many of them.
const PART: u64 = 8 << 20;
/// The most parts: S3 takes 10,000, Azure's 50,000.
const MAX_PARTS: u64 = 9_000;
/// How long a store may take to have a part.
const PUT: Duration = Duration::from_secs(900);
/// How often a change of what others change too is begun anew.
const RACES: usize = 100;
/// The longest pause before that.
const RACE_PAUSE_MS: u64 = 400;
/// How many writes may fail in one change before the failure is what is said. Each doubles the longest pause.
const PUT_FAILURES: u32 = 5;

/// A bucket, and what the names of the layout's objects begin with.
#[derive(Debug)]
pub(crate) struct Bucket {
    provider: Provider,
    prefix: String,
    shown: String,
}

/// What others may have changed meanwhile.
type Seen = Option<(Vec<u8>, UpdateVersion)>;

impl Bucket {
    /// Gets ready to ask. Nothing is sent yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a store of which too little is known, or that is not to be spoken to.
    pub fn open(reference: &LayoutReference, access: Access) -> Result<Self> {
        Ok(Bucket {
            provider: provider::open(reference, access)?,
            prefix: reference.bucket().1.to_owned(),
            shown: reference.layout(),
        })
    }

    /// Where the store is, as a reference says it.
    pub fn settings(&self) -> &[(String, String)] {
        &self.provider.settings
    }

    fn store(&self) -> &dyn ObjectStore {
        &*self.provider.store
    }

    fn parts(&self) -> &dyn MultipartStore {
        &*self.provider.parts
    }

    fn object(&self, name: &str) -> Result<Path> {
        let whole = match self.prefix.is_empty() {
            true => name.to_owned(),
            false => format!("{}/{name}", self.prefix),
        };
        Path::parse(&whole).map_err(|error| {
            let text = format!("{:?} is no name of an object: {error}", whole);
            Error::new(ErrorKind::InvalidInput, text)
        })
    }

    fn failed(&self, doing: &str, name: &str, error: &object_store::Error) -> Failure {
        provider::failure(&format!("{doing} {name} of {}", self.shown), error)
    }

    /// Asks for an object; `None` where there is none in a bucket that is there.
    async fn get(
        &self,
        doing: &str,
        name: &str,
        range: Option<GetRange>,
    ) -> Result<Option<GetResult>, Failure> {
        let options = GetOptions {
            range,
            ..GetOptions::default()
        };
        let place = self.object(name)?;
        let whole = format!("{doing} {name} of {}", self.shown);
        match patiently(&whole, self.store().get_opts(&place, options)).await? {
            Ok(found) => Ok(Some(found)),
            Err(error @ object_store::Error::NotFound { .. }) => {
                match provider::no_bucket(&error) {
                    true => Err(self.failed(doing, name, &error)),
                    false => Ok(None),
                }
            }
            Err(error) => Err(self.failed(doing, name, &error)),
        }
    }

    /// All of a short object, and which one it was.
    pub async fn read(
        &self,
        name: &str,
        most: u64,
    ) -> Result<Option<(Vec<u8>, UpdateVersion)>, Failure> {
        retried(Tries::Several, || async {
            let Some(found) = self.get("reading", name, None).await? else {
                return Ok(None);
            };
            if found.meta.size > most {
                let text = format!(
                    "{name} of {} has {} bytes; at most {most} are read",
                    self.shown, found.meta.size
                );
                return Err(Error::new(ErrorKind::Corrupt, text).into());
            }
            let version = UpdateVersion {
                e_tag: found.meta.e_tag.clone(),
                version: found.meta.version.clone(),
            };
            let mut bytes = Vec::new();
            self.receive(found, name, &mut |piece| {
                bytes.extend_from_slice(piece);
                Ok(Flow::Go)
            })
            .await?;
            Ok(Some((bytes, version)))
        })
        .await
    }

    /// Hands out what comes of an object.
    async fn receive(
        &self,
        found: GetResult,
        name: &str,
        each: &mut dyn FnMut(&[u8]) -> Result<Flow, Failure>,
    ) -> Result<(), Failure> {
        let mut pieces = found.into_stream();
        while let Some(piece) = patiently("reading", pieces.next()).await? {
            let piece = piece.map_err(|error| self.failed("reading", name, &error))?;
            if each(&piece)? == Flow::Stop {
                break;
            }
        }
        Ok(())
    }

    /// How many bytes an object has; `None` where there is none.
    pub async fn size(&self, name: &str) -> Result<Option<u64>, Failure> {
        let place = self.object(name)?;
        let options = GetOptions {
            head: true,
            ..GetOptions::default()
        };
        retried(Tries::Several, || async {
            let asked = self.store().get_opts(&place, options.clone());
            match patiently("asking for", asked).await? {
                Ok(found) => Ok(Some(found.meta.size)),
                // Without a body nobody says what is not there; the index, which is read first, did.
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(self.failed("asking for", name, &error)),
            }
        })
        .await
    }

    /// Hands out an object from a byte on. False where there is none. Tries once.
    pub async fn stream(
        &self,
        name: &str,
        from: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<Flow, Failure>,
    ) -> Result<bool, Failure> {
        let range = (from > 0).then_some(GetRange::Offset(from));
        let Some(found) = self.get("reading", name, range).await? else {
            return Ok(false);
        };
        self.receive(found, name, each).await?;
        Ok(true)
    }

    /// Those bytes of an object, fewer where it ends before; `None` where there is none. Tries once.
    pub async fn range(&self, name: &str, range: Range<u64>) -> Result<Option<Vec<u8>>, Failure> {
        let len = range.end.saturating_sub(range.start) as usize;
        let bounded = Some(GetRange::Bounded(range));
        let Some(found) = self.get("reading", name, bounded).await? else {
            return Ok(None);
        };
        let mut bytes = Vec::with_capacity(len);
        self.receive(found, name, &mut |piece| {
            bytes.extend_from_slice(piece);
            match bytes.len() > len {
                true => Ok(Flow::Stop),
                false => Ok(Flow::Go),
            }
        })
        .await?;
        Ok(Some(bytes))
    }

    /// Puts bytes there.
    pub async fn put(&self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        let place = self.object(name)?;
        let payload = PutPayload::from(bytes.to_vec());
        retried(Tries::Several, || async {
            let put = self
                .store()
                .put_opts(&place, payload.clone(), PutOptions::default());
            let done = self.in_time(name, put).await?;
            done.map_err(|error| self.failed("writing", name, &error))?;
            Ok(())
        })
        .await
    }

    async fn in_time<T>(&self, name: &str, work: impl Future<Output = T>) -> Result<T, Failure> {
        tokio::time::timeout(PUT, work).await.map_err(|_| {
            let seconds = PUT.as_secs();
            let text = format!(
                "writing {name} of {}: no answer for {seconds} seconds",
                self.shown
            );
            Failure::passing(Error::new(ErrorKind::Timeout, text))
        })
    }

    /// Puts a file there, a long one in parts; `moved` counts its bytes.
    pub async fn put_file(
        &self,
        name: &str,
        from: &FilePath,
        moved: &AtomicU64,
    ) -> Result<(), Failure> {
        let reading = || format!("cannot read {}", from.display());
        let file = std::fs::File::open(from).context(reading)?;
        let len = file.metadata().context(reading)?.len();
        if len <= PART {
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, 0).context(reading)?;
            self.put(name, &bytes).await?;
            moved.fetch_add(len, Ordering::Relaxed);
            return Ok(());
        }
        let place = self.object(name)?;
        let id = retried(Tries::Several, || async {
            let begun = self
                .in_time(name, self.parts().create_multipart(&place))
                .await?;
            begun.map_err(|error| self.failed("beginning to write", name, &error))
        })
        .await?;
        let upload = Parts {
            bucket: self,
            name,
            place: &place,
            id: &id,
        };
        let sent = upload.send(&file, len, moved).await;
        if sent.is_err() {
            // Else the store would keep the parts; what is left of it is the store's to remove.
            let _ = self
                .in_time(name, self.parts().abort_multipart(&place, &id))
                .await;
        }
        sent
    }

    /// Changes an object that others may be changing too, on the condition that it is the one that was read.
    pub async fn change(
        &self,
        name: &str,
        most: u64,
        change: &dyn Fn(Option<Vec<u8>>) -> Result<Option<Vec<u8>>>,
    ) -> Result<(), Failure> {
        let mut failures = 0;
        for _ in 0..RACES {
            let seen: Seen = self.read(name, most).await?;
            let (bytes, version) = match seen {
                Some((bytes, version)) => (Some(bytes), Some(version)),
                None => (None, None),
            };
            let Some(bytes) = change(bytes)? else {
                return Ok(());
            };
            let mut most = RACE_PAUSE_MS;
            match self.put_unless_changed(name, bytes, version).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                // Whether it was written shows when it is read again.
                Err(failure) if failure.passes && failures < PUT_FAILURES => {
                    failures += 1;
                    most <<= failures;
                }
                Err(failure) => return Err(failure),
            }
            let pause = Duration::from_millis(fastrand::u64(0..most));
            tokio::time::sleep(pause).await;
        }
        let text = format!(
            "{name} of {} is changed by others all the time: nothing was changed, and the blobs are there; push it once \
             more",
            self.shown
        );
        Err(Error::new(ErrorKind::InUse, text).into())
    }

    /// False where it was changed meanwhile.
    async fn put_unless_changed(
        &self,
        name: &str,
        bytes: Vec<u8>,
        version: Option<UpdateVersion>,
    ) -> Result<bool, Failure> {
        let mode = match version {
            Some(version) => PutMode::Update(version),
            None => PutMode::Create,
        };
        let place = self.object(name)?;
        let put = self
            .store()
            .put_opts(&place, PutPayload::from(bytes), PutOptions::from(mode));
        match self.in_time(name, put).await? {
            Ok(_) => Ok(true),
            Err(
                object_store::Error::Precondition { .. }
                | object_store::Error::AlreadyExists { .. },
            ) => Ok(false),
            Err(error) => Err(self.failed("writing", name, &error)),
        }
    }
}

/// An object that is put there in parts.
struct Parts<'a> {
    bucket: &'a Bucket,
    name: &'a str,
    place: &'a Path,
    id: &'a MultipartId,
}

impl Parts<'_> {
    async fn send(&self, file: &std::fs::File, len: u64, moved: &AtomicU64) -> Result<(), Failure> {
        let size = PART.max(len.div_ceil(MAX_PARTS));
        let mut ids = Vec::new();
        let mut at = 0;
        while at < len {
            let count = size.min(len - at);
            let mut bytes = vec![0; count as usize];
            file.read_exact_at(&mut bytes, at)
                .context(|| format!("reading the blob {}", self.name))?;
            ids.push(self.part(ids.len(), bytes).await?);
            at += count;
            moved.fetch_add(count, Ordering::Relaxed);
        }
        let (bucket, name) = (self.bucket, self.name);
        retried(Tries::Several, || async {
            let complete = bucket
                .parts()
                .complete_multipart(self.place, self.id, ids.clone());
            match bucket.in_time(name, complete).await? {
                Ok(_) => Ok(()),
                // An answer that was lost: there is no such upload any more.
                Err(_) if bucket.size(name).await? == Some(len) => Ok(()),
                Err(error) => Err(bucket.failed("writing", name, &error)),
            }
        })
        .await
    }

    async fn part(&self, index: usize, bytes: Vec<u8>) -> Result<PartId, Failure> {
        let (bucket, name) = (self.bucket, self.name);
        let payload = PutPayload::from(bytes);
        retried(Tries::Several, || async {
            let put = bucket
                .parts()
                .put_part(self.place, self.id, index, payload.clone());
            let done = bucket.in_time(name, put).await?;
            done.map_err(|error| bucket.failed("writing a part of", name, &error))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Arc;

    use futures_util::FutureExt;
    use object_store::memory::InMemory;

    use super::*;

    fn bucket() -> Bucket {
        let store = Arc::new(InMemory::new());
        Bucket {
            provider: Provider {
                store: store.clone(),
                parts: store,
                settings: Vec::new(),
            },
            prefix: "some/prefix".into(),
            shown: "s3://bucket/some/prefix".into(),
        }
    }

    fn within<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(work)
    }

    #[test]
    fn a_change_that_lost_a_race_is_made_again_from_what_is_there_now() {
        let bucket = bucket();
        // The first time there is nothing yet, the second time something.
        for expected in [&b"other mine"[..], b"other other mine"] {
            let asked = Cell::new(0);
            let change = |there: Option<Vec<u8>>| {
                if asked.replace(asked.get() + 1) == 0 {
                    let before = there.clone().filter(|_| expected.len() > 10);
                    let others =
                        before.map_or_else(|| b"other".to_vec(), |_| b"other other".to_vec());
                    bucket
                        .put("index", &others)
                        .now_or_never()
                        .unwrap()
                        .unwrap();
                }
                let there = there.as_deref().unwrap_or(b"");
                Ok(Some([there, b" mine"].concat()))
            };
            within(bucket.change("index", 100, &change)).unwrap();
            assert_eq!(asked.get(), 2);
            let (bytes, _) = within(bucket.read("index", 100)).unwrap().unwrap();
            assert_eq!(bytes, expected);
        }
    }

    #[test]
    fn what_is_put_in_parts_is_whole_and_can_be_read_by_ranges() {
        let bucket = bucket();
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..PART + 4321).map(|n| (n % 251) as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let moved = AtomicU64::new(0);
        within(bucket.put_file("blob", file.path(), &moved)).unwrap();
        assert_eq!(moved.into_inner(), PART + 4321);
        assert_eq!(within(bucket.size("blob")).unwrap(), Some(PART + 4321));
        let range = PART - 7..PART + 9;
        let part = within(bucket.range("blob", range.clone())).unwrap();
        assert_eq!(
            part.as_deref(),
            bytes.get(range.start as usize..range.end as usize)
        );
        assert!(within(bucket.read("blob", 100)).is_err());
        assert_eq!(within(bucket.size("absent")).unwrap(), None);
    }
}
