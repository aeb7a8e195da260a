//! Ctrl-C.

use terrarium::train::{StopFlag, install_signal_handler, leave_at_once};

use crate::failure::Failure;

/// For commands with something to finish: the first Ctrl-C raises the flag, the second ends the program.
pub fn graceful() -> Result<StopFlag, Failure> {
    let stop = StopFlag::new();
    install_signal_handler(&stop)?;
    Ok(stop)
}

/// For commands that can stop anywhere. Files are written under another name and renamed, so nothing is left half-done.
pub fn immediate() {
    // Without a handler the system ends the program just the same, only with another exit status.
    let _ = ctrlc::set_handler(|| leave_at_once());
}
