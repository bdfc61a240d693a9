"""recipes/generate.py: the same answers however it is asked, and what is wrong said once."""

import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model, run_script

import minillama
from minillama.adapters.lora import LoraConfig, apply_lora
from minillama.adapters.peft import save_adapter

RECIPE = Path(__file__).parents[1] / "recipes" / "generate.py"
QUESTIONS = ["Hi", "What is it?", "ab"]


@pytest.fixture
def ask(tiny_folder, tmp_path):
    def call(*flags, world_size=1):
        flags = ("--model", tiny_folder, "--device", "cpu", "--max-new-tokens", 12, "--dtype", "fp32", *flags)
        codes, text = run_script(RECIPE, *flags, world_size=world_size, log=tmp_path / "log")
        lent = (
            f"note: {tiny_folder} has no chat template, and prompts are put to it in Llama 3's format; --template none "
        )
        text, notes = re.subn(f"{lent}leaves them as they are\n", "", text)
        assert notes == (codes[0] == 0 and "none" not in flags)
        # where bf16 is several times as fast
        return codes, re.sub(r"warning: --dtype fp32 computes in float32, at .* times as fast\n", "", text)

    return call


@pytest.fixture
def streams(tiny_folder, monkeypatch):
    """streams(*flags, typed=, encoding=): the bytes that the recipe, run in this process, prints to stdout."""

    def call(*flags, typed=b"", encoding="utf-8"):
        every = ("--model", tiny_folder, "--device", "cpu", "--max-new-tokens", 5, "--dtype", "fp32", *flags)
        with monkeypatch.context() as patch:
            out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
            patch.setattr(sys, "argv", [str(RECIPE), *map(str, every)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding=encoding))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            runpy.run_path(str(RECIPE), run_name="__main__")
            out.flush()
        return out.buffer.getvalue()

    return call


STOP = {257, 264, 265}  # <|end_of_text|>, <|eom_id|>, <|eot_id|>


def expected(model, folder, question):
    tokenizer = minillama.load_tokenizer(folder)
    prompt = tokenizer.chat_prompt([{"role": "user", "content": question}])
    stop = {tokenizer.eos_id, tokenizer.id_of("<|eot_id|>"), tokenizer.id_of("<|eom_id|>")}
    return tokenizer.decode(minillama.generate(model, prompt, max_new_tokens=12, stop_ids=stop))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_file_of_prompts(ask, tiny_folder, tmp_path, world_size):
    rows = [{"id": number, "prompt": question, "answer": "?"} for number, question in enumerate(QUESTIONS)]
    rows += [{"messages": [{"role": "user", "content": "Hi"}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes, text = ask("--prompts", tmp_path / "p.jsonl", "--batch-size", 3, world_size=world_size)
    assert codes == [0] * world_size, text
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [row["prompt"] for row in found] == [*QUESTIONS, rows[3]["messages"]]
    assert [row.get("id") for row in found] == [0, 1, 2, None] and found[3].keys() == {"prompt", "answer"}
    assert "positions" not in text
    model = random_model()
    assert [row["answer"] for row in found] == [expected(model, tiny_folder, q) for q in [*QUESTIONS, "Hi"]]


def test_one_prompt_with_an_adapter(ask, tiny_folder, tmp_path):
    config = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    model = apply_lora(random_model(), config)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter", config, "tiny")
    codes, text = ask("--prompt", "Hi", "--adapter", tmp_path / "adapter")
    assert codes == [0] and text.endswith("\n" + expected(model, tiny_folder, "Hi") + "\n")
    assert not ask("--prompt", "Hi")[1].endswith(expected(model, tiny_folder, "Hi") + "\n")


def test_a_text_to_go_on_with(ask, tiny_folder):
    tokenizer = minillama.load_tokenizer(tiny_folder)
    tokens = minillama.generate(random_model(), tokenizer.encode("Once", bos=True), max_new_tokens=12)
    codes, text = ask("--prompt", "Once", "--template", "none")
    assert codes == [0] and text == tokenizer.decode(tokens) + "\n"


def test_more_than_the_model_was_made_for_is_said_once(ask, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    codes, text = ask("--prompts", tmp_path / "p.jsonl", "--batch-size", 1, "--max-new-tokens", 250)
    assert codes == [0] and text.count("more than the 256 positions") == 1


def test_a_chat_remembers(streams, tiny_folder):
    printed = streams("--chat", "--system", "Be brief.", typed=b"Hi\nWhy?\n\nnever asked\n").decode()
    tokenizer, model = minillama.load_tokenizer(tiny_folder), random_model()
    messages, said = [{"role": "system", "content": "Be brief."}], ""
    for question in ("Hi", "Why?"):
        messages.append({"role": "user", "content": question})
        stop = {tokenizer.eos_id, tokenizer.id_of("<|eot_id|>"), tokenizer.id_of("<|eom_id|>")}
        ids = minillama.generate(model, tokenizer.chat_prompt(messages), max_new_tokens=5, stop_ids=stop)
        messages.append({"role": "assistant", "content": tokenizer.decode(ids)})
        said += tokenizer.decode(ids) + "\n"
    assert printed == said


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_half_characters_and_terminals_that_lack_some(streams, tiny_folder, tmp_path, encoding):
    rows = [{"prompt": "Hi \ud83d"}, {"prompt": "é🦙", "note": "日"}, {"prompt": "Hi"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = streams("--prompts", tmp_path / "p.jsonl", encoding=encoding).decode(encoding)
    found = [json.loads(line) for line in printed.splitlines()]
    model = random_model()
    for row, line in zip(rows, found, strict=True):
        ids = minillama.load_tokenizer(tiny_folder).chat_prompt([{"role": "user", "content": row["prompt"]}])
        assert line == row | {"answer": line["answer"]}
        new = minillama.generate(model, ids, max_new_tokens=5, stop_ids=STOP)
        assert line["answer"] == minillama.load_tokenizer(tiny_folder).decode(new)
    assert streams("--prompt", "é", encoding=encoding).count(b"\n") == 1
    assert streams("--chat", typed=b"\xff\n", encoding=encoding).count(b"\n") == 1


def test_tools_and_a_bos_of_its_own(tiny_folder, tmp_path):
    module = runpy.run_path(str(RECIPE), run_name="generate")
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ tools | tojson }}{{ messages[0].content }}")
    tokenizer = minillama.load_tokenizer(folder)
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "add"}]}')
    config = module["Config"](folder, prompts=tmp_path / "p.jsonl")
    [(_, tokens)] = module["read_prompts"](config, tokenizer)
    assert tokenizer.decode(tokens) == '[{"name": "add"}]a'
    config = module["Config"](folder, prompt="a", template="none")
    bos = "<|begin_of_text|>"
    assert [tokenizer.decode(module["to_tokens"](config, tokenizer, text)) for text in ("a", bos + "a")] == [
        bos + "a"
    ] * 2


def test_what_is_wrong_is_said_once(ask, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    (tmp_path / "empty.jsonl").write_text("")
    for flags, message in (
        ((), "give one of --prompt, --prompts and --chat"),
        (("--prompt", "a", "--chat"), "give one of --prompt, --prompts and --chat"),
        (("--prompts", tmp_path / "p.jsonl"), "line 2: a row needs the text 'prompt' or the list 'messages'"),
        (("--prompts", tmp_path / "none.jsonl"), "none.jsonl does not exist"),
        (("--prompts", tmp_path / "bad.jsonl"), "bad.jsonl, line 2: not JSON"),
        (("--prompts", tmp_path / "empty.jsonl"), "empty.jsonl: no row in it"),
        (("--prompt", "a", "--top-p", 0, "--model", tmp_path / "none"), "--top-p 0.0: must be above 0"),
        (("--prompt", "a", "--adapter", tmp_path / "none"), "none does not exist: give the adapter/"),
    ):
        world_size = 2 if flags[:1] == ("--prompts",) else 1
        codes, text = ask(*flags, world_size=world_size)
        assert codes == [1] * world_size and text.count("error: ") == 1 and message in text and "Traceback" not in text
