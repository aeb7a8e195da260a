//! Pickles by hand: every way to call something, and every lie about a length.

use super::*;
use crate::error::PickleError;

fn failure(bytes: &[u8]) -> PickleError {
    parse(bytes).expect_err("an error")
}

/// Protocol 4 text.
fn text(s: &str) -> Vec<u8> {
    [&[0x8c, s.len() as u8], s.as_bytes()].concat()
}

fn stack_global(module: &str, name: &str) -> Vec<u8> {
    [text(module), text(name), vec![0x93]].concat()
}

#[test]
fn calls_of_anything_but_data_are_refused() {
    let global = |names: &str| [b"c", names.replace(' ', "\n").as_bytes(), b"\n"].concat();
    let cases = [
        ("os system", "os.system"),
        ("posix system", "posix.system"),
        ("builtins eval", "builtins.eval"),
        ("builtins exec", "builtins.exec"),
        ("__builtin__ eval", "__builtin__.eval"),
        ("subprocess Popen", "subprocess.Popen"),
        ("runpy run_module", "runpy.run_module"),
        ("torch load", "torch.load"),
        ("torch.storage _load_from_bytes", "torch.storage._load_from_bytes"),
        ("torch._utils os.system", "torch._utils.os.system"),
        ("torch._utils _rebuild_x.__globals__", "torch._utils._rebuild_x.__globals__"),
        ("megatron.training os.system", "megatron.training.os.system"),
        ("megatron.training Args.os.system", "megatron.training.Args.os.system"),
        ("megatron.training run", "megatron.training.run"),
        ("megatronix Evil", "megatronix.Evil"),
        ("numpy load", "numpy.load"),
        ("torch os.Storage", "torch.os.Storage"),
    ];
    for (names, callable) in cases {
        let global = global(names);
        let inst = [b"(", b"i".as_slice(), &global[1..], b"."].concat();
        let (module, name) = names.split_once(' ').expect("two names");
        let stack = stack_global(module, name);
        let pickles = [
            ("REDUCE", [&global[..], b")R."].concat()),
            ("NEWOBJ", [&global[..], b")\x81."].concat()),
            ("NEWOBJ_EX", [&global[..], b")}\x92."].concat()),
            ("INST", inst),
            ("OBJ", [b"(", &global[..], b"o."].concat()),
            ("STACK_GLOBAL", [&stack[..], b"(Vtouch x\ntR."].concat()),
            ("BUILD", [&global[..], b"}b."].concat()),
            ("through the memo", [&global[..], b"q\x010h\x01)R."].concat()),
        ];
        for (how, bytes) in pickles {
            let error = failure(&bytes);
            let PickleError::Refused { callable: found, .. } = &error else { panic!("{how} {names}: {error}") };
            assert_eq!(found, callable, "{how}");
            assert!(error.to_string().contains("nothing in it is ever run"));
        }
        // As a name it is harmless.
        assert!(parse(&[&global[..], b"."].concat()).is_ok());
    }
}

#[test]
fn callables_taken_by_callables_are_looked_at() {
    let member = |class: &str| [b"cbuiltins\ngetattr\n(c".as_slice(), class.as_bytes(), b"\nVx\ntR."].concat();
    parse(&member("megatron.core.enums\nModelType")).expect("a member of an enum");
    for class in ["os\npath", "builtins\ngetattr", "builtins\n__import__", "megatron\nos"] {
        assert!(matches!(failure(&member(class)), PickleError::Refused { .. }), "{class}");
    }
    let made = |class: &str| [b"ccopy_reg\n_reconstructor\n(c".as_slice(), class.as_bytes(), b"\nc__builtin__\nobject\nNtR."].concat();
    parse(&made("argparse\nNamespace")).expect("an object of protocol 1");
    assert!(matches!(failure(&made("subprocess\nPopen")), PickleError::Refused { .. }));
    // The result of a call is no name that could be called.
    for bytes in [b"cbuiltins\ngetattr\n(cmegatron\nX\nVrun\ntR)R.".as_slice(), b"Vos.system\n)R.", b"}(K\x01tR."] {
        assert!(matches!(failure(bytes), PickleError::Refused { .. }));
    }
    for opcode in [b"\x82\x01".as_slice(), b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"] {
        let PickleError::Refused { callable, .. } = failure(&[opcode, b")R."].concat()) else { panic!("an extension") };
        assert!(callable.contains("copyreg extension"));
    }
}

#[test]
fn claimed_lengths_are_not_believed() {
    let huge = u64::MAX.to_le_bytes();
    for opcode in [0x8du8, 0x8e, 0x96, 0x95] {
        let error = failure(&[&[opcode], &huge[..], b"abc."].concat());
        assert!(matches!(error, PickleError::Truncated { needed: u64::MAX, left: 4, .. }), "{opcode:#x}: {error}");
    }
    for opcode in
        [b"X\xff\xff\xff\xff".as_slice(), b"B\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x8a\x09", b"U\x05"]
    {
        assert!(matches!(failure(&[opcode, b"abc."].concat()), PickleError::Truncated { .. }));
    }
    for opcode in [b"T\xff\xff\xff\xff".as_slice(), b"\x8b\xff\xff\xff\xff"] {
        assert!(matches!(failure(&[opcode, b"abc."].concat()), PickleError::Malformed { .. }), "a negative length");
    }
    // A memo index is no size, and a long integer stays as it is.
    assert!(parse(b"Nr\xff\xff\xff\xff0j\xff\xff\xff\xff.").is_ok());
    let long = [b"\x8b\x00\x00\x01\x00".as_slice(), &[7; 1 << 16], b"."].concat();
    assert!(matches!(parse(&long).expect("reads").get(0), Node::Big));
    assert!(matches!(failure(b"\x8b\x04\x00\x00\x00"), PickleError::Truncated { at: 5, needed: 4, left: 0 }));
}

#[test]
fn bombs_stay_as_small_as_they_are_written() {
    // A billion laughs: a list of ten times the list before, thirty times over.
    let mut bytes = b"]q\x00(K\x01e".to_vec();
    for level in 0..30u8 {
        bytes.extend([b']', b'q', level + 1, b'(']);
        bytes.extend([b'h', level].repeat(10));
        bytes.push(b'e');
    }
    bytes.push(b'.');
    let pickle = parse(&bytes).expect("reads");
    assert!(pickle.nodes.len() < 64);
    // A list within itself, and a dictionary as its own key.
    parse(b"]q\x00h\x00a.").expect("a cycle is harmless");
    parse(b"}q\x00h\x00h\x00s.").expect("a cycle is harmless");
    // Depth without recursion; the drop does not recurse either.
    let deep = [b"N".as_slice(), &[0x85; 1 << 20], b"."].concat();
    drop(parse(&deep).expect("reads"));
    assert!(matches!(failure(&[b'('; 1 << 16]), PickleError::Limit { what: "nested collections", .. }));
}

#[test]
fn what_is_changed_after_it_was_memoised_is_seen_changed() {
    let pickle = parse(b"(]q\x00h\x00K\x05at.").expect("reads");
    let lists = pickle.items(pickle.root()).expect("a tuple");
    for &list in lists {
        assert_eq!(pickle.items(list).map(<[Id]>::len), Some(if lists[0] == lists[1] { 1 } else { 0 }));
    }
    assert_eq!(lists[0], lists[1]);
}

#[test]
fn damage_is_named_with_its_offset() {
    assert_eq!(failure(b""), PickleError::Truncated { at: 0, needed: 1, left: 0 });
    assert_eq!(failure(b"N"), PickleError::Truncated { at: 1, needed: 1, left: 0 }, "no STOP");
    assert_eq!(failure(b"NN\xff"), PickleError::UnknownOpcode { at: 2, opcode: 0xff });
    for (bytes, opcode) in
        [(b".".as_slice(), b'.'), (b"(.", b'.'), (b"t.", b't'), (b"K\x01\x86.", 0x86), (b"N(\x85.", 0x85), (b"R.", b'R'), (b"(o", b'o')]
    {
        assert!(matches!(failure(bytes), PickleError::Underflow { opcode: found, .. } if found == opcode), "{bytes:?}");
    }
    for bytes in [
        b"\x80\x06.".as_slice(),
        b"h\x07.",
        b"NK\x01a.",
        b"}(K\x01u.",
        b"(K\x01d.",
        b"Ix\n.",
        b"Fx\n.",
        b"Sx\n.",
        b"V\\ud800\n.",
        b"NN\x93.",
        b"N}b.",
        b"\x97.",
        b"ctorch\nSize\nNR.",
    ] {
        assert!(matches!(failure(bytes), PickleError::Malformed { .. }), "{bytes:?}: {}", failure(bytes));
    }
}

#[test]
fn old_protocols_read_like_new_ones() {
    let value = |bytes: &[u8]| format!("{:?}", parse(bytes).expect("reads").nodes.last().expect("one"));
    assert_eq!(value(b"I01\n."), "Bool(true)");
    assert_eq!(value(b"I-7\n."), "Int(-7)");
    assert_eq!(value(b"L123L\n."), "Int(123)");
    assert_eq!(value(b"L99999999999999999999L\n."), "Big");
    assert_eq!(value(b"F2.5\n."), "Float(2.5)");
    assert_eq!(value(b"G\x40\x04\x00\x00\x00\x00\x00\x00."), "Float(2.5)");
    assert_eq!(value(b"S'a\\n\\x41\\''\n."), "Str(\"a\\nA'\")");
    assert_eq!(value(b"Va\\u00e9\xe9\n."), "Str(\"a\u{e9}\u{e9}\")");
    assert_eq!(value(b"\x8a\x02\xff\xff."), "Int(-1)");
    assert_eq!(value(b"J\xfe\xff\xff\xff."), "Int(-2)");
    assert_eq!(value(b"(I1\nI2\nl."), "List([0, 1])");
    assert_eq!(value(b"(I1\nI2\nd."), "Dict([(0, 1)])");
    assert_eq!(value(b"I3\np12\ng12\n."), "Int(3)");
    assert_eq!(value(b"(N(NN1N0."), "None");
    assert_eq!(value(b"P17\n."), "Persistent(0)");
}

#[test]
fn ordered_dicts_of_python_2_hold_their_arguments() {
    let pickle = parse(b"ccollections\nOrderedDict\n((lp1\n(lp2\nVa\naI1\naatRVb\nI2\ns.").expect("reads");
    let of = |key| pickle.lookup(pickle.root(), key).and_then(|id| pickle.int(id));
    assert_eq!((of("a"), of("b"), of("c")), (Some(1), Some(2), None));
}
