//! The library's log on standard error: warnings always, more with `-v`.

use log::{LevelFilter, Log, Metadata, Record};

use crate::console::Console;

struct Logger(Console);

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Other crates log a great deal; theirs is shown from the second -v on.
        metadata.level() <= log::max_level() && (metadata.target().starts_with("terrarium") || self.0.verbose() > 1)
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_lowercase();
            self.0.note(format_args!("{level}: {}", record.args()));
        }
    }

    fn flush(&self) {}
}

/// Starts logging.
pub fn install(console: &Console) {
    let level = match console.verbose() {
        _ if console.quiet() => LevelFilter::Off,
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    };
    if log::set_boxed_logger(Box::new(Logger(*console))).is_ok() {
        log::set_max_level(level);
    }
}
