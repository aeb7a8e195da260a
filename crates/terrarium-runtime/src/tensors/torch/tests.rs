//! The container by hand; whole files are in tests/torch.rs.

use super::zip::Directory;

#[test]
fn bytes_that_are_no_archive_are_refused() {
    for bytes in [b"".as_slice(), b"PK\x03\x04", &[0; 21], &[0; 22], b"PK\x05\x06", &[b'P'; 1 << 17]] {
        let error = Directory::read(bytes).expect_err("an error");
        assert!(error.contains("no end of central directory"), "{error}");
    }
    let empty = [b"PK\x05\x06".as_slice(), &[0; 18]].concat();
    assert_eq!(Directory::read(&empty).expect("an empty archive").names().count(), 0);
}
