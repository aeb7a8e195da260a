//! Asking a run to stop: Ctrl-C, a termination signal, or a caller.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::TrainError;
use crate::dashboard::terminal;

/// A request to save and leave after the running step. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// A flag that is not raised.
    pub fn new() -> Self {
        Self::default()
    }

    /// Raises it.
    pub fn request(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it is raised.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The flag that signals raise. The handler itself can be installed only once per process.
static CURRENT: Mutex<Option<StopFlag>> = Mutex::new(None);

/// From now on Ctrl-C (and `SIGTERM`) raise `stop`; pressed again, they restore the terminal and leave with status 130.
///
/// # Errors
/// When the system refuses a handler.
pub fn install_signal_handler(stop: &StopFlag) -> Result<(), TrainError> {
    let before = CURRENT.lock().unwrap_or_else(PoisonError::into_inner).replace(stop.clone());
    if before.is_some() {
        return Ok(());
    }
    ctrlc::set_handler(|| {
        let current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match current {
            Some(stop) if !stop.requested() => {
                terminal::say("stopping after this step; press Ctrl-C again to leave at once without saving");
                stop.request();
            }
            _ => leave_at_once(),
        }
    })
    .map_err(|error| TrainError::Signal(error.to_string()))
}
/// Restores the terminal and ends the process with status 130, as a shell reports Ctrl-C.
///
/// What libraries have set to run at an exit is left out where the system allows it: a GPU's are taken apart there under the
/// feet of the threads that still enqueue work.
pub fn leave_at_once() -> ! {
    terminal::restore();
    #[cfg(unix)]
    // SAFETY: ends the process; nothing of it is used any more.
    unsafe {
        libc::_exit(130)
    }
    #[cfg(not(unix))]
    std::process::exit(130)
}
