import torch
from conftest import random_model
from test_model import hf_twin

from minillama import generate


def test_greedy_equals_transformers():
    model = random_model()
    prompt = [5, 77, 301, 12]
    expected = hf_twin(model).generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate(model, prompt, max_new_tokens=24) == expected[0, 4:].tolist()


def test_stops_before_a_stop_token():
    model = random_model()
    tokens = generate(model, [5, 77], max_new_tokens=10)
    stop = tokens[4]
    assert generate(model, [5, 77], max_new_tokens=10, stop_ids=[stop]) == tokens[: tokens.index(stop)]


def test_sampling_follows_the_softmax_and_the_seed():
    model = random_model()
    first = [generate(model, [5], max_new_tokens=1, temperature=2.0, seed=seed)[0] for seed in range(300)]
    assert first == [generate(model, [5], max_new_tokens=1, temperature=2.0, seed=seed)[0] for seed in range(300)]
    probability = (model(torch.tensor([[5]]))[0, -1] / 2).softmax(-1)
    likely = probability > probability.median()
    share = sum(likely[t].item() for t in first) / 300
    assert abs(share - probability[likely].sum().item()) < 0.1
