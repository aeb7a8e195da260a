//! The commands in README.md exist as written there.

use std::path::Path;
use std::process::Command;

/// Arguments of every `cargo run ... -- ARGUMENTS` in a shell block of the file.
fn commands(text: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut in_shell = false;
    for line in text.lines() {
        if line.starts_with("```") {
            in_shell = line == "```sh";
        } else if let (true, Some((head, arguments))) = (in_shell, line.split_once(" -- "))
            && head.starts_with("cargo run")
        {
            found.push(split(arguments.split(" #").next().unwrap_or(arguments)));
        }
    }
    found
}

/// Splits at spaces outside double quotes.
fn split(text: &str) -> Vec<String> {
    let mut quoted = false;
    let mut words = vec![String::new()];
    for c in text.trim().chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn commands_of_the_readme_are_understood() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let commands = commands(&std::fs::read_to_string(readme).unwrap());
    assert!(commands.len() >= 6, "{commands:?}");
    for arguments in commands {
        // Help is printed only if everything before it is a known command with known flags.
        let output = Command::new(env!("CARGO_BIN_EXE_terrarium")).args(&arguments).arg("--help").output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
