"""Rows of preference data: which prompt and which answers each form of them has, and what is no such row."""

import pytest
from test_chat import tokenizer_with

from minillama.data.encoders import encode_preference
from minillama.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content ~ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content ~ '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def encoded(row, tokenizer):
    """Of both conversations the text, with what is trained in brackets."""
    shown = []
    for ids, mask, _ in encode_preference(row, tokenizer):
        text, before = "", False
        for token, trained in zip(ids, mask, strict=True):
            text += "[" * (trained and not before) + "]" * (before and not trained) + tokenizer.decode([token])
            before = trained
        shown.append(text + "]" * before)
    return shown


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_with(tmp_path_factory.mktemp("chatml"), CHATML)


SHORT = [f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[{said}<|im_end|>]\n" for said in ("Hello!", "No.")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
        {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("No.")]},
        {"prompt": "Hi", "chosen": [assistant("Hello!")], "rejected": assistant("No.")},
        {"chosen": [user("Hi"), assistant("Hello!")], "rejected": [user("Hi"), assistant("No.")]},
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello!")], "rejected": [user("Hi"), assistant("No.")]},
        {"conversations": [human("Hi")], "chosen": gpt("Hello!"), "rejected": gpt("No.")},
        {"conversations": [human("Hi")], "chosen": [gpt("Hello!")], "rejected": [gpt("No.")]},
        {"chosen": [human("Hi"), gpt("Hello!")], "rejected": [human("Hi"), gpt("No.")]},
    ],
)
def test_every_form_of_a_pair(row, tokenizer):
    assert encoded(row, tokenizer) == SHORT


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_answer_is_trained_not_earlier_ones(template, tmp_path):
    tokenizer = tokenizer_with(tmp_path, template)
    before = [user("Hi"), assistant("Hello!"), user("More")]
    row = {"prompt": before, "chosen": [assistant("Hello!")], "rejected": [assistant("Hello? Hi")], "system": "Be"}
    start = (
        "<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    start += "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
    expected = [f"{start}[{said}<|im_end|>]\n" for said in ("Hello!", "Hello? Hi")]
    assert encoded(row, tokenizer) == expected
    whole = {"chosen": [*before, assistant("Hello!")], "rejected": [*before, assistant("Hello? Hi")], "system": "Be"}
    assert encoded(whole, tokenizer) == expected


def test_an_answer_of_several_messages(tokenizer):
    row = {"prompt": "Hi", "chosen": [assistant("A"), user("B"), assistant("C")], "rejected": "D"}
    assert encoded(row, tokenizer)[0] == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[A<|im_end|>]\n"
        "<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n[C<|im_end|>]\n"
    )


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": [assistant("b")]}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "the rejected answer is empty"),
        ({"prompt": "a", "chosen": [assistant("")], "rejected": "c"}, "the chosen answer is empty"),
        ({"prompt": "a", "chosen": 7, "rejected": "c"}, "field 'chosen' must be a list of messages, found 7"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "field 'prompt' must be a list of messages"),
        ({"prompt": [user("a")], "chosen": [user("a"), assistant("b")], "rejected": "c"}, "there is 'prompt' too"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]}, "there is no prompt"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, "rejected is the prompt alone"),
        (
            {"chosen": [user("a"), user("b"), assistant("c")], "rejected": [user("a"), assistant("c")]},
            "chosen differs from the other in what user says",
        ),
        ({"prompt": "a", "chosen": [{"from": "gpt"}], "rejected": "c"}, "turn 1 needs 'from'"),
        ({"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}, "message 1 needs the texts 'role'"),
    ],
)
def test_what_is_no_pair(row, problem, tokenizer):
    with pytest.raises(UserError, match=problem):
        encode_preference(row, tokenizer)


def test_answers_that_the_template_shows_alike(tmp_path):
    trimming = tokenizer_with(tmp_path, CHATML.replace("m.content", "m.content.strip()"))
    with pytest.raises(UserError, match="the same in the chat template"):
        encode_preference({"prompt": "a", "chosen": "b", "rejected": "b "}, trimming)
