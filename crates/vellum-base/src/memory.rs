//! What a process that serves for months keeps of the memory that it once needed.
//!
//! glibc's malloc(3) takes large blocks from the kernel one by one and gives them back, until the
//! first of them is freed: from then on it keeps blocks of that size to itself
//! (mallopt(3), M_MMAP_THRESHOLD: "dynamic"). A checkpoint of a map of a million extents would so
//! stay resident for ever.

/// Blocks of at least this many bytes are the kernel's once they are freed.
const LARGE: libc::c_int = 256 << 10;
/// Each further arena keeps what its own threads free.
const ARENAS: libc::c_int = 2;

/// Has the process give large blocks of memory back. To be called before there are other threads.
pub fn keep_small() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_ARENA_MAX, ARENAS)] {
        // SAFETY: mallopt(3) changes parameters of the allocator and touches no memory of ours.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives back what is free between the blocks in use. Takes milliseconds; for after work that needed
/// much for a moment.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) gives free memory of the allocator back and touches none that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
