//! The kernel's FUSE protocol as far as one regular file needs it.
//!
//! Source: include/uapi/linux/fuse.h, protocol 7.31 to 7.45. All numbers are in host byte order.
//! Requests are parsed from byte slices, so that a fuzzer can drive this without a kernel.

use std::fmt;

use vellum_base::block::Durability;

/// The protocol's major version, unchanged since 2006.
pub const MAJOR: u32 = 7;
/// The newest minor version that this code was written against.
pub const MINOR: u32 = 45;
/// The oldest minor version whose INIT reply and flags are understood here (Linux 5.4).
pub const MIN_MINOR: u32 = 31;

/// Bytes of a request's header.
pub const IN_HEADER_LEN: usize = 40;
/// Bytes of the arguments in front of the data of a WRITE.
pub const WRITE_IN_LEN: usize = 40;
/// Bytes of a reply's header.
pub const OUT_HEADER_LEN: usize = 16;
/// The most bytes that one READ or WRITE carries: 1 MiB.
pub const MAX_IO: usize = 1 << 20;
/// The node of the mount's root, here the only one.
pub const ROOT_NODE: u64 = 1;
/// The bit that the kernel sets in `unique` of a request that it sends again.
pub const UNIQUE_RESEND: u64 = 1 << 63;

/// OPEN's answer: neither kernel nor server caches the file.
pub const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// OPEN's answer: no FLUSH at close.
pub const FOPEN_NOFLUSH: u32 = 1 << 5;
/// OPEN's answer: direct writes may run side by side.
pub const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// INIT: reads may be asynchronous.
pub const INIT_ASYNC_READ: u64 = 1 << 0;
/// INIT: writes larger than a page.
pub const INIT_BIG_WRITES: u64 = 1 << 5;
/// INIT: direct I/O may be asynchronous.
pub const INIT_ASYNC_DIO: u64 = 1 << 15;
/// INIT: `max_pages` of the reply counts.
pub const INIT_MAX_PAGES: u64 = 1 << 22;
/// INIT: `flags2` counts.
pub const INIT_EXT: u64 = 1 << 30;
/// INIT: the kernel sends unanswered requests again when told (Linux 6.9, protocol 7.40).
pub const INIT_HAS_RESEND: u64 = 1 << 39;

/// INIT: requests come by io_uring (Linux 6.14, protocol 7.42).
pub const INIT_OVER_IO_URING: u64 = 1 << 41;

/// FALLOCATE mode: free the range, which then reads as zeros; the length stays.
pub const FALLOC_PUNCH_HOLE_KEEP_SIZE: u32 = 0x3;
/// FALLOCATE mode: the range reads as zeros and stays allocated; the length stays.
pub const FALLOC_ZERO_RANGE_KEEP_SIZE: u32 = 0x11;

const OP_FORGET: u32 = 2;
const OP_GETATTR: u32 = 3;
const OP_OPEN: u32 = 14;
const OP_READ: u32 = 15;
const OP_WRITE: u32 = 16;
const OP_STATFS: u32 = 17;
const OP_RELEASE: u32 = 18;
const OP_FSYNC: u32 = 20;
const OP_FLUSH: u32 = 25;
const OP_INIT: u32 = 26;
const OP_INTERRUPT: u32 = 36;
const OP_DESTROY: u32 = 38;
const OP_NOTIFY_REPLY: u32 = 41;
const OP_BATCH_FORGET: u32 = 42;
const OP_FALLOCATE: u32 = 43;
const OP_LSEEK: u32 = 46;

const NOTIFY_RETRIEVE: i32 = 5;
const NOTIFY_RESEND: i32 = 7;

/// A request that is not one: the framing between kernel and server is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParseError {
    /// Fewer bytes than a header.
    ShortHeader(usize),
    /// The header's length and the bytes that were read differ: (said, read).
    Length(u32, usize),
    /// The arguments of the opcode are cut: (opcode, unique). It can be answered with an error.
    ShortArguments(u32, u64),
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParseError::ShortHeader(read) => {
                write!(f, "{read} bytes where a request header has {IN_HEADER_LEN}")
            }
            ParseError::Length(said, read) => {
                write!(f, "a request says {said} bytes and has {read}")
            }
            ParseError::ShortArguments(opcode, _) => {
                write!(f, "the arguments of opcode {opcode} are cut")
            }
        }
    }
}

impl std::error::Error for ParseError {}

/// One request of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// The opcode's number.
    pub opcode: u32,
    /// What the reply repeats.
    pub unique: u64,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// What the kernel asks. Offsets and lengths are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    /// The handshake.
    Init(InitIn),
    /// The file's attributes.
    Getattr,
    /// Open, with the flags of open(2).
    Open {
        /// Flags of open(2).
        flags: u32,
    },
    /// Read.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes wanted.
        size: u32,
    },
    /// Write.
    Write {
        /// First byte.
        offset: u64,
        /// What to write.
        data: &'a [u8],
        /// When it has to be durable.
        durability: Durability,
    },
    /// close(2) of one descriptor.
    Flush,
    /// The last close.
    Release,
    /// fsync or fdatasync.
    Fsync,
    /// fallocate(2).
    Fallocate {
        /// First byte.
        offset: u64,
        /// Length.
        length: u64,
        /// Mode of fallocate(2).
        mode: u32,
    },
    /// lseek(2) with SEEK_DATA or SEEK_HOLE.
    Lseek {
        /// Where to start.
        offset: u64,
        /// SEEK_DATA or SEEK_HOLE.
        whence: u32,
    },
    /// statfs(2).
    Statfs,
    /// The caller of an earlier request was interrupted.
    Interrupt,
    /// References to nodes are dropped; has no reply.
    Forget,
    /// The file system is unmounted.
    Destroy,
    /// What [`notify_retrieve`] asked for.
    Retrieved,
    /// An opcode that a single file does not need.
    Other,
}

impl Operation<'_> {
    /// True for what must not be carried out again once it was answered.
    pub fn changes_data(&self) -> bool {
        matches!(self, Operation::Write { .. } | Operation::Fallocate { .. })
    }
}

/// As [`Operation::changes_data`], of an opcode.
pub fn changes_data(opcode: u32) -> bool {
    matches!(opcode, OP_WRITE | OP_FALLOCATE)
}

/// The arguments of INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitIn {
    /// Protocol version of the kernel, major.
    pub major: u32,
    /// Protocol version of the kernel, minor.
    pub minor: u32,
    /// The most bytes that the kernel would read ahead.
    pub max_readahead: u32,
    /// What the kernel offers; the upper half is 0 where it does not know [`INIT_EXT`].
    pub flags: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(field.try_into().ok()?))
}

/// What the reply to the request in `bytes` repeats; `None` where they are no request.
pub fn unique(bytes: &[u8]) -> Option<u64> {
    u64_at(bytes, 8)
}

impl<'a> Request<'a> {
    /// Parses one request as read(2) on the FUSE device returned it.
    ///
    /// # Errors
    /// [`ParseError`], where the bytes contradict their lengths.
    pub fn parse(bytes: &'a [u8]) -> Result<Request<'a>, ParseError> {
        let (header, arguments) = bytes
            .split_at_checked(IN_HEADER_LEN)
            .ok_or(ParseError::ShortHeader(bytes.len()))?;
        let (Some(len), Some(opcode), Some(unique)) =
            (u32_at(header, 0), u32_at(header, 4), u64_at(header, 8))
        else {
            return Err(ParseError::ShortHeader(bytes.len()));
        };
        if len as usize != bytes.len() {
            return Err(ParseError::Length(len, bytes.len()));
        }
        let (arguments, data) = match opcode {
            OP_WRITE => arguments
                .split_at_checked(WRITE_IN_LEN)
                .ok_or(ParseError::ShortArguments(opcode, unique))?,
            _ => (arguments, [].as_slice()),
        };
        Request::of(opcode, unique, arguments, data)
    }

    /// A request whose arguments lie apart from its data, of which `data` has at least as many bytes as
    /// there are: as an entry of a ring holds it.
    ///
    /// # Errors
    /// [`ParseError::ShortArguments`] where a WRITE says that it has more data than `data`.
    pub fn from_parts(
        opcode: u32,
        unique: u64,
        arguments: &'a [u8],
        data: &'a [u8],
    ) -> Result<Request<'a>, ParseError> {
        let len = match opcode {
            OP_WRITE => u32_at(arguments, 16).unwrap_or(u32::MAX) as usize,
            _ => 0,
        };
        let data = data.get(..len);
        let data = data.ok_or(ParseError::ShortArguments(opcode, unique))?;
        Request::of(opcode, unique, arguments, data)
    }

    fn of(
        opcode: u32,
        unique: u64,
        arguments: &'a [u8],
        data: &'a [u8],
    ) -> Result<Request<'a>, ParseError> {
        let operation =
            operation(opcode, arguments, data).ok_or(ParseError::ShortArguments(opcode, unique))?;
        Ok(Request {
            opcode,
            unique,
            operation,
        })
    }
}

/// The operation of `opcode`, or `None` where its arguments are cut or do not fit its data.
fn operation<'a>(opcode: u32, arguments: &[u8], data: &'a [u8]) -> Option<Operation<'a>> {
    Some(match opcode {
        OP_INIT => {
            let low = u32_at(arguments, 12)?;
            let mut flags = u64::from(low);
            if flags & INIT_EXT != 0 {
                flags |= u64::from(u32_at(arguments, 16)?) << 32;
            }
            Operation::Init(InitIn {
                major: u32_at(arguments, 0)?,
                minor: u32_at(arguments, 4)?,
                max_readahead: u32_at(arguments, 8)?,
                flags,
            })
        }
        OP_GETATTR => Operation::Getattr,
        OP_OPEN => Operation::Open {
            flags: u32_at(arguments, 0)?,
        },
        OP_READ => Operation::Read {
            offset: u64_at(arguments, 8)?,
            size: u32_at(arguments, 16)?,
        },
        OP_WRITE => {
            let size = u32_at(arguments, 16)? as usize;
            if data.len() != size {
                return None;
            }
            Operation::Write {
                offset: u64_at(arguments, 8)?,
                data,
                durability: Durability::Buffered,
            }
        }
        OP_FALLOCATE => Operation::Fallocate {
            offset: u64_at(arguments, 8)?,
            length: u64_at(arguments, 16)?,
            mode: u32_at(arguments, 24)?,
        },
        OP_LSEEK => Operation::Lseek {
            offset: u64_at(arguments, 8)?,
            whence: u32_at(arguments, 16)?,
        },
        OP_FLUSH => Operation::Flush,
        OP_RELEASE => Operation::Release,
        OP_FSYNC => Operation::Fsync,
        OP_STATFS => Operation::Statfs,
        OP_INTERRUPT => Operation::Interrupt,
        OP_FORGET | OP_BATCH_FORGET => Operation::Forget,
        OP_DESTROY => Operation::Destroy,
        OP_NOTIFY_REPLY => Operation::Retrieved,
        _ => Operation::Other,
    })
}

/// A reply's header for `body` further bytes. `errno` is 0 or a positive errno.
pub fn out_header(unique: u64, errno: i32, body: usize) -> [u8; OUT_HEADER_LEN] {
    let mut bytes = Bytes::<OUT_HEADER_LEN>::default();
    bytes.u32((OUT_HEADER_LEN + body) as u32);
    bytes.u32(errno.wrapping_neg() as u32);
    bytes.u64(unique);
    bytes.all
}

/// The notification that makes the kernel send every unanswered request again.
pub fn notify_resend() -> [u8; OUT_HEADER_LEN] {
    let mut bytes = Bytes::<OUT_HEADER_LEN>::default();
    bytes.u32(OUT_HEADER_LEN as u32);
    bytes.u32(NOTIFY_RESEND as u32);
    bytes.u64(0);
    bytes.all
}

/// The notification that asks for no bytes of the file that the kernel may have cached, which has the
/// kernel send a request with that id: on the queue of the calling processor, where there are several.
pub fn notify_retrieve(id: u64) -> [u8; OUT_HEADER_LEN + 32] {
    let mut bytes = Bytes::<{ OUT_HEADER_LEN + 32 }>::default();
    bytes.u32((OUT_HEADER_LEN + 32) as u32);
    bytes.u32(NOTIFY_RETRIEVE as u32);
    bytes.u64(0);
    bytes.u64(id);
    bytes.u64(ROOT_NODE);
    // Offset, size.
    bytes.u64(0);
    bytes.u32(0);
    bytes.all
}

/// An id for [`notify_retrieve`] that no request of the kernel's has, nor an earlier one: those of the
/// kernel count up from 0 in twos, and the lowest bit is its own.
pub fn kick_id(queue: usize) -> u64 {
    let now = vellum_base::storage::clock_ns(nix::time::ClockId::CLOCK_MONOTONIC);
    1 << 62 | (now & ((1 << 54) - 1)) << 7 & !(1 << 63) | (queue as u64) << 1
}

/// The body of INIT's reply. `flags` are those of the `INIT_*` that both sides know, `max_io` the most
/// bytes that one READ or WRITE carries.
pub fn init_out(minor: u32, max_readahead: u32, flags: u64, max_io: usize) -> [u8; 64] {
    let mut bytes = Bytes::<64>::default();
    bytes.u32(MAJOR);
    bytes.u32(minor);
    bytes.u32(max_readahead);
    bytes.u32(flags as u32);
    // max_background and congestion_threshold. Beyond 64 nothing was gained, but where reads of a lazy layer stall,
    // all that a loop device sends (128) has to get through.
    bytes.u16(144);
    bytes.u16(128);
    bytes.u32(max_io as u32);
    // time_gran: 1 ns.
    bytes.u32(1);
    bytes.u16((max_io / 4096) as u16);
    bytes.u16(0);
    bytes.u32((flags >> 32) as u32);
    bytes.all
}

/// The body of GETATTR's reply for a regular file of `size` bytes, never cached by the kernel:
/// the size changes when the device grows.
pub fn attr_out(size: u64, mode: u32) -> [u8; 104] {
    let mut bytes = Bytes::<104>::default();
    // attr_valid, attr_valid_nsec, dummy.
    bytes.u64(0);
    bytes.u64(0);
    bytes.u64(ROOT_NODE);
    bytes.u64(size);
    // No blocks: what the device holds lies in the layers' files, where du(1) counts it.
    bytes.u64(0);
    // Times: always the epoch, which is true of a device made of layers.
    for _ in 0..3 {
        bytes.u64(0);
    }
    for _ in 0..3 {
        bytes.u32(0);
    }
    bytes.u32(mode);
    // nlink, uid, gid, rdev, blksize, flags.
    bytes.u32(1);
    bytes.u32(0);
    bytes.u32(0);
    bytes.u32(0);
    bytes.u32(4096);
    bytes.u32(0);
    bytes.all
}

/// The body of OPEN's reply with the `FOPEN_*` flags.
pub fn open_out(flags: u32) -> [u8; 16] {
    let mut bytes = Bytes::<16>::default();
    bytes.u64(0);
    bytes.u32(flags);
    bytes.all
}

/// The body of WRITE's reply: `size` bytes were written.
pub fn write_out(size: u32) -> [u8; 8] {
    let mut bytes = Bytes::<8>::default();
    bytes.u32(size);
    bytes.all
}

/// The body of LSEEK's reply.
pub fn lseek_out(offset: u64) -> [u8; 8] {
    offset.to_ne_bytes()
}

/// The body of STATFS's reply for a file of `size` bytes. The block size becomes the loop
/// device's discard granularity.
pub fn statfs_out(size: u64) -> [u8; 80] {
    let mut bytes = Bytes::<80>::default();
    bytes.u64(size / 4096);
    // bfree, bavail, files, ffree.
    bytes.u64(0);
    bytes.u64(0);
    bytes.u64(1);
    bytes.u64(0);
    bytes.u32(4096);
    bytes.u32(255);
    bytes.u32(4096);
    bytes.all
}

/// A fixed-size message that is filled from the front; what is not written stays zero.
struct Bytes<const N: usize> {
    all: [u8; N],
    at: usize,
}

impl<const N: usize> Default for Bytes<N> {
    fn default() -> Self {
        Bytes { all: [0; N], at: 0 }
    }
}

impl<const N: usize> Bytes<N> {
    fn put(&mut self, field: &[u8]) {
        self.all[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
    }

    fn u16(&mut self, value: u16) {
        self.put(&value.to_ne_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_ne_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(opcode: u32, arguments: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((IN_HEADER_LEN + arguments.len()) as u32).to_ne_bytes());
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend((7 | UNIQUE_RESEND).to_ne_bytes());
        bytes.resize(IN_HEADER_LEN, 0);
        bytes.extend(arguments);
        bytes
    }

    #[test]
    fn write_is_parsed_with_its_data_and_its_resend_bit() {
        let mut arguments = vec![0; WRITE_IN_LEN];
        arguments[8..16].copy_from_slice(&8192u64.to_ne_bytes());
        arguments[16..20].copy_from_slice(&3u32.to_ne_bytes());
        arguments.extend(b"abc");
        let bytes = request(OP_WRITE, &arguments);
        let request = Request::parse(&bytes).unwrap();
        assert_eq!(request.unique, 7 | UNIQUE_RESEND);
        assert_eq!(
            request.operation,
            Operation::Write {
                offset: 8192,
                data: b"abc",
                durability: Durability::Buffered,
            }
        );
    }

    #[test]
    fn write_whose_size_differs_from_its_data_is_refused_and_can_be_answered() {
        let mut arguments = vec![0; WRITE_IN_LEN];
        arguments[16..20].copy_from_slice(&4u32.to_ne_bytes());
        arguments.extend(b"abc");
        let bytes = request(OP_WRITE, &arguments);
        assert_eq!(
            Request::parse(&bytes),
            Err(ParseError::ShortArguments(OP_WRITE, 7 | UNIQUE_RESEND))
        );
    }

    #[test]
    fn lengths_that_contradict_the_bytes_are_refused() {
        assert_eq!(Request::parse(&[0; 39]), Err(ParseError::ShortHeader(39)));
        let mut bytes = request(OP_GETATTR, &[0; 16]);
        bytes.pop();
        assert_eq!(Request::parse(&bytes), Err(ParseError::Length(56, 55)));
    }

    #[test]
    fn init_flags_join_both_halves_only_where_the_kernel_says_so() {
        let mut arguments = vec![0; 64];
        arguments[0..4].copy_from_slice(&7u32.to_ne_bytes());
        arguments[4..8].copy_from_slice(&40u32.to_ne_bytes());
        arguments[16..20].copy_from_slice(&(1u32 << 7).to_ne_bytes());
        let flags_of = |arguments: &[u8]| match Request::parse(&request(OP_INIT, arguments))
            .unwrap()
            .operation
        {
            Operation::Init(init) => init.flags,
            other => panic!("{other:?}"),
        };
        assert_eq!(flags_of(&arguments) & INIT_HAS_RESEND, 0);
        arguments[12..16].copy_from_slice(&(INIT_EXT as u32).to_ne_bytes());
        assert_ne!(flags_of(&arguments) & INIT_HAS_RESEND, 0);
    }

    #[test]
    fn replies_carry_their_whole_length_and_a_negative_errno() {
        let header = out_header(9, libc::ENOSPC, 8);
        assert_eq!(u32_at(&header, 0), Some(24));
        assert_eq!(u32_at(&header, 4), Some(-libc::ENOSPC as u32));
        assert_eq!(u64_at(&header, 8), Some(9));
        assert_eq!(u32_at(&notify_resend(), 4), Some(7));
        assert_eq!(u32_at(&init_out(MINOR, 0, 0, MAX_IO), 20), Some(1 << 20));
        assert_eq!(u64_at(&attr_out(4096, 0), 24), Some(4096));
        assert_eq!(u64_at(&attr_out(4096, 0), 32), Some(0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused_without_a_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
            opcode in 0u32..60,
            honest: bool,
        ) {
            if honest && bytes.len() >= IN_HEADER_LEN {
                let len = (bytes.len() as u32).to_ne_bytes();
                bytes[0..4].copy_from_slice(&len);
                bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
            }
            if let Ok(Request { operation: Operation::Write { data, .. }, .. }) =
                Request::parse(&bytes)
            {
                prop_assert!(data.len() <= bytes.len() - IN_HEADER_LEN - WRITE_IN_LEN);
            }
        }
    }
}
