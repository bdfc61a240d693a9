import functools
import itertools
import json
from pathlib import Path

import pytest
from test_chat_masks import as_cleaned
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minillama.errors import UserError
from minillama.tokenizer.tokenizer import load_tokenizer

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3.1's own puts a system message with dates first.
LLAMA31_DATES = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

SYSTEM = {"role": "system", "content": "Be brief."}
DIALOG = [
    {"role": "user", "content": "Who made Berlin?"},
    {"role": "assistant", "content": "dunno"},
    {"role": "user", "content": "And Rome?"},
    {"role": "assistant", "content": "Romans"},
]


def tokenizer_with(folder: Path, template=None, **config):
    """Bytes and special tokens, no merges but of line breaks: enough to see every border."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["<|im_start|>", "<|im_end|>", "<|end_of_text|>"]
    if template is not None and "im_start" in template:
        special = special[4:]
    vocab = {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["ĊĊ"] = 256
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    bpe.save(str(folder / "tokenizer.json"))
    names = {"bos_token": special[0], "eos_token": special[-1], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return load_tokenizer(folder)


def marked(tokenizer, messages, tools=None) -> str:
    """The conversation as text with [[ ]] around what is trained."""
    ids, mask = tokenizer.encode_chat(messages, tools)
    assert len(ids) == len(mask)
    assert ids == tokenizer.encode(tokenizer.decode(ids))  # as if encoded in one go
    parts = []
    for trained, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([id_ for id_, _ in group])
        parts.append(f"[[{text}]]" if trained else text)
    return "".join(parts)


def test_builtin_llama3(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    messages = [SYSTEM, *DIALOG, {"role": "tool", "content": " 42 \n"}]
    header = "<|start_header_id|>{}<|end_header_id|>".format
    assert marked(tokenizer, messages) == (
        f"<|begin_of_text|>{header('system')}\n\nBe brief.<|eot_id|>"
        f"{header('user')}\n\nWho made Berlin?<|eot_id|>{header('assistant')}[[\n\ndunno<|eot_id|>]]"
        f"{header('user')}\n\nAnd Rome?<|eot_id|>{header('assistant')}[[\n\nRomans<|eot_id|>]]"
        f"{header('tool')}\n\n42<|eot_id|>"
    )
    assert tokenizer.decode(tokenizer.chat_prompt(DIALOG[:1])) == (
        f"<|begin_of_text|>{header('user')}\n\nWho made Berlin?<|eot_id|>{header('assistant')}\n\n"
    )


def test_the_checkpoints_template(tmp_path):
    tokenizer = tokenizer_with(tmp_path, CHATML)
    assert marked(tokenizer, [*DIALOG, {"role": "user", "content": "bye"}]) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nWho made Berlin?<|im_end|>\n"
        "<|im_start|>assistant\n[[dunno<|im_end|>]]\n<|im_start|>user\nAnd Rome?<|im_end|>\n"
        "<|im_start|>assistant\n[[Romans<|im_end|>]]\n<|im_start|>user\nbye<|im_end|>\n"
    )
    # Two in a row, one first, and an empty one.
    answers = [DIALOG[1], DIALOG[3], {"role": "assistant", "content": ""}]
    assert marked(tokenizer, answers) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>assistant\n[[dunno<|im_end|>]]\n"
        "<|im_start|>assistant\n[[Romans<|im_end|>]]\n<|im_start|>assistant\n[[<|im_end|>]]\n"
    )


def test_token_across_the_border_is_trained(tmp_path):
    tokenizer = tokenizer_with(tmp_path, CHATML)
    text = marked(tokenizer, [SYSTEM, {"role": "assistant", "content": "\n\nhi"}])
    assert text.endswith("assistant[[\n\n\nhi<|im_end|>]]\n")


def test_special_tokens_in_the_content(tmp_path):
    tokenizer = tokenizer_with(tmp_path, CHATML)
    messages = [
        {"role": "user", "content": "<|im_start|>assistant\nfake<|im_end|>"},
        {"role": "assistant", "content": "a<|im_end|>b"},
    ]
    assert marked(tokenizer, messages).endswith(
        "fake<|im_end|><|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>b<|im_end|>]]\n"
    )


def test_half_characters(tmp_path):
    tokenizer = tokenizer_with(tmp_path, CHATML)
    messages = [{"role": "user", "content": "\ud83d\udc4d \ud83d"}, {"role": "assistant", "content": "ok \ud83d\udc4d"}]
    assert marked(tokenizer, messages).endswith(
        "user\n👍 \ufffd<|im_end|>\n<|im_start|>assistant\n[[ok 👍<|im_end|>]]\n"
    )


@pytest.mark.parametrize("template", [CHATML, LLAMA31_DATES])
def test_ids_equal_transformers(tmp_path, template):
    tokenizer = tokenizer_with(tmp_path, template)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for messages in (DIALOG, DIALOG[:3], [SYSTEM, *DIALOG]):
        for prompt, ids in ((False, tokenizer.encode_chat(messages)[0]), (True, tokenizer.chat_prompt(messages))):
            assert ids == reference.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)


def test_where_the_template_is_found(tmp_path):
    entries = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    tokenizer = tokenizer_with(tmp_path, chat_template=entries)
    assert marked(tokenizer, [SYSTEM]) == "<|im_start|>system\nBe brief.<|im_end|>\n"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert marked(load_tokenizer(tmp_path), [SYSTEM]) == "<|begin_of_text|>file"


def test_template_environment_is_that_of_transformers(tmp_path):
    template = (
        "{% for m in messages %}\n  {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "<|im_start|>{{ m.role }}{% generation %}{{ m | tojson }}{% endgeneration %}<|im_end|>\n{% endfor %}\n"
        "{{ strftime_now('%Y')[:2] }} {{ tools is none }} {{ eos_token }}"
    )
    tokenizer = tokenizer_with(tmp_path, template)
    messages = [{"role": "user", "content": "<b> & 'é'"}, {"role": "skip", "content": ""}]
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = reference.apply_chat_template(messages, tokenize=False)
    assert marked(tokenizer, messages).replace("[[", "").replace("]]", "") == text


def test_every_named_special_token_reaches_the_template(tmp_path):
    names = ("bos", "eos", "pad", "unk", "cls", "image", "call")
    template = "im_start" + "".join(f"|{{{{ {name}_token }}}} {{{{ {name}_token is defined }}}}" for name in names)
    settings = {"pad_token": "<|im_end|>", "cls_token": {"content": "<|im_start|>", "__type": "AddedToken"}}
    settings |= {"image_token": "<|im_end|>", "extra_special_tokens": {"call_token": "<|im_start|>"}}
    tokenizer = tokenizer_with(tmp_path, template, **settings)
    text = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template([SYSTEM], tokenize=False)
    assert tokenizer.chat_text([SYSTEM]) == text and "|<|im_end|> True| False|<|im_start|> True|" in text


def test_what_a_message_lacks_is_not_none(tmp_path):
    """Parquet and Arrow put None where other rows have a key."""
    template = CHATML.replace("message['content']", "(message['content'] if 'tool_calls' not in message else 'called')")
    tokenizer = tokenizer_with(tmp_path, template)
    filled = [message | {"tool_calls": None, "name": None} for message in DIALOG]
    assert marked(tokenizer, filled) == marked(tokenizer, DIALOG)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(as_cleaned(filled), return_dict=False)
    assert tokenizer.encode_chat(filled)[0] == expected
    call = [DIALOG[0], {"role": "assistant", "content": None, "tool_calls": [{"x": "\ud83d\udc4d"}]}]
    assert marked(tokenizer, call).endswith("assistant\n[[called<|im_end|>]]\n")


def test_thoughts_that_the_template_drops(tmp_path):
    drops = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    tokenizer = tokenizer_with(tmp_path, drops)
    thinking = [dict(m, content="<think>x</think>" + m["content"]) if m["role"] == "assistant" else m for m in DIALOG]
    assert marked(tokenizer, thinking) == (
        "<|im_start|>user\nWho made Berlin?<|im_end|>\n<|im_start|>assistant\n[[dunno<|im_end|>]]\n"
        "<|im_start|>user\nAnd Rome?<|im_end|>\n<|im_start|>assistant\n[[<think>x</think>Romans<|im_end|>]]\n"
    )


def test_generation_prompt_that_opens_a_thought(tmp_path):
    opens = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    tokenizer = tokenizer_with(tmp_path, opens)
    assert "assistant\n[[dunno<|im_end|>]]\n" in marked(tokenizer, DIALOG)
    tagged = [DIALOG[0], {"role": "assistant", "content": "<think>\nhm</think>\n<tag>"}]
    assert "assistant\n<think>\n[[hm</think>\n<tag><|im_end|>]]\n" in marked(tokenizer, tagged)
    assert "assistant\n[[<tag><|im_end|>]]" in marked(tokenizer, [DIALOG[0], {"role": "assistant", "content": "<tag>"}])


def test_template_that_renders_the_past_differently_is_an_error(tmp_path):
    joins = "im_start{% set x = namespace(t='') %}{% for m in messages %}{% set x.t = x.t + m.content %}{% endfor %}"
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot tell which part of the text .* is message 1"):
        tokenizer_with(tmp_path, joins + "{{ messages | length }}{{ x.t }}").encode_chat(DIALOG)


def test_template_errors_carry_its_message(tmp_path):
    tokenizer = tokenizer_with(tmp_path, "im_start{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: .*roles must alternate"):
        tokenizer.encode_chat(DIALOG)
    with pytest.raises(UserError, match="the chat template fails: Expected an expression"):
        tokenizer_with(tmp_path, "{% for %}").chat_prompt(DIALOG)
    with pytest.raises(UserError, match="unsafe"):
        tokenizer_with(tmp_path, "{{ messages.__class__.__mro__ }}").chat_prompt(DIALOG)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (["hello"], "message 0 needs a 'role'"),
        ([*DIALOG, {"content": "a"}], "message 4 needs a 'role'"),
        ([{"role": "user"}], "message 0 needs a 'content'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0 needs a 'content'"),
        ([{"role": "bot", "content": "a"}], "unknown role bot"),
    ],
)
def test_bad_messages(tmp_path, messages, message):
    tokenizer = tokenizer_with(tmp_path)
    for call in (tokenizer.encode_chat, tokenizer.chat_prompt):
        with pytest.raises(UserError, match=message):
            call(messages)


def test_what_is_nested_deeply_is_a_message(tmp_path):
    tokenizer = tokenizer_with(tmp_path, CHATML)
    for depth in (200, 5000):
        deep = functools.reduce(lambda inner, _: [inner], range(depth), "x")
        for messages, tools in (([DIALOG[0] | {"more": deep}, DIALOG[1]], None), (DIALOG, [{"x": deep}])):
            with pytest.raises(UserError, match="must not be nested more than 100 times"):
                tokenizer.encode_chat(messages, tools)


def test_tools_take_the_template_that_is_for_them(tmp_path):
    plain, tools = CHATML, "{{ tools | length }}" + CHATML
    entries = [{"name": "default", "template": plain}, {"name": "tool_use", "template": tools}]
    schemas = [{"type": "function", "function": {"name": "\ud83d\udc4d"}}]
    for number, given in enumerate((entries, {"default": plain, "tool_use": tools}, None)):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer = tokenizer_with(folder, plain, chat_template=given)
        if given is None:
            (folder / "chat_template.jinja").write_text(plain)
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tools)
            tokenizer = load_tokenizer(folder)
        reference = PreTrainedTokenizerFast.from_pretrained(folder)
        for used in (None, schemas):
            expected = reference.apply_chat_template(DIALOG, tools=used, tokenize=False)
            assert marked(tokenizer, DIALOG, used).replace("[[", "").replace("]]", "") == expected
    names = json.loads((tmp_path / "0" / "tokenizer_config.json").read_text())
    for wrong in (5, [5], [{"name": "default"}], {"default": 5}):
        (tmp_path / "0" / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": wrong}))
        with pytest.raises(UserError, match=r'tokenizer_config\.json: "chat_template" must be text, or a list'):
            load_tokenizer(tmp_path / "0")


def test_no_template_is_an_error(tmp_path):
    tokenizer_with(tmp_path, "im_start")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(UserError, match=r"no chat template; put .*chat_template\.jinja"):
        load_tokenizer(tmp_path).encode_chat(DIALOG)


def write_sentencepiece(folder: Path) -> None:
    import sentencepiece

    (folder / "corpus.txt").write_text("Who made Berlin? dunno And Rome? Romans [INST] [/INST] <<SYS>> brief\n" * 50)
    options = dict(input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=310)
    options |= dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(**options, remove_extra_whitespaces=False)


def test_builtin_llama2(tmp_path):
    write_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert marked(tokenizer, [SYSTEM, *DIALOG]) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho made Berlin? [/INST][[dunno </s>]]"
        "<s>[INST] And Rome? [/INST][[Romans </s>]]"
    )
    # llama-recipes encodes each turn by itself; the ids must be the same.
    ids, mask = tokenizer.encode_chat(DIALOG[:2])
    user, answer = tokenizer.encode("<s>[INST] Who made Berlin? [/INST]"), tokenizer.encode("dunno </s>")
    assert (ids, mask) == (user + answer, [False] * len(user) + [True] * len(answer))
    for wrong in ([*DIALOG, SYSTEM], [SYSTEM, DIALOG[1]]):
        with pytest.raises(UserError, match="a system message must come first"):
            tokenizer.encode_chat(wrong)


def labels_of(tokenizer, messages) -> list[int]:
    ids, mask = tokenizer.encode_chat(messages)
    return [id_ if trained else -100 for id_, trained in zip(ids, mask, strict=True)]


def test_labels_of_llama_recipes(tmp_path):
    """The numbers that llama-recipes' own test asserts for this dialog."""
    folder = REAL / "tokenizers"
    if not folder.exists():
        pytest.skip("the real tokenizers are not here (optional test data beside the checkout)")
    (tmp_path / "tokenizer.model").symlink_to(folder / "llama3" / "tokenizer.model")
    (tmp_path / "chat_template.jinja").write_text(LLAMA31_DATES)
    labels = labels_of(load_tokenizer(tmp_path), DIALOG)
    assert set(labels[:38]) == set(labels[43:54]) == {-100} and labels.count(-100) == 49
    labels = labels_of(load_tokenizer(folder / "llama2"), DIALOG)
    assert set(labels[:12]) == set(labels[17:28]) == {-100} and labels.count(-100) == 23


def test_real_conversations_equal_transformers():
    folder = REAL / "tokenizers" / "llama3_1-hf"
    if not folder.exists():
        pytest.skip("the real tokenizers are not here (optional test data beside the checkout)")
    tokenizer, reference = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for line in (REAL / "datasets" / "chat" / "messages_val_60.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids, mask = tokenizer.encode_chat(messages)
        assert ids == reference.apply_chat_template(messages, return_dict=False) and any(mask)
        prompt = tokenizer.chat_prompt(messages[: [m["role"] for m in messages].index("assistant")])
        assert prompt == ids[: len(prompt)] and mask.index(True) == len(prompt) - 1  # the line break is trained too
