//! The bytes of FUSE over io_uring: what lies in an entry's header, and the commands.
//!
//! Source: include/uapi/linux/fuse.h (`fuse_uring_req_header`, `fuse_uring_cmd_req`), Linux 6.14, and
//! include/uapi/linux/io_uring.h. All numbers are in host byte order.

use io_uring::squeue::Entry128;

use vellum_base::block::part_mut;

/// Bytes of `fuse_uring_req_header`.
pub const HEADER_LEN: usize = 288;
/// Where in it the request's header is, and afterwards the reply's.
pub const IN_OUT: usize = 0;
/// Where the arguments of the opcode are; never overwritten.
pub const OP_IN: usize = 128;
/// Bytes of the arguments at most.
pub const OP_IN_LEN: usize = 128;
/// Where the commit id is.
pub const COMMIT_ID: usize = 264;
/// Where the length of what lies in the payload is.
pub const PAYLOAD_LEN: usize = 272;
/// Where in the request's header its opcode is.
pub const OPCODE: usize = IN_OUT + 4;

const IORING_OP_URING_CMD: u8 = 46;
const IOSQE_FIXED_FILE: u8 = 1;

/// A command to the session's descriptor, which is the ring's fixed file 0.
#[derive(Debug, Clone, Copy)]
pub enum Command {
    /// A fresh entry, whose header and payload this array of two iovecs names.
    Register(u64),
    /// The answer to the request with this id lies in the entry; fetch the next one into it.
    CommitAndFetch(u64),
}

impl Command {
    /// The submission for an entry of queue `qid`.
    pub fn submission(self, qid: u16, user_data: u64) -> Entry128 {
        let (number, iovecs, segments, commit_id) = match self {
            Command::Register(iovecs) => (1u32, iovecs, 2u32, 0),
            Command::CommitAndFetch(id) => (2, 0, 0, id),
        };
        let mut bytes = [0u8; 128];
        let mut put = |at, field: &[u8]| {
            part_mut(&mut bytes, at, field.len()).copy_from_slice(field);
        };
        put(0, &[IORING_OP_URING_CMD, IOSQE_FIXED_FILE]);
        // The file at 4 is number 0, the command's own bytes begin at 48: flags, commit_id, qid.
        put(8, &number.to_ne_bytes());
        put(16, &iovecs.to_ne_bytes());
        put(24, &segments.to_ne_bytes());
        put(32, &user_data.to_ne_bytes());
        put(56, &commit_id.to_ne_bytes());
        put(64, &qid.to_ne_bytes());
        // SAFETY: the type is the kernel's `struct io_uring_sqe` with 64 bytes behind it: 128 bytes of
        // integers, for which every bit pattern is a value.
        unsafe { std::mem::transmute::<[u8; 128], Entry128>(bytes) }
    }
}
