import re

import torch
from conftest import random_model
from test_model import hf_reference

from minillama import LlamaAdapterConfig, LoraConfig, apply_llama_adapter, apply_lora, generate
from minillama.errors import UserError
from minillama.inference.generate import _choose, stream
from minillama.model.kv_cache import KvCache

PROMPTS = [[5, 77, 301, 12], [9], [400, 3, 3, 17, 250, 31, 8], [2, 2]]


def answers(model, prompts, **settings):
    columns = zip(*stream(model, prompts, **settings), strict=True)
    return [[token for token in column if token is not None] for column in columns]


def test_greedy_equals_transformers():
    model = random_model()
    expected = [
        hf_reference(model)
        .generate(torch.tensor([p]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(p) :]
        .tolist()
        for p in PROMPTS
    ]
    assert [generate(model, prompt, max_new_tokens=24) for prompt in PROMPTS] == expected
    assert answers(model, PROMPTS, max_new_tokens=24) == expected  # together, padded on the left


def test_cached_logits_are_those_of_the_whole_sequence():
    for model in (
        random_model(),
        random_model(num_key_value_heads=4),
        apply_lora(random_model(), LoraConfig(targets=("all-linear",))),
        apply_llama_adapter(random_model(), LlamaAdapterConfig(prompt_len=3, layers=2)),
    ):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.eval()
        tokens = torch.randint(0, 512, (3, 12), generator=torch.Generator().manual_seed(0))
        padding = torch.tensor([0, 4, 2])
        with torch.no_grad():
            cache = KvCache(3, 12, padding)
            for cut in (6, 7, 10, 12):
                cached = model(tokens[:, cache.length : cut], cache=cache)
                for row, start in enumerate(padding.tolist()):
                    whole = model(tokens[row : row + 1, start:cut])[:, -1:]
                    torch.testing.assert_close(cached[row : row + 1], whole, rtol=1e-5, atol=1e-5)


def test_cached_logits_of_several_tokens_at_a_time():
    model, tokens = random_model(), torch.randint(0, 512, (2, 12))
    with torch.no_grad():
        expected = model(tokens)
        cache, done = KvCache(3, 12, torch.zeros(2, dtype=torch.int64)), 0
        for count in (5, 4, 1, 2):
            done += count
            logits = model(tokens[:, done - count : done], cache=cache)
            torch.testing.assert_close(logits[:, -1], expected[:, done - 1], rtol=1e-4, atol=1e-4)


def test_stops_before_a_stop_token():
    model = random_model()
    tokens = generate(model, [5, 77], max_new_tokens=10)
    stop = tokens[4]
    ended = tokens[: tokens.index(stop)]
    assert generate(model, [5, 77], max_new_tokens=10, stop_ids=[stop]) == ended
    alone = generate(model, [9, 8], max_new_tokens=10, stop_ids=[stop])
    assert answers(model, [[5, 77], [9, 8]], max_new_tokens=10, stop_ids=[stop]) == [ended, alone]
    assert generate(model, [5], max_new_tokens=0) == []


def test_sampling_draws_what_torch_draws_from_the_softmax_of_the_whole_prefix():
    model = random_model()
    for seed in range(20):
        random, tokens = torch.Generator().manual_seed(seed), [5]
        for _ in range(4):
            probabilities = (model(torch.tensor([tokens]))[:, -1] / 2).softmax(-1)
            tokens.append(torch.multinomial(probabilities, 1, generator=random).item())
        assert generate(model, [5], max_new_tokens=4, temperature=2.0, seed=seed) == tokens[1:]


def test_what_is_left_to_sample_from_is_what_transformers_leaves():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2
    for temperature, top_k, top_p in ((1.0, 5, 1.0), (0.7, 0, 0.8), (2.0, 20, 0.5), (1.5, 3, 0.05)):
        warpers = [TemperatureLogitsWarper(temperature)]
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        expected = LogitsProcessorList(warpers)(None, logits.clone())[0].softmax(-1)
        random = torch.Generator().manual_seed(0)
        drawn = _choose(logits.expand(4000, -1), temperature, top_k, top_p, random)[:, 0]
        counts = torch.bincount(drawn, minlength=50) / 4000
        assert set(drawn.tolist()) <= set(expected.nonzero().flatten().tolist())
        assert (counts - expected).abs().max() < 0.03


def test_impossible_settings():
    model = random_model()
    for settings in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}):
        try:
            generate(model, [1], max_new_tokens=1, **settings)
        except UserError as error:
            assert re.search(r"at least 0|above 0 and at most 1", str(error))
        else:
            raise AssertionError(settings)
    for prompts in ([], [[]], [[1], []]):
        try:
            list(stream(model, prompts, max_new_tokens=1))
        except UserError as error:
            assert "at least one token" in str(error)
        else:
            raise AssertionError(prompts)
