//! Checking the compiled normalisation rules of a model before the library walks them: it indexes without looking.
//!
//! Layout: four bytes with the trie's size, the trie (a double array of 32-bit units), the replacements, each ended by
//! a zero byte.

use tokenizers::normalizers::Precompiled;

/// The rules, once every path through them is known to stay inside.
pub(super) fn read(bytes: &[u8]) -> Result<Precompiled, String> {
    check(bytes).map_err(|reason| format!("precompiled_charsmap: {reason}"))?;
    Precompiled::from(bytes).map_err(|e| format!("precompiled_charsmap: {e}"))
}

fn check(bytes: &[u8]) -> Result<(), String> {
    let size = bytes.first_chunk::<4>().map(|b| u32::from_le_bytes(*b) as usize).ok_or("it has no size")?;
    let rest = &bytes[4..];
    if size == 0 || size % 4 != 0 || size > rest.len() {
        return Err(format!("its trie of {size} bytes does not fit the {} bytes there are", rest.len()));
    }
    let (trie, replacements) = rest.split_at(size);
    let units: Vec<usize> = trie.chunks_exact(4).map(|b| b.iter().rev().fold(0, |n, &byte| n << 8 | usize::from(byte))).collect();
    let replacements = std::str::from_utf8(replacements).map_err(|e| format!("its replacements are not UTF-8: {e}"))?;
    let outside = |place: usize| format!("its trie leads to unit {place} of {}", units.len());

    let mut seen = vec![false; units.len()];
    let mut open = vec![offset(units[0])];
    while let Some(base) = open.pop() {
        // A step reads `base ^ byte` for any byte but zero; a leaf reads `base` itself.
        let last = base | 0xFF;
        if last >= units.len() {
            return Err(outside(last));
        }
        for byte in 1..=255usize {
            let node = base ^ byte;
            let unit = units[node];
            if unit & (1 << 31 | 0xFF) != byte || std::mem::replace(&mut seen[node], true) {
                continue;
            }
            let next = node ^ offset(unit);
            if next >= units.len() {
                return Err(outside(next));
            }
            if unit >> 8 & 1 == 1 {
                let at = units[next] & ((1 << 31) - 1);
                if !replacements.is_char_boundary(at) {
                    return Err(format!("a replacement at byte {at} of {}", replacements.len()));
                }
            }
            open.push(next);
        }
    }
    Ok(())
}

fn offset(unit: usize) -> usize {
    (unit >> 10) << ((unit & (1 << 9)) >> 6)
}
