//! Extended headers: lengths of 64 bits, and chunks alone.

use super::transmission::*;
use super::*;

fn extended() -> Script {
    Script::new().option(option::EXTENDED_HEADERS, &[])
}

fn chunk(last: bool, kind: u16, data: &[u8]) -> Reply {
    Reply::Chunk {
        flags: if last { chunk::FLAG_DONE } else { 0 },
        kind,
        data: data.to_vec(),
    }
}

#[test]
fn every_reply_is_a_chunk_that_repeats_the_requests_offset() {
    let mut answers = extended()
        .go("disk")
        .extended_request(WRITE, command_flag::PAYLOAD_LEN, 1000, 5)
        .bytes(b"hello")
        .extended_request(READ, 0, 1000, 5)
        .extended_request(FLUSH, 0, 0, 0)
        .extended_request(DISC, 0, 0, 0)
        .run_on_disk();
    let answers = answers.transmitting();
    assert_eq!(answers.reply(), chunk(true, chunk::NONE, &[]));
    assert_eq!(answers.offset, Some(1000));
    let data = [&1000u64.to_be_bytes()[..], b"hello"].concat();
    assert_eq!(answers.reply(), chunk(true, chunk::OFFSET_DATA, &data));
    assert_eq!(answers.offset, Some(1000));
    assert_eq!(answers.reply(), chunk(true, chunk::NONE, &[]));
    assert!(answers.end().is_ok());
}

#[test]
fn one_request_zeroes_trims_and_describes_more_than_four_gib() {
    const LARGE: u64 = 6 << 30;
    let exports = [named("disk", MemoryDevice::new(LARGE))];
    let mut answers = extended()
        .option(
            option::SET_META_CONTEXT,
            &meta_data("disk", &[BASE_ALLOCATION]),
        )
        .go("disk")
        .extended_request(ZEROES, 0, 0, LARGE)
        .extended_request(TRIM, 0, 4096, LARGE - 4096)
        .extended_request(CACHE, 0, 0, LARGE)
        .extended_request(STATUS, 0, 0, LARGE)
        .extended_request(DISC, 0, 0, 0)
        .run(&exports);
    let answers = answers.transmitting();
    for _ in 0..3 {
        assert_eq!(answers.reply(), chunk(true, chunk::NONE, &[]));
    }
    let described = [
        &BASE_ALLOCATION_ID.to_be_bytes()[..],
        &1u32.to_be_bytes(),
        &LARGE.to_be_bytes(),
        &u64::from(STATE_HOLE | STATE_ZERO).to_be_bytes(),
    ];
    assert_eq!(
        answers.reply(),
        chunk(true, chunk::BLOCK_STATUS_EXT, &described.concat())
    );
    assert!(answers.end().is_ok());
}

#[test]
fn a_payload_that_a_command_does_not_have_is_skipped_with_an_error() {
    for command in [READ, FLUSH, STATUS, 99] {
        let mut answers = extended()
            .go("disk")
            .extended_request(command, command_flag::PAYLOAD_LEN, 0, 300_000)
            .bytes(&vec![7; 300_000])
            .extended_request(FLUSH, 0, 0, 0)
            .extended_request(DISC, 0, 0, 0)
            .run_on_disk();
        assert_eq!(answers.transmitting().error(), EINVAL, "command {command}");
        assert_eq!(answers.reply(), chunk(true, chunk::NONE, &[]));
        assert!(answers.end().is_ok());
    }
}

#[test]
fn an_absurd_payload_ends_the_session() {
    let mut answers = extended()
        .go("disk")
        .extended_request(WRITE, command_flag::PAYLOAD_LEN, 0, u64::MAX)
        .run_on_disk();
    let answers = answers.transmitting();
    assert_eq!(answers.error(), EINVAL);
    answers.protocol_error();
}

#[test]
fn reads_and_ranges_beyond_what_there_is_are_refused_one_by_one() {
    let mut answers = extended()
        .go("disk")
        .extended_request(READ, 0, 0, u64::from(MAX_PAYLOAD) + 1)
        .extended_request(TRIM, 0, 1, u64::MAX)
        .extended_request(ZEROES, 0, 0, SIZE + 1)
        .extended_request(FLUSH, 0, 0, 0)
        .extended_request(DISC, 0, 0, 0)
        .run_on_disk();
    let answers = answers.transmitting();
    for errno in [EOVERFLOW, EINVAL, ENOSPC] {
        assert_eq!(answers.error(), errno);
    }
    assert_eq!(answers.reply(), chunk(true, chunk::NONE, &[]));
    assert!(answers.end().is_ok());
}

#[test]
fn compact_requests_end_a_session_that_agreed_on_extended_ones() {
    let mut answers = extended()
        .go("disk")
        .request(READ, 0, 0, 4096)
        .run_on_disk();
    answers.transmitting().protocol_error();
}

#[test]
fn extended_headers_take_no_data_and_stay_agreed_on() {
    let mut answers = Script::new()
        .option(option::EXTENDED_HEADERS, &[1])
        .option(option::STRUCTURED_REPLY, &[])
        .option(option::EXTENDED_HEADERS, &[])
        .option(option::EXTENDED_HEADERS, &[])
        .option(option::STRUCTURED_REPLY, &[])
        .option(option::ABORT, &[])
        .run_on_disk();
    let answers = answers.greeting();
    answers.expect(option::EXTENDED_HEADERS, option_reply::ERR_INVALID);
    answers.expect(option::STRUCTURED_REPLY, option_reply::ACK);
    answers.expect(option::EXTENDED_HEADERS, option_reply::ACK);
    answers.expect(option::EXTENDED_HEADERS, option_reply::ERR_INVALID);
    answers.expect(option::STRUCTURED_REPLY, option_reply::ERR_EXT_HEADER_REQD);
    answers.expect(option::ABORT, option_reply::ACK);
    assert!(answers.end().is_ok());
}
