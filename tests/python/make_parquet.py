#!/usr/bin/env python3
"""Write the Parquet fixtures: the documents of `fixtures/datasets/lines`, in the layout, columns and types that the data sets have on the hub.

  pip install pyarrow==26.0.1
  python tests/python/make_parquet.py            # rewrites fixtures/datasets/hub and fixtures/datasets/odd

`lines/TASK.jsonl` are the documents asked about, `lines/TASK.train.jsonl` the examples; both are invented. What a task does not read is
left out of the lines and filled in here, as the columns of the data set have it. Files differ on purpose: codecs, versions of pages,
encodings, row groups, shards. `odd/` holds what the data sets have not: every type, nulls at every depth, codecs that are not read.
"""
import datetime, decimal, json, pathlib

import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).resolve().parent.parent / 'fixtures/datasets'
S, I32, I64 = pa.string(), pa.int32(), pa.int64()
TEXTS = pa.list_(S)
CHOICES = pa.struct([('text', TEXTS), ('label', TEXTS)])
TARGETS = pa.struct([('choices', TEXTS), ('labels', pa.list_(I32))])
PAGES = pa.struct([(name, TEXTS) for name in ('doc_source', 'filename', 'title', 'wiki_context')])
SEARCH = pa.struct([('description', TEXTS), ('filename', TEXTS), ('rank', pa.list_(I32)), ('title', TEXTS), ('url', TEXTS), ('search_context', TEXTS)])
TRIVIA = pa.struct([('aliases', TEXTS), ('normalized_aliases', TEXTS), ('matched_wiki_entity_name', S), ('normalized_matched_wiki_entity_name', S),
                    ('normalized_value', S), ('type', S), ('value', S)])
MMLU = [('question', S), ('subject', S), ('choices', TEXTS), ('answer', I64)]
ARC = [('id', S), ('question', S), ('choices', CHOICES), ('answerKey', S)]

# Columns, and where the hub keeps the documents and the examples: data set, configuration, split.
SETS = {
    'lambada_openai': ([('text', S)], 'EleutherAI/lambada_openai', 'default', 'test', None),
    'hellaswag': ([('ind', I32), ('activity_label', S), ('ctx_a', S), ('ctx_b', S), ('ctx', S), ('endings', TEXTS), ('source_id', S), ('split', S),
                   ('split_type', S), ('label', S)], 'Rowan/hellaswag', 'default', 'validation', 'train'),
    'piqa': ([('goal', S), ('sol1', S), ('sol2', S), ('label', I64)], 'baber/piqa', 'default', 'validation', 'train'),
    'arc_easy': (ARC, 'allenai/ai2_arc', 'ARC-Easy', 'test', 'train'),
    'arc_challenge': (ARC, 'allenai/ai2_arc', 'ARC-Challenge', 'test', 'train'),
    'winogrande': ([('sentence', S), ('option1', S), ('option2', S), ('answer', S)], 'allenai/winogrande', 'winogrande_xl', 'validation', 'train'),
    'openbookqa': ([('id', S), ('question_stem', S), ('choices', CHOICES), ('answerKey', S)], 'allenai/openbookqa', 'main', 'test', 'train'),
    'boolq': ([('question', S), ('passage', S), ('idx', I32), ('label', I64)], 'aps/super_glue', 'boolq', 'validation', 'train'),
    'race': ([('article', S), ('problems', S)], 'EleutherAI/race', 'high', 'test', None),
    'pubmedqa': ([('QUESTION', S), ('CONTEXTS', TEXTS), ('LABELS', TEXTS), ('MESHES', TEXTS), ('YEAR', S), ('reasoning_required_pred', S),
                  ('reasoning_free_pred', S), ('final_decision', S), ('LONG_ANSWER', S)], 'bigbio/pubmed_qa', 'pubmed_qa_labeled_fold0_source', 'test', 'train'),
    'truthfulqa': ([('question', S), ('mc1_targets', TARGETS), ('mc2_targets', TARGETS)], 'truthfulqa/truthful_qa', 'multiple_choice', 'validation', None),
    'nq_open': ([('question', S), ('answer', TEXTS)], 'google-research-datasets/nq_open', 'nq_open', 'validation', 'train'),
    'triviaqa': ([('question', S), ('question_id', S), ('question_source', S), ('entity_pages', PAGES), ('search_results', SEARCH), ('answer', TRIVIA)],
                 'mandarjoshi/trivia_qa', 'rc.nocontext', 'validation', 'train'),
    'squadv2': ([('id', S), ('title', S), ('context', S), ('question', S), ('answers', pa.struct([('text', TEXTS), ('answer_start', pa.list_(I32))]))],
                'lighteval/squad_v2', 'squad_v2', 'validation', 'train'),
}
# How files are written, in turn: what the hub itself writes, other writers' habits, and encodings that pandas and polars choose.
WAYS = [
    {'compression': 'snappy'},
    {'compression': 'zstd', 'row_group_size': 3},
    {'compression': 'snappy', 'data_page_version': '2.0', 'row_group_size': 2},
    {'compression': 'gzip', 'use_dictionary': False},
    {'compression': 'none', 'use_dictionary': False, 'data_page_size': 64, 'write_batch_size': 1},
]


def lines(name):
    path = HERE / f'lines/{name}.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(kind):
    """What stands where the lines have nothing: empty lists, as where `datasets` had none to put there, and null."""
    if pa.types.is_struct(kind):
        return {field.name: missing(field.type) for field in kind}
    return [] if pa.types.is_list(kind) else None


def table(columns, docs):
    full = [{name: complete(doc.get(name), kind) for name, kind in columns} for doc in docs]
    return pa.Table.from_pylist(full, schema=pa.schema(columns))


def complete(value, kind):
    if value is None:
        return missing(kind)
    if pa.types.is_struct(kind):
        return {field.name: complete(value.get(field.name), field.type) for field in kind}
    return value


def write(path, columns, docs, way):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(columns, docs), path, **way)


def data_sets():
    files = 0
    for task, (columns, repo, config, docs, shots) in SETS.items():
        for name, split in ((task, docs), (f'{task}.train', shots)):
            if split is None:
                continue
            found, folder = lines(name), HERE / 'hub' / repo / config / split
            # Shards of unequal sizes, the last without a document.
            parts = [found[:1], found[1:], []] if task == 'arc_easy' and split == 'test' else [found]
            for i, part in enumerate(parts):
                write(folder / f'{i:04}.parquet', columns, part, WAYS[files % len(WAYS)])
                files += 1
    for split, name in (('test', 'mmlu'), ('dev', 'mmlu.dev')):
        found = lines(name)
        for subject in {doc['subject']: None for doc in found}:
            own = [doc for doc in found if doc['subject'] == subject]
            write(HERE / f'hub/cais/mmlu/{subject}/{split}/0000.parquet', MMLU, own, WAYS[files % len(WAYS)])
            files += 1


def odd():
    """Every type, with nulls, beside `odd/types.jsonl`: what is to come of it."""
    (HERE / 'odd').mkdir(parents=True, exist_ok=True)
    day, time = datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12, 30, 1, 5000)
    nested = pa.list_(pa.list_(pa.struct([('a', I32), ('b', TEXTS)])))
    columns = [('text', S), ('large', pa.large_string()), ('coded', pa.dictionary(pa.int8(), S)), ('i8', pa.int8()), ('i64', I64), ('u8', pa.uint8()), ('u64', pa.uint64()),
               ('f16', pa.float16()), ('f32', pa.float32()), ('f64', pa.float64()), ('yes', pa.bool_()), ('bytes', pa.binary()), ('day', pa.date32()),
               ('ms', pa.timestamp('ms')), ('money', pa.decimal128(9, 2)), ('deep', nested), ('map', pa.map_(S, I64)),
               ('large_list', pa.large_list(pa.struct([('x', S)]))), ('empty', pa.null())]
    rows = [
        dict(text='Ünï "cödé" \U0001f40d\n\t\u2028', large='', coded='x', i8=-128, i64=-2**63, u8=255, u64=2**64 - 1, f16=0.5, f32=0.1, f64=1e300, yes=True,
             bytes=b'\x00\xff', day=day, ms=time, money=decimal.Decimal('-12.30'), deep=[[{'a': 1, 'b': ['p', None]}, None], [], None], map=[('k', 1), ('l', None)],
             large_list=[{'x': 'y'}, {'x': None}, None], empty=None),
        {name: None for name, _ in columns},
        dict(text='\u0000 b', large='A' * 200, coded='x', i8=127, i64=2**63 - 1, u8=0, u64=0, f16=-2.0, f32=float('nan'), f64=-0.0, yes=False, bytes=b'', day=None, ms=None,
             money=decimal.Decimal('0.05'), deep=[], map=[], large_list=[], empty=None),
        dict(text='x', large='B', coded='y', i8=0, i64=0, u8=1, u64=1, f16=None, f32=float('inf'), f64=0.1, yes=None, bytes=None, day=None, ms=None, money=None,
             deep=[[{'a': None, 'b': []}, {'a': 2, 'b': None}]], map=None, large_list=[], empty=None),
    ]
    types = pa.Table.from_pylist(rows, schema=pa.schema(columns))
    pq.write_table(types, HERE / 'odd/types.parquet', compression='zstd', row_group_size=2)
    coded = {'i64': 'DELTA_BINARY_PACKED', 'text': 'DELTA_BYTE_ARRAY', 'large': 'DELTA_LENGTH_BYTE_ARRAY', 'f64': 'BYTE_STREAM_SPLIT', 'f16': 'BYTE_STREAM_SPLIT'}
    pq.write_table(types, HERE / 'odd/encodings.parquet', compression='snappy', use_dictionary=False, column_encoding=coded, data_page_version='2.0', version='2.6')
    plain = lambda value: None if isinstance(value, float) and value in (float('inf'),) or value != value else value
    (HERE / 'odd/types.jsonl').write_text(''.join(json.dumps({
        # Numbers that JSON has not are null, as `to_json` writes them; what no task reads is left out.
        name: (dict(row[name]) if name == 'map' and row[name] is not None else plain(row[name]))
        for name, _ in columns if name not in ('bytes', 'day', 'ms', 'money', 'f32')}, ensure_ascii=False) + '\n' for row in rows))
    answered = lines('arc_easy')
    for codec in ('brotli', 'lz4'):
        pq.write_table(table(ARC, answered[:1]), HERE / f'odd/{codec}.parquet', compression=codec)
    pq.write_table(pa.table({'question': ['Why?'], 'duration': pa.array([1], pa.duration('s')), 'time': pa.array([1], pa.time64('ns'))}), HERE / 'odd/nanoseconds.parquet')


data_sets()
odd()
