//! BLOCK_STATUS: what the metadata contexts that a client selected say of a range.

use super::exec::{Buffer, Refusal, done};
use super::handshake::Selected;
use super::protocol::{self as wire, ChunkHeader, Headers, Request, chunk, command_flag as flag};
use vellum_base::block::{BlockDevice, Extent, ExtentKind};

/// The most extents in a reply to BLOCK_STATUS.
const STATUS_EXTENTS: usize = 4096;

/// What a client may ask of the bytes of its export.
pub(super) struct Contexts(pub(super) Vec<Selected>);

impl Contexts {
    /// True when the client selected none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The most memory that an answer takes beyond one about a single context, in bytes: what is found, and
    /// what is sent of it.
    pub(super) fn memory(&self, headers: Headers) -> usize {
        let found = 2 * size_of::<(u64, u32)>();
        self.0.len().saturating_sub(1) * STATUS_EXTENTS * (found + descriptor_len(headers))
    }

    /// Answers BLOCK_STATUS: one chunk for each.
    pub(super) fn answer(
        &self,
        device: &dyn BlockDevice,
        request: &Request,
        headers: Headers,
        out: &mut Buffer,
    ) -> Result<(), Refusal> {
        let mut answers = Vec::with_capacity(self.0.len());
        for Selected { id, own } in &self.0 {
            let found = match own {
                None => allocation(device, request)?,
                Some(own) => own.statuses(request.offset, request.len, STATUS_EXTENTS)?,
            };
            answers.push((*id, descriptors(&found, request)));
        }
        let chunks = answers.len();
        for (number, (id, descriptors)) in answers.into_iter().enumerate() {
            let flags = done(number + 1 == chunks);
            push_answer(headers, flags, request, id, &descriptors, out);
        }
        Ok(())
    }
}

/// Bytes that a descriptor takes.
fn descriptor_len(headers: Headers) -> usize {
    match headers {
        Headers::Simple | Headers::Structured => 8,
        Headers::Extended => 16,
    }
}

/// Appends the chunk of one context.
fn push_answer(
    headers: Headers,
    flags: u16,
    request: &Request,
    id: u32,
    descriptors: &[(u64, u32)],
    out: &mut Buffer,
) {
    let count = descriptors.len() as u32;
    let len = count * descriptor_len(headers) as u32;
    if headers == Headers::Extended {
        let kind = chunk::BLOCK_STATUS_EXT;
        out.push(ChunkHeader::new(headers, flags, kind, request, 8 + len).bytes());
        out.push(&id.to_be_bytes());
        out.push(&count.to_be_bytes());
        for (len, status) in descriptors {
            out.push(&len.to_be_bytes());
            out.push(&u64::from(*status).to_be_bytes());
        }
        return;
    }
    let kind = chunk::BLOCK_STATUS;
    out.push(ChunkHeader::new(headers, flags, kind, request, 4 + len).bytes());
    out.push(&id.to_be_bytes());
    for (len, status) in descriptors {
        // They lie within the request, whose length has 32 bits.
        out.push(&(*len as u32).to_be_bytes());
        out.push(&status.to_be_bytes());
    }
}

/// What `base:allocation` says of a request's range.
fn allocation(device: &dyn BlockDevice, request: &Request) -> Result<Vec<(u64, u32)>, Refusal> {
    let extents = device.extents(request.offset, request.len, STATUS_EXTENTS)?;
    let mut found = Vec::with_capacity(extents.len());
    for extent in clip(&extents, request) {
        let status = match extent.kind {
            ExtentKind::Data => 0,
            ExtentKind::Hole | ExtentKind::Zero => wire::STATE_HOLE | wire::STATE_ZERO,
        };
        found.push((extent.len, status));
    }
    if found.is_empty() {
        // "May hold data" is always true.
        found.push((request.len, 0));
    }
    Ok(found)
}

/// (bytes, status) as the protocol has them: neighbours of one status are one; whatever was found, nothing
/// outside the request goes to the client, and one of no length to nobody.
fn descriptors(found: &[(u64, u32)], request: &Request) -> Vec<(u64, u32)> {
    let one = request.flags & flag::REQ_ONE != 0;
    let mut left = request.len;
    let mut descriptors: Vec<(u64, u32)> = Vec::new();
    for (len, status) in found {
        let len = (*len).min(left);
        if len == 0 {
            continue;
        }
        left -= len;
        match descriptors.last_mut() {
            Some((sum, last)) if last == status => *sum += len,
            Some(_) if one => break,
            _ => descriptors.push((len, *status)),
        }
    }
    assert!(
        !descriptors.is_empty(),
        "a context that says nothing of a byte"
    );
    descriptors
}

/// The extents as far as they describe the request from its start on, without a gap: whatever a
/// device says, nothing outside the request goes to the client.
pub(super) fn clip(extents: &[Extent], request: &Request) -> Vec<Extent> {
    let end = request.offset + request.len;
    let mut at = request.offset;
    let mut clipped = Vec::with_capacity(extents.len());
    for extent in extents {
        let extent_end = extent.offset.saturating_add(extent.len).min(end);
        if extent.offset > at || extent_end <= at {
            break;
        }
        clipped.push(Extent {
            offset: at,
            len: extent_end - at,
            kind: extent.kind,
        });
        at = extent_end;
    }
    clipped
}
