import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_chat import tokenizer_with, write_sentencepiece

from minillama.data.batch import collate
from minillama.data.cache import open_packed, prepare
from minillama.data.datasets import DataConfig, Source, check_vocabulary, load_collator
from minillama.data.rows import read_rows
from minillama.errors import UserError
from minillama.model.config import LlamaConfig
from minillama.tokenizer.tokenizer import load_tokenizer
from minillama.training.run import described

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


class Bytes:
    """One id a byte; 256 and 257 are BOS and EOS. A chat turn is "role:content" and EOS."""

    bos_id, eos_id, vocab_size, fingerprint = 256, 257, 258, "bytes"

    def encode(self, text, *, bos=False, eos=False):
        return [256] * bos + list(text.encode()) + [257] * eos

    def encode_chat(self, messages):
        ids, mask = [256], [False]
        for message in messages:
            head, said = self.encode(message["role"] + ":"), self.encode(message["content"], eos=True)
            ids += head + said
            mask += [False] * len(head) + [message["role"] == "assistant"] * len(said)
        return ids, mask


class NoBos(Bytes):
    bos_id, fingerprint = None, "bytes without BOS"

    def encode(self, text, *, bos=False, eos=False):
        assert not bos
        return super().encode(text, eos=eos)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(path, dataset, tokenizer=None, **flags):
    """All documents of a file, through the cache."""
    config = DataConfig(dataset, path, **flags)
    return open_packed(prepare(config, tokenizer or Bytes(), 0, validation=False)[0]).documents


def pieces(document):
    """The untrained start and the trained rest of a document, as text; also that it is cut once, and BOS and EOS."""
    tokens, trained = document
    cut = int(np.argmax(trained))
    assert tokens[0] == 256 and tokens[-1] == 257
    assert not trained[:cut].any() and trained[cut:].all()
    return bytes(tokens[1:cut].tolist()).decode(), bytes(tokens[cut:-1].tolist()).decode()


def datasets(dataset, path=None, val_path=None, validation=True, **flags):
    """The documents to train on and to evaluate on, in the order of the file."""
    config = DataConfig(dataset, path, val_path, batching="padding", **flags)
    packs = [folder and open_packed(folder) for folder in prepare(config, Bytes(), 0, validation=validation)]
    return [p and [p.documents[i] for i in np.searchsorted(p.documents.offsets, p.starts, "right") - 1] for p in packs]


# --- formats


def test_samsum(tmp_path):
    row = {"id": 7, "dialogue": "A: hi\r\nB: yo 🦙", "summary": "They greet."}
    (document,) = load(write(tmp_path / "a.json", json.dumps([row])), "samsum")
    assert pieces(document) == (
        "Summarize this dialog:\nA: hi\r\nB: yo 🦙\n---\nSummary:\n",
        "They greet.",
    )


def test_ids_and_mask_value_for_value(tmp_path):
    rows = [{"input": "a", "target": "b"}, {"input": "", "target": "cd"}]
    documents = load(write(tmp_path / "a.json", json.dumps(rows)), "grammar")
    head, tail = list(b"Correct this to standard English: "), list(b"\n---\nCorrected: ")
    first = [256, *head, 97, *tail, 98, 257]
    second = [256, *head, *tail, 99, 100, 257]
    assert documents.tokens.tolist() == first + second
    assert documents.trained.tolist() == [False] * 52 + [True] * 2 + [False] * 51 + [True] * 3
    assert documents.offsets.tolist() == [0, 54, 108]
    assert documents.lengths.tolist() == [54, 54]
    kinds = (documents.tokens.dtype, documents.trained.dtype, documents.offsets.dtype, documents.lengths.dtype)
    assert kinds == (np.int32, np.bool_, np.int64, np.int64)
    assert len(documents) == 2
    assert documents[1][0].tolist() == documents[-1][0].tolist() == second
    with pytest.raises(IndexError):
        documents[2]


def test_alpaca_with_and_without_input(tmp_path):
    rows = [
        {"instruction": "Add {x}.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "Hi"},
        {"instruction": "Say hi.", "input": None, "output": "Hi"},
        {"instruction": "Say hi.", "output": "Hi"},
        {"instruction": "Say nothing.", "output": ""},
    ]
    documents = load(write(tmp_path / "a.json", json.dumps(rows)), "alpaca")
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:"
    )
    assert pieces(documents[0]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:",
        "3",
    )
    assert pieces(documents[1]) == pieces(documents[2]) == pieces(documents[3]) == (without, "Hi")
    assert documents[4][1].tolist()[-2:] == [False, True]  # an empty output still trains its EOS


def test_chat(tmp_path):
    rows = [[("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "bc")]]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in rows]
    (document,) = load(write(tmp_path / "a.jsonl", "\n".join(lines)), "chat")
    said = [*b"user:q", 257, *b"assistant:a", 257, *b"user:r", 257, *b"assistant:bc", 257]
    assert document[0].tolist() == [256, *said]
    assert np.flatnonzero(document[1]).tolist() == [18, 19, 37, 38, 39]


def test_chat_with_tools(tmp_path):
    template = "im_start{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}:"
    template += "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>{% endfor %}"
    template += "{{ '<|im_start|>assistant:' if add_generation_prompt }}"
    tokenizer = tokenizer_with(tmp_path, template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    answer = {"role": "assistant", "content": "3", "tool_calls": None}
    messages = [
        {"role": "user", "content": "1 + 2", "tool_calls": None},
        call,
        {"role": "tool", "content": "3"},
        answer,
    ]
    schemas = [{"name": "add"}]
    rows = [{"messages": messages, "tools": tools} for tools in (schemas, json.dumps(schemas), None)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    documents = load(path, "chat", tokenizer)
    read = [tokenizer.decode(tokens.tolist()) for tokens, _ in documents]
    text = (
        '<|im_start|>user:1 + 2<|im_end|><|im_start|>assistant:[{"name": "add"}]<|im_end|><|im_start|>tool:3<|im_end|>'
        "<|im_start|>assistant:3<|im_end|>"
    )
    assert read == ['im_start[{"name": "add"}]' + text] * 2 + ["im_start" + text]
    for tokens, trained in documents:
        assert tokenizer.decode(tokens[trained].tolist()) == '[{"name": "add"}]<|im_end|>3<|im_end|>'


SAID = [("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "t"), ("assistant", "b")]
CHATS = {
    "messages": [{"role": role, "content": text} for role, text in SAID],
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text, "weight": 0}
        for role, text in SAID
    ],
}


def test_sharegpt_is_openai_in_other_words(tmp_path):
    forms = [{name: CHATS[name]} for name in CHATS]
    forms += [{name: CHATS[name][1:], "system": "s"} for name in CHATS]
    forms += [{"messages": CHATS["messages"], "system": "never read: there is one", "conversations": []}]
    documents = load(write(tmp_path / "a.json", json.dumps(forms)), "chat")
    said = [*b"system:s", 257, *b"user:q", 257, *b"assistant:a", 257, *b"tool:t", 257, *b"assistant:b", 257]
    for tokens, trained in documents:
        assert tokens.tolist() == [256, *said]
        assert tokens[trained].tolist() == [*b"a", 257, *b"b", 257]
    assert len(documents) == 5


def test_a_prompt_with_a_response_is_a_chat(tmp_path):
    path = write(tmp_path / "a.csv", "question,answer\nq,a\n")
    (document,) = load(path, "chat", columns=("prompt=question", "response=answer"))
    assert document[0].tolist() == [256, *b"user:q", 257, *b"assistant:a", 257]
    assert document[0][document[1]].tolist() == [*b"a", 257]


def test_text_trains_every_token(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "1.txt", "\ufeffone\r\n🦙")
    write(tmp_path / "b" / "2.TXT", "two\n")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("one\r\n🦙", "two\n"))
    for path in (tmp_path / "b", write(tmp_path / "a.jsonl", rows)):
        documents = load(path, "text")
        assert [d[0].tolist() for d in documents] == [[256, *"one\r\n🦙".encode(), 257], [256, *b"two\n", 257]]
        assert documents.trained.all()
    assert load(tmp_path / "b", "text", NoBos())[1][0].tolist() == [*b"two\n", 257]

    # a long text goes in parts, cut behind line breaks where there are some
    monkeypatch.setattr("minillama.data.encoders.LONGEST_PART", 10)
    asked = []

    class Parts(Bytes):
        fingerprint = "parts"

        def encode(self, text, *, bos=False, eos=False):
            asked.append(text)
            return super().encode(text)

    text = "a line\nanother\n" + "x" * 25 + "\nend"
    (document,) = load(write(tmp_path / "long.txt", text), "text", Parts())
    assert document[0].tolist() == [256, *text.encode(), 257]
    assert asked == ["a line\n", "another\n", "x" * 10, "x" * 10, "xxxxx\nend"]


def test_no_second_bos_or_eos(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    texts = ["a", bos + "a", "a" + eos, bos + "a" + eos, bos + bos + "a", eos]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = load(path, "text", tokenizer)
    read = [tokenizer.decode(tokens.tolist()) for tokens, _ in documents]
    assert read == [bos + "a" + eos] * 4 + [bos + bos + "a" + eos, bos + eos]
    assert documents.had_ends == 5 and documents.trained.all()
    rows = [{"input": "a", "target": target} for target in ("b", "b" + eos, "b" + eos + eos)]
    path = write(tmp_path / "b.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    documents = load(path, "grammar", tokenizer)
    read = [tokenizer.decode(tokens[trained].tolist()) for tokens, trained in documents]
    assert read == ["b" + eos, "b" + eos, "b" + eos + eos] and documents.had_ends == 2
    assert "; 2 had BOS or EOS in their text" in described(
        open_packed(prepare(DataConfig("grammar", path), tokenizer, 0, validation=False)[0]), LlamaConfig(), 1, 1
    )


def test_the_parts_of_a_long_text_have_no_spaces_between_them(tmp_path, monkeypatch):
    write_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    path = write(tmp_path / "a.txt", "Who made\nBerlin?\n Romans\n" * 3)
    (whole,) = load(path, "text", tokenizer)
    monkeypatch.setattr("minillama.data.encoders.LONGEST_PART", 20)
    (parts,) = load(path, "text", tokenizer, cache_dir=tmp_path / "other")
    assert parts[0].tolist() == whole[0].tolist()


def test_columns(tmp_path):
    rows = [{"text": "t", "tldr": "s", "summary": "never read"}, {"text": "t"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:1]))
    (document,) = load(path, "samsum", columns=("dialogue=text", "summary=tldr"))
    assert pieces(document) == ("Summarize this dialog:\nt\n---\nSummary:\n", "s")
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"line 2: field 'tldr', to be summary, is missing, the fields are 'text'"):
        load(path, "samsum", columns=("dialogue=text", "summary=tldr"))
    with pytest.raises(UserError, match="samsum has no field prompt, only dialogue, summary"):
        load(path, "samsum", columns=("prompt=text",))
    for wrong in ("dialogue", "=text", "a=", "a=b=c"):
        with pytest.raises(UserError, match=f"--data.columns {wrong}: give FIELD=COLUMN"):
            DataConfig(columns=(wrong,))


def test_training_on_all_and_skipping_bad_rows(tmp_path):
    rows = ['{"input": "a", "target": "b"}', '{"input": "a"}', "[", '{"input": "\\ud83d", "target": "b"}']
    path = write(tmp_path / "a.jsonl", "\n".join([*rows, '{"input": "c", "target": "d"}']).encode() + b"\n\xff")
    documents = load(path, "grammar", bad_rows="skip", train_on="all")
    assert len(documents) == 2 and documents.refused == 4 and documents.trained.all()
    documents = load(path, "grammar", bad_rows="skip")
    assert [pieces(document)[1] for document in documents] == ["b", "d"]
    path = write(tmp_path / "a.csv", "input,target\na,b\nc,d,e\nf,g\n")
    documents = load(path, "grammar", bad_rows="skip")
    assert [pieces(document)[1] for document in documents] == ["b", "g"] and documents.refused == 1


def test_rows_that_are_alike_are_all_kept(tmp_path):
    rows = [{"id": 7, "input": "a", "target": "b"}] * 3
    assert len(load(write(tmp_path / "a.json", json.dumps(rows)), "grammar")) == 3


OWN = '''
import dataclasses

@dataclasses.dataclass
class Row:  # needs its module
    text: str

def get_custom_dataset(config, tokenizer, split):
    """The signature of llama-recipes"""
    ids = tokenizer.encode(split, bos=True, eos=True)
    yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 3 + ids[3:]}

def rows(config, tokenizer, split):
    return [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": Row(str(config.path)).text}]},
            {"text": "t"}]

def bad(config, tokenizer, split):
    return [{"input_ids": [1, 2], "labels": [-100, 2]}, BAD]

CALLED = []
def get_data_collator(tokenizer):
    CALLED.append(tokenizer)
    import torch
    def collate(rows):
        """Pads on the left, and trains no token 2."""
        width = max(len(row["input_ids"]) for row in rows)
        padded = lambda name, fill: torch.tensor([[fill] * (width - len(r[name])) + r[name] for r in rows])
        labels = padded("labels", -100)
        labels[labels == 2] = -100
        return {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0), "labels": labels}
    return collate
'''


def test_a_function_of_ones_own(tmp_path):
    file = write(tmp_path / "own.py", OWN)
    train, validation = datasets(str(file))
    for (tokens, trained), split in ((train[0], "train"), (validation[0], "validation")):
        assert tokens.tolist() == [256, *split.encode(), 257]
        assert trained.tolist() == [False] * 3 + [True] * (len(tokens) - 3)
    chat, text = load(Path("some/where"), f"{file}:rows")
    assert chat[0].tolist() == [256, *b"user:q", 257, *b"assistant:some/where", 257] and not chat[1].all()
    assert text[0].tolist() == [256, *b"t", 257] and text[1].all()
    for wrong, message in ((f"{file}:none", "has no function none"), (f"{tmp_path}/no.py", "no.py: no such file")):
        with pytest.raises(UserError, match=message):
            load(None, wrong)


BAD_OWN = [
    ("3", "row 2: a row must be an object, found 3"),
    ('{"input_ids": [1, 2]}', "'labels' is missing"),
    ('{"input_ids": [1, 2], "labels": [1]}', "field 'labels' must be a list of integers, of one length"),
    ('{"input_ids": [], "labels": []}', "field 'input_ids' must be a list of integers"),
    ('{"input_ids": [[1]], "labels": [[1]]}', "field 'input_ids' must be a list of integers"),
    ('{"input_ids": [1.5], "labels": [1]}', "field 'input_ids' must be a list of integers"),
    ('{"input_ids": [1, 258], "labels": [1, -100]}', "input_ids must be from 0 to 257"),
    ('{"input_ids": [-1], "labels": [-100]}', "input_ids must be from 0 to 257"),
    ('{"input_ids": [1, 2], "labels": [2, -100]}', "each of the labels -100 or the id itself"),
    ('{"input_ids": [1, 2], "labels": [-100, -100]}', "all labels but the first are -100, so nothing to train on"),
    ('{"input_ids": [1, 2], "labels": [1, -100]}', "all labels but the first are -100, so nothing to train on"),
]


@pytest.mark.parametrize("row, message", BAD_OWN)
def test_bad_rows_of_ones_own(tmp_path, row, message):
    file = write(tmp_path / "own.py", OWN.replace("BAD", row))
    with pytest.raises(UserError, match=f"own.py:bad, row 2: .*{message}".replace(": .*row 2", "")):
        load(None, f"{file}:bad")


def test_a_collator_of_ones_own(tmp_path):
    file = write(tmp_path / "own.py", OWN.replace("BAD", '{"input_ids": [3, 2, 4], "labels": [3, 2, 4]}'))
    config = DataConfig(f"{file}:bad", batching="padding", cache_dir=tmp_path)
    tokenizer = Bytes()
    packed = open_packed(prepare(config, tokenizer, 0, validation=False)[0])
    collator = load_collator(config, tokenizer)
    assert [tokenizer] == sys.modules["minillama_own_own"].CALLED
    batch = collate(replace(packed, collator=collator), [0, 1], 9, "cpu")
    assert batch.tokens.tolist() == [[0, 1, 2], [3, 2, 4]]
    assert batch.labels.tolist() == [[-100, -100, -100], [-100, 4, -100]]
    assert batch.document_ids.tolist() == [[-1, 0, 0], [0, 0, 0]]
    assert batch.positions.tolist() == [[0, 0, 1], [0, 1, 2]]
    assert (batch.count, batch.trained, batch.squares) == (5, 1, 13)
    assert collate(replace(packed, collator=collator), [], 9, "cpu").tokens.tolist() == [[9]]  # never asked for nothing
    with pytest.raises(UserError, match=r"has a get_data_collator, which is for --data\.batching padding"):
        load_collator(replace(config, batching="packing"), tokenizer)
    with pytest.raises(UserError, match="the collator must return tensors input_ids and labels"):
        collate(replace(packed, collator=lambda rows: {"input_ids": 0}), [0], 9, "cpu")
    write(tmp_path / "three.py", "def get_data_collator(_): return 3\ndef get_custom_dataset(*_): ...")
    with pytest.raises(UserError, match=r"three\.py: get_data_collator must return a function, not 3"):
        load_collator(replace(config, dataset=str(tmp_path / "three.py")), tokenizer)
    with pytest.raises(UserError, match=r"three\.py must return rows, a list or a generator, not null"):
        load(None, str(tmp_path / "three.py"))
    write(tmp_path / "none.py", "def get_custom_dataset(*_): ...")
    assert (
        load_collator(DataConfig(str(tmp_path / "none.py")), tokenizer)
        is None
        is load_collator(DataConfig(), tokenizer)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_set_of_the_hub(tmp_path):
    """As far as it goes offline: a folder takes the way of a name."""
    pytest.importorskip("datasets")
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for split, count in (("train", 5), ("validation", 2)):
        write(
            folder / f"{split}.jsonl",
            "".join(json.dumps({"input": "a", "target": f"{k}"}) + "\n" for k in range(count)),
        )
    train, validation = datasets("grammar", Path(f"hub:{folder}"), Path(f"hub:{folder}:validation"))
    assert answers(train) == list(range(5)) and answers(validation) == [0, 1]
    assert answers(datasets("grammar", Path(f"hub:{folder}:validation"), validation=False)[0]) == [0, 1]
    with pytest.raises(UserError, match=f"hub:{folder}:test: .*test"):
        load(Path(f"hub:{folder}:test"), "grammar")
    calls = [{"input": None, "call": {"a": 1, "b": {"c": 2}}}, {"input": None, "call": {"a": 3, "d": [{"e": None}]}}]
    (tmp_path / "calls").mkdir()
    write(tmp_path / "calls" / "train.jsonl", "".join(json.dumps(call) + "\n" for call in calls))
    (tmp_path / "calls.py").write_text(
        f"import datasets\n\n\ndef rows(config, tokenizer, split):\n    return datasets.Dataset.from_list({calls!r})\n"
    )
    for source in (
        Source("grammar", Path(f"hub:{tmp_path}/calls"), "train"),
        Source(f"{tmp_path}/calls.py:rows", None, "train"),
    ):
        read = [read() for _, read in source.rows(DataConfig(), None)]
        assert read == [calls[0], {"input": None, "call": {"a": 3, "d": [{}]}}]
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "train.jsonl", '{"input": "a"}\n')
    with pytest.raises(UserError, match=f"hub:{tmp_path}/other, row 1: field 'target' is missing"):
        load(Path(f"hub:{tmp_path}/other"), "grammar")


def test_a_tokenizer_without_bos(tmp_path):
    path = write(tmp_path / "a.csv", "input,target\na,b\n")
    (document,) = load(path, "grammar", NoBos())
    assert document[0].tolist() == [*b"Correct this to standard English: a\n---\nCorrected: b", 257]


@pytest.mark.parametrize("dataset", ["samsum", "alpaca", "grammar", "chat"])
def test_bundled_sets(dataset):
    train, validation = datasets(dataset)
    assert len(train) >= 60 and len(validation) >= 12
    for documents in (train, validation):
        assert all(trained.any() and not trained[0] for _, trained in documents)
        assert max(len(tokens) for tokens, _ in documents) < 4096
    assert not {tokens.tobytes() for tokens, _ in train} & {tokens.tobytes() for tokens, _ in validation}


# --- files


def test_csv_quotes_newlines_blank_lines_and_long_fields(tmp_path):
    long = "x" * 200_000
    text = f'input,target\n"a, ""b""\nc",d\n\n{long},e\n'
    documents = load(write(tmp_path / "a.csv", text), "grammar")
    assert csv.field_size_limit() == 131_072  # the whole process's, so left as Python has it
    assert [pieces(document)[1] for document in documents] == ["d", "e"]
    assert pieces(documents[0])[0] == 'Correct this to standard English: a, "b"\nc\n---\nCorrected: '
    assert documents.lengths[1] == 1 + 34 + 200_000 + 16 + 2


@pytest.mark.parametrize("part", [1, 3, 50])
def test_json_is_read_in_parts(tmp_path, monkeypatch, part):
    monkeypatch.setattr("minillama.data.rows.PART", part)
    rows = [{"a": "é🦙\\" * k, "b": [{}, [k, None, "]"]], "c": -1.5e3} for k in range(20)]
    for indent in (None, 1):
        read = []
        path = write(tmp_path / "a.json", " \n" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\r\n ")
        assert [row() for _, row in read_rows(path, read.append)] == rows
        assert sum(read) == path.stat().st_size


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_same_rows_in_every_form(tmp_path, bom, end):
    rows = [{"input": "é\u2028🦙", "target": "one"}, {"input": "b", "target": "two"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    files = {
        "a.json": "[" + f",{end}".join(lines) + f"]{end}",
        "a.jsonl": f"{end}{end}".join(lines),
        "a.CSV": end.join(["input,target", *(f"{row['input']},{row['target']}" for row in rows)]) + end,
    }
    for name, text in files.items():
        documents = load(write(tmp_path / name, bom + text.encode()), "grammar")
        assert [pieces(document) for document in documents] == [
            ("Correct this to standard English: é\u2028🦙\n---\nCorrected: ", "one"),
            ("Correct this to standard English: b\n---\nCorrected: ", "two"),
        ]


GOOD = '{"input": "a", "target": "b"}'

BAD = [
    # file name, content, dataset, what the message must say
    ("a.jsonl", f'{GOOD}\n\n{{"input": "a"\n', "grammar", ["line 3: not JSON", "',' delimiter", "column"]),
    ("a.jsonl", f'{GOOD}\n["a"]', "grammar", ["line 2:", "must be an object", '["a"]']),
    ("a.jsonl", f'{GOOD}\n{{"input": "a"}}', "grammar", ["line 2:", "'target' is missing", "are 'input'"]),
    ("a.jsonl", f'{GOOD}\n{{"input": 3, "target": "b"}}', "grammar", ["line 2:", "'input' must be text", "found 3"]),
    ("a.jsonl", '{"input": "a", "target": null}', "grammar", ["line 1:", "'target'", "found null"]),
    ("a.jsonl", '{"input": "a", "target": " \\n"}', "grammar", ["line 1:", "'target' is empty"]),
    ("a.jsonl", '{"input": "\\ud83d", "target": "b"}', "grammar", ["line 1:", "not Unicode"]),
    ("a.jsonl", "{}", "samsum", ["line 1:", "'dialogue' is missing", "are none"]),
    ("a.jsonl", '{"dialogue": "a", "summary": ""}', "samsum", ["line 1:", "'summary' is empty"]),
    ("a.jsonl", '{"instruction": "a", "input": 1, "output": ""}', "alpaca", ["line 1:", "'input' must", "found 1"]),
    ("a.jsonl", '{"instruction": "a", "output": null}', "alpaca", ["line 1:", "'output'", "found null"]),
    ("a.json", f"[{GOOD}, {{}}]", "grammar", ["row 2:", "'input' is missing"]),
    ("a.json", f"{GOOD}\n{GOOD}", "grammar", ["not JSON", "Extra data: line 2", ".jsonl"]),
    ("a.json", f'{{"data": [{GOOD}]}}', "grammar", ["must be a list of objects", '{"data": [']),
    ("a.json", "[]", "grammar", ["no rows"]),
    ("a.json", "", "grammar", ["empty", "list of objects"]),
    ("a.jsonl", "\n \n", "grammar", ["no rows"]),
    ("a.csv", "", "grammar", ["no rows"]),
    ("a.csv", "input,target\n", "grammar", ["no rows"]),
    ("a.csv", "input,output\na,b\n", "grammar", ["line 2:", "'target' is missing", "'input', 'output'"]),
    ("a.csv", 'input,target\n"a\nb",c\nd,\n', "grammar", ["line 4:", "'target' is empty"]),
    ("a.csv", "input,target\na,b\nc, d,e\n", "grammar", ["line 3: 3 fields", "has 2 (input, target)", "quotes"]),
    ("a.csv", 'input,target\na,b\n"c,d\ne,f\n', "grammar", ["line 3: not CSV", "end of data"]),
    ("a.csv", '"input,target\n', "grammar", ["line 1: not CSV"]),
    ("a.csv", b"input,target\na,b\nc\xe9,d\n", "grammar", ["line 3: not UTF-8", "0xe9", "position 1", "save"]),
    ("a.jsonl", b"\xff\xfe{\x00", "grammar", ["line 1: not UTF-8", "0xff", "position 0"]),
    ("a.json", b'[\n{"input": "\xe9"}]', "grammar", ["line 2: not UTF-8", "0xe9"]),
    ("a.tsv", "a", "grammar", ["unknown format '.tsv'", ".json, .jsonl, .csv"]),
    ("a.txt", "a", "grammar", ["'input' is missing, the fields are 'text'"]),
    ("a.txt", " \n", "text", ["'text' is empty"]),
    ("a.txt", b"a\nb\xe9", "text", ["line 2: not UTF-8", "0xe9"]),
    ("a.csv", "input;target\na;b\n", "grammar", ['header is one field, "input;target"', "commas"]),
    ("a.csv", "input,input\na,b\n", "grammar", ["names a field twice"]),
    ("a.json", f"[{GOOD}, {GOOD}", "grammar", ["truncated, line 1", "delimiter"]),
    ("a.json", f"[{GOOD},]", "grammar", ["not JSON"]),
    ("a.json", f"[{GOOD}]\n7", "grammar", ["not JSON", "Extra data: line 2"]),
    ("a", "a", "grammar", ["unknown format ''"]),
    ("a.jsonl", '{"dialog": []}', "chat", ["line 1:", "'messages' is missing", "'dialog'"]),
    ("a.jsonl", '{"conversations": []}', "chat", ["line 1:", "'conversations' must be a list", "found []"]),
    ("a.jsonl", '{"conversations": [{"from": "me"}]}', "chat", ["turn 1 needs 'from', one of human", '"from": "me"']),
    ("a.jsonl", '{"conversations": [{"from": "gpt", "value": 1}]}', "chat", ["turn 1 needs", "'value'"]),
    ("a.jsonl", '{"conversations": [["gpt", "hi"]]}', "chat", ["turn 1 needs", '["gpt", "hi"]']),
    ("a.jsonl", '{"prompt": "a"}', "chat", ["'response' is missing"]),
    ("a.jsonl", '{"messages": "hi"}', "chat", ["line 1:", "'messages' must be a list", 'found "hi"']),
    ("a.jsonl", '{"messages": []}', "chat", ["line 1:", "'messages' must be a list", "found []"]),
    ("a.jsonl", '{"messages": [{"role": "assistant", "content": " \\n"}]}', "chat", ["line 1: message 1,", "is empty"]),
    ("a.jsonl", '{"conversations": [{"from": "gpt", "value": ""}]}', "chat", ["line 1: message 1,", "is empty"]),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}], "tools": 5}', "chat", ["'tools' must be a list"]),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}], "tools": "[5"}', "chat", ["'tools' must be a list"]),
    ("a.jsonl", '{"messages": ["hi"]}', "chat", ["line 1: message 1 needs", 'found "hi"']),
    (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}',
        "chat",
        ["line 1: message 2 needs", "'content'", '"content": null'],
    ),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "chat", ["line 1:", "no message", "'assistant'"]),
]


@pytest.mark.parametrize(("name", "content", "dataset", "says"), BAD)
def test_bad_files(tmp_path, name, content, dataset, says):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        load(path, dataset)
    assert str(caught.value).startswith(str(path))
    for words in says:
        assert words in str(caught.value)


def test_no_such_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        load(tmp_path / "none.jsonl", "grammar")


def test_a_folder_is_its_files_in_order(tmp_path):
    rows = [{"input": f"i{k}", "target": f"t{k}"} for k in range(4)]
    for name, part in (("b.jsonl", rows[2:3]), ("a.jsonl", rows[:2]), ("sub/c.JSONL", rows[3:])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "a.jsonl", "never read")
    write(tmp_path / "README.md", "nor this")
    assert [pieces(document)[1] for document in load(tmp_path, "grammar")] == ["t0", "t1", "t2", "t3"]

    write(tmp_path / "b.jsonl", "{}")
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: field 'input' is missing"):
        load(tmp_path, "grammar")
    write(tmp_path / "d.csv", "input,target\n")
    with pytest.raises(UserError, match=r"different kinds \(\.csv, \.jsonl\)"):
        load(tmp_path, "grammar")


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"has no file ending in \.json"):
        load(tmp_path, "grammar")


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "🦙"}, {"role": "assistant", "content": "é\u2028"}]
    rows = [{"input": f"i{k}", "target": f"t{k}"} for k in range(2_500)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    assert [pieces(document)[1] for document in load(tmp_path / "a.parquet", "grammar")] == [r["target"] for r in rows]
    place, row = list(read_rows(tmp_path / "a.parquet"))[2_499]
    assert (place, row()) == (f"{tmp_path / 'a.parquet'}, row 2500", rows[-1])

    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "chat.parquet")
    write(tmp_path / "chat.jsonl", json.dumps({"messages": messages}))
    in_parquet, in_json = load(tmp_path / "chat.parquet", "chat"), load(tmp_path / "chat.jsonl", "chat")
    assert [part.tolist() for part in in_parquet[0]] == [part.tolist() for part in in_json[0]]

    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "say", "arguments": {"text": "b"}}]
    rows = [{"messages": messages, "tools": [call], "tool_calls": None} for call in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "tools.parquet")
    # Arrow gives each object the keys of all others: {"a": 1, "text": None}
    assert [read() for _, read in read_rows(tmp_path / "tools.parquet")] == rows

    parquet.write_table(pyarrow.Table.from_pylist([{"input": "a", "target": None}]), tmp_path / "null.parquet")
    with pytest.raises(UserError, match=r"null\.parquet, row 1: field 'target' must be text, found null"):
        load(tmp_path / "null.parquet", "grammar")
    write(tmp_path / "bad.parquet", (tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"bad\.parquet: not a Parquet file"):
        load(tmp_path / "bad.parquet", "grammar")


# --- which file is for what


def alpaca_file(path, n):
    return write(path, "".join(json.dumps({"instruction": "i", "output": f"{k}"}) + "\n" for k in range(n)))


def answers(documents):
    return [int(pieces(document)[1]) for document in documents]


def test_alpaca_alone_holds_out_its_first_twentieth(tmp_path):
    path = alpaca_file(tmp_path / "a.jsonl", 59)
    train, validation = datasets("alpaca", path)
    assert answers(validation) == [0, 1] and answers(train) == list(range(2, 59))
    train, validation = datasets("alpaca", path, validation=False)
    assert answers(train) == list(range(59)) and validation is None
    train, validation = datasets("alpaca", path, alpaca_file(tmp_path / "b.jsonl", 3))
    assert answers(train) == list(range(59)) and answers(validation) == [0, 1, 2]
    with pytest.raises(UserError, match=r"of 19 rows .* --data\.val-path"):
        datasets("alpaca", alpaca_file(tmp_path / "c.jsonl", 19))


def test_impossible_flags(tmp_path):
    path = alpaca_file(tmp_path / "a.jsonl", 3)
    with pytest.raises(UserError, match=r"without rows to evaluate on: .*--data\.val-path.*--eval\.no-enabled"):
        datasets("samsum", path)
    with pytest.raises(UserError, match=r"--data\.val-path .* without --data\.path"):
        datasets("alpaca", None, path)
    for call in (datasets, lambda name: load(path, name)):
        with pytest.raises(UserError, match="alpacca is unknown: choose one of samsum, alpaca, grammar, chat"):
            call("alpacca")
    with pytest.raises(UserError, match=r"--data\.context-length 1"):
        DataConfig(context_length=1)


def test_check_vocabulary():
    for model_rows in (258, 264, 290):
        check_vocabulary(Bytes(), model_rows)
    for model_rows in (257, 512):
        with pytest.raises(UserError, match=f"258 ids, the model {model_rows}"):
            check_vocabulary(Bytes(), model_rows)


# --- real data


@pytest.mark.skipif(not REAL.exists(), reason="needs the optional real data beside the checkout")
def test_real_files_and_llama31_tokenizer_give_the_ids_of_transformers():
    transformers = pytest.importorskip("transformers")
    from minillama.tokenizer.tokenizer import load_tokenizer

    folder = REAL / "tokenizers" / "llama3_1-hf"
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = load_tokenizer(folder)

    def ids(text):
        return theirs(text, add_special_tokens=False)["input_ids"]

    def expected(prompt, answer):
        return [128000, *ids(prompt)], [*ids(answer), ours.eos_id]

    def same(documents, expectations):
        assert len(documents) == len(expectations)
        for (tokens, trained), (prompt, answer) in zip(documents, expectations, strict=True):
            assert tokens.tolist() == prompt + answer
            assert trained.tolist() == [False] * len(prompt) + [True] * len(answer)

    samsum = REAL / "datasets" / "samsum" / "val_200.json"
    rows = json.loads(samsum.read_text(encoding="utf-8"))
    same(
        load(samsum, "samsum", ours),
        [expected(f"Summarize this dialog:\n{row['dialogue']}\n---\nSummary:\n", row["summary"]) for row in rows],
    )
    grammar = REAL / "datasets" / "grammar" / "val_200.csv"
    with grammar.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    same(
        load(grammar, "grammar", ours),
        [
            expected(f"Correct this to standard English: {row['input']}\n---\nCorrected: ", row["target"])
            for row in rows
        ],
    )
    alpaca = REAL / "datasets" / "alpaca" / "val_200.json"
    prompts = []
    for row in json.loads(alpaca.read_text(encoding="utf-8")):
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        paired = ", paired with an input that provides further context" if row["input"] else ""
        prompts.append(
            f"Below is an instruction that describes a task{paired}. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{row['instruction']}\n\n{given}### Response:"
        )
    rows = json.loads(alpaca.read_text(encoding="utf-8"))
    same(
        load(alpaca, "alpaca", ours),
        [expected(prompt, row["output"]) for prompt, row in zip(prompts, rows, strict=True)],
    )
    chat = load(REAL / "datasets" / "chat" / "messages_val_60.jsonl", "chat", ours)
    assert len(chat) == 60 and all(trained.any() for _, trained in chat)


def turns_of_llama3(ids, tokenizer):
    """Which ids are trained, by another way than the library's: from behind an assistant's header to its <|eot_id|>."""
    head, end, over = (tokenizer.id_of(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id"))
    trained, role, inside = [], None, False
    for place, token in enumerate(ids):
        trained.append(inside and role == "assistant")
        if token == head:
            role, inside = tokenizer.decode(ids[place + 1 : ids.index(end, place)]), False
        elif token == end:
            inside = True
        elif token == over:
            inside = False
    return trained


def turns_of_chatml(ids, tokenizer):
    """The same for <|im_start|>assistant\\n ... <|im_end|>."""
    head, over = (tokenizer.id_of(f"<|im_{name}|>") for name in ("start", "end"))
    trained, place = [False] * len(ids), 0
    while head in ids[place:]:
        place = ids.index(head, place)
        end = ids.index(over, place)
        start = next(i for i in range(place + 2, end) if "\n" in tokenizer.decode(ids[place + 1 : i]))
        if tokenizer.decode(ids[place + 1 : start]) == "assistant\n":
            trained[start : end + 1] = [True] * (end + 1 - start)
        place = end
    return trained


@pytest.mark.skipif(not REAL.exists(), reason="needs the optional real data beside the checkout")
@pytest.mark.parametrize("name", ["llama3", "llama3_1-hf", "SmolLM2"])
def test_real_chats_are_trained_on_the_assistants_turns(name, tmp_path):
    from minillama.tokenizer.tokenizer import load_tokenizer

    smol = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"
    if name == "SmolLM2" and not smol.exists():
        pytest.skip("needs what make demo leaves")
    tokenizer = load_tokenizer(smol if name == "SmolLM2" else REAL / "tokenizers" / name)
    turns = turns_of_chatml if name == "SmolLM2" else turns_of_llama3
    for file in ("messages_train.jsonl", "sharegpt_dummy_conversation.json"):
        path = REAL / "datasets" / "chat" / file
        documents = load(path, "chat", tokenizer)
        rows = [row() for _, row in read_rows(path)]
        assert len(documents) == len(rows)
        for (tokens, trained), row in zip(documents, rows, strict=True):
            assert trained.tolist() == turns(tokens.tolist(), tokenizer)
            turns_in_row = row.get("messages") or row["conversations"]
            answers = [m for m in turns_in_row if "assistant" in m.values() or m.get("from") == "gpt"]
            text = tokenizer.decode(tokens[trained].tolist())
            place = 0
            for answer in answers:  # each is there, and in their order
                content = (answer.get("content") or answer.get("value")).strip()
                place = text.index(content, place) + len(content)
