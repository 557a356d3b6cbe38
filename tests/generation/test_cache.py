"""A cache saves repetition and changes nothing: against a whole forward pass for each token, each prompt alone."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from lit_llm.components import kv_cache as cache_module
from lit_llm.components.convolution.cache import ConvolutionStates
from lit_llm.components.kv_cache import KeyValues
from lit_llm.generation import generate, prefill
from lit_llm.models.cost import cache_bytes
from lit_llm.models.stacks import Block
from tests.generation.recomputation import CONVOLUTIONS, PROMPTS, VOCABULARY, build, next_logits, recomputed

NEW = 6
FAMILIES = ["decllm", "palm", "redllm", "yoco", "retention", "mixers", "double"]
NORMS = ["[]", "[q, k, v]", "[v]"]
OUTPUTS = ["none", "head", "concat", "after_out"]
ROPES = ["continuous", "restart", "none"]
PAIRS = [
    [
        "attention.kv_heads=2",
        f"attention.qkv_norm={NORMS[norms]}",
        f"attention.output_norm={output}",
        f"decoder.cross_attention.rope={ROPES[(norms + place) % 3]}",
    ]
    for norms, (place, output) in itertools.product(range(3), enumerate(OUTPUTS))
]
"""Each pair of two of these settings stands in one of the twelve."""
SHARED = [
    ["attention.kv_heads=1"],
    ["attention.kv_heads=4"],
    ["attention.head_dim=12", "attention.kv_heads=2"],
    ["attention.rope=none"],
    ["attention.qkv_norm=[q, k]", "attention.qkv_norm_scale=true"],
    ["attention.qkv_norm=[q, k, v]", "attention.qkv_norm_over=concat", "attention.kv_heads=2"],
    ["attention.output_norm=concat", "attention.output_norm_scale=true"],
    ["attention.gate=per_head", "attention.kv_heads=2"],
    ["attention.gate=per_element", "attention.output_norm=head", "attention.window=3"],
    ["attention.value_residual=learned", "attention.qkv_norm=[v]", "attention.window=3"],
    ["attention.value_residual=fixed", "attention.kv_heads=2"],
    ["attention.rope_theta=20.0"],
    ["attention.qkv_bias=[q, k, v]", "feed_forward.bias=true", "attention.kv_heads=2"],
    ["attention.relative_bias=alibi", "attention.rope=none"],
    ["attention.relative_bias=alibi", "attention.window=5", "attention.kv_heads=2"],
    [
        "attention.rope_fraction=0.5",
        "attention.rope_scaling=yarn",
        "attention.rope_factor=4.0",
        "attention.rope_original_length=8",
    ],
    ["attention={rope_scaling: llama3, rope_factor: 4.0, rope_original_length: 8}"],
    ["embedding.positions=continuous", "embedding.max_positions=20", "attention.rope=none"],
    ["norm.function=layer_norm"],
    ["attention.qkv_norm=[q, k, v]", "attention.norm_function=layer_norm", "attention.qkv_norm_scale=true"],
    ["attention.qkv_norm=[q, v]", "attention.norm_function=layer_norm", "attention.qkv_norm_over=concat"],
    ["tie_embeddings=none"],
    ["attention.window=3", "attention.kv_heads=2"],
    ["attention.window=4", "attention.window_right=2", "decoder.layer_ranges.0.self_attention.window=40"],
    ["attention.softcap=2.0", "attention.window=1"],
    ["attention.relative_bias=per_layer", "attention.relative_buckets=8", "attention.relative_distance=12"],
    ["attention.relative_bias=shared", "attention.window=5", "attention.scale=1.0", "attention.rope=none"],
    ["attention.rope_factor=4.0", "attention.softcap=5.0", "attention.kv_heads=2"],
    ["norm.placement=sandwich", "embedding.scaled=true", "output.softcap=3.0"],
    ["norm.placement=parallel"],
    ["norm.placement=post", "embedding.norm=true"],
    ["norm.placement=output", "output.head=dense", "output.bias=true"],
    ["norm.skip_first=true", "norm.function=layer_norm", "feed_forward.activation=reglu"],
    ["parametrization={kind: completep, base_width: 8, base_depth: 1, base_head_dim: 2}", "embedding.scaled=true"],
    ["residual={kind: layer_scale, initial: 0.5}", "initialisation=t5"],
    ["residual=rezero"],
]
MERGED = "decoder.cross_attention_mode=merged"
RED = [
    ["tie_embeddings=inputs"],
    ["tie_layers=true", "attention.window=3"],
    ["embedding.positions=restart", "embedding.max_positions=20", "encoder.d_model=24", "tie_embeddings=decoder"],
    ["decoder.self_attention.kv_heads=2", "decoder.cross_attention.kv_heads=1"],
    ["decoder.layer_ranges.1.cross_attention.rope=restart", "decoder.layer_ranges.0.cross_attention.rope_theta=50.0"],
    ["decoder.self_attention.rope=none", "encoder.layers=1", "decoder.layers=3"],
    *([MERGED, f"attention.rope={rope}", "attention.qkv_norm=[q, k]", "attention.kv_heads=2"] for rope in ROPES),
    [MERGED, "attention.gate=per_element"],
    ["residual=deepnorm", "norm.placement=post", "encoder.layers=3"],
    ["output.future_tokens=2"],
    [MERGED, "decoder.layer_ranges.0.self_attention.window=2", "attention.softcap=2.0"],
    ["decoder.layer_ranges.1.cross_attention_mode=none"],
    [*CONVOLUTIONS, "attention.window=3", "attention.qkv_norm=[q, k]"],
    ["encoder.experts={count: 3}", "decoder.layer_ranges.1.experts={count: 4, top_k: 1, normalised: false}"],
    ["decoder.layer_ranges.0.cross_attention_mode=merged", "attention.output_norm=head"],
    ["encoder.d_model=24", "tie_embeddings=decoder", "decoder.cross_attention.kv_heads=2"],
]
DEC = [
    *([f"attention.qkv_norm={norms}", f"attention.output_norm={out}"] for norms in NORMS for out in OUTPUTS),
    ["attention.qkv_norm=[q, k, v]", "attention.kv_heads=2", "tie_embeddings=none"],
    ["decoder.layer_ranges.1.self_attention.rope=none"],
    ["decoder.experts={count: 3, shared_d_ff: 8}"],
    ["decoder.experts={count: 4, top_k: 2, balance: bias}", "feed_forward.bias=true"],
    ["residual=deepnorm", "norm.placement=post"],
    ["output.future_tokens=2"],
    [*CONVOLUTIONS, "attention.kv_heads=2"],
]
PALM = [
    *([f"attention.qkv_norm={norms}", f"attention.output_norm={out}"] for norms in NORMS for out in OUTPUTS),
    *([f"decoder.partial_attention.rope={rope}", "attention.kv_heads=2"] for rope in ("continuous", "none")),
    ["decoder.partial_attention={kv_heads: 1, head_dim: 12, rope_theta: 50.0}", "norm.function=layer_norm"],
    ["decoder.partial_attention={gate: per_head}"],
    ["decoder.partial_attention=null", "decoder.layer_ranges.1.partial_attention=palm"],
]
NO_RANGES = [overrides for overrides in SHARED if not any(o.startswith("decoder.") for o in overrides)]
YOCO = [
    [o if "relative_bias" not in o else o.replace("attention", "self_decoder.self_attention", 1) for o in overrides]
    for overrides in NO_RANGES
]
YOCO += [
    [f"attention.qkv_norm={norms}", f"attention.output_norm={output}", "attention.kv_heads=2"]
    for norms in NORMS
    for output in OUTPUTS
]
YOCO += [
    ["attention.qkv_norm=[q, k, v]", "attention.qkv_norm_scale=true", "cross_decoder.layers=3"],
    ["attention.qkv_norm=[q, k]", "attention.qkv_norm_over=concat", "attention.qkv_norm_scale=true"],
    [
        "self_decoder.self_attention.window=null",
        "cross_decoder.layer_ranges.0.cross_attention={heads: 8, kv_heads: 4, head_dim: 8}",
    ],
    ["attention.convolution=[qkv]", "self_decoder.feed_forward={convolution: [hidden], activation: gelu}"],
    ["self_decoder.layers=3", "self_decoder.layer_ranges.0-2/2.self_attention.window=1", "cross_decoder.layers=1"],
]
RETENTION = [
    ["self_decoder.retention.heads=2", "self_decoder.retention.value_dim=12", "attention.kv_heads=2"],
    ["self_decoder.retention.chunk=100", "attention.rope=none", "norm.placement=sandwich"],
    ["self_decoder.retention=null", "self_decoder.layer_ranges.1.retention={heads: 1}", "attention.window=3"],
    ["norm.skip_first=true", "norm.function=layer_norm", "tie_embeddings=none"],
]
MIXERS = [
    ["decoder.layer_ranges.2.mamba2={groups: 2, conv: 1}", "attention.kv_heads=2"],
    ["decoder.layer_ranges.1.gated_deltanet={value_dim: 12, conv: 2}", "norm.placement=sandwich"],
    ["decoder.layer_ranges.0.gla={heads: 2, chunk: 100}", "tie_embeddings=none"],
]
RED_MIXERS = [
    [f"encoder.{mixer}={{chunk: 3}}", f"decoder.{mixer}={{}}"] for mixer in ("gla", "gated_deltanet", "mamba2")
]
_WITHOUT = ("window", "relative_bias")
DOUBLE = [overrides for overrides in SHARED if not any(key in each for key in _WITHOUT for each in overrides)]
DOUBLE += [
    ["embedding.positions=restart", "embedding.max_positions=20", "embedding.norm=true"],
    [MERGED, "attention.qkv_norm=[q, k]", "attention.kv_heads=2"],
    [MERGED, "attention.rope=restart", "block=1"],
    ["decoder.layer_ranges.0.cross_attention_mode=merged", "block=3", "attention.output_norm=head"],
    ["decoder.cross_attention.rope=restart", "decoder.layer_ranges.1.cross_attention_mode=none", "block=2"],
    ["encoder.d_model=24", "tie_embeddings=decoder", "encoder.layers=3", "block=100"],
]
BOTH = ["causal", "bidirectional"]


def reads_the_prefix(family, overrides):
    """Whether the prefix changes what these settings do; others are tested with one prefix."""
    keys = ("window", "relative_bias", "rope", "convolution")
    return family == "palm" or any(key in each for key in keys for each in overrides)


def in_turns(prefixes, number):
    """The prefix of a case; shifted from row to row of four, so that no setting of a product has one prefix alone."""
    return [prefixes[(number + number // 4) % len(prefixes)]]


CASES = [
    pytest.param(family, overrides, prefix, id=f"{family}, {prefix}: {' '.join(overrides)}")
    for family, cases, prefixes in (
        ("redllm", [*PAIRS, *SHARED, *RED], ["causal"]),
        ("decllm", [*DEC, *SHARED], BOTH),
        ("decllm", [["decoder.layer_ranges.0.retention=gated", "attention.window=3"]], ["causal"]),
        ("palm", PALM, BOTH),
        ("yoco", YOCO, BOTH),
        ("retention", RETENTION, ["causal"]),
        ("mixers", MIXERS, ["causal"]),
        ("redllm", RED_MIXERS, ["causal"]),
        ("double", DOUBLE, ["causal"]),
        ("yoco", [[f"self_decoder.{mixer}={{chunk: 3}}"] for mixer in ("gla", "gated_deltanet", "mamba2")], ["causal"]),
        ("yoco", [["self_decoder.experts={count: 3}"]], ["causal"]),
    )
    for number, overrides in enumerate(cases)
    for prefix in (prefixes if reads_the_prefix(family, overrides) else in_turns(prefixes, number))
]


def cached_logits(model, prompts, answers, prefix="causal"):
    """B x T x V: what a cache makes of the same answers, all prompts in one batch."""
    decoding = prefill(model, prompts, prefix=prefix)
    found = [decoding.logits_BV]
    for tokens in list(zip(*answers, strict=True))[:-1]:
        decoding.step(torch.tensor(tokens))
        found.append(decoding.logits_BV)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(
    ("family", "overrides", "prefix"), CASES, ids=lambda value: str(value).replace("attention", "a")
)
def test_greedy_output_is_that_of_recomputation_token_for_token(family, overrides, prefix):
    """Five prompts of different lengths in one batch, one of them empty, against each one alone."""
    model = build(family, *overrides)
    wanted = [recomputed(model, prompt, NEW, prefix) for prompt in PROMPTS]
    found = generate(model, PROMPTS, max_new_tokens=NEW, stop=(), prefix=prefix)
    assert [result.tokens for result in found] == [tokens for tokens, _ in wanted]
    logits = cached_logits(model, PROMPTS, [tokens for tokens, _ in wanted], prefix)
    # Angles of positions are computed in float32 and rounded alike on both sides.
    assert_close(logits, torch.stack([row for _, row in wanted]), rtol=0, atol=1e-9)
    for result, (tokens, row) in zip(found, wanted, strict=True):
        nats = row.log_softmax(-1)[torch.arange(NEW), torch.tensor(tokens)]
        assert_close(torch.tensor(result.log_probabilities, dtype=torch.float64), nats, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_of_this_file_tell_the_prompts_apart(family):
    """Or the test above would compare constants with each other."""
    model = build(family)
    answers = [tuple(recomputed(model, prompt, NEW)[0]) for prompt in PROMPTS]
    assert len(set(answers)) == len(PROMPTS)
    assert len(set(itertools.chain(*answers))) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_the_logits_agree_but_for_rounding(family):
    # Of mixers to 1e-4: their recomputation sums states within chunks and from chunk to chunk, a cache token by token.
    bound = 1e-4 if family == "mixers" else 1e-5
    model = build(family, "attention.qkv_norm=[q, k, v]", dtype=torch.float32)
    wanted = [recomputed(model, prompt, NEW) for prompt in PROMPTS]
    logits = cached_logits(model, PROMPTS, [tokens for tokens, _ in wanted])
    expected = torch.stack([row for _, row in wanted])
    assert_close(logits, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_a_cache_rounds_no_worse_than_recomputation(family, autocast):
    """Both round the same quantities as often, in another order: against float32 the errors are of one size, to 20%.
    Some thirty roundings of up to 2^-9 = 0.2% each, of random signs, stay below 6% of the logits' norm."""
    model = build(family, "attention.qkv_norm=[q, k, v]", dtype=torch.float32)
    answers = [recomputed(model, prompt, NEW)[0] for prompt in PROMPTS]
    exact = cached_logits(model, PROMPTS, answers)
    if not autocast:
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cached = cached_logits(model, PROMPTS, answers)
        whole = torch.stack(
            [
                torch.stack([next_logits(model, prompt, answer[:step]) for step in range(NEW)])
                for prompt, answer in zip(PROMPTS, answers, strict=True)
            ]
        )
        generate(model, PROMPTS, max_new_tokens=NEW)
    assert cached.dtype == torch.bfloat16
    errors = [float((found.float() - exact).norm() / exact.norm()) for found in (cached, whole)]
    assert 0 < errors[0] < 0.06
    # One step of a recurrence sums in float32 what a chunk sums in bfloat16, and rounds the state once more.
    assert errors[0] == pytest.approx(errors[1], rel=0.4 if family in ("retention", "mixers") else 0.2)


@pytest.mark.parametrize("family", FAMILIES[:-1])
@pytest.mark.parametrize("room", [1, 16])
def test_a_cache_that_is_full_several_times_loses_nothing(family, room, monkeypatch):
    """40 tokens: more than the room that is made at once."""
    monkeypatch.setattr(cache_module, "SPARE_TOKENS", room)
    model, prompts = build(family), [PROMPTS[0], PROMPTS[2]]
    wanted = [recomputed(model, prompt, 40)[0] for prompt in prompts]
    assert [result.tokens for result in generate(model, prompts, max_new_tokens=40, stop=())] == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_go_on_alone_as_they_would_have_beside_the_others(family):
    """First without the longest prompt, then one row alone; the cache was cut twice."""
    model = build(family)
    wanted = [recomputed(model, prompt, 6) for prompt in PROMPTS]
    decoding, rows = prefill(model, PROMPTS), list(range(len(PROMPTS)))
    for step in range(6):
        assert_close(decoding.logits_BV, torch.stack([wanted[row][1][step] for row in rows]), rtol=0, atol=1e-9)
        chosen = {2: [4, 1, 2, 0], 4: [2]}.get(step, range(len(rows)))  # places among those that still run
        if step in (2, 4):
            decoding.keep(chosen)
            rows = [rows[place] for place in chosen]
        decoding.step(torch.tensor([wanted[row][0][step] for row in rows]))


# --- what is computed ------------------------------------------------------------------------------------------------


def tokens_read(model, part):
    """[(rows, tokens) of each call] of a module, filled as it is called."""
    calls = []
    part.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape[:2])))
    return calls


def test_a_decoder_only_model_reads_the_prompts_once_and_then_a_token_at_a_time():
    model = build("decllm")
    calls = tokens_read(model, model.decoder.layers[1])
    generate(model, [PROMPTS[0], PROMPTS[2]], max_new_tokens=4, stop=())
    # The fourth token is chosen and need not be read.
    assert calls == [(2, 1 + len(PROMPTS[0])), (2, 1), (2, 1), (2, 1)]


def test_partial_attention_computes_the_sources_keys_and_values_once():
    model = build("palm")
    partial = model.decoder.layers[1].partial_attention
    made, keys, values, queries = (tokens_read(model, part) for part in (partial.a1, partial.k, partial.v, partial.q))
    generate(model, [PROMPTS[0], PROMPTS[2]], max_new_tokens=4, stop=())
    assert made == keys == values == [(2, 1 + len(PROMPTS[0]))]
    assert queries == [(2, 1 + len(PROMPTS[0])), (2, 1), (2, 1), (2, 1)]


def test_an_encoder_decoder_reads_the_source_once_and_computes_cross_keys_and_values_once():
    model = build("redllm")
    cross = model.decoder.layers[1].cross_attention
    encoded, keys, values = (tokens_read(model, part) for part in (model.encoder, cross.k, cross.v))
    decoded = tokens_read(model, model.decoder.layers[1])
    generate(model, [PROMPTS[0], PROMPTS[2]], max_new_tokens=4, stop=())
    assert encoded == keys == values == [(2, len(PROMPTS[0]))]
    assert decoded == [(2, 1)] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_have_stopped_leave_the_computation(family):
    model, prompts = build(family), [PROMPTS[0], PROMPTS[2], PROMPTS[3]]
    answers = [recomputed(model, prompt, 8)[0] for prompt in prompts]
    stop = answers[1][3]
    lengths = [answer.index(stop) if stop in answer else 8 for answer in answers]
    assert min(lengths) < 7
    calls = tokens_read(model, model.decoder.layers[0])
    generate(model, prompts, max_new_tokens=8, stop=[stop])
    running = [sum(length > step for length in lengths) for step in range(7)]
    assert [rows for rows, _ in calls[1:]] == [rows for rows in running if rows]


def test_a_decoder_decoder_reads_the_prompts_with_its_first_half_alone():
    """The cross-decoder sees the last token of each prompt, and keys and values are made once for all of its layers."""
    model = build("yoco", "cross_decoder.layers=3")
    layers, decoder = model.decoder.layers, model.decoder
    first, last, keys = (tokens_read(model, part) for part in (layers[1], layers[4], decoder.shared_kv.k))
    generate(model, [PROMPTS[0], PROMPTS[2]], max_new_tokens=4, stop=())
    assert first == keys == [(2, 1 + len(PROMPTS[0])), (2, 1), (2, 1), (2, 1)]
    assert last == [(2, 1)] * 4


def test_merged_attention_copies_its_source_only_when_rows_leave():
    """Source and row lie in one tensor, so a token adds one slot, whatever the length of the source."""
    model = build("redllm", MERGED, "decoder.layer_ranges.0.self_attention.window=3")
    decoding, joined = prefill(model, PROMPTS, max_new_tokens=10), []
    for rows in (5, 5, 5, 2, 2, 2):
        if rows < len(decoding.logits_BV):
            decoding.keep([0, 3])
        decoding.step(torch.full((rows,), 7))
        joined.append([vars(layer["self_attention"])["_joined"][0] for layer in decoding.cache.layers])
    first, second = joined[0], joined[3]
    assert all(a is b for later in joined[1:3] for a, b in zip(later, first, strict=True))
    assert all(a is b for later in joined[4:] for a, b in zip(later, second, strict=True))
    assert all(a is not b for a, b in zip(first, second, strict=True))


def test_merged_attention_copies_nothing_while_a_first_block_has_no_source():
    decoding, joined = prefill(build("double", MERGED, "block=12"), [[], [3]], max_new_tokens=10), []
    for _ in range(4):
        decoding.step(torch.full((2,), 7))
        joined.append([vars(layer["self_attention"])["_joined"][0] for layer in decoding.cache.layers])
    assert all(a is b for later in joined[1:] for a, b in zip(later, joined[0], strict=True))


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("decllm", []),
        ("decllm", ["attention.kv_heads=1"]),
        ("decllm", ["attention.head_dim=12", "decoder.layers=3"]),
        ("redllm", []),
        ("redllm", ["decoder.self_attention.kv_heads=2", "decoder.cross_attention.kv_heads=1"]),
        ("redllm", ["encoder.layers=1", "decoder.layers=3"]),
        ("redllm", CONVOLUTIONS),
        ("decllm", [CONVOLUTIONS[1], "attention.kv_heads=2"]),
        ("palm", []),
        ("palm", ["decoder.partial_attention.kv_heads=1", "decoder.layers=3"]),
        ("yoco", []),
        ("yoco", ["attention.kv_heads=2", "cross_decoder.layers=3", "self_decoder.self_attention.window=7"]),
        ("retention", []),
        ("retention", ["self_decoder.retention.value_dim=4", "attention.kv_heads=1"]),
        ("decllm", ["decoder.layer_ranges.1.retention.heads=2"]),
        ("mixers", []),
        ("redllm", ["encoder.mamba2={}", "decoder.layer_ranges.1.mamba2={groups: 2}"]),
        ("double", []),
        ("double", [MERGED, "encoder.layers=3", "attention.kv_heads=2", "block=3"]),
    ],
)
def test_the_cache_takes_the_bytes_that_the_analytic_cost_says(family, overrides, dtype):
    """After n chosen tokens, for every row of a mixed batch. An empty source is one token."""
    model = build(family, *overrides, dtype=dtype)
    cost = cache_bytes(model.config, bytes_per_entry=dtype.itemsize)
    sources = [max(len(prompt), 1) if family == "redllm" else len(prompt) for prompt in PROMPTS]
    decoding = prefill(model, PROMPTS)
    for chosen in range(1, 5):
        assert decoding.cache_bytes() == [cost.total(source, chosen) for source in sources]
        decoding.step(torch.full((len(PROMPTS),), 7))
    decoding.keep([3, 1])
    assert decoding.cache_bytes() == [cost.total(sources[row], 5) for row in (3, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_are_those_of_the_tensors_where_nothing_is_padded(family):
    """Without padding and before room is made, what the caches hold is all that they have."""
    prompt = PROMPTS[3][:-1]  # with <s> it fills blocks
    decoding = prefill(build(family), [prompt, prompt])
    found, tensors = [cache for stack in decoding.caches for cache in stack.caches], []
    while found:
        kept = [*vars(found.pop()).values()]
        kept += [inner for states in kept if isinstance(states, dict) for inner in states.values()]
        found += [inner for inner in kept if isinstance(inner, KeyValues | ConvolutionStates)]
        tensors += [inner for inner in kept if isinstance(inner, torch.Tensor)]
    assert sum(decoding.cache_bytes()) == sum(tensor.nbytes for tensor in tensors)


def test_an_ordinary_forward_pass_keeps_nothing():
    model = build("redllm")
    seen = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1]["self_attention"].cache))
    model(torch.randint(VOCABULARY, (2, 5)), torch.randint(VOCABULARY, (2, 4)))
    assert seen == [None] * 4
