#!/usr/bin/env python3
"""Ask one checkpoint the same documents through lm-evaluation-harness and through `terrarium eval`, and compare answer by answer.

  pip install lm_eval==0.4.13 transformers torch
  python lm_eval_compare.py --model DIR --terrarium target/release/terrarium --eval DIR --work DIR [--set NAME ...]

DIR of --eval holds the collections that `terrarium eval` reads as they are (mosaic/*.jsonl, piqa/, hellaswag/, mmlu/, truthfulqa/). They
are rewritten once, in the fields of the data sets on the hub, below --work; both sides read these files. The harness is used as it
is: its tasks, its HFLM (float32, CPU); only `datasets.load_dataset` is answered from the files, and the script of the metric `squad_v2`,
which `evaluate` would download, from --squad-metrics (`transformers/data/metrics/squad_metrics.py` of transformers 4). Its answers are
kept below --work and not asked again. `--gguf FILE --tokenizer DIR` first makes the checkpoint --model of a llama.cpp file, in float32.

Of every request the log-likelihood and whether greedy decoding gives it are compared, of generated answers the text, of every document the
metrics, and of every task the results with their names and errors. Requests that differ by more than 1e-3 are asked again with the harness's
softmax in float64. Exit code 1 when a choice or metric differs, or still a log-likelihood by more than that.
"""
import argparse, bz2, csv, json, os, pathlib, re, shutil, subprocess, sys, time

LETTERS = 'ABCDEFGH'
MMLU = ['abstract_algebra', 'anatomy', 'astronomy', 'global_facts', 'high_school_psychology', 'marketing', 'moral_scenarios', 'public_relations']
# Name of a set: tasks, examples per prompt, documents per task, longest prompt and answer if not the model's.
SETS = {
    'standard': (['lambada_openai', 'hellaswag', 'arc_easy', 'piqa', 'winogrande'], 0, 200, None),
    'more': (['arc_challenge', 'openbookqa', 'boolq'], 0, 200, None),
    'mmlu': (['mmlu_' + subject for subject in MMLU], 5, 25, None),
    'shots': (['lambada_openai', 'hellaswag', 'arc_easy', 'piqa', 'winogrande', 'openbookqa', 'boolq', 'truthfulqa_mc1'], 2, 10, None),
    'truthfulqa': (['truthfulqa_mc1', 'truthfulqa_mc2'], 0, 10, None),
    # Prompts that are cut off at the start.
    'cut': (['lambada_openai', 'mmlu_anatomy', 'boolq'], 3, 20, 64),
    'small': (['race', 'pubmedqa', 'nq_open', 'triviaqa', 'squadv2'], 0, 100, None),
    # Not squadv2: the harness's own class for it fails where examples are asked for.
    'small-shots': (['race', 'pubmedqa', 'nq_open', 'triviaqa'], 2, 100, None),
}
TOLERANCE = 1e-3  # of log-likelihoods
EVALUATED, EXAMPLES = 300, 300  # documents kept of each collection: the first for the questions, the next as examples


# ---------------------------------------------------------------------------------------------------------- documents

def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def labelled(choices, gold, letters=LETTERS):
    return {'choices': {'text': choices, 'label': list(letters[:len(choices)])}, 'answerKey': letters[gold]}


def lambada(root):
    return [{'text': f"{d['context']} {d['continuation'].strip()}"} for d in lines(root / 'mosaic/lambada_openai.jsonl')]


def hellaswag(root):
    found = sorted((root / 'hellaswag').glob('hellaswag_val_full.txt*'))[0]
    rows = (bz2.decompress(found.read_bytes()).decode() if found.suffix == '.bz2' else found.read_text()).splitlines()
    docs = []
    for at in range(0, len(rows) - 5, 6):
        activity, context = rows[at].split(': ', 1)
        docs.append({'activity_label': activity, 'ctx_a': context, 'ctx_b': '', 'endings': rows[at + 2:at + 6], 'label': rows[at + 1].strip()})
    return docs


def piqa(root):
    labels = (root / 'piqa/valid-labels.lst').read_text().split()
    return [{k: d[k] for k in ('goal', 'sol1', 'sol2')} | {'label': int(label)} for d, label in zip(lines(root / 'piqa/valid.jsonl'), labels)]


def arc(name):
    def read(root):
        # Some questions of ARC name their choices 1 to 4.
        return [{'question': d['query'].removeprefix('Question: ')} | labelled(d['choices'], d['gold'], LETTERS if i % 5 else '12345678')
                for i, d in enumerate(lines(root / f'mosaic/{name}.jsonl'))]
    return read


def winogrande(root):
    docs = []
    for d in lines(root / 'mosaic/winogrande.jsonl'):
        a, b = (text.split(' ') for text in d['context_options'])
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if same is None:
            continue
        docs.append({'sentence': ' '.join(a[:same] + ['_', d['continuation'].strip()]), 'option1': ' '.join(a[same:]),
                     'option2': ' '.join(b[same:]), 'answer': str(d['gold'] + 1)})
    return docs


def openbookqa(root):
    return [{'question_stem': d['query']} | labelled(d['choices'], d['gold']) for d in lines(root / 'mosaic/openbook_qa.jsonl')]


def boolq(root):
    docs = []
    for d in lines(root / 'mosaic/boolq.jsonl'):
        passage, question = re.fullmatch(r'Passage: (.*)\nQuestion: (.*?)\??\n?(?:Answer:)?\s*', d['query'], re.S).groups()
        docs.append({'question': question, 'passage': passage, 'label': int(d['choices'][d['gold']].strip() == 'yes')})
    return docs


def truthfulqa(root):
    docs = []
    for row in csv.DictReader((root / 'truthfulqa/TruthfulQA.csv').open()):
        listed = {k: [text.strip() for text in row[k].split(';') if text.strip()] for k in ('Correct Answers', 'Incorrect Answers')}
        right, wrong, best = listed['Correct Answers'], listed['Incorrect Answers'], row['Best Answer'].strip()
        docs.append({'question': row['Question'], 'mc1_targets': {'choices': [best] + wrong, 'labels': [1] + [0] * len(wrong)},
                     'mc2_targets': {'choices': right + wrong, 'labels': [1] * len(right) + [0] * len(wrong)}})
    return docs


READERS = {'lambada_openai': lambada, 'hellaswag': hellaswag, 'piqa': piqa, 'arc_easy': arc('arc_easy'), 'arc_challenge': arc('arc_challenge'),
           'winogrande': winogrande, 'openbookqa': openbookqa, 'boolq': boolq, 'truthfulqa': truthfulqa}
# No examples of these: the harness draws them from the documents asked about.
UNSPLIT = {'lambada_openai', 'truthfulqa'}
SMALL = pathlib.Path(__file__).resolve().parent.parent / 'fixtures/eval'


def convert(root, data):
    data.mkdir(parents=True, exist_ok=True)

    def write(path, docs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(json.dumps(doc, ensure_ascii=False) + '\n' for doc in docs))

    for name, read in READERS.items():
        docs = read(root)
        write(data / f'{name}.jsonl', docs[:EVALUATED])
        if name not in UNSPLIT:
            write(data / f'{name}.train.jsonl', docs[EVALUATED:EVALUATED + EXAMPLES])
    for subject in MMLU:
        for split in ('test', 'dev'):
            to = data / f'mmlu/{split}/{subject}_{split}.csv'
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text((root / f'mmlu/{split}/{subject}_{split}.csv').read_text())


# ------------------------------------------------------------------------------------------------------- the harness

FILES = {'EleutherAI/lambada_openai': 'lambada_openai', 'Rowan/hellaswag': 'hellaswag', 'baber/piqa': 'piqa', 'allenai/winogrande': 'winogrande',
         'allenai/openbookqa': 'openbookqa', 'aps/super_glue': 'boolq', 'truthfulqa/truthful_qa': 'truthfulqa', 'EleutherAI/race': 'race',
         'bigbio/pubmed_qa': 'pubmedqa', 'google-research-datasets/nq_open': 'nq_open', 'mandarjoshi/trivia_qa': 'triviaqa',
         'lighteval/squad_v2': 'squadv2'}


def dataset_from_files(data):
    import datasets

    def rows(path, *_, **__):
        return datasets.Dataset.from_list(path)

    def load_dataset(path=None, name=None, **_):
        if path == 'cais/mmlu':
            splits = {}
            for split in ('test', 'dev'):
                table = csv.DictReader((data / f'mmlu/{split}/{name}_{split}.csv').open(newline=''))
                splits[split] = rows([{'question': r['question'], 'choices': [r[f'choice{i}'] for i in range(4)], 'answer': int(r['answer'])}
                                      for r in table])
            return datasets.DatasetDict(splits)
        task = {'ARC-Easy': 'arc_easy', 'ARC-Challenge': 'arc_challenge'}[name] if path == 'allenai/ai2_arc' else FILES[path]
        docs, shots = data / f'{task}.jsonl', data / f'{task}.train.jsonl'
        asked = rows(lines(docs))
        train = rows(lines(shots)) if shots.exists() else asked
        return datasets.DatasetDict({'train': train, 'validation': asked, 'test': asked})

    return load_dataset


def squad_v2(path):
    """`evaluate`'s `squad_v2`, computed by the script it wraps."""
    import importlib.util, types
    spec = importlib.util.spec_from_file_location('squad_metrics', path)
    # It imports the rest of transformers 4 for what is not used here.
    text = re.sub(r'^from \.\.\..*$|^logger = .*$', '', path.read_text(), flags=re.M)
    module = types.ModuleType(spec.name)
    exec(compile(text, str(path), 'exec'), module.__dict__)
    m = module

    def compute(predictions, references):
        golds = {r['id']: [a for a in r['answers']['text'] if m.normalize_answer(a)] or [''] for r in references}
        answerable = {r['id']: bool(r['answers']['text']) for r in references}
        texts = {p['id']: p['prediction_text'] for p in predictions}
        no_answer = {p['id']: p['no_answer_probability'] for p in predictions}
        exact = {i: max(m.compute_exact(g, texts[i]) for g in golds[i]) for i in texts}
        f1 = {i: max(m.compute_f1(g, texts[i]) for g in golds[i]) for i in texts}
        exact_t = m.apply_no_ans_threshold(exact, no_answer, answerable, 1.0)
        f1_t = m.apply_no_ans_threshold(f1, no_answer, answerable, 1.0)
        out = dict(m.make_eval_dict(exact_t, f1_t))
        for prefix, wanted in (('HasAns', True), ('NoAns', False)):
            ids = [i for i in texts if answerable[i] == wanted]
            if ids:
                part = m.make_eval_dict(exact_t, f1_t, qid_list=ids)
                out.update({f'{prefix}_{k}': v for k, v in part.items()})
        m.find_all_best_thresh(out, texts, exact, f1, no_answer, answerable)
        return out

    return types.SimpleNamespace(compute=compute)


def ask_harness(a, tasks, shots, limit, most):
    import torch
    torch.set_num_threads(a.threads)
    import lm_eval, lm_eval.api.task, evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    lm_eval.api.task.datasets.load_dataset = dataset_from_files(a.work / 'data')
    if a.squad_metrics:
        evaluate.load = lambda *_, **__: squad_v2(a.squad_metrics)
    model = HFLM(pretrained=str(a.model), device='cpu', dtype='float32', batch_size=a.batch, max_length=most)
    began = time.time()
    # What was answered when it is stopped need not be asked again.
    results = lm_eval.simple_evaluate(model=model, tasks=tasks, num_fewshot=shots or None, limit=limit, task_manager=TaskManager(),
                                      use_cache=str(a.work / 'harness/answered'))
    results['seconds'] = time.time() - began
    return json.loads(json.dumps(results, default=str))


def harness(a, name):
    tasks, shots, limit, most = SETS[name]
    tasks, limit = [t for t in tasks if not a.tasks or t in a.tasks], a.limit or limit
    answers = {}
    for task in tasks:
        kept = a.work / f'harness/{task}-{shots}-{limit}-{most}.json'
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(ask_harness(a, [task], shots, limit, most)))
        answers[task] = json.loads(kept.read_text())
    return tasks, shots, limit, most, answers


# ----------------------------------------------------------------------------------------------------------- compare

def ask_terrarium(a, name, tasks, shots, limit, most):
    out = a.work / f'terrarium/{name}'
    if out.exists() and not a.resume:
        shutil.rmtree(out)
    command = [a.terrarium, 'eval', '--model', str(a.model), '--device', 'cpu', '--tasks', ','.join(tasks), '--data', str(a.work / 'data'),
               '--num-fewshot', str(shots), '--limit', str(limit), '--out', str(out), '--json']
    if out.exists():
        command.append('--resume')
    if most:
        command += ['--max-length', str(most)]
    began = time.time()
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {'RAYON_NUM_THREADS': str(a.threads)})
    if run.returncode:
        raise SystemExit(f'terrarium eval ended with {run.returncode}')
    return json.loads(run.stdout), {task: lines(out / f'samples_{task}.jsonl') for task in tasks}, time.time() - began


def ask_again(a, most, arguments):
    """Log-likelihoods by the harness with its option `softmax_dtype=float64`: PyTorch's float32 softmax over tens of thousands of tokens is off by
    nearly 1e-5 in one direction, which adds up over a long continuation."""
    import torch
    torch.set_num_threads(a.threads)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model = HFLM(pretrained=str(a.model), device='cpu', dtype='float32', batch_size=a.batch, max_length=most, softmax_dtype='float64')
    return [score for score, _ in model.loglikelihood([Instance('loglikelihood', {}, tuple(x), 0) for x in arguments])]


def close(theirs, ours, tolerance):
    if isinstance(theirs, (int, float)) and isinstance(ours, (int, float)):
        return abs(theirs - ours) <= tolerance * max(1.0, abs(theirs))
    return theirs == ours


def compare(a, most, task, theirs, ours, samples):
    """Whether something differs; prints the row of the table."""
    wrong, far, requests, apart = [], 0.0, 0, []
    asked = theirs['samples'][task]
    if len(asked) != len(samples):
        wrong.append(f'{len(asked)} and {len(samples)} documents')
    for their, our in zip(asked, samples):
        expected = [resp[0] for resp in their['resps']]
        if len(expected) != len(our['resps']):
            wrong.append(f"document {our['doc_id']}: {len(expected)} and {len(our['resps'])} requests")
            continue
        for i, (x, y) in enumerate(zip(expected, our['resps'])):
            requests += 1
            if isinstance(x, str):
                if x != y:
                    wrong.append(f"document {our['doc_id']}, request {i}: {x!r} and {y!r}")
                continue
            off = abs(x[0] - y[0])
            far = max(far, off)
            if off > TOLERANCE:
                apart.append((f"document {our['doc_id']}, request {i}: {x} and {y}", their['arguments'][i], y[0]))
            if bool(x[1]) != y[1]:
                wrong.append(f"document {our['doc_id']}, request {i}: {x} and {y}")
        for metric in their['metrics']:
            if metric in our and metric not in ('perplexity',):
                if not close(their[metric], our[metric], 1e-4):
                    wrong.append(f"document {our['doc_id']}: {metric} {their[metric]} and {our[metric]}")
            elif isinstance(their[metric], (int, float)) and metric != 'perplexity':
                wrong.append(f"document {our['doc_id']}: no {metric}")
    entry, mine = theirs['results'][task], ours['results'][task]
    if set(entry) != set(mine):
        wrong.append(f'results: only theirs {sorted(set(entry) - set(mine))}, only ours {sorted(set(mine) - set(entry))}')
    for key in set(entry) & set(mine):
        if not close(entry[key], mine[key], 1e-3 if 'perplexity' in key else 1e-4):
            wrong.append(f'results: {key} {entry[key]} and {mine[key]}')
    for key in ('versions', 'n-shot', 'higher_is_better', 'n-samples'):
        if theirs[key][task] != ours[key].get(task):
            wrong.append(f'{key}: {theirs[key][task]} and {ours[key].get(task)}')
    if apart:
        again = ask_again(a, most, [x for _, x, _ in apart])
        wrong += [f'{text}, {score} again' for (text, _, y), score in zip(apart, again) if abs(score - y) > TOLERANCE]
    named = [k for k in entry if ',' in k and '_stderr' not in k]
    values = ', '.join(f"{k.split(',')[0]} {mine.get(k, float('nan')):.4f}" if isinstance(entry[k], (int, float)) else k for k in named)
    same = f'{len(wrong)} differ' if wrong else f'all, {len(apart)} asked again' if apart else 'all'
    print(f'| `{task}` | {ours["n-shot"].get(task)} | {len(samples)} | {requests} | {same} | {far:.1e} | {values} |', flush=True)
    for text in wrong[:a.verbose]:
        print('  ', task, text)
    return bool(wrong)


def make_model(a):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(str(a.gguf.parent), gguf_file=a.gguf.name, dtype=torch.float32)
    config = model.config.to_dict()
    config.pop('quantization_config', None)
    a.model.mkdir(parents=True)
    tied = config.get('tie_word_embeddings')
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == 'lm_head.weight')},
              str(a.model / 'model.safetensors'), metadata={'format': 'pt'})
    (a.model / 'config.json').write_text(json.dumps(config | {'architectures': [type(model).__name__], 'dtype': 'float32'}, indent=1))
    for path in a.tokenizer.iterdir():
        (a.model / path.name).write_bytes(path.read_bytes())
    # transformers 5 puts the pre-tokenizer of the named class, GPT2Tokenizer's for SmolLM2, in the place of that of tokenizer.json: blanks
    # before digits become other tokens. transformers 4 and other readers of the file take it as it is.
    config = json.loads((a.model / 'tokenizer_config.json').read_text())
    (a.model / 'tokenizer_config.json').write_text(json.dumps(config | {'tokenizer_class': 'PreTrainedTokenizerFast'}, indent=1))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--model', required=True, type=pathlib.Path)
    ap.add_argument('--gguf', type=pathlib.Path)
    ap.add_argument('--tokenizer', type=pathlib.Path)
    ap.add_argument('--terrarium', help='the program; without it only the harness is asked')
    ap.add_argument('--eval', required=True, type=pathlib.Path)
    ap.add_argument('--work', required=True, type=pathlib.Path)
    ap.add_argument('--set', nargs='+', choices=SETS, default=list(SETS))
    ap.add_argument('--tasks', nargs='+', help='only these of the sets')
    ap.add_argument('--limit', type=int, help='documents per task, instead of those of the sets')
    ap.add_argument('--batch', type=int, default=8)
    ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--squad-metrics', type=pathlib.Path)
    ap.add_argument('--resume', action='store_true', help='go on with what terrarium was asked before')
    ap.add_argument('--verbose', type=int, default=5, help='differences shown per task')
    a = ap.parse_args()
    if a.gguf and not a.model.exists():
        make_model(a)
    if not (a.work / 'data').exists():
        convert(a.eval, a.work / 'data')
    for path in SMALL.glob('*.jsonl'):
        (a.work / 'data' / path.name).write_text(path.read_text())
    failed = False
    for name in a.set:
        tasks, shots, limit, most, theirs = harness(a, name)
        if not a.terrarium or not tasks:
            continue
        ours, samples, seconds = ask_terrarium(a, name, tasks, shots, limit, most)
        print(f'\n{name}: {sum(t["seconds"] for t in theirs.values()):.0f} s and {seconds:.0f} s\n')
        print('| task | examples | documents | requests | the same | largest difference of log-likelihoods | results |')
        print('|---|---|---|---|---|---|---|')
        for task in tasks:
            failed |= compare(a, most, task, theirs[task], ours, samples[task])
    sys.exit(failed)


if __name__ == '__main__':
    main()
