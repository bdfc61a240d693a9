import csv
import json
from pathlib import Path

import numpy as np
import pytest

from minillama.cache import open_packed, prepare
from minillama.datasets import DataConfig, check_vocabulary
from minillama.errors import UserError
from minillama.rows import read_rows

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
    ("a.json", "", "grammar", ["not JSON", "line 1"]),
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
    ("a.json", f"[{GOOD}, {GOOD}", "grammar", ["not JSON", "delimiter"]),
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
    assert list(read_rows(tmp_path / "a.parquet"))[2_499] == (f"{tmp_path / 'a.parquet'}, row 2500", rows[-1])

    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "chat.parquet")
    write(tmp_path / "chat.jsonl", json.dumps({"messages": messages}))
    in_parquet, in_json = load(tmp_path / "chat.parquet", "chat"), load(tmp_path / "chat.jsonl", "chat")
    assert [part.tolist() for part in in_parquet[0]] == [part.tolist() for part in in_json[0]]

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
    from minillama.tokenizer import load_tokenizer

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
