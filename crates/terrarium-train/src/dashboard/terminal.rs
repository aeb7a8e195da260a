//! What burn-train's dashboard leaves to be done about the terminal.

use std::io::Write;

/// The last resort before leaving at once: line mode, main screen, cursor.
pub(crate) fn restore() {
    if unix::restore_modes() {
        let mut out = std::io::stdout();
        let _ = out.write_all(b"\x1b[?1049l\x1b[?25h").and_then(|()| out.flush());
    }
}

/// A line on stderr, unless the dashboard has the screen.
pub(crate) fn say(text: &str) {
    if !unix::in_use() {
        // A closed stderr is no reason to stop.
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

pub(crate) use unix::{adjust, forget, remember};

#[cfg(unix)]
mod unix {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::time::{Duration, Instant};

    /// Modes of the terminal before the dashboard took it.
    static BEFORE: Mutex<Option<libc::termios>> = Mutex::new(None);

    fn before() -> MutexGuard<'static, Option<libc::termios>> {
        BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn modes(tty: &File) -> Option<libc::termios> {
        let mut modes = std::mem::MaybeUninit::uninit();
        // SAFETY: the descriptor is open, and the call fills the structure when it returns 0.
        unsafe { (libc::tcgetattr(tty.as_raw_fd(), modes.as_mut_ptr()) == 0).then(|| modes.assume_init()) }
    }

    fn set_modes(tty: &File, modes: &libc::termios) {
        // SAFETY: the descriptor is open, and the structure came from `tcgetattr`.
        unsafe { libc::tcsetattr(tty.as_raw_fd(), libc::TCSANOW, modes) };
    }

    fn tty() -> Option<File> {
        File::options().read(true).write(true).open("/dev/tty").ok()
    }

    /// Notes the modes before the dashboard starts.
    pub fn remember() {
        *before() = tty().and_then(|tty| modes(&tty));
    }

    /// The dashboard has ended and put everything back itself.
    pub fn forget() {
        *before() = None;
    }

    /// True while the dashboard has the screen.
    pub fn in_use() -> bool {
        before().is_some()
    }

    /// Puts the noted modes back; false when there are none.
    pub fn restore_modes() -> bool {
        // `try_lock`: this runs in a signal handler's thread, which must not wait.
        let Some(modes) = BEFORE.try_lock().ok().and_then(|mut before| before.take()) else { return false };
        if let Some(tty) = tty() {
            set_modes(&tty, &modes);
        }
        true
    }

    /// Two repairs once the dashboard runs. Its raw mode swallows Ctrl-C: signals are switched on again. Its thread spins between
    /// frames, which would cost training a core: it gets the lowest priority.
    pub fn adjust() {
        let Some(tty) = tty() else { return };
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            if let Some(mut modes) = modes(&tty)
                && modes.c_lflag & libc::ICANON == 0
            {
                modes.c_lflag |= libc::ISIG;
                set_modes(&tty, &modes);
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        lower_priority("train-renderer");
    }

    #[cfg(target_os = "linux")]
    fn lower_priority(thread: &str) {
        for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            if let (true, Some(id)) = (name.trim() == thread, task.file_name().to_str().and_then(|id| id.parse().ok())) {
                // SAFETY: takes numbers only; a thread that is gone is an error that can be ignored.
                unsafe { libc::setpriority(libc::PRIO_PROCESS, id, 19) };
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn lower_priority(_thread: &str) {}
}

#[cfg(not(unix))]
mod unix {
    use std::sync::atomic::{AtomicBool, Ordering};

    static IN_USE: AtomicBool = AtomicBool::new(false);

    pub fn remember() {
        IN_USE.store(true, Ordering::SeqCst);
    }

    pub fn forget() {
        IN_USE.store(false, Ordering::SeqCst);
    }

    pub fn in_use() -> bool {
        IN_USE.load(Ordering::SeqCst)
    }

    pub fn restore_modes() -> bool {
        IN_USE.swap(false, Ordering::SeqCst)
    }

    pub fn adjust() {}
}
