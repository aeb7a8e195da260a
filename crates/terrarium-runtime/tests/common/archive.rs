//! torch.save archives by hand, honest and otherwise.

use std::io::{Cursor, Seek, SeekFrom, Write};

/// A member of a zip archive. What is `Some` is claimed in the directory against the truth.
#[derive(Clone, Default)]
pub struct Member {
    pub name: String,
    pub data: Vec<u8>,
    /// Bytes of zeros after the data, left as a hole in a file.
    pub zeros: u64,
    pub method: u16,
    pub flags: u16,
    pub size: Option<u32>,
    pub offset: Option<u32>,
}

pub fn member(name: &str, data: &[u8]) -> Member {
    Member { name: name.into(), data: data.into(), ..Member::default() }
}

fn put(out: &mut Vec<u8>, values: &[(u64, usize)]) {
    for (value, width) in values {
        out.extend_from_slice(&value.to_le_bytes()[..*width]);
    }
}

/// Writes an archive; `wide` puts sizes and offsets into zip64 fields.
pub fn write_zip(out: &mut (impl Write + Seek), members: &[Member], wide: bool) {
    let mut directory = Vec::new();
    let narrow = |value: u64| if wide { u64::from(u32::MAX) } else { value };
    for m in members {
        let start = out.stream_position().expect("a position");
        let size = m.data.len() as u64 + m.zeros;
        let mut local = b"PK\x03\x04".to_vec();
        let name = (m.name.len() as u64, 2);
        let extra = if wide { 20 } else { 0 };
        let common = [(0, 2), (m.flags.into(), 2), (m.method.into(), 2), (0, 8), (narrow(size), 4), (narrow(size), 4), name];
        put(&mut local, &common);
        put(&mut local, &[(extra, 2)]);
        local.extend_from_slice(m.name.as_bytes());
        if wide {
            put(&mut local, &[(1, 2), (16, 2), (size, 8), (size, 8)]);
        }
        out.write_all(&local).expect("writes");
        out.write_all(&m.data).expect("writes");
        out.seek(SeekFrom::Current(m.zeros as i64)).expect("seeks");

        directory.extend_from_slice(b"PK\x01\x02");
        let claimed = m.size.map_or(size, u64::from);
        put(
            &mut directory,
            &[(0, 2), (0, 2), (m.flags.into(), 2), (m.method.into(), 2), (0, 8), (narrow(claimed), 4), (narrow(claimed), 4), name],
        );
        let offset = m.offset.map_or(start, u64::from);
        put(&mut directory, &[(if wide { 28 } else { 0 }, 2), (0, 2), (0, 2), (0, 2), (0, 4), (narrow(offset), 4)]);
        directory.extend_from_slice(m.name.as_bytes());
        if wide {
            put(&mut directory, &[(1, 2), (24, 2), (claimed, 8), (claimed, 8), (offset, 8)]);
        }
    }
    let (start, size, count) = (out.stream_position().expect("a position"), directory.len() as u64, members.len() as u64);
    if wide {
        directory.extend_from_slice(b"PK\x06\x06");
        put(&mut directory, &[(44, 8), (45, 2), (45, 2), (0, 4), (0, 4), (count, 8), (count, 8), (size, 8), (start, 8)]);
        directory.extend_from_slice(b"PK\x06\x07");
        put(&mut directory, &[(0, 4), (start + size, 8), (1, 4)]);
    }
    directory.extend_from_slice(b"PK\x05\x06");
    put(&mut directory, &[(0, 4), (count, 2), (count, 2), (size, 4), (narrow(start), 4), (0, 2)]);
    out.write_all(&directory).expect("writes");
}

pub fn zip(members: &[Member]) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    write_zip(&mut out, members, false);
    out.into_inner()
}

/// An archive of a pickle and storages, as torch.save lays it out.
pub fn archive(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
    zip(&members(pickle, storages))
}

pub fn members(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<Member> {
    let mut members = vec![member("x/data.pkl", pickle), member("x/byteorder", b"little")];
    members.extend(storages.iter().map(|(key, data)| member(&format!("x/data/{key}"), data)));
    members.push(member("x/version", b"3\n"));
    members
}

pub fn text(s: &str) -> Vec<u8> {
    [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
}

pub fn int(value: i64) -> Vec<u8> {
    [b"\x8a\x08", &value.to_le_bytes()[..]].concat()
}

fn tuple(values: &[i64]) -> Vec<u8> {
    let values: Vec<u8> = values.iter().flat_map(|&v| int(v)).collect();
    [b"(", &values[..], b"t"].concat()
}

/// A view of a storage.
#[derive(Clone)]
pub struct View<'a> {
    pub class: &'a str,
    pub storage: &'a str,
    pub elements: i64,
    pub offset: i64,
    pub shape: &'a [i64],
    pub strides: &'a [i64],
}

/// Four floats in a row, in storage `0`.
pub const FOUR: View = View { class: "FloatStorage", storage: "0", elements: 4, offset: 0, shape: &[4], strides: &[1] };

impl View<'_> {
    /// The pickle of the tensor.
    pub fn pickle(&self) -> Vec<u8> {
        let class = format!("ctorch\n{}\n", self.class);
        let storage =
            [b"(", &text("storage")[..], class.as_bytes(), &text(self.storage), &text("cpu"), &int(self.elements), b"tQ"].concat();
        let hooks = b"\x89ccollections\nOrderedDict\n)R";
        let start = b"ctorch._utils\n_rebuild_tensor_v2\n(";
        [&start[..], &storage, &int(self.offset), &tuple(self.shape), &tuple(self.strides), hooks, b"tR"].concat()
    }
}

/// The pickle of a dict of pickled values.
pub fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = items.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [b"\x80\x02}(", &items[..], b"u."].concat()
}
