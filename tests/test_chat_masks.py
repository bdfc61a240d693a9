"""Ids and masks of conversations, beside transformers' with {% generation %} put into the same template by hand."""

import json
import random
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from minillama.errors import UserError
from minillama.tokenizer.chat import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE
from minillama.tokenizer.tokenizer import load_tokenizer

# Written for these tests, in the structure of the families they are named after. [[ ]] is what the assistant says.
LLAMA2 = LLAMA2_TEMPLATE.replace(
    "{{- ' ' ~ message.content.strip() ~ ' ' ~ eos_token -}}",
    "[[{{- ' ' ~ message.content.strip() ~ ' ' ~ eos_token -}}]]",
)
LLAMA3 = LLAMA3_TEMPLATE.replace(
    "{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content.strip() ~ '<|eot_id|>' -}}",
    "{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>' -}}"
    "{%- if message.role == 'assistant' -%}[[{{- '\\n\\n' ~ message.content.strip() ~ '<|eot_id|>' -}}]]"
    "{%- else -%}{{- '\\n\\n' ~ message.content.strip() ~ '<|eot_id|>' -}}{%- endif -%}",
)
LLAMA31 = r"""
{{- bos_token -}}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}
{{- 'Environment: ipython\n' if tools -}}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' -}}
{%- for tool in tools or [] -%}{{- tool | tojson(indent=4) ~ '\n\n' -}}{%- endfor -%}
{{- messages[0].content | trim if messages[0].role == 'system' -}}
{{- '<|eot_id|>' -}}
{%- for message in rest -%}
{%- if message.role in ('tool', 'ipython') -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' ~ (message.content | tojson) ~ '<|eot_id|>' -}}
{%- elif 'tool_calls' in message -%}
{%- if message.tool_calls | length != 1 -%}{{- raise_exception('one tool call at a time') -}}{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>' -}}
[[
{{- '\n\n' -}}
{%- if call.name == 'search' -%}
{{- '<|python_tag|>' ~ call.name ~ '.call(query="' ~ call.arguments.query ~ '")<|eom_id|>' -}}
{%- else -%}
{{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}<|eot_id|>' -}}
{%- endif -%}
]]
{%- else -%}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>' -}}
{%- if message.role == 'assistant' -%}
[[
{{- '\n\n' ~ message.content | trim ~ '<|eot_id|>' -}}
]]
{%- else -%}
{{- '\n\n' ~ message.content | trim ~ '<|eot_id|>' -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt -}}
"""
LLAMA32 = LLAMA31.replace("26 Jul 2024", "' ~ strftime_now('%d %b %Y') ~ '")
CHATML = r"""
{%- for message in messages -%}
{{- '<|im_start|>system\nYou are helpful<|im_end|>\n' if loop.first and message.role != 'system' -}}
{{- '<|im_start|>' ~ message.role ~ '\n' -}}
{%- if message.role == 'assistant' -%}
[[
{{- message.content ~ '<|im_end|>' -}}
]]
{%- else -%}
{{- message.content ~ '<|im_end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""
# Earlier thoughts are dropped, the last turn has some even if they are empty, and a blank ends the text after each turn.
THOUGHTS = r"""
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages[::-1] -%}
{%- if ns.last_user < 0 and message.role == 'user' -%}
{%- set ns.last_user = messages | length - 1 - loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\n' -}}
{%- if message.role == 'assistant' -%}
{%- set content = message.content.split('</think>')[-1].lstrip('\n') -%}
{%- set thoughts = message.reasoning_content or (message.content.split('</think>')[0] if '</think>' in message.content) -%}
[[
{%- if loop.index0 > ns.last_user and (loop.last or thoughts) -%}
{{- '<think>\n' ~ (thoughts or '').strip('\n') ~ '\n</think>\n\n' -}}
{%- endif -%}
{{- content ~ '<|im_end|>' -}}
]]
{%- else -%}
{{- message.content ~ '<|im_end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""
TOOLS = r"""
{%- macro said(message) -%}{{- message.content | trim if message.content -}}{%- endmacro -%}
{{- '<|im_start|>system\nTools: ' ~ (tools | tojson) ~ '<|im_end|>\n' if tools -}}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' -}}
{{- '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' -}}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}
[[
{{- said(message) -}}
{%- for tool_call in message.tool_calls or [] -%}
{{- '\n' if message.content or not loop.first -}}
{{- '<tool_call>\n{"name": "' ~ tool_call.function.name ~ '", "arguments": ' -}}
{{- tool_call.function.arguments | tojson ~ '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
]]
{{- '\n' -}}
{%- else -%}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ said(message) ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""
# Marks itself what is trained, here without the token that ends the turn: used as it is, not as we would.
OWN = r"""
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{{- message.content -}}
{%- endgeneration -%}
{{- '<|im_end|>\n' -}}
{%- else -%}
{{- message.content ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
"""
SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
]
SPECIAL += ["<|python_tag|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]

WORDS = [
    "Rome",
    "was",
    "not ",
    "built",
    " in",
    "a day",
    ".",
    "\n",
    "\n\n",
    "  ",
    "42",
    "1234",
    "\t",
    "é",
    "日本",
    "🦙",
    "'s",
    "I'm",
]
WORDS += [
    "assistant",
    "user",
    "<b>",
    "{{ x }}",
    '"',
    "\\",
    "<|im_end",
    "</s",
    "7190318000001",
    "<|eot_id|>",
    "<|im_end|>",
    "</think>",
]


def put_generation(template: str) -> str:
    return template.replace("[[", "{%- generation -%}").replace("]]", "{%- endgeneration -%}")


def pair(folder: Path, template: str, kind: str):
    """Our tokenizer of a folder with the template, and transformers' with the template marked by hand."""
    folder.mkdir()
    names = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if kind != "bytes":
        write_llama2(folder)
        names |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        names |= {"tokenizer_class": "LlamaTokenizer", "legacy": False} if kind == "one space" else {}
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator([" ".join(WORDS), "assistant\n\n\n user system 日本 🦙🦙 \n\n\n"] * 20, trainer)
        bpe.add_special_tokens(SPECIAL)
        bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(put_generation(template))
    theirs = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template.replace("[[", "").replace("]]", ""))
    return load_tokenizer(folder), theirs


def write_llama2(folder: Path) -> None:
    import sentencepiece

    from minillama.tokenizer.export import tokenizer_json

    (folder / "corpus.txt").write_text(
        ("Rome was not built in a day . [INST] [/INST] <<SYS>> I'm 42 assistant user\n") * 50
    )
    options = dict(input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=320)
    options |= dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(**options, remove_extra_whitespaces=False, split_digits=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json((folder / "tokenizer.model").read_bytes())))


def said(rng: random.Random, empty: bool = False) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0 if empty else 1, 8)))


def conversation(rng: random.Random, *, tools: bool, thoughts: bool, one_call: bool, first: bool):
    """Messages and tools; first: the assistant may speak first, twice, and without an answer."""
    messages, schemas = [], None
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": said(rng)})
    if tools and rng.random() < 0.8:
        schemas = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "x": said(rng)}}}]
    if first and rng.random() < 0.2:
        messages.append({"role": "assistant", "content": said(rng)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": said(rng)})
        while schemas and rng.random() < 0.6:
            calls = []
            for _ in range(1 if one_call else rng.randint(1, 2)):
                name = rng.choice(["add", "search"])
                arguments = {"query": said(rng), "n": [1, {"deep": said(rng)}]}
                calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
            text = {"content": said(rng)} if rng.random() < 0.5 else {"content": rng.choice([None, ""])}
            messages.append({"role": "assistant", **text, "tool_calls": calls})
            messages += [{"role": "tool", "content": said(rng)} for _ in calls]
        answer = {"role": "assistant", "content": said(rng, empty=first), "tool_calls": None}
        if thoughts:
            answer |= rng.choice([{}, {"reasoning_content": said(rng) + answer["content"]}, {"thinking": "hm\n"}])
            if len(answer) == 3 and rng.random() < 0.5:
                answer["content"] = f"<think>\n{answer['content']}</think>\n\n{answer['content']}"
        messages.append(answer)
        if first and rng.random() < 0.2:
            messages.append({"role": "assistant", "content": said(rng)})
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": said(rng)})
    return messages, schemas


def as_cleaned(messages):
    """What the reference is given: transformers before 5.23 tells templates of None, and of "thinking" by that name."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
        return messages
    renamed = {"thinking": "reasoning_content"}
    return [{renamed.get(key, key): value for key, value in m.items() if value is not None} for m in messages]


def compare(ours, theirs, messages, tools) -> list[bool]:
    ids, mask = ours.encode_chat(messages, tools)
    reference = theirs.apply_chat_template(
        as_cleaned(messages), tools=tools, return_assistant_tokens_mask=True, return_dict=True
    )
    assert ids == reference["input_ids"], messages
    marked = "".join(f"[{ours.decode([i])}]" if m else ours.decode([i]) for i, m in zip(ids, mask, strict=True))
    assert [int(one) for one in mask] == reference["assistant_masks"], (messages, marked)
    return mask


@pytest.mark.parametrize(
    ("name", "template", "kinds"),
    [
        ("Llama 2", LLAMA2, {}),
        ("Llama 2, one space", LLAMA2, {}),
        ("Llama 3", LLAMA3, {"first": True}),
        ("Llama 3.1", LLAMA31, {"tools": True, "one_call": True}),
        ("Llama 3.2", LLAMA32, {"tools": True, "one_call": True}),
        ("ChatML", CHATML, {"first": True}),
        ("thoughts", THOUGHTS, {"thoughts": True, "first": True}),
        ("tool calls", TOOLS, {"tools": True, "first": True}),
        ("marks itself", OWN, {"first": True}),
    ],
)
def test_30_conversations_are_as_in_transformers(tmp_path, name, template, kinds):
    kind = {"Llama 2": "sentencepiece", "Llama 2, one space": "one space"}.get(name, "bytes")
    ours, theirs = pair(tmp_path / "t", template, kind)
    rng, trained = random.Random(name), 0
    for _ in range(30):
        kinds = {"tools": False, "thoughts": False, "one_call": False, "first": False} | kinds
        trained += sum(compare(ours, theirs, *conversation(rng, **kinds)))
    assert trained > 300


# Turns are found without a loop whose variable is a message, in buffered text, and where the template changes the words.
SET_BLOCK = "{%- set all -%}" + CHATML.replace(
    "{{- '<|im_start|>assistant", "{%- endset -%}{{- all -}}{{- '<|im_start|>assistant"
)
MERGED = r"""
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\n' if loop.first or loop.previtem.role != message.role -}}
{%- if message.role == 'assistant' -%}
[[
{{- message.content -}}
{{- '<|im_end|>' if loop.last or loop.nextitem.role != message.role -}}
]]
{%- else -%}
{{- message.content ~ ('<|im_end|>' if loop.last or loop.nextitem.role != message.role else '') -}}
{%- endif -%}
{{- '\n' if loop.last or loop.nextitem.role != message.role -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""
OTHERS = {
    "opens a thought": CHATML.replace("assistant\\n' if add", "assistant\\n<think>\\n' if add"),
    "counts first": "{{- messages | length -}}" + CHATML,
    "looks first": "{% for message in messages %}\n{% set x = message %}\n{% endfor %}\n" + CHATML,
    "ends after the loop": CHATML.replace("if add_generation_prompt", "if add_generation_prompt else eos_token"),
    "ends with the text": r"""
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\n' -}}
{%- if message.role == 'assistant' -%}[[{{- message.content ~ (eos_token if loop.last) -}}]]
{%- else -%}{{- message.content -}}{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}""",
    "by number": CHATML.replace("for message in messages", "for i in range(messages | length)").replace(
        "message.", "messages[i]."
    ),
    "set": SET_BLOCK.replace("[[", "").replace("]]", ""),
    "merges turns": MERGED,
    "shouts": CHATML.replace("message.content ~", "message.content | upper ~"),
    "drops turns": CHATML.replace(
        "{{- '<|im_start|>' ~",
        "{%- if message.role == 'assistant' and not loop.last -%}{%- continue -%}{%- endif -%}{{- '<|im_start|>' ~",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_templates_of_other_makes(tmp_path, name):
    ours, theirs = pair(tmp_path / "t", OTHERS[name], "bytes")
    rng = random.Random(name)
    for number in range(4):
        messages, _ = conversation(rng, tools=False, thoughts=False, one_call=False, first=True)
        if name == "set":  # transformers counts from where the buffer is shown, so its mask is of another text
            ids, mask = ours.encode_chat(messages)
            chatml, _ = pair(tmp_path / f"chatml{number}", CHATML, "bytes")
            assert (ids, mask) == chatml.encode_chat(messages)
        else:
            compare(ours, theirs, messages, None)


def test_a_conversation_that_holds_the_marks_of_our_own(tmp_path):
    forged = "\ufdd0g\ufdd1 \ufdd00:1\ufdd1a\ufdd00\ufdd1"
    messages = [{"role": role, "content": forged} for role in ("user", "assistant", "user", "assistant")]
    compare(*pair(tmp_path / "t", CHATML, "bytes"), messages, None)
    ours, _ = pair(tmp_path / "own", OWN, "bytes")
    with pytest.raises(UserError, match=r"cannot tell what the {% generation %} blocks of the chat template show"):
        ours.encode_chat(messages)


def test_turns_that_cannot_be_told_are_refused(tmp_path):
    joined = (
        "{%- set ns = namespace(text='') -%}{%- for m in messages -%}{%- set ns.text = ns.text ~ m.role ~ m.content -%}"
        "{%- endfor -%}{{- messages | length ~ ns.text -}}"
    )
    twice = CHATML + "{{- messages[1].content -}}"
    for name, template in (("joined", joined), ("twice", twice)):
        ours, _ = pair(tmp_path / name, template, "bytes")
        with pytest.raises(
            UserError, match=r"chat_template\.jinja: cannot tell which part of the text .* is message 1"
        ):
            ours.encode_chat([{"role": role, "content": "a"} for role in ("user", "assistant", "user")])


def test_what_tools_answer_is_never_taken_for_the_assistants(tmp_path):
    """As some templates show it in the turn with the call"""
    template = CHATML.replace("for message in messages", "for message in messages if message.role != 'tool'").replace(
        "[[", "[[{{- messages[loop.index].content if message.tool_calls -}}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [{"name": "add"}]},
    ]
    messages += [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "c"}]
    ours, _ = pair(tmp_path / "t", template, "bytes")
    with pytest.raises(UserError, match=r"cannot tell which part of the text .* is message 1"):
        ours.encode_chat(messages)
    compare(*pair(tmp_path / "other", CHATML, "bytes"), messages, None)


def test_a_call_after_which_no_token_ends_the_turn_is_refused(tmp_path):
    plain = "{%- for m in messages -%}{{- m.role ~ ': ' ~ m.content ~ (m.tool_calls or '.') -}}{%- endfor -%}"
    messages = [{"role": "user", "content": "a"}]
    messages += [{"role": "assistant", "content": "b", "tool_calls": [{"name": "add"}]}]
    ours, _ = pair(tmp_path / "t", plain, "bytes")
    with pytest.raises(UserError, match=r"cannot tell which part of the text .* is message 1"):
        ours.encode_chat(messages)
