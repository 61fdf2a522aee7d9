//! Ways to hand a [`BlockDevice`](crate::block::BlockDevice) to somebody else.

pub mod nbd;
