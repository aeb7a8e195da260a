//! Pickles as data: a machine that reads protocols 0 to 5 and never runs anything.
//!
//! What a pickle would import becomes a name, what it would call becomes an inert record of the call, and even that
//! only for constructors of plain data ([`allow`]). Nodes live in one arena and refer to one another by index: cycles
//! are harmless, a list changed after it was memoised is seen changed, and dropping is not recursive. Memory is
//! proportional to the bytes read: no claimed length is believed before the bytes behind it were seen.

mod allow;
mod machine;
mod node;
mod reader;
#[cfg(test)]
mod tests;

pub(crate) use machine::parse;
pub(crate) use node::{Id, Node, Pickle};
