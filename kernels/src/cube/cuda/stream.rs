//! The CUDA stream behind one of CubeCL's.
//!
//! CubeCL 0.10 has no accessor for it. What it has is a server that derives `Debug`: its text names every stream it made,
//! with a cursor that moves whenever that stream is asked for something. So: read, ask, read again; the stream whose
//! cursor moved is the one. Done once per stream. Where a later release writes another text, nothing is found, a test
//! below fails, and callers order their work by events across the whole context instead.

use cubecl::server::ComputeServer;
use cubecl::stream_id::StreamId;
use cudarc::driver::sys::{CUcontext, CUresult, CUstream, cuCtxGetCurrent, cuStreamGetCtx};

use super::Server;

/// Streams and their cursors as the text of a server names them.
fn named(text: &str) -> Vec<(usize, u64)> {
    const STREAM: &str = "sys: 0x";
    const CURSOR: &str = "cursor: ";
    const AFTER: &str = ", last_synced: {";
    let places: Vec<usize> = text.match_indices(STREAM).map(|(at, _)| at).collect();
    let ends = places.iter().skip(1).copied().chain([text.len()]);
    let entry = |(at, end): (usize, usize)| {
        let part = &text[at + STREAM.len()..end];
        let digits = part.find(|c: char| !c.is_ascii_hexdigit())?;
        let stream = usize::from_str_radix(&part[..digits], 16).ok()?;
        let cursor = &part[..part.find(AFTER)?];
        Some((stream, cursor[cursor.rfind(CURSOR)? + CURSOR.len()..].parse().ok()?))
    };
    places.iter().copied().zip(ends).filter_map(entry).collect()
}

/// Whether nothing that was uploaded on `stream` is still held on the host; nothing where the text does not say.
fn settled(text: &str, stream: usize) -> Option<bool> {
    let from = text.find(&format!("sys: {:?},", stream as CUstream))?;
    let part = &text[from..];
    let part = &part[part.find("PendingDropQueue {")?..];
    let part = &part[..part.find("policy:")?];
    Some(part.contains("pending: []") && part.contains("staged: []"))
}

/// Lets go of what was uploaded for the stream of `id`, or says whether something was since.
pub(super) fn uploads(server: &mut Server, id: StreamId, forget: bool) -> Option<bool> {
    if forget {
        // The first makes it wait, the second lets it go.
        server.flush(id).ok()?;
        server.flush(id).ok()?;
    }
    let stream = find(server, id)?;
    settled(&format!("{server:?}"), stream as usize).map(|settled| !settled)
}

/// The stream on which `server` runs the work of `id`, on the server's thread, with its context current.
pub(super) fn find(server: &mut Server, id: StreamId) -> Option<CUstream> {
    let before = named(&format!("{server:?}"));
    server.memory_usage(id).ok()?;
    let after = named(&format!("{server:?}"));
    let moved: Vec<usize> = after.iter().filter(|entry| !before.contains(entry)).map(|entry| entry.0).collect();
    let &[stream] = &moved[..] else { return None };
    let stream = stream as CUstream;
    let (mut own, mut current): (CUcontext, CUcontext) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: both are out-parameters; the address was printed by the server that made the stream and never destroys it.
    let (got, has) = unsafe { (cuStreamGetCtx(stream, &mut own), cuCtxGetCurrent(&mut current)) };
    (got == CUresult::CUDA_SUCCESS && has == CUresult::CUDA_SUCCESS && own == current).then_some(stream)
}

#[cfg(test)]
mod tests {
    use cubecl::Runtime;
    use cubecl::cuda::{CudaDevice, CudaRuntime};
    use cubecl::device::Device;
    use cubecl::device_handle::DeviceHandle;

    use super::*;

    #[test]
    fn streams_and_cursors_are_read_from_the_text() {
        let text = "pool: [Some(StreamWrapper { stream: Stream { sys: 0x7f01, memory: M { cursor: 9 } }, cursor: 12, last_synced: {} }), \
                    None, Some(StreamWrapper { stream: Stream { sys: 0xab }, cursor: 3, last_synced: {0: 4} })]";
        assert_eq!(named(text), [(0x7f01, 12), (0xab, 3)]);
        assert_eq!(named("sys: 0xzz, cursor: 1"), []);
    }

    /// Fails where CubeCL has changed: see the head of this file.
    #[test]
    fn the_stream_of_a_client_is_found() {
        let device = CudaDevice::default();
        let found = || {
            let client = CudaRuntime::client(&device);
            drop(client.create_from_slice(&[0; 64]));
            let id = StreamId::current();
            let handle = DeviceHandle::<Server>::new(device.to_id());
            handle.submit_blocking(move |server| find(server, id).map(|stream| stream as usize)).expect("the server answers")
        };
        let own = found().expect("CubeCL's stream");
        assert_eq!(found(), Some(own));
        let other = std::thread::scope(|scope| scope.spawn(found).join().expect("no panic")).expect("another thread's stream");
        assert_ne!(own, other);
    }
}
