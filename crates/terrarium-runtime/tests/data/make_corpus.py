#!/usr/bin/env python3
"""Writes tests/corpus: small hostile and valid files that a test replays. Files named ok-* are to be read, all others refused;
*.pkl are pickles that the test puts into an archive with one storage, `0`, of 16 zero bytes. Standard library only."""
import io, json, os, shutil, struct, zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, '..', 'corpus')


def text(s):
    return b'X' + struct.pack('<I', len(s)) + s.encode()


def num(n):
    return b'\x8a\x08' + struct.pack('<q', n)


def tup(values):
    return b'(' + b''.join(map(num, values)) + b't'


def tensor(shape=(4,), strides=(1,), offset=0, elements=4, cls='FloatStorage', key='0'):
    storage = b'(' + text('storage') + b'ctorch\n' + cls.encode() + b'\n' + text(key) + text('cpu') + num(elements) + b'tQ'
    return b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + num(offset) + tup(shape) + tup(strides) + b'\x89ccollections\nOrderedDict\n)RtR'


def d(**items):
    return b'\x80\x02}(' + b''.join(text(k) + v for k, v in items.items()) + b'u.'


def laughs(levels, width):
    out = b']q\x00(K\x01e'
    for i in range(levels):
        out += b']q' + bytes([i + 1]) + b'(' + (b'h' + bytes([i])) * width + b'e'
    return out


PICKLES = {
    'ok-tensor': d(w=tensor()), 'ok-transposed': d(w=tensor((2, 2), (1, 2))), 'ok-empty': d(), 'ok-scalar': d(w=tensor((), ())),
    'ok-zero': d(w=tensor((0, 5), (5, 1))), 'ok-extra-state': d(w=tensor(), x=b'N', y=b'c_io\nBytesIO\n)R'),
    'ok-expanded': d(w=tensor((4,), (0,))), 'ok-laughs-beside': b'\x80\x02' + laughs(20, 10) + b'0' + d(w=tensor())[2:],
    'os-system': b'cos\nsystem\n(Vtouch x\ntR.', 'eval-inst': b'(Vx\nibuiltins\neval\n.', 'exec-obj': b'(cbuiltins\nexec\nVx\no.',
    'popen-newobj': b'csubprocess\nPopen\n(Vx\nt\x81.', 'stack-global': b'\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.', 'build-global': b'cos\nsystem\n}b.',
    'getattr-os': b'cbuiltins\ngetattr\n(cos\npath\nVsystem\ntR.', 'extension': b'\x82\x01)R.', 'reconstructor': b'ccopyreg\n_reconstructor\n(cos\nsystem\nNNtR.',
    'dotted': b'\x8c\x0emegatron.train\x8c\tos.system\x93)R.', 'load-from-bytes': b'ctorch.storage\n_load_from_bytes\n(Vx\ntR.',
    'unicode8-length': b'\x8d' + b'\xff' * 8 + b'x.', 'bytes8-length': b'\x8e' + b'\xff' * 7 + b'\x7f.', 'bytearray8-length': b'\x96' + b'\xff' * 8, 'frame-length': b'\x80\x04\x95' + b'\xff' * 8 + b'N.',
    'long4-length': b'\x8b\xff\xff\xff\x7f', 'long4-negative': b'\x8b\xff\xff\xff\xff.', 'memo-high': b'Nr\xff\xff\xff\xff.', 'memo-unset': b'h\x09.', 'laughs': laughs(30, 50) + b'.',
    'laughs-args': d(model=b'}', args=laughs(5, 120)), 'marks': b'(' * 5000, 'deep-tuples': b'N' + b'\x85' * 5000 + b'.', 'cycle': b'}q\x00' + text('w') + b'h\x00s.', 'no-stop': b'N', 'empty': b'',
    'underflow': b'\x86.', 'unknown-opcode': b'\xfe.', 'mark-at-end': b'N(.', 'set-in-none': b'NK\x01K\x02s.', 'protocol-9': b'\x80\x09N.', 'buffer': b'\x97.',
    'duplicate-key': b'}(' + text('w') + tensor() + text('w') + tensor() + b'u.', 'number-key': b'}(K\x01' + tensor() + b'u.', 'absurd-shape': d(w=tensor((1 << 62, 4), (0, 0))),
    'expanded-shape': d(w=tensor((1 << 40,), (0,))), 'negative-stride': d(w=tensor((4,), (-1,))), 'negative-offset': d(w=tensor(offset=-1)), 'offset-beyond': d(w=tensor(offset=1)),
    'stride-beyond': d(w=tensor((2,), (1 << 62,))), 'many-dims': d(w=tensor((1,) * 100, (1,) * 100)), 'storage-missing': d(w=tensor(key='7')), 'storage-size': d(w=tensor(elements=1 << 40)),
    'storage-type': d(w=tensor(cls='QUInt4x2Storage')), 'list': b']' + tensor() + b'a.', 'bare-tensor': tensor() + b'.', 'nested': d(model=d(w=tensor())[2:-1]), 'storage-alone': d(w=b'(tQ'),
}


def archive(members, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', method) as z:
        for name, data in members:
            z.writestr(zipfile.ZipInfo(name) if method == zipfile.ZIP_STORED else name, data)
    return out.getvalue()


def archives():
    base = [('x/data.pkl', d(w=tensor())), ('x/data/0', bytes(16)), ('x/version', b'3\n')]
    good = archive(base)
    yield 'ok-plain', good
    yield 'ok-comment', good[:-2] + b'\x03\x00abc'
    yield 'compressed', archive(base[:1] + [('x/data/0', bytes(16))], zipfile.ZIP_DEFLATED)
    yield 'bomb', archive(base[:1] + [('x/data/0', bytes(1 << 20))], zipfile.ZIP_DEFLATED)
    yield 'up', archive(base + [('x/../../up', b'')])
    yield 'two-pickles', archive(base + [('y/data.pkl', b'N.')])
    yield 'big-endian', archive(base + [('x/byteorder', b'big')])
    yield 'truncated', good[:len(good) // 2]
    yield 'no-pickle', archive(base[1:])
    yield 'count', good[:-12] + struct.pack('<H', 9) + good[-10:]
    yield 'prefixed', b'PK\x03\x04' + good
    yield 'legacy', b'\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.'
    yield 'plain-pickle', b'\x80\x04\x95\x0b\0\0\0\0\0\0\0}\x94\x8c\x01w\x94K\x01s.'
    yield 'html', b'<!DOCTYPE html><html>not found</html>'
    yield 'lfs', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'
    # Both data members at one place.
    twice = bytearray(archive(base[:2] + [('x/data/1', bytes(16))]))
    at = twice.rindex(b'x/data/1') - 4
    twice[at:at + 4] = struct.pack('<I', good.index(b'PK\x03\x04', 4))
    yield 'overlap', bytes(twice)


def tensors_file(header, data=b'', length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(raw) if length is None else length) + raw + data


def entry(shape, begin, end, dtype='F32'):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


SAFETENSORS = {
    'ok-one': tensors_file({'w': entry([2, 2], 0, 16)}, bytes(16)), 'ok-none': tensors_file({}), 'ok-empty': tensors_file({'w': entry([0], 0, 0)}),
    'hole': tensors_file({'w': entry([1], 4, 8)}, bytes(8)), 'overlap': tensors_file({'a': entry([2], 0, 8), 'b': entry([1], 4, 8)}, bytes(8)),
    'short': tensors_file({'w': entry([4], 0, 16)}, bytes(8)), 'long': tensors_file({'w': entry([1], 0, 4)}, bytes(8)), 'absurd': tensors_file({'w': entry([1 << 40, 1 << 40], 0, 4)}, bytes(4)),
    'huge-header': tensors_file(b'{}', length=(1 << 64) - 1), 'header-beyond': tensors_file(b'{}', length=1 << 20), 'twice': tensors_file(b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    'deep': tensors_file(b'{"w":' + b'[' * 5000), 'dtype': tensors_file({'w': entry([1], 0, 4, 'F99')}, bytes(4)), 'backwards': tensors_file({'w': entry([1], 4, 0)}, bytes(4)), 'no-text': tensors_file(b'\xff\xfe\xfd'),
}

if __name__ == '__main__':
    shutil.rmtree(OUT, ignore_errors=True)
    for folder in ('torch', 'safetensors'):
        os.makedirs(os.path.join(OUT, folder))
    files = {f'torch/{k}.pkl': v for k, v in PICKLES.items()} | {f'torch/{k}.bin': v for k, v in archives()} | {f'safetensors/{k}.safetensors': v for k, v in SAFETENSORS.items()}
    for name, data in files.items():
        with open(os.path.join(OUT, name), 'wb') as f:
            f.write(data)
