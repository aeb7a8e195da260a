//! What can be wrong with the arguments of an operation.

/// Arguments that do not fit together. Operations panic with this message, as Burn's own tensor operations do;
/// call an argument's `check` first to get it as a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// A tensor's shape disagrees with the shapes of the others.
    #[error("{op}: {tensor} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Operation.
        op: &'static str,
        /// Argument name.
        tensor: &'static str,
        /// Shape that the other arguments ask for.
        expected: Vec<usize>,
        /// Shape that was given.
        found: Vec<usize>,
    },
    /// A size that must divide another does not.
    #[error("{op}: {what} = {value} is not a multiple of {by} = {divisor}")]
    NotDivisible {
        /// Operation.
        op: &'static str,
        /// Name of the size.
        what: &'static str,
        /// Its value.
        value: usize,
        /// Name of the divisor.
        by: &'static str,
        /// Its value.
        divisor: usize,
    },
    /// Two tensors that enter one product have different dtypes.
    #[error("{op}: {tensor} is {found}, expected {expected}; cast one of them")]
    Dtype {
        /// Operation.
        op: &'static str,
        /// Argument name.
        tensor: &'static str,
        /// Expected dtype.
        expected: String,
        /// Dtype that was given.
        found: String,
    },
    /// Segment ids break the rules in [`crate::Segments`].
    #[error("segments: row {row}, position {position}: {reason}")]
    Segments {
        /// Batch row.
        row: usize,
        /// Position in the row.
        position: usize,
        /// Rule that is broken.
        reason: &'static str,
    },
}

pub(crate) fn expect_shape(op: &'static str, tensor: &'static str, found: &[usize], expected: &[usize]) -> Result<(), ArgumentError> {
    if found == expected {
        return Ok(());
    }
    Err(ArgumentError::Shape { op, tensor, expected: expected.to_vec(), found: found.to_vec() })
}
