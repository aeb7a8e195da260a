//! What reading a long prompt takes. One test: memory is that of the whole process.

mod common;

use common::{B, device, random};
use terrarium_models::Decoder;
use terrarium_runtime::read_prompts;

const MAMBA2: &str = r#"{"model_type": "mamba2", "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16,
    "n_groups": 1, "state_size": 16, "tie_word_embeddings": true}"#;

/// Peak of this process's resident memory since the last call, where the system tells.
fn peak() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    std::fs::write("/proc/self/clear_refs", "5").ok()?;
    Some(kilobytes * 1024)
}

/// Bytes that reading takes at most beyond those taken before, and the state it ends in.
fn reading(model: &Decoder<B>, length: usize, chunk: usize) -> (Option<u64>, Vec<f32>) {
    let prompt: Vec<u32> = (0..length as u32).map(|i| (i * i + 7 * i) % 97).collect();
    peak();
    let before = peak();
    let (hidden, cache) = read_prompts(model, &[&prompt], chunk, 0, &device()).expect("reads");
    let took = before.zip(peak()).map(|(before, after)| after - before.min(after));
    assert_eq!(cache.len(), length);
    (took, hidden.into_data().into_vec().expect("float32"))
}

#[test]
fn memory_does_not_grow_with_the_prompt() {
    const LONG: usize = 1 << 17;
    let (_, model) = random(MAMBA2, 5);
    // What the allocator keeps is kept by now.
    reading(&model, 1 << 14, 1024);
    let (short, _) = reading(&model, 1 << 14, 1024);
    let (long, state) = reading(&model, LONG, 1024);
    let (whole, expected) = reading(&model, LONG, 0);
    let worst = state.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5 * expected.iter().fold(1.0, |most, x| x.abs().max(most)), "{worst:e}");
    let (Some(short), Some(long), Some(whole)) = (short, long, whole) else {
        println!("this system does not tell peak memory: not checked");
        return;
    };
    println!("{short} bytes for 16K tokens, {long} for 128K, {whole} for 128K at once");
    // Of a token only its place is kept, 4 bytes; the rest is the allocator's.
    assert!(long < short + (8 << 20), "{short} bytes for 16K tokens, {long} for 128K");
    assert!(whole > 10 * long.max(8 << 20), "{long} bytes in pieces, {whole} at once");
}
