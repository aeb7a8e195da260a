//! Comparing generated text with answers, as the harness's `exact_match` and the official script of SQuAD 2.0 do.

use std::collections::HashMap;

/// Python's `string.punctuation`.
const PUNCTUATION: &str = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";

fn without_punctuation(text: &str) -> String {
    text.chars().filter(|c| !PUNCTUATION.contains(*c)).collect()
}

/// A character of Python's `\w`.
fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether one of the answers is the text: case and punctuation do not count, nor articles if `articles` is set.
pub(crate) fn exact_match(text: &str, answers: &[String], articles: bool) -> bool {
    let plain = |text: &str| {
        let text = if articles { without_leading_articles(text) } else { text.to_string() };
        without_punctuation(&text.to_lowercase())
    };
    let text = plain(text);
    answers.iter().any(|answer| plain(answer) == text)
}

/// `re.sub("\\b(?:The |the |An |A |The |a |an )", "", text)`, of the task `nq_open`.
fn without_leading_articles(text: &str) -> String {
    const ARTICLES: [&str; 6] = ["The ", "the ", "An ", "A ", "a ", "an "];
    let (mut out, mut rest, mut last) = (String::new(), text, ' ');
    while let Some(c) = rest.chars().next() {
        let article = ARTICLES.iter().find(|article| !is_word(last) && rest.starts_with(**article));
        let taken = article.map_or(c.len_utf8(), |article| article.len());
        if article.is_none() {
            out.push(c);
        }
        last = rest[..taken].chars().next_back().unwrap_or(' ');
        rest = &rest[taken..];
    }
    out
}

/// SQuAD's normalised words: lower case, without punctuation and articles.
fn words(text: &str) -> Vec<String> {
    let text = without_punctuation(&text.to_lowercase());
    // An article goes wherever word characters end around it, so `the–end` loses its own.
    let mut plain = String::new();
    let mut word = String::new();
    for c in text.chars().chain([' ']) {
        if is_word(c) {
            word.push(c);
            continue;
        }
        plain.push_str(if ["a", "an", "the"].contains(&word.as_str()) { " " } else { &word });
        word.clear();
        plain.push(c);
    }
    plain.split_whitespace().map(str::to_string).collect()
}

/// Exact match and F1 of one answer, the better of each over all answers; without answers an empty text is right.
pub(crate) fn squad(text: &str, answers: &[String]) -> (f64, f64) {
    let found = words(text);
    let mut golds: Vec<Vec<String>> = answers.iter().map(|answer| words(answer)).filter(|gold| !gold.is_empty()).collect();
    if golds.is_empty() {
        golds.push(Vec::new());
    }
    let exact = f64::from(u8::from(golds.contains(&found)));
    (exact, golds.iter().map(|gold| f1(gold, &found)).fold(0.0, f64::max))
}

fn f1(gold: &[String], found: &[String]) -> f64 {
    if gold.is_empty() || found.is_empty() {
        return f64::from(u8::from(gold == found));
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in gold {
        *left.entry(word).or_default() += 1;
    }
    let mut same = 0.0;
    for word in found {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            same += 1.0;
        }
    }
    if same == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (same / found.len() as f64, same / gold.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// What one question of SQuAD came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Squad {
    pub exact: f64,
    pub f1: f64,
    /// Probability of `unanswerable`.
    pub no_answer: f64,
    pub answerable: bool,
    /// Whether something was answered.
    pub answered: bool,
}

/// The script's table, in percent: all, questions with and without an answer, and the best for any threshold of not answering.
pub(crate) fn squad_table(all: &[Squad]) -> Vec<(&'static str, f64)> {
    let percent = |part: &[f64]| if part.is_empty() { 0.0 } else { 100.0 * part.iter().sum::<f64>() / part.len() as f64 };
    let of = |pick: fn(&Squad) -> f64, wanted: Option<bool>| -> f64 {
        percent(&all.iter().filter(|one| wanted.is_none_or(|wanted| wanted == one.answerable)).map(pick).collect::<Vec<_>>())
    };
    vec![
        ("exact", of(|one| one.exact, None)),
        ("f1", of(|one| one.f1, None)),
        ("HasAns_exact", of(|one| one.exact, Some(true))),
        ("HasAns_f1", of(|one| one.f1, Some(true))),
        ("NoAns_exact", of(|one| one.exact, Some(false))),
        ("NoAns_f1", of(|one| one.f1, Some(false))),
        ("best_exact", best(all, |one| one.exact)),
        ("best_f1", best(all, |one| one.f1)),
    ]
}

/// Answering where `unanswerable` is less probable than a threshold: the best sum over all thresholds.
fn best(all: &[Squad], score: fn(&Squad) -> f64) -> f64 {
    let mut order: Vec<&Squad> = all.iter().collect();
    order.sort_by(|a, b| a.no_answer.total_cmp(&b.no_answer));
    let mut sum = all.iter().filter(|one| !one.answerable).count() as f64;
    let mut most = sum;
    for one in order {
        sum += match (one.answerable, one.answered) {
            (true, _) => score(one),
            (false, true) => -1.0,
            (false, false) => 0.0,
        };
        most = most.max(sum);
    }
    100.0 * most / all.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(items: &[&str]) -> Vec<String> {
        items.iter().map(|item| item.to_string()).collect()
    }

    #[test]
    fn case_punctuation_and_articles_do_not_count() {
        assert!(exact_match("the Eiffel-Tower!", &texts(&["Louvre", "EiffelTower"]), true));
        assert!(!exact_match("the Eiffel Tower", &texts(&["Eiffel Tower"]), false));
        // As Python: re.sub(r"\b(?:The |the |An |A |The |a |an )", "", "Bathe the a an THE end of a an. a") == "Bathe THE end of an. a"
        assert_eq!(without_leading_articles("Bathe the a an THE end of a an. a"), "Bathe THE end of an. a");
        assert_eq!(without_leading_articles("é(the end"), "é(end");
        assert!(!exact_match("", &[], true));
    }

    #[test]
    fn answers_of_squad_are_scored_as_by_its_script() {
        assert_eq!(squad("The  cat, sat", &texts(&["dog", "a cat sat"])), (1.0, 1.0));
        // Two of three words are among four: 2 * (2/3) * (2/4) / (2/3 + 2/4).
        let (exact, f1) = squad("cat sat down", &texts(&["black cat cat sat"]));
        assert!(exact == 0.0 && (f1 - 4.0 / 7.0).abs() < 1e-12, "{f1}");
        assert_eq!(squad("", &[]), (1.0, 1.0));
        assert_eq!(squad("something", &[]), (0.0, 0.0));
        assert_eq!(squad("", &texts(&["cat"])), (0.0, 0.0));
        // An answer of articles alone counts as none.
        assert_eq!(squad("the", &texts(&["a"])), (1.0, 1.0));
        assert_eq!(words("the–end of Theatre"), ["–end", "of", "theatre"]);
    }

    #[test]
    fn the_best_threshold_may_be_any() {
        let one = |exact, no_answer, answerable| Squad { exact, f1: exact / 2.0, no_answer, answerable, answered: true };
        // In order: right +1, without an answer -1, right +1; two without an answer to begin with.
        let all = [one(1.0, 0.3, true), one(1.0, 0.1, true), one(0.0, 0.2, false), one(0.0, 0.9, false)];
        let table: HashMap<_, _> = squad_table(&all).into_iter().collect();
        assert_eq!((table["exact"], table["HasAns_f1"], table["NoAns_exact"]), (50.0, 50.0, 0.0));
        assert_eq!((table["best_exact"], table["best_f1"]), (75.0, 62.5));
        assert_eq!(squad_table(&all[..2])[4], ("NoAns_exact", 0.0));
    }
}
