//! The directory of a zip archive whose members are all stored as they are.
//!
//! Stricter than zip programs are: two members of one name or in one place, a compressed or encrypted member, a name
//! that leads out of the archive, and sizes that the local header contradicts are errors that name the member. So no
//! archive shows one thing to this reader and another to a scanner, and none grows when it is read.

use std::collections::HashMap;
use std::ops::Range;

/// Members by name, as ranges of bytes of the file.
#[derive(Debug, Default)]
pub(super) struct Directory {
    members: HashMap<String, Range<usize>>,
    /// Why the archive is refused if it turns out to be one of torch.save: a compressed member. (TorchScript compresses
    /// its code, and has a message of its own.)
    pub compressed: Option<String>,
}

const END: usize = 22;
const END_64_LOCATOR: usize = 20;
const END_64: usize = 56;
const CENTRAL: usize = 46;
const LOCAL: usize = 30;

/// Far above what the names of a checkpoint's tensors need.
const MAX_DIRECTORY: usize = 256 << 20;

/// Where the central directory is, and how many members it lists.
struct Place {
    range: Range<usize>,
    count: u64,
}

struct Central {
    name: String,
    method: u16,
    /// Bytes in the archive.
    size: u64,
    local: u64,
    flags: u16,
}

impl Directory {
    /// Reads and checks the directory; no member's data is touched. The error is a sentence.
    pub fn read(file: &[u8]) -> Result<Self, String> {
        let place = find_directory(file)?;
        let mut rest = &file[place.range.clone()];
        let (mut members, mut compressed) = (HashMap::new(), None);
        let mut used: Vec<(usize, usize, String)> = Vec::new();
        while !rest.is_empty() {
            let entry = central_entry(&mut rest)?;
            let (start, data) = local_entry(file, &entry, place.range.start)?;
            used.push((start, data.end, entry.name.clone()));
            if members.contains_key(&entry.name) {
                return Err(format!("the member `{}` is there twice: refused", entry.name));
            }
            if entry.method != 0 {
                let (name, method) = (&entry.name, entry.method);
                compressed
                    .get_or_insert(format!("the member `{name}` is compressed (method {method}), which torch.save never does: refused"));
            }
            members.insert(entry.name, data);
        }
        if members.len() as u64 != place.count {
            return Err(format!("its end lists {} members, its directory {}", place.count, members.len()));
        }
        used.sort();
        for pair in used.windows(2) {
            if pair[0].1 > pair[1].0 {
                return Err(format!("the members `{}` and `{}` overlap: refused", pair[0].2, pair[1].2));
            }
        }
        Ok(Self { members, compressed })
    }

    /// Where a member's bytes are.
    pub fn get(&self, name: &str) -> Option<Range<usize>> {
        self.members.get(name).cloned()
    }

    /// All names, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }
}

/// Little-endian numbers at offsets that were checked to be there.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn find_directory(file: &[u8]) -> Result<Place, String> {
    let cut = || "it has no end of central directory: it is truncated, download or copy it again".to_string();
    let last = file.len().checked_sub(END).ok_or_else(cut)?;
    let first = last.saturating_sub(usize::from(u16::MAX));
    let is_end = |&at: &usize| file[at..].starts_with(b"PK\x05\x06") && at + END + usize::from(u16_at(file, at + 20)) == file.len();
    let end = (first..=last).rev().find(is_end).ok_or_else(cut)?;
    if [u16_at(file, end + 4), u16_at(file, end + 6)].iter().any(|&disk| disk != 0 && disk != u16::MAX) {
        return Err("it is one of several volumes".into());
    }
    let mut count = u64::from(u16_at(file, end + 10));
    let (mut size, mut start) = (u64::from(u32_at(file, end + 12)), u64::from(u32_at(file, end + 16)));
    let mut before = end;
    if let Some(locator) = end.checked_sub(END_64_LOCATOR).filter(|&at| file[at..].starts_with(b"PK\x06\x07")) {
        let at = usize::try_from(u64_at(file, locator + 8)).unwrap_or(usize::MAX);
        let there = at.checked_add(END_64).is_some_and(|to| to <= locator) && file[at..].starts_with(b"PK\x06\x06");
        if !there {
            return Err("its zip64 end of central directory is not where it should be".into());
        }
        (count, size, start) = (u64_at(file, at + 32), u64_at(file, at + 40), u64_at(file, at + 48));
        before = at;
    }
    let wrong = || format!("its directory ({size} bytes at {start}) does not end where it should, at {before}");
    let to = start.checked_add(size).filter(|&to| to == before as u64).ok_or_else(wrong)?;
    // Both are at most `before`, an offset into the file.
    let range = start as usize..to as usize;
    if range.len() > MAX_DIRECTORY {
        return Err(format!("its directory takes {} bytes, more than {MAX_DIRECTORY}: refused", range.len()));
    }
    Ok(Place { range, count })
}

fn central_entry(rest: &mut &[u8]) -> Result<Central, String> {
    let head = *rest;
    if head.len() < CENTRAL || !head.starts_with(b"PK\x01\x02") {
        return Err("its directory is damaged".into());
    }
    let [name_len, extra_len, comment_len] = [28, 30, 32].map(|at| usize::from(u16_at(head, at)));
    let total = CENTRAL + name_len + extra_len + comment_len;
    if total > head.len() {
        return Err("its directory is damaged: an entry goes beyond its end".into());
    }
    *rest = &head[total..];
    let name = std::str::from_utf8(&head[CENTRAL..CENTRAL + name_len]).map_err(|_| "a member's name is not UTF-8".to_string())?;
    let (flags, method) = (u16_at(head, 8), u16_at(head, 10));
    let refuse = |reason: String| Err(format!("the member `{}` {reason}: refused", name.escape_default()));
    if name.is_empty() || name.starts_with('/') || name.contains(['\\', '\0', ':']) || name.split('/').any(|part| part == "..") {
        return refuse("has a name that leads out of the archive".into());
    }
    if flags & 0x2041 != 0 {
        return refuse("is encrypted".into());
    }
    let mut wide = [u64::from(u32_at(head, 24)), u64::from(u32_at(head, 20)), u64::from(u32_at(head, 42))];
    if !widen(&mut wide, &head[CENTRAL + name_len..CENTRAL + name_len + extra_len]) {
        return refuse("has a damaged zip64 field".into());
    }
    let [size, packed, local] = wide;
    if method == 0 && size != packed {
        return refuse(format!("is stored and claims {packed} bytes for {size}"));
    }
    Ok(Central { name: name.to_string(), method, size: packed, local, flags })
}

/// Replaces the values that do not fit 32 bits by those of the zip64 field, in its order.
fn widen(values: &mut [u64; 3], mut extra: &[u8]) -> bool {
    let needed = values.iter().filter(|&&v| v == u64::from(u32::MAX)).count();
    while extra.len() >= 4 {
        let (kind, length) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        let Some(field) = extra.get(4..4 + length) else { return needed == 0 };
        extra = &extra[4 + length..];
        if kind != 1 {
            continue;
        }
        if field.len() < 8 * needed {
            return false;
        }
        let narrow = values.iter_mut().filter(|v| **v == u64::from(u32::MAX));
        for (i, value) in narrow.enumerate() {
            *value = u64_at(field, 8 * i);
        }
        return true;
    }
    needed == 0
}

/// Where a member starts and where its data is; both end before the directory.
fn local_entry(file: &[u8], entry: &Central, limit: usize) -> Result<(usize, Range<usize>), String> {
    let name = &entry.name;
    let outside = || format!("the member `{name}` ({} bytes at {}) goes beyond the archive's data", entry.size, entry.local);
    let start = usize::try_from(entry.local).ok().filter(|&s| s.checked_add(LOCAL).is_some_and(|to| to <= limit)).ok_or_else(outside)?;
    let head = &file[start..limit];
    let (name_len, extra_len) = (usize::from(u16_at(head, 26)), usize::from(u16_at(head, 28)));
    let from = LOCAL + name_len + extra_len;
    if !head.starts_with(b"PK\x03\x04") || head.get(LOCAL..LOCAL + name_len) != Some(name.as_bytes()) || u16_at(head, 8) != entry.method {
        return Err(format!("the member `{name}` is another one where its data is: refused"));
    }
    let size = usize::try_from(entry.size).map_err(|_| outside())?;
    let to = from.checked_add(size).filter(|&to| to <= head.len()).ok_or_else(outside)?;
    // With bit 3 the sizes follow the data; 2^32 - 1 says that they are in a zip64 field.
    let claimed = u64::from(u32_at(head, 18));
    if entry.flags & 8 == 0 && claimed != entry.size && claimed != u64::from(u32::MAX) {
        return Err(format!("the member `{name}` claims {} bytes in the directory and {claimed} where it is: refused", entry.size));
    }
    Ok((start, start + from..start + to))
}
