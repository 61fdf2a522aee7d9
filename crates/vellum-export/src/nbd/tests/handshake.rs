//! Options: what each gets, and that a bad one ends nothing but itself.

use super::*;
use crate::nbd::handshake::{Handshake, Outcome};

const GO: u32 = option::GO;

/// The size and transmission flags that GO with `script` yields.
fn info_of(script: Script, export: Arc<Export>) -> (u64, u16) {
    let mut answers = script.go("").run(&[export]);
    answers.greeting();
    loop {
        let option = u32::from_be_bytes(
            answers.bytes.range(8..12).copied().collect::<Vec<_>>()[..]
                .try_into()
                .unwrap(),
        );
        let (kind, data) = answers.option(option);
        if kind == option_reply::INFO && data[..2] == info::EXPORT.to_be_bytes() {
            let size = u64::from_be_bytes(data[2..10].try_into().unwrap());
            return (size, u16::from_be_bytes(data[10..].try_into().unwrap()));
        }
    }
}

#[test]
fn a_writable_export_offers_all_commands() {
    use transmission_flag::*;
    let plain = HAS_FLAGS
        | SEND_FLUSH
        | SEND_FUA
        | SEND_TRIM
        | SEND_WRITE_ZEROES
        | SEND_FAST_ZERO
        | SEND_CACHE
        | CAN_MULTI_CONN;
    assert_eq!(info_of(Script::new(), disk()), (SIZE, plain));
    assert_eq!(
        info_of(Script::new().structured(), disk()),
        (SIZE, plain | SEND_DF)
    );
}

#[test]
fn a_read_only_export_says_so_whether_the_device_or_the_export_is() {
    use transmission_flag::*;
    let device = named("disk", MemoryDevice::new(SIZE).read_only());
    let export = Arc::new(Export {
        read_only: true,
        ..Export::new("disk", Arc::new(MemoryDevice::new(SIZE)))
    });
    for export in [device, export] {
        let (_, flags) = info_of(Script::new(), export);
        assert_ne!(flags & READ_ONLY, 0);
        assert_eq!(flags & (SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO), 0);
    }
}

#[test]
fn an_unknown_option_is_refused_and_the_next_one_answered() {
    let mut answers = Script::new()
        .option(4711, b"whatever")
        .option(option::LIST, &[])
        .run_on_disk();
    answers.greeting().expect(4711, option_reply::ERR_UNSUP);
    let export = answers.expect(option::LIST, option_reply::SERVER);
    assert_eq!(export, string("disk"));
    answers.expect(option::LIST, option_reply::ACK);
    answers.protocol_error();
}

#[test]
fn lists_name_every_export_with_its_description() {
    let described = Arc::new(Export {
        description: "two words".into(),
        ..Export::new("b", Arc::new(MemoryDevice::new(4096)))
    });
    let mut answers = Script::new()
        .option(option::LIST, &[])
        .run(&[disk(), described]);
    answers.greeting();
    assert_eq!(
        answers.expect(option::LIST, option_reply::SERVER),
        string("disk")
    );
    let mut second = string("b");
    second.extend(b"two words");
    assert_eq!(answers.expect(option::LIST, option_reply::SERVER), second);
    answers.expect(option::LIST, option_reply::ACK);
}

#[test]
fn options_without_data_that_carry_some_are_invalid() {
    for option in [option::LIST, option::STARTTLS, option::STRUCTURED_REPLY] {
        let mut answers = Script::new().option(option, b"x").run_on_disk();
        answers.greeting().expect(option, option_reply::ERR_INVALID);
        answers.protocol_error();
    }
}

#[test]
fn options_with_malformed_data_are_invalid_and_the_session_goes_on() {
    for option in [
        option::GO,
        option::INFO,
        option::LIST_META_CONTEXT,
        option::SET_META_CONTEXT,
    ] {
        for data in [&[][..], &[0xff; 4], &[0xff; 64], &[0, 0, 0, 1, 0xff, 0, 0]] {
            let mut answers = Script::new()
                .structured()
                .option(option, data)
                .go("disk")
                .run_on_disk();
            answers
                .greeting()
                .expect(option::STRUCTURED_REPLY, option_reply::ACK);
            answers.expect(option, option_reply::ERR_INVALID);
            answers.expect(GO, option_reply::INFO);
            answers.expect(GO, option_reply::ACK);
            assert!(answers.end().is_ok());
        }
    }
}

#[test]
fn too_long_option_data_is_skipped_with_an_error() {
    let mut answers = Script::new()
        .option(GO, &vec![0; (64 << 10) + 1])
        .go("disk")
        .run_on_disk();
    answers.greeting().expect(GO, option_reply::ERR_TOO_BIG);
    answers.expect(GO, option_reply::INFO);
    answers.expect(GO, option_reply::ACK);
}

#[test]
fn absurdly_long_option_data_ends_the_session_before_it_is_read() {
    let mut header = Vec::new();
    header.extend(OPTION_MAGIC.to_be_bytes());
    header.extend(GO.to_be_bytes());
    header.extend(u32::MAX.to_be_bytes());
    let mut answers = Script::new().bytes(&header).run_on_disk();
    answers.greeting().protocol_error();
}

#[test]
fn a_wrong_option_magic_ends_the_session() {
    let mut answers = Script::new().bytes(&[0; 16]).run_on_disk();
    answers.greeting().protocol_error();
}

#[test]
fn client_flags_that_were_not_offered_end_the_session() {
    let script = Script {
        input: vec![0, 0, 0, 7],
        ..Script::default()
    };
    script.go("disk").run_on_disk().greeting().protocol_error();
}

#[test]
fn every_cut_of_a_handshake_ends_it_with_a_protocol_error() {
    let whole = Script::new()
        .structured()
        .option(
            option::SET_META_CONTEXT,
            &meta_data("disk", &[BASE_ALLOCATION]),
        )
        .go("disk");
    for len in 0..whole.input.len() {
        let script = Script {
            input: whole.input[..len].to_vec(),
            ..Script::default()
        };
        let kind = script.run_on_disk().result.unwrap_err().kind();
        assert_eq!(kind, ErrorKind::Protocol, "cut at {len}");
    }
}

#[test]
fn abort_is_acknowledged_and_ends_the_session_in_good_order() {
    let mut answers = Script::new().option(option::ABORT, &[]).run_on_disk();
    answers.greeting().expect(option::ABORT, option_reply::ACK);
    assert!(answers.end().is_ok());
}

#[test]
fn export_name_enters_transmission_with_and_without_the_zeroes() {
    for (flags, zeroes) in [(3, 0), (1, 124), (0, 124)] {
        let script = Script {
            input: vec![0, 0, 0, flags],
            ..Script::default()
        };
        let mut answers = script.option(option::EXPORT_NAME, b"disk").run_on_disk();
        assert_eq!(answers.greeting().u64(), SIZE);
        assert_ne!(answers.u16() & transmission_flag::HAS_FLAGS, 0);
        assert_eq!(answers.take(zeroes), vec![0; zeroes]);
        assert!(answers.end().is_ok());
    }
}

#[test]
fn export_name_for_what_is_not_there_ends_the_session() {
    for name in [&b"nothing"[..], &[0xff], &[b'a'; 5000]] {
        let mut answers = Script::new()
            .option(option::EXPORT_NAME, name)
            .run_on_disk();
        answers.greeting().protocol_error();
    }
}

#[test]
fn the_empty_name_stands_for_the_only_export() {
    let mut answers = Script::new()
        .option(option::INFO, &info_data("", &[info::NAME]))
        .run_on_disk();
    answers.greeting().expect(option::INFO, option_reply::INFO);
    let name = answers.expect(option::INFO, option_reply::INFO);
    assert_eq!(name, [&info::NAME.to_be_bytes()[..], b"disk"].concat());
    answers.expect(option::INFO, option_reply::ACK);
}

#[test]
fn the_empty_name_is_unknown_where_there_are_several_exports_or_none() {
    for exports in [vec![], vec![disk(), named("b", MemoryDevice::new(4096))]] {
        let mut answers = Script::new().go("").run(&exports);
        answers.greeting().expect(GO, option_reply::ERR_UNKNOWN);
        answers.protocol_error();
    }
}

#[test]
fn info_gives_what_was_asked_for_and_no_more() {
    let export = Arc::new(Export {
        description: "text".into(),
        ..Export::new("disk", Arc::new(MemoryDevice::new(SIZE)))
    });
    let wanted = [info::BLOCK_SIZE, info::DESCRIPTION, 77];
    let mut answers = Script::new()
        .option(option::INFO, &info_data("disk", &wanted))
        .run(&[export]);
    let first = answers.greeting().expect(option::INFO, option_reply::INFO);
    assert_eq!(first[..2], info::EXPORT.to_be_bytes());
    let text = answers.expect(option::INFO, option_reply::INFO);
    assert_eq!(
        text,
        [&info::DESCRIPTION.to_be_bytes()[..], b"text"].concat()
    );
    let sizes = answers.expect(option::INFO, option_reply::INFO);
    assert_eq!(sizes[..2], info::BLOCK_SIZE.to_be_bytes());
    assert_eq!(sizes[2..6], 1u32.to_be_bytes());
    assert_eq!(sizes[6..10], 4096u32.to_be_bytes());
    assert_eq!(sizes[10..], (32u32 << 20).to_be_bytes());
    answers.expect(option::INFO, option_reply::ACK);
    // INFO does not enter transmission: the end of the stream cuts the handshake short.
    answers.protocol_error();
}

#[test]
fn metadata_contexts_need_structured_replies_first() {
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let mut answers = Script::new()
            .option(option, &meta_data("disk", &[BASE_ALLOCATION]))
            .run_on_disk();
        answers.greeting().expect(option, option_reply::ERR_INVALID);
    }
}

#[test]
fn metadata_queries_find_base_allocation_by_the_protocols_rules() {
    let (list, set) = (option::LIST_META_CONTEXT, option::SET_META_CONTEXT);
    for (option, queries, found) in [
        (list, &[][..], true),
        (list, &["base:"][..], true),
        (list, &[BASE_ALLOCATION][..], true),
        (list, &["base:other"][..], false),
        (list, &["x-other:"][..], false),
        (set, &[][..], false),
        (set, &["base:"][..], false),
        (set, &["x-other:a", BASE_ALLOCATION][..], true),
        (set, &["base:other"][..], false),
    ] {
        let mut answers = Script::new()
            .structured()
            .option(option, &meta_data("disk", queries))
            .run_on_disk();
        answers
            .greeting()
            .expect(option::STRUCTURED_REPLY, option_reply::ACK);
        if found {
            let context = answers.expect(option, option_reply::META_CONTEXT);
            assert_eq!(context[4..], *BASE_ALLOCATION.as_bytes());
        }
        answers.expect(option, option_reply::ACK);
        answers.protocol_error();
    }
}

#[test]
fn metadata_queries_without_a_namespace_or_for_an_unknown_export_are_refused() {
    let option = option::SET_META_CONTEXT;
    let mut answers = Script::new()
        .structured()
        .option(option, &meta_data("disk", &["allocation"]))
        .option(option, &meta_data("other", &[BASE_ALLOCATION]))
        .run_on_disk();
    answers
        .greeting()
        .expect(option::STRUCTURED_REPLY, option_reply::ACK);
    answers.expect(option, option_reply::ERR_INVALID);
    answers.expect(option, option_reply::ERR_UNKNOWN);
}

#[test]
fn starttls_without_tls_is_refused_by_policy() {
    let mut answers = Script::new()
        .option(option::STARTTLS, &[])
        .go("disk")
        .run_on_disk();
    answers
        .greeting()
        .expect(option::STARTTLS, option_reply::ERR_POLICY);
    answers.expect(GO, option_reply::INFO);
}

/// Runs one leg of a handshake with TLS required over scripted bytes.
fn secure_leg<'a>(
    handshake: &mut Handshake<'a, [Arc<Export>]>,
    greet: bool,
    script: Script,
) -> (Result<Outcome>, Answers) {
    let mut output = Vec::new();
    let mut wire = Wire {
        input: Cursor::new(if greet {
            &script.input
        } else {
            &script.input[4..]
        }),
        output: &mut output,
    };
    let outcome = match greet {
        true => handshake
            .greet(&mut wire)
            .and_then(|()| handshake.haggle(&mut wire)),
        false => handshake.haggle(&mut wire),
    };
    let answers = Answers {
        bytes: output.into(),
        result: Ok(()),
        offset: None,
    };
    (outcome, answers)
}

#[test]
fn with_tls_required_plain_text_gets_nothing_but_tls() {
    let exports = [disk()];
    let mut handshake = Handshake::new(&exports[..], true);
    let script = Script::new()
        .option(option::LIST, &[])
        .go("disk")
        .option(4711, &[])
        .option(option::STARTTLS, &[]);
    let (outcome, mut answers) = secure_leg(&mut handshake, true, script);
    assert!(matches!(outcome, Ok(Outcome::StartTls)));
    answers.greeting();
    for option in [option::LIST, GO, 4711] {
        answers.expect(option, option_reply::ERR_TLS_REQD);
    }
    answers.expect(option::STARTTLS, option_reply::ACK);

    handshake.secured();
    let script = Script::new().option(option::STARTTLS, &[]).go("disk");
    let (outcome, mut answers) = secure_leg(&mut handshake, false, script);
    answers.expect(option::STARTTLS, option_reply::ERR_INVALID);
    assert!(matches!(outcome, Ok(Outcome::Transmit(_))));
}

#[test]
fn export_name_in_plain_text_ends_the_session_when_tls_is_required() {
    let exports = [disk()];
    let mut handshake = Handshake::new(&exports[..], true);
    let script = Script::new().option(option::EXPORT_NAME, b"disk");
    let (outcome, mut answers) = secure_leg(&mut handshake, true, script);
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Protocol);
    assert!(answers.greeting().end().is_ok());
}
