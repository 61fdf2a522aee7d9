//! Devices that fail, or say what cannot be: what the client hears.

use super::transmission::{
    CACHE, DISC, EINVAL, EIO, ENOSPC, ENOTSUP, EPERM, FLUSH, READ, STATUS, TRIM, WRITE, ZEROES,
    reassemble, simple, statuses, structured, with_status,
};
use super::*;
use vellum_base::block::{Durability, Extent, ExtentKind, ZeroMode};

/// A device that fails every call in one way.
struct Broken(ErrorKind);

impl Broken {
    fn fail<T>(&self) -> Result<T> {
        // Longer than any client would read, and cut within a letter.
        Err(Error::new(self.0, format!("broken: {}", "ü".repeat(5000))))
    }
}

impl BlockDevice for Broken {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
        self.fail()
    }

    fn write_at(&self, _: &[u8], _: u64, _: Durability) -> Result<()> {
        self.fail()
    }

    fn flush(&self) -> Result<()> {
        self.fail()
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        self.fail()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode, _: Durability) -> Result<()> {
        self.fail()
    }

    fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<Extent>> {
        self.fail()
    }

    fn prefetch(&self, _: u64, _: u64) -> Result<()> {
        self.fail()
    }
}

#[test]
fn the_devices_errors_reach_the_client_by_their_kind() {
    for (kind, error) in [
        (ErrorKind::NoSpace, ENOSPC),
        (ErrorKind::ReadOnly, EPERM),
        (ErrorKind::InvalidInput, EINVAL),
        (ErrorKind::OutOfRange, EINVAL),
        (ErrorKind::Unsupported, ENOTSUP),
        (ErrorKind::Io, EIO),
        (ErrorKind::Corrupt, EIO),
        (ErrorKind::Poisoned, EIO),
    ] {
        for script in [simple, with_status] {
            let mut script = script()
                .request(READ, 0, 0, 512)
                .request(READ, 0, 0, 5 << 20)
                .request(WRITE, command_flag::FUA, 0, 512)
                .bytes(&[1; 512])
                .request(WRITE, 0, 0, 100_000)
                .bytes(&[1; 100_000])
                .request(FLUSH, 0, 0, 0)
                .request(TRIM, 0, 0, 512)
                .request(ZEROES, 0, 0, 512)
                .request(CACHE, 0, 0, 512);
            script = script.request(DISC, 0, 0, 0);
            let mut answers = script.run(&[named("disk", Broken(kind))]);
            answers.transmitting();
            for _ in 0..7 {
                assert_eq!(answers.error(), error, "{kind:?}");
            }
            assert!(answers.success().end().is_ok());
        }
    }
}

/// A device that answers reads and questions in a way of its own, and takes all else.
struct Odd {
    read: fn(&mut [u8], u64) -> Result<()>,
    extent: fn(u64, u64) -> Extent,
}

impl BlockDevice for Odd {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        (self.read)(buf, offset)
    }

    fn write_at(&self, _: &[u8], _: u64, _: Durability) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode, _: Durability) -> Result<()> {
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, _: usize) -> Result<Vec<Extent>> {
        Ok(vec![(self.extent)(offset, len)])
    }
}

#[test]
fn a_read_that_fails_half_way_ends_with_an_error_chunk() {
    let half = Odd {
        read: |buf, offset| {
            if offset >= 2 << 20 {
                return Err(Error::new(ErrorKind::Io, "the rest is gone"));
            }
            buf.fill(1);
            Ok(())
        },
        extent: |offset, len| Extent {
            offset,
            len,
            kind: ExtentKind::Data,
        },
    };
    let mut answers = structured()
        .request(READ, 0, 0, 4 << 20)
        .request(FLUSH, 0, 0, 0)
        .request(DISC, 0, 0, 0)
        .run(&[named("disk", half)]);
    answers.transmitting();
    for _ in 0..2 {
        match answers.reply() {
            Reply::Chunk { flags, kind, data } => {
                assert_eq!((flags, kind), (0, chunk::OFFSET_DATA));
                assert!(data[8..].iter().all(|byte| *byte == 1));
            }
            reply => panic!("{reply:?}"),
        }
    }
    assert_eq!(answers.error(), EIO);
    assert!(answers.success().end().is_ok());
}

#[test]
fn extents_that_lie_outside_the_request_are_never_passed_on() {
    // The device as one hole, whatever is asked.
    let careless = Odd {
        read: |buf, _| {
            buf.fill(0);
            Ok(())
        },
        extent: |_, _| Extent {
            offset: 0,
            len: u64::MAX,
            kind: ExtentKind::Hole,
        },
    };
    let mut answers = with_status()
        .request(STATUS, 0, 4096, 8192)
        .request(READ, 0, 4096, 1 << 20)
        .request(DISC, 0, 0, 0)
        .run(&[named("disk", careless)]);
    answers.transmitting();
    assert_eq!(statuses(&mut answers), [(8192, 3)]);
    let (_, kinds) = reassemble(&mut answers, 4096, 1 << 20);
    assert_eq!(kinds, [chunk::OFFSET_HOLE]);
    assert!(answers.end().is_ok());
}
