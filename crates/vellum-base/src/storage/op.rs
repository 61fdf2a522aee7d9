//! What an operation on the storage seam is, for counting it and for making it fail.

/// The kinds of operation of [`super::Storage`] and [`super::StorageFile`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OpKind {
    /// Opening an existing file.
    Open,
    /// Opening a file that is made by it, or may be.
    Create,
    /// Making a directory.
    CreateDir,
    /// Renaming.
    Rename,
    /// Removing a file or a tree.
    Remove,
    /// Making the names of a directory durable.
    SyncDir,
    /// Listing a directory, asking for a name, a length or allocated bytes.
    Look,
    /// Reading or mapping bytes of a file.
    Read,
    /// A buffered write.
    Write,
    /// A synchronous write.
    WriteDurable,
    /// A write past the page cache.
    WriteDirect,
    /// fdatasync.
    SyncData,
    /// fsync.
    Sync,
    /// Cutting or extending a file.
    SetLen,
    /// Punching a hole.
    Punch,
    /// Reserving space.
    Allocate,
    /// Asking whether something could not be written back.
    CheckWrittenBack,
}

/// Number of kinds.
const KINDS: usize = OpKind::CheckWrittenBack as usize + 1;

impl OpKind {
    /// What changes something on the disk.
    pub const CHANGES: [OpKind; 13] = [
        OpKind::Create,
        OpKind::CreateDir,
        OpKind::Rename,
        OpKind::Remove,
        OpKind::SyncDir,
        OpKind::Write,
        OpKind::WriteDurable,
        OpKind::WriteDirect,
        OpKind::SyncData,
        OpKind::Sync,
        OpKind::SetLen,
        OpKind::Punch,
        OpKind::Allocate,
    ];

    /// True for what makes something durable.
    pub fn is_sync(self) -> bool {
        matches!(
            self,
            OpKind::SyncDir | OpKind::WriteDurable | OpKind::SyncData | OpKind::Sync
        )
    }
}

/// How many operations of each kind there were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpCounts([u64; KINDS]);

impl OpCounts {
    /// Counts one.
    #[expect(clippy::indexing_slicing, reason = "there are KINDS kinds")]
    pub(super) fn add(&mut self, kind: OpKind) {
        self.0[kind as usize] += 1;
    }

    /// Operations of one kind.
    #[expect(clippy::indexing_slicing, reason = "there are KINDS kinds")]
    pub fn of(&self, kind: OpKind) -> u64 {
        self.0[kind as usize]
    }

    /// Operations of all kinds.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// What happened since `earlier`.
    pub fn since(&self, earlier: &OpCounts) -> OpCounts {
        let mut counts = *self;
        for (count, before) in counts.0.iter_mut().zip(earlier.0) {
            *count -= before;
        }
        counts
    }
}
