//! Requests: what each gets, and that a bad one ends nothing but itself.

use proptest::prelude::*;

use super::*;
use crate::nbd::MetaContext;
use vellum_base::block::{Durability, ExtentKind};

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISC: u16 = 2;
pub(super) const FLUSH: u16 = 3;
pub(super) const TRIM: u16 = 4;
pub(super) const CACHE: u16 = 5;
pub(super) const ZEROES: u16 = 6;
pub(super) const STATUS: u16 = 7;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const EOVERFLOW: u32 = 75;
pub(super) const ENOTSUP: u32 = 95;

pub(super) fn simple() -> Script {
    Script::new().go("disk")
}

pub(super) fn structured() -> Script {
    Script::new().structured().go("disk")
}

pub(super) fn with_status() -> Script {
    Script::new()
        .structured()
        .option(
            option::SET_META_CONTEXT,
            &meta_data("disk", &[BASE_ALLOCATION]),
        )
        .go("disk")
}

/// Puts a request that must succeed after `script`, to see that the session lives.
fn alive(script: Script) -> Script {
    script.request(FLUSH, 0, 0, 0).request(DISC, 0, 0, 0)
}

fn one_error(script: Script, exports: &[Arc<Export>]) -> u32 {
    let mut answers = alive(script).run(exports);
    let error = answers.transmitting().error();
    assert!(answers.success().end().is_ok());
    error
}

#[test]
fn what_was_written_is_read_back_in_simple_and_structured_replies() {
    let data: Vec<u8> = (0..3000u32).map(|i| i as u8).collect();
    let exports = [disk()];
    let mut answers = simple()
        .request(WRITE, 0, 1000, 3000)
        .bytes(&data)
        .request(READ, 0, 1000, 3000)
        .request(DISC, 0, 0, 0)
        .run(&exports);
    answers.transmitting().success().success();
    assert_eq!(answers.take(3000), data);
    assert!(answers.end().is_ok());

    let mut answers = structured()
        .request(READ, 0, 1000, 3000)
        .request(DISC, 0, 0, 0)
        .run(&exports);
    let expected = [&1000u64.to_be_bytes()[..], &data].concat();
    let chunk = Reply::Chunk {
        flags: chunk::FLAG_DONE,
        kind: chunk::OFFSET_DATA,
        data: expected,
    };
    assert_eq!(answers.transmitting().reply(), chunk);
    assert!(answers.end().is_ok());
}

/// Puts structured replies to a read together.
pub(super) fn reassemble(answers: &mut Answers, offset: u64, len: usize) -> (Vec<u8>, Vec<u16>) {
    let mut bytes = vec![0xee; len];
    let mut kinds = Vec::new();
    loop {
        let Reply::Chunk { flags, kind, data } = answers.reply() else {
            panic!("a simple reply to a structured read");
        };
        kinds.push(kind);
        let at = (u64::from_be_bytes(data[..8].try_into().unwrap()) - offset) as usize;
        match kind {
            chunk::OFFSET_DATA => bytes[at..at + data.len() - 8].copy_from_slice(&data[8..]),
            chunk::OFFSET_HOLE => {
                let len = u32::from_be_bytes(data[8..].try_into().unwrap()) as usize;
                bytes[at..at + len].fill(0);
            }
            kind => panic!("chunk of type {kind}"),
        }
        if flags & chunk::FLAG_DONE != 0 {
            return (bytes, kinds);
        }
    }
}

#[test]
fn a_long_read_sends_holes_as_holes_and_data_in_pieces() {
    let device = MemoryDevice::new(SIZE);
    let data = vec![7; 3 << 20];
    device
        .write_at(&data, 1 << 20, Durability::Buffered)
        .unwrap();
    let len = 6 << 20;
    let mut answers = structured()
        .request(READ, 0, 4096, len as u32)
        .request(DISC, 0, 0, 0)
        .run(&[named("disk", device)]);
    let (bytes, kinds) = reassemble(answers.transmitting(), 4096, len);
    let mut expected = vec![0; len];
    expected[(1 << 20) - 4096..(4 << 20) - 4096].fill(7);
    assert!(bytes == expected);
    let (hole, data) = (chunk::OFFSET_HOLE, chunk::OFFSET_DATA);
    assert_eq!(kinds, [hole, data, data, data, hole]);
    assert!(answers.end().is_ok());
}

#[test]
fn df_keeps_a_read_in_one_chunk() {
    let len = 6 << 20;
    let mut answers = structured()
        .request(READ, command_flag::DF, 0, len as u32)
        .request(DISC, 0, 0, 0)
        .run_on_disk();
    let (bytes, kinds) = reassemble(answers.transmitting(), 0, len);
    assert!(bytes.iter().all(|byte| *byte == 0));
    assert_eq!(kinds, [chunk::OFFSET_DATA]);
    assert!(answers.end().is_ok());
}

#[test]
fn requests_of_the_largest_size_are_served() {
    let len = MAX_PAYLOAD;
    let data = vec![0x5a; len as usize];
    let mut answers = simple()
        .request(WRITE, 0, 1, len)
        .bytes(&data)
        .request(READ, 0, 1, len)
        .request(DISC, 0, 0, 0)
        .run_on_disk();
    answers.transmitting().success().success();
    assert!(answers.take(len as usize) == data);
    assert!(answers.end().is_ok());
}

#[test]
fn a_write_over_the_limit_is_refused_its_payload_skipped() {
    let len = MAX_PAYLOAD + 1;
    for script in [simple(), structured()] {
        let script = script
            .request(WRITE, 0, 0, len)
            .bytes(&vec![1; len as usize]);
        assert_eq!(one_error(script, &[disk()]), EINVAL);
    }
}

#[test]
fn a_write_far_over_the_limit_is_refused_and_ends_the_session() {
    let mut answers = simple().request(WRITE, 0, 0, u32::MAX).run_on_disk();
    assert_eq!(answers.transmitting().error(), EINVAL);
    answers.protocol_error();
}

#[test]
fn reads_over_the_limit_are_refused() {
    let len = MAX_PAYLOAD + 1;
    assert_eq!(
        one_error(simple().request(READ, 0, 0, len), &[disk()]),
        EINVAL
    );
    assert_eq!(
        one_error(structured().request(READ, 0, 0, len), &[disk()]),
        EOVERFLOW
    );
}

#[test]
fn requests_past_the_end_are_refused_writes_for_want_of_space() {
    for (command, error) in [
        (READ, EINVAL),
        (WRITE, ENOSPC),
        (TRIM, EINVAL),
        (ZEROES, ENOSPC),
        (CACHE, EINVAL),
        (STATUS, EINVAL),
    ] {
        for offset in [SIZE - 511, SIZE, u64::MAX, u64::MAX - 511] {
            for script in [simple(), with_status()] {
                let mut script = script.request(command, 0, offset, 512);
                if command == WRITE {
                    script = script.bytes(&[1; 512]);
                }
                assert_eq!(one_error(script, &[disk()]), error, "{command} at {offset}");
            }
        }
    }
}

#[test]
fn requests_up_to_the_last_byte_are_served() {
    for command in [TRIM, ZEROES, CACHE] {
        let mut answers = simple()
            .request(command, 0, SIZE - 1, 1)
            .request(command, 0, 0, SIZE as u32)
            .request(DISC, 0, 0, 0)
            .run_on_disk();
        assert!(answers.transmitting().success().success().end().is_ok());
    }
}

#[test]
fn requests_of_length_zero_are_refused() {
    for command in [READ, WRITE, TRIM, ZEROES, CACHE, STATUS] {
        let script = with_status().request(command, 0, 0, 0);
        assert_eq!(one_error(script, &[disk()]), EINVAL, "{command}");
    }
}

#[test]
fn a_flush_with_offset_or_length_is_refused() {
    for (offset, len) in [(0, 1), (1, 0)] {
        let script = simple().request(FLUSH, 0, offset, len);
        assert_eq!(one_error(script, &[disk()]), EINVAL);
    }
}

#[test]
fn unknown_commands_are_refused() {
    for command in [8, 9, 255, u16::MAX] {
        for script in [simple(), structured()] {
            assert_eq!(
                one_error(script.request(command, 0, 0, 512), &[disk()]),
                EINVAL
            );
        }
    }
}

#[test]
fn flags_are_valid_with_their_commands_alone() {
    use command_flag::*;
    for command in [READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS] {
        for bit in 0..16 {
            let flag = 1 << bit;
            let valid = flag == FUA
                || match command {
                    READ => flag == DF,
                    ZEROES => flag == NO_HOLE || flag == FAST_ZERO,
                    STATUS => flag == REQ_ONE,
                    _ => false,
                };
            let len = if command == FLUSH { 0 } else { 16 };
            let mut script = with_status().request(command, flag, 0, len);
            if command == WRITE {
                script = script.bytes(&[0; 16]);
            }
            let mut answers = alive(script).run_on_disk();
            answers.transmitting();
            if valid {
                match answers.reply() {
                    Reply::Simple(0) => {}
                    Reply::Chunk { kind, .. } if kind & (1 << 15) == 0 => {}
                    reply => panic!("command {command} with flag {flag:#x}: {reply:?}"),
                }
            } else {
                assert_eq!(answers.error(), EINVAL, "command {command}, flag {flag:#x}");
            }
            assert!(answers.success().end().is_ok());
        }
    }
}

#[test]
fn df_without_structured_replies_is_refused() {
    let script = simple().request(READ, command_flag::DF, 0, 512);
    assert_eq!(one_error(script, &[disk()]), EINVAL);
}

#[test]
fn a_read_only_export_refuses_every_write_and_skips_payloads() {
    let export = named("disk", MemoryDevice::new(SIZE).read_only());
    for (command, payload) in [(WRITE, 512), (TRIM, 0), (ZEROES, 0)] {
        let script = structured()
            .request(command, 0, 0, 512)
            .bytes(&vec![1; payload]);
        assert_eq!(one_error(script, &[Arc::clone(&export)]), EPERM);
    }
}

#[test]
fn block_status_without_a_selected_context_is_refused() {
    for script in [simple(), structured()] {
        assert_eq!(
            one_error(script.request(STATUS, 0, 0, 4096), &[disk()]),
            EINVAL
        );
    }
}

#[test]
fn a_context_selected_for_another_export_does_not_count() {
    let exports = [disk(), named("other", MemoryDevice::new(SIZE))];
    let script = Script::new()
        .structured()
        .option(
            option::SET_META_CONTEXT,
            &meta_data("other", &[BASE_ALLOCATION]),
        )
        .go("disk")
        .request(STATUS, 0, 0, 4096);
    assert_eq!(one_error(script, &exports), EINVAL);
}

/// The descriptors, length and status, of the next reply about `base:allocation` alone.
pub(super) fn statuses(answers: &mut Answers) -> Vec<(u32, u32)> {
    let (flags, id, descriptors) = context_chunk(answers);
    assert_eq!((flags, id), (chunk::FLAG_DONE, BASE_ALLOCATION_ID));
    descriptors
}

/// The next chunk about a context: its flags, the context's number, and the descriptors.
fn context_chunk(answers: &mut Answers) -> (u16, u32, Vec<(u32, u32)>) {
    let Reply::Chunk { flags, kind, data } = answers.reply() else {
        panic!("a simple reply to BLOCK_STATUS");
    };
    assert_eq!(kind, chunk::BLOCK_STATUS);
    let id = u32::from_be_bytes(data[..4].try_into().unwrap());
    let descriptors = data[4..]
        .chunks(8)
        .map(|descriptor| {
            let (len, status) = descriptor.split_at(4);
            (
                u32::from_be_bytes(len.try_into().unwrap()),
                u32::from_be_bytes(status.try_into().unwrap()),
            )
        })
        .collect();
    (flags, id, descriptors)
}

/// Says of each 4096 bytes whether their number is odd, and of more than was asked for.
struct Odd(&'static str);

impl MetaContext for Odd {
    fn name(&self) -> &str {
        self.0
    }

    fn statuses(&self, offset: u64, len: u64, max: usize) -> Result<Vec<(u64, u32)>> {
        let first = offset / 4096;
        let last = (offset + len) / 4096 + 1;
        let mut runs: Vec<(u64, u32)> = (first..=last).map(|n| (4096, n as u32 % 2)).collect();
        runs[0].0 -= offset % 4096;
        runs.truncate(max);
        Ok(runs)
    }
}

/// An export with two contexts of its own.
fn with_contexts() -> Arc<Export> {
    Arc::new(Export {
        contexts: vec![
            Arc::new(Odd("qemu:dirty-bitmap:a")),
            Arc::new(Odd("qemu:dirty-bitmap:b")),
        ],
        ..Export::new("disk", Arc::new(MemoryDevice::new(SIZE)))
    })
}

#[test]
fn each_selected_context_has_a_chunk_of_its_own_in_a_reply() {
    let selected = [
        "qemu:dirty-bitmap:b",
        BASE_ALLOCATION,
        "qemu:dirty-bitmap:c",
    ];
    let mut answers = Script::new()
        .structured()
        .option(option::SET_META_CONTEXT, &meta_data("disk", &selected))
        .go("disk")
        .request(STATUS, 0, 4000, 8192)
        .request(STATUS, command_flag::REQ_ONE, 4096, 8192)
        .request(DISC, 0, 0, 0)
        .run(&[with_contexts()]);
    answers.transmitting();
    let odd = [(96, 0), (4096, 1), (4000, 0)];
    assert_eq!(context_chunk(&mut answers), (0, 1, vec![(8192, 3)]));
    assert_eq!(
        context_chunk(&mut answers),
        (chunk::FLAG_DONE, 3, odd.to_vec())
    );
    assert_eq!(context_chunk(&mut answers), (0, 1, vec![(8192, 3)]));
    assert_eq!(
        context_chunk(&mut answers),
        (chunk::FLAG_DONE, 3, vec![(4096, 1)])
    );
    assert!(answers.end().is_ok());
}

#[test]
fn more_contexts_than_a_connection_may_have_are_refused() {
    let names: Vec<String> = (0..17).map(|n| format!("qemu:dirty-bitmap:{n}")).collect();
    let names: Vec<&'static str> = names.into_iter().map(|name| &*name.leak()).collect();
    let context = |name: &&'static str| -> Arc<dyn MetaContext> { Arc::new(Odd(name)) };
    let export = Arc::new(Export {
        contexts: names.iter().map(context).collect(),
        ..Export::new("disk", Arc::new(MemoryDevice::new(SIZE)))
    });
    let option = option::SET_META_CONTEXT;
    for (count, answer) in [
        (16, option_reply::META_CONTEXT),
        (17, option_reply::ERR_TOO_BIG),
    ] {
        let mut answers = Script::new()
            .structured()
            .option(option, &meta_data("disk", &names[..count]))
            .run(std::slice::from_ref(&export));
        answers
            .greeting()
            .expect(option::STRUCTURED_REPLY, option_reply::ACK);
        answers.expect(option, answer);
    }
}

#[test]
fn contexts_of_a_kind_are_listed_together() {
    for (queries, found) in [
        (&[][..], 3),
        (&["qemu:"][..], 2),
        (&["qemu:dirty-bitmap:"][..], 2),
        (&["base:", "qemu:dirty-bitmap:a"][..], 2),
        (&["qemu:dirty-bitmap:c", "other:"][..], 0),
    ] {
        let option = option::LIST_META_CONTEXT;
        let mut answers = Script::new()
            .structured()
            .option(option, &meta_data("disk", queries))
            .run(&[with_contexts()]);
        answers
            .greeting()
            .expect(option::STRUCTURED_REPLY, option_reply::ACK);
        for _ in 0..found {
            answers.expect(option, option_reply::META_CONTEXT);
        }
        answers.expect(option, option_reply::ACK);
    }
}

#[test]
fn block_status_tells_holes_from_data_and_joins_neighbours() {
    let device = MemoryDevice::new(SIZE);
    device
        .write_at(&[1; 8192], 8192, Durability::Buffered)
        .unwrap();
    let mut answers = with_status()
        .request(STATUS, 0, 4000, 16384)
        .request(STATUS, command_flag::REQ_ONE, 4000, 16384)
        .request(STATUS, 0, 0, SIZE as u32)
        .request(DISC, 0, 0, 0)
        .run(&[named("disk", device)]);
    answers.transmitting();
    assert_eq!(
        statuses(&mut answers),
        [(4192, 3), (8192, 0), (16384 - 4192 - 8192, 3)]
    );
    assert_eq!(statuses(&mut answers), [(4192, 3)]);
    assert_eq!(
        statuses(&mut answers),
        [(8192, 3), (8192, 0), (SIZE as u32 - 16384, 3)]
    );
    assert!(answers.end().is_ok());
}

#[test]
fn write_zeroes_and_trim_make_zeros() {
    for command in [TRIM, ZEROES] {
        let device = MemoryDevice::new(SIZE);
        device
            .write_at(&[1; 3000], 0, Durability::Buffered)
            .unwrap();
        let mut answers = simple()
            .request(command, command_flag::FUA, 1000, 1000)
            .request(READ, 0, 0, 3000)
            .request(DISC, 0, 0, 0)
            .run(&[named("disk", device)]);
        answers.transmitting().success().success();
        let bytes = answers.take(3000);
        assert_eq!(bytes[..1000], [1; 1000]);
        assert_eq!(bytes[1000..2000], [0; 1000]);
        assert_eq!(bytes[2000..], [1; 1000]);
        assert!(answers.end().is_ok());
    }
}

#[test]
fn a_fast_zero_that_must_not_unmap_is_refused_as_not_fast() {
    let flags = command_flag::FAST_ZERO | command_flag::NO_HOLE;
    let script = simple().request(ZEROES, flags, 0, 4096);
    assert_eq!(one_error(script, &[disk()]), ENOTSUP);
}

#[test]
fn a_wrong_request_magic_ends_the_session_after_the_replies_before_it() {
    let mut answers = simple()
        .request(FLUSH, 0, 0, 0)
        .bytes(&[0; 28])
        .request(FLUSH, 0, 0, 0)
        .run_on_disk();
    answers.transmitting().success().protocol_error();
}

#[test]
fn a_stream_that_ends_between_requests_ends_the_session_in_good_order() {
    let mut answers = simple().request(FLUSH, 0, 0, 0).run_on_disk();
    assert!(answers.transmitting().success().end().is_ok());
}

#[test]
fn a_stream_that_ends_within_a_request_changes_nothing_on_the_device() {
    for len in [100u32, 100_000] {
        let whole = simple()
            .request(WRITE, 0, 0, len)
            .bytes(&vec![1; len as usize])
            .input;
        let head = simple().input.len();
        for cut in [head + 1, head + 27, head + 28, head + 50, whole.len() - 1] {
            let device = Arc::new(MemoryDevice::new(SIZE));
            let export = Arc::new(Export::new("disk", device.clone()));
            let script = Script {
                input: whole[..cut].to_vec(),
                ..Script::default()
            };
            script.run(&[export]).transmitting().protocol_error();
            let extents = device.extents(0, SIZE, 10).unwrap();
            assert_eq!(extents.len(), 1, "something was written");
            assert_eq!(extents[0].kind, ExtentKind::Hole);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Arbitrary bytes end a session, sooner or later, and never in a panic.
    #[test]
    fn arbitrary_bytes_are_survived(head in 0usize..4, bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let script = match head {
            0 => Script::default(),
            1 => Script::new(),
            2 => simple(),
            _ => with_status(),
        };
        let _ = script.bytes(&bytes).run(&[named("disk", MemoryDevice::new(1 << 20))]).result;
    }

    /// Requests with arbitrary fields each get one answer, until one breaks the framing.
    #[test]
    fn arbitrary_requests_are_answered(
        requests in prop::collection::vec((0u16..9, 0u16..32, 0u64..(1 << 20), 0u32..9000), 1..20),
    ) {
        let mut script = with_status();
        let mut expected = 0;
        for (command, flags, offset, len) in requests {
            if command == DISC {
                continue;
            }
            script = script.request(command, flags, offset, len);
            if command == WRITE {
                script = script.bytes(&vec![3; len as usize]);
            }
            expected += 1;
        }
        let mut answers = script.run(&[named("disk", MemoryDevice::new(1 << 20))]);
        answers.transmitting();
        for _ in 0..expected {
            while let Reply::Chunk { flags, .. } = answers.reply() {
                if flags & chunk::FLAG_DONE != 0 {
                    break;
                }
            }
        }
        prop_assert!(answers.end().is_ok());
    }
}
