//! Stop strings, which may begin in one token and end in another.

/// Holds back text that may be the beginning of a stop string.
#[derive(Debug, Clone)]
pub(super) struct StopScanner {
    stops: Vec<String>,
    held: String,
}

/// Text that may be given out, and the stop string that ended it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Scanned {
    pub(super) text: String,
    pub(super) stop: Option<String>,
}

impl StopScanner {
    /// Empty stop strings are left out: they would end every text.
    pub(super) fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes more text. The stop string that begins first counts, and it is not part of the text.
    pub(super) fn push(&mut self, text: &str) -> Scanned {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop))).min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = found {
            let stop = Some(stop.clone());
            self.held.truncate(at);
            return Scanned { text: std::mem::take(&mut self.held), stop };
        }
        let safe = self.safe_length();
        let rest = self.held.split_off(safe);
        Scanned { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// What was held back, when no more comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the text before the longest end that some stop string begins with.
    fn safe_length(&self) -> usize {
        let ends = self.held.char_indices().map(|(at, _)| at);
        ends.into_iter().find(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]))).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All text given out, and the stop string.
    fn scan(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut scanner = StopScanner::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let mut out = String::new();
        for piece in pieces {
            let scanned = scanner.push(piece);
            out.push_str(&scanned.text);
            if scanned.stop.is_some() {
                return (out, scanned.stop);
            }
        }
        (out + &scanner.finish(), None)
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_not_given_out() {
        assert_eq!(scan(&["\n\nUser:"], &["Hello", "\n", "\nUs", "er: hi"]), ("Hello".into(), Some("\n\nUser:".into())));
    }

    #[test]
    fn a_beginning_that_goes_on_otherwise_is_given_out() {
        assert_eq!(scan(&["abc"], &["xa", "b", "d"]), ("xabd".into(), None));
        assert_eq!(scan(&["aab"], &["a", "a", "a", "b!"]), ("a".into(), Some("aab".into())));
    }

    #[test]
    fn the_first_stop_string_counts() {
        assert_eq!(scan(&["late", "ea"], &["a late eagle"]), ("a ".into(), Some("late".into())));
    }

    #[test]
    fn characters_of_several_bytes_are_not_cut() {
        assert_eq!(scan(&["é!"], &["caf", "é", "s"]), ("cafés".into(), None));
    }

    #[test]
    fn without_stop_strings_nothing_is_held() {
        let mut scanner = StopScanner::new(&["".to_string()]);
        assert_eq!(scanner.push("abc"), Scanned { text: "abc".into(), stop: None });
    }
}
