//! The dashboard where there is a terminal, plain lines where there is none.

use std::process::Command;

use tempfile::TempDir;

use crate::common::{run, terrarium, text, tiny_config};

#[test]
fn without_a_terminal_there_are_plain_lines() {
    let dir = TempDir::new().unwrap();
    let config = tiny_config(dir.path(), 5);
    let ran = run(&["train", "--config", text(&config), "--out-dir", text(&dir.path().join("run"))]).ok();
    assert!(ran.err.contains("step") && ran.err.contains("loss"), "{ran:#?}");
    assert!(!ran.err.contains('\x1b') && !ran.out.contains('\x1b'), "{ran:#?}");
}

#[test]
fn on_a_terminal_there_is_the_dashboard_and_the_terminal_is_given_back() {
    let dir = TempDir::new().unwrap();
    let config = tiny_config(dir.path(), 5);
    let program = terrarium(&[]);
    let command = format!(
        "stty rows 45 cols 160; '{}' train --config '{}' --out-dir '{}'; echo code=$?; stty -a",
        program.get_program().to_str().unwrap(),
        config.display(),
        dir.path().join("run").display()
    );
    let Ok(output) = Command::new("script").args(["-qec", &command, "/dev/null"]).env("TERM", "xterm-256color").output() else {
        println!("skipped: no `script` command");
        return;
    };
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("\x1b[?1049h") && shown.contains("\x1b[?1049l"), "the alternate screen is entered and left: {shown}");
    let (_, after) = shown.rsplit_once("\x1b[?1049l").unwrap();
    assert!(after.contains("code=0") && after.contains(" icanon") && after.contains(" echo"), "{after}");
    assert!(dir.path().join("run/model/model.safetensors").exists());
}
