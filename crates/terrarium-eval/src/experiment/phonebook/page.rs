//! The texts of the paper, and how they fall into tokens.

use serde::{Deserialize, Serialize};

/// When the question is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// After the book.
    Standard,
    /// Before the book, and again after it.
    Reversed,
}

/// First names.
pub(in crate::experiment) const FIRST: [&str; 64] = [
    "Ada", "Alan", "Anna", "Ben", "Bella", "Carl", "Clara", "Dan", "Diana", "Ed", "Ella", "Eric", "Eva", "Felix", "Flora", "Fred", "Gina",
    "Grace", "Hank", "Helen", "Hugo", "Ida", "Igor", "Irene", "Ivan", "Jack", "Jane", "John", "Julia", "Karl", "Kate", "Ken", "Lara",
    "Leo", "Lily", "Louis", "Lucy", "Maria", "Mark", "Max", "Mia", "Nick", "Nina", "Nora", "Oscar", "Olga", "Otto", "Paul", "Paula",
    "Peter", "Rita", "Robert", "Rosa", "Sam", "Sara", "Simon", "Sofia", "Thomas", "Tina", "Tom", "Ursula", "Victor", "Vera", "Walter",
];

/// Last names.
pub(super) const LAST: [&str; 64] = [
    "Abbott", "Adams", "Baker", "Barnes", "Bell", "Brown", "Burke", "Carter", "Clark", "Cole", "Cook", "Cruz", "Davis", "Dixon", "Doyle",
    "Evans", "Ferris", "Fisher", "Ford", "Fox", "Garcia", "Gray", "Green", "Hall", "Harris", "Hart", "Hill", "Howard", "Hunt", "James",
    "Jones", "Kelly", "King", "Klein", "Lane", "Lee", "Lewis", "Lopez", "Marsh", "Mason", "Meyer", "Miller", "Moore", "Nash", "Olsen",
    "Owens", "Parker", "Perez", "Porter", "Quinn", "Reed", "Rivera", "Ross", "Russo", "Scott", "Shaw", "Smith", "Stone", "Taylor",
    "Turner", "Vega", "Ward", "White", "Young",
];

/// A book with its questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Page {
    /// Text and whether it is an answer.
    pub parts: Vec<(String, bool)>,
}

impl Page {
    fn text(&mut self, text: impl Into<String>) -> &mut Self {
        self.parts.push((text.into(), false));
        self
    }

    fn answer(&mut self, phone: &str) -> &mut Self {
        self.parts.push((format!(" {phone}"), true));
        self
    }
}

/// Words, line ends, up to four digits at once, single signs; blanks only part them.
pub(super) fn pieces(text: &str) -> Vec<&str> {
    let class = |c: char| match c {
        '\n' => 0,
        c if c.is_whitespace() => 1,
        c if c.is_ascii_digit() => 2,
        c if c.is_alphabetic() => 3,
        _ => 4,
    };
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let most = match class(first) {
            1 | 3 => usize::MAX,
            2 => 4,
            _ => 1,
        };
        let end = rest.char_indices().enumerate().find(|(n, (_, c))| *n >= most || class(*c) != class(first));
        let (piece, after) = rest.split_at(end.map_or(rest.len(), |(_, (at, _))| at));
        if class(first) != 1 {
            found.push(piece);
        }
        rest = after;
    }
    found
}

/// The templates of the paper. `shots`, two of them there, and `target` are places in the book.
pub(super) fn page(variant: Variant, entries: &[(String, String)], shots: &[usize], target: usize) -> Page {
    let mut page = Page { parts: Vec::new() };
    let book: String = entries.iter().map(|(name, phone)| format!("{name}: {phone}\n")).collect();
    let (name, phone) = &entries[target];
    match variant {
        Variant::Standard => {
            page.text(book);
            for (name, phone) in shots.iter().map(|shot| &entries[*shot]) {
                page.text(format!("What is the phone number for {name}?\nAnswer:")).answer(phone).text("\n");
            }
            page.text(format!("What is the phone number for {name}?\nAnswer:"));
        }
        Variant::Reversed => {
            let shown: String = shots.iter().map(|shot| &entries[*shot]).map(|(name, phone)| format!("{name}: {phone}\n")).collect();
            page.text(format!(
                "Given a phone book with entries of the form:\n{shown}... and so on.\n\
                 Please find the phone number for {name}.\nI will ask you for this phone number later.\n\
                 Memorize it so you can respond correctly.\nRemember {name}.\nHere is the phonebook:\n\n"
            ));
            page.text(book);
            page.text(format!(
                "Okay, that is the end of the phonebook.\nRemember when I asked you to memorize the phone number for {name}?\n\
                 What is the phone number for {name}?"
            ));
        }
    }
    page.answer(phone);
    page
}

/// A book, and its entries again.
pub(super) fn twice(book: &[(String, String)], again: &[(String, String)]) -> Page {
    let mut page = Page { parts: Vec::new() };
    page.text(book.iter().map(|(name, phone)| format!("{name}: {phone}\n")).collect::<String>());
    for (name, phone) in again {
        page.text(format!("{name}:")).answer(phone).text("\n");
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_the_templates_of_the_paper() {
        let entries: Vec<(String, String)> = [("Ada Fox", "200-300-4000"), ("Ben Lee", "555-666-7777"), ("Eva Ross", "201-302-4003")]
            .map(|(a, b)| (a.into(), b.into()))
            .into();
        let text = |variant| page(variant, &entries, &[0, 1], 2).parts.iter().map(|(text, _)| text.as_str()).collect::<String>();
        assert_eq!(
            text(Variant::Standard),
            "Ada Fox: 200-300-4000\nBen Lee: 555-666-7777\nEva Ross: 201-302-4003\n\
             What is the phone number for Ada Fox?\nAnswer: 200-300-4000\nWhat is the phone number for Ben Lee?\nAnswer: 555-666-7777\n\
             What is the phone number for Eva Ross?\nAnswer: 201-302-4003"
        );
        assert_eq!(
            text(Variant::Reversed),
            "Given a phone book with entries of the form:\nAda Fox: 200-300-4000\nBen Lee: 555-666-7777\n... and so on.\n\
             Please find the phone number for Eva Ross.\nI will ask you for this phone number later.\n\
             Memorize it so you can respond correctly.\nRemember Eva Ross.\nHere is the phonebook:\n\n\
             Ada Fox: 200-300-4000\nBen Lee: 555-666-7777\nEva Ross: 201-302-4003\n\
             Okay, that is the end of the phonebook.\nRemember when I asked you to memorize the phone number for Eva Ross?\n\
             What is the phone number for Eva Ross? 201-302-4003"
        );
    }

    #[test]
    fn pieces_are_words_digits_and_signs() {
        assert_eq!(pieces("Ada Fox: 200-300-4005\n\nOkay?"), ["Ada", "Fox", ":", "200", "-", "300", "-", "4005", "\n", "\n", "Okay", "?"]);
        assert_eq!(pieces(" 1 23456"), ["1", "2345", "6"]);
    }
}
