//! How inputs are put together and taken apart: a first byte of choices, pieces, files.

/// An input whose first byte is `mode`.
pub fn with_mode(mode: u8, bytes: &[u8]) -> Vec<u8> {
    [&[mode], bytes].concat()
}

/// Takes the next piece: it comes after its length in two bytes, and is no longer than there is.
pub fn take_piece<'a>(input: &mut &'a [u8]) -> Option<&'a [u8]> {
    let [low, high, rest @ ..] = *input else {
        return None;
    };
    let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
    let (piece, rest) = rest.split_at(len);
    *input = rest;
    Some(piece)
}

/// What [`take_piece`] takes.
pub fn put_piece(out: &mut Vec<u8>, piece: &[u8]) {
    out.extend((piece.len() as u16).to_le_bytes());
    out.extend(piece);
}

/// Takes the next file: a byte for which of the `names` it has, and a piece.
pub fn take_file<'a>(
    input: &mut &'a [u8],
    names: &[&'static str],
) -> Option<(&'static str, &'a [u8])> {
    let (which, mut rest) = input.split_first()?;
    let bytes = take_piece(&mut rest)?;
    *input = rest;
    Some((names[usize::from(*which) % names.len()], bytes))
}

/// What [`take_file`] takes.
pub fn put_file(out: &mut Vec<u8>, which: u8, bytes: &[u8]) {
    out.push(which);
    put_piece(out, bytes);
}
