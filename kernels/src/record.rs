//! Recording what a step enqueues, to enqueue it again at once.
//!
//! A decoding step is hundreds of small kernels, and enqueuing each costs the host more than the device takes for it. A
//! recorder notes them once (on CUDA as a graph); a replay does them all again on the same memory. So a step can be
//! recorded that reads and writes the same places every time: what it carries is updated in place, and nothing that it
//! reads is chosen or uploaded by the host in between.
//!
//! Memory that a recorded step uses for intermediate values must not be given to others. A recorder therefore has a
//! stream of its own, with memory of its own: whatever touches what the step carries runs in [`Recorder::within`], and
//! what outlives the next replay is not allocated there. What it takes over from another stream may have been changed in
//! place since it was allocated: it is read after something that was allocated there just before, which is what CubeCL waits for.

use burn::tensor::backend::Backend;

/// Why a step was not recorded. Nothing of it was done then, and it can be taken without.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("steps are not recorded, so each kernel is launched by itself: {0}")]
pub struct RecordError(pub String);

/// A stream on which steps are recorded.
pub trait Recorder<B: Backend>: Send {
    /// Does `work` on this stream.
    fn within(&self, work: &mut dyn FnMut());

    /// Waits until all is done that was asked for on this stream.
    ///
    /// CubeCL gives memory back to the stream that it came from as soon as the last tensor is dropped, whether or not another stream
    /// still reads it. So before a tensor of another stream that was read here is dropped, the host waits.
    ///
    /// # Errors
    /// [`RecordError`] when the device failed.
    fn wait(&self) -> Result<(), RecordError>;

    /// Where a tensor lies; the same as before if it was changed in place.
    fn address(&self, tensor: &B::FloatTensorPrimitive) -> Result<u64, RecordError>;

    /// Where a tensor lies.
    fn int_address(&self, tensor: &B::IntTensorPrimitive) -> Result<u64, RecordError>;

    /// Writes `values` where `tensor` lies, behind what is enqueued already.
    ///
    /// # Errors
    /// [`RecordError`] when the device refuses, or the tensor has another number of elements.
    fn overwrite(&self, tensor: &B::IntTensorPrimitive, values: &[i32]) -> Result<(), RecordError>;

    /// Does `work` on this stream, and says whether the host uploaded something for it, as Burn does with the sizes of some of its
    /// kernels' arguments: then it cannot be recorded.
    ///
    /// # Errors
    /// [`RecordError`] where that cannot be known; `work` may be done then or not.
    fn uploads(&self, work: &mut dyn FnMut()) -> Result<bool, RecordError>;

    /// Notes what `work` enqueues, which is not done before the first replay. `work` must not wait for the device nor upload anything
    /// ([`Recorder::uploads`]), and all that it does must have been done on this stream before: kernels are compiled and memory is found on the first time.
    ///
    /// # Errors
    /// [`RecordError`] when something in `work` cannot be repeated.
    fn record(&self, work: &mut dyn FnMut()) -> Result<Box<dyn Recording>, RecordError>;
}

/// A recorded step.
pub trait Recording: Send {
    /// Does it once more. The caller keeps every tensor alive that the step reads or leaves.
    fn replay(&self);

    /// Whether all replays that are enqueued by now could be. To be asked when their results were read.
    ///
    /// # Errors
    /// [`RecordError`] when one could not: what was read is then older than it should be.
    fn check(&self) -> Result<(), RecordError>;

    /// Kernels and copies in it.
    fn operations(&self) -> usize;
}
