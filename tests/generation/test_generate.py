"""generate(): stopping, batches, modes, and the errors that help."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lit_llm.generation import Generated, Sampling, generate, stream
from tests.generation.recomputation import CONVOLUTIONS, PROMPTS, VOCABULARY, build, recomputed

DRAWN = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=3)
STOPS = [0, *range(2, 61, 4)]
FAMILIES = pytest.mark.parametrize("family", ["decllm", "redllm"])


@FAMILIES
@pytest.mark.parametrize("place", [0, 3])
def test_generation_ends_at_a_stop_token_and_leaves_it_out(family, place):
    model = build(family)
    answers = [recomputed(model, prompt, 10)[0] for prompt in PROMPTS]
    stop = answers[0][place]
    for answer, result in zip(answers, generate(model, PROMPTS, max_new_tokens=10, stop=[stop, 59]), strict=True):
        ends = [step for step, token in enumerate(answer) if token in (stop, 59)]
        assert result.tokens == answer[: ends[0] if ends else 10]
        assert result.stopped == bool(ends)
        assert len(result.log_probabilities) == len(result.tokens)


@pytest.mark.parametrize(
    ("family", "prefix", "overrides"),
    [
        ("decllm", "causal", []),
        ("decllm", "bidirectional", ["attention.window=3"]),
        ("redllm", "causal", []),
        ("redllm", "causal", ["decoder.cross_attention_mode=merged"]),
        ("palm", "causal", []),
        ("yoco", "causal", []),
        ("retention", "causal", []),
        ("mixers", "causal", []),
        ("decllm", "causal", [*CONVOLUTIONS, "attention.value_residual=fixed", "attention.window=3"]),
        ("redllm", "causal", [*CONVOLUTIONS, "attention.relative_bias=alibi"]),
        ("double", "causal", []),
        ("double", "causal", ["decoder.cross_attention_mode=merged"]),
    ],
)
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_the_batch_size_changes_nothing(family, prefix, overrides, sampling):
    """With fewer rows than prompts, rows that have ended make room for the prompts that wait."""
    model = build(family, *overrides)
    prompts = [*PROMPTS, *([token, token] for token in range(2, 12))]
    results = [
        generate(model, prompts, max_new_tokens=20, stop=STOPS, sampling=sampling, prefix=prefix, batch_size=size)
        for size in (1, 2, 7, 100)
    ]
    for other in results[1:]:
        assert [(r.tokens, r.stopped) for r in other] == [(r.tokens, r.stopped) for r in results[0]]
    assert True in {r.stopped for r in results[0]}
    assert len({len(r.tokens) for r in results[0]}) > 1  # rows end one after the other


@FAMILIES
def test_a_row_that_has_ended_makes_room_for_the_next_prompt(family):
    """Two rows decode as long as a prompt waits, and the tokens come as they are chosen."""
    model = build(family)
    prompts = [[3], [4, 17], [3, 3, 8], [9, 2, 1, 5]]
    answers = [recomputed(model, prompt, 8)[0] for prompt in prompts]
    stop = answers[3][1]  # of the longest prompt, which is read first
    lengths = [answer.index(stop) + 1 if stop in answer else 8 for answer in answers]
    assert lengths[3] == 2
    rows = []
    model.decoder.layers[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    tokens = list(stream(model, prompts, max_new_tokens=8, stop=[stop], batch_size=2))
    order = [token.prompt for token in tokens]
    assert order[:5] == [3, 2, 3, 2, 1 if lengths[2] > 2 else order[4]]
    assert 2 in rows[2:]  # a pass over two rows after the first of them had ended
    for prompt, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
        chosen = [token.token for token in tokens if token.prompt == prompt]
        assert chosen == [*answer[: length - 1], None if stop in answer else answer[length - 1]]


@FAMILIES
def test_a_stream_that_is_left_early_leaves_the_model_as_it_was(family):
    model = build(family).train()
    for _ in stream(model, PROMPTS, max_new_tokens=5):
        assert not torch.is_inference_mode_enabled()
        break
    assert all(module.training for module in model.modules())


@FAMILIES
def test_what_is_drawn_for_a_prompt_does_not_depend_on_its_neighbours(family):
    model = build(family)
    among = generate(model, PROMPTS, max_new_tokens=20, stop=(), sampling=DRAWN)
    others = [[50, 51], [40] * 20, PROMPTS[2], [60], []]
    beside_others = generate(model, others, max_new_tokens=20, stop=(), sampling=DRAWN)
    assert beside_others[2].tokens == among[2].tokens
    assert beside_others[4].tokens != among[4].tokens


@FAMILIES
def test_equal_prompts_are_drawn_apart_and_seeds_too(family):
    model = build(family)
    drawn = [
        tuple(result.tokens)
        for seed in (0, 1)
        for result in generate(
            model, [[5, 6]] * 4, max_new_tokens=20, stop=(), sampling=Sampling(temperature=1.5, seed=seed)
        )
    ]
    assert len(set(drawn)) == 8
    greedy = generate(model, [[5, 6]] * 4, max_new_tokens=20, stop=())
    assert len({tuple(result.tokens) for result in greedy}) == 1


@FAMILIES
def test_a_drawn_tokens_log_probability_is_the_models_own(family):
    """Of the whole distribution at temperature 1, whatever was drawn from: comparable with val/target_nll."""
    model = build(family)
    result = generate(model, [PROMPTS[0]], max_new_tokens=8, stop=(), sampling=DRAWN)[0]
    source, target = torch.tensor([PROMPTS[0]]), torch.tensor([[1, *result.tokens[:-1]]])
    with torch.no_grad():
        if family == "redllm":
            logits = model(source, target)[0]
        else:
            logits = model(torch.cat([torch.tensor([[1]]), source, target[:, 1:]], 1))[0, len(PROMPTS[0]) :]
    nats = nn.functional.cross_entropy(logits, torch.tensor(result.tokens), reduction="none")
    assert result.log_probabilities == pytest.approx([-float(nat) for nat in nats], abs=1e-9)


@FAMILIES
def test_begin_and_end_are_the_callers_to_name(family):
    """As tokens of the text they give what a forward pass over that text gives."""
    model = build(family)
    found = generate(model, [[], [4, 5]], max_new_tokens=1, stop=(), begin=33, end=44)
    for prompt, result in zip([[], [4, 5]], found, strict=True):
        if family == "redllm":
            logits = model(torch.tensor([prompt or [44]]), torch.tensor([[33]]))
        else:
            logits = model(torch.tensor([[33, *prompt]]))
        assert result.tokens == [int(logits[0, -1].argmax())]


@FAMILIES
def test_dropout_is_off_and_every_module_is_as_before(family):
    model = build(family)
    wanted = generate(model, PROMPTS, max_new_tokens=5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    model.decoder.layers[0].eval()  # frozen, say
    before = [module.training for module in model.modules()]
    assert [r.tokens for r in generate(model, PROMPTS, max_new_tokens=5)] == [r.tokens for r in wanted]
    assert [module.training for module in model.modules()] == before


@FAMILIES
def test_training_goes_on_after_generating(family):
    """Nothing made in inference mode stays behind in the model."""
    model = build(family)
    generate(model, PROMPTS, max_new_tokens=3)
    tokens = torch.randint(VOCABULARY, (2, 5))
    model(*[tokens] * (1 + (family == "redllm"))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@FAMILIES
def test_prompts_may_be_arrays(family):
    model = build(family)
    arrays = [np.array(prompt, dtype=np.int64) for prompt in PROMPTS]
    assert generate(model, arrays, max_new_tokens=3) == generate(model, PROMPTS, max_new_tokens=3)


def test_generating_loads_nothing_that_a_bare_machine_lacks():
    """Beyond torch, pydantic and the reader of configuration files."""
    code = "import sys, lit_llm.generation; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"lightning", "mlflow", "transformers", "tokenizers", "torchmetrics", "scipy", "optuna"}
    assert heavy & {*done.stdout.split()} == set()


def test_no_prompts_give_no_results():
    assert generate(build("decllm"), [], max_new_tokens=3) == []


def test_logits_that_are_no_numbers_are_an_error_that_names_the_prompt():
    model = build("decllm")
    with torch.no_grad():
        model.embedding.weight[17] = torch.nan
    for sampling in (Sampling(), DRAWN):
        with pytest.raises(FloatingPointError, match=r"token 0 after prompt 1 .*diverged"):
            generate(model, [[], [4, 17]], max_new_tokens=3, sampling=sampling)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("decllm", {"max_new_tokens": 0}, "max_new_tokens: 0 is too few; at least 1"),
        ("decllm", {"batch_size": 0}, "batch_size: 0 is too few"),
        ("decllm", {"prompts": [[2], [3, 61]]}, r"prompts\[1\]: 61 is not a token; the model's vocabulary is 0 to 60"),
        ("decllm", {"prompts": [[-1]]}, r"prompts\[0\]: -1 is not a token"),
        ("decllm", {"stop": [99]}, "stop: 99 is not a token"),
        ("decllm", {"begin": 61}, "begin: 61 is not a token"),
        ("redllm", {"end": 61}, "end: 61 is not a token"),
        ("decllm", {"prefix": "open"}, "prefix: 'open' is unknown; causal or bidirectional"),
        ("redllm", {"prefix": "bidirectional"}, "prefix: bidirectional changes nothing here: an encoder sees all"),
    ],
)
def test_what_cannot_be_is_refused_by_name(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(build(family), **{"prompts": [[2]], "max_new_tokens": 1, **arguments})


def test_a_result_begins_empty():
    assert Generated() == Generated(tokens=[], log_probabilities=[], stopped=False)
