"""Learned absolute positions: the formula, GPT-2, which rows a token reads, and texts longer than the table."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm import load_experiment
from lit_llm.config.problems import InputError
from lit_llm.data.tokenizers import Bytes
from lit_llm.generation import Sampling, generate, prefill
from lit_llm.models.adapt import adaptation_of
from lit_llm.models.build import build_model
from lit_llm.models.parameter_groups import parameter_groups
from lit_llm.models.parameters import parameter_shapes
from lit_llm.models.positions import positions_read
from lit_llm.models.scaling import initial_deviations
from lit_llm.objectives.collate import collate, collate_packed
from lit_llm.objectives.config import MasksConfig
from lit_llm.runs.trained_model import complete_texts, stream_text
from lit_llm.training.optimizers.config import AdamW, Muon
from lit_llm.training.optimizers.multipliers import multipliers_of
from tests.generation import recomputation
from tests.tiny_models import VOCABULARY, build, config, ids, resolved

ROWS, S, T = 20, 7, 9
LENGTHS = torch.tensor([3, S])
CONTINUOUS = ["embedding.positions=continuous", f"embedding.max_positions={ROWS}"]
RESTART = ["embedding.positions=restart", f"embedding.max_positions={ROWS}"]


def stack_input(stack, run):
    """B x T x D: what the first layer of a stack reads in `run`."""
    seen = []
    handle = stack.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    (x,) = seen
    return x


@pytest.mark.parametrize(
    ("family", "overrides", "positions"),
    [
        ("decllm", CONTINUOUS, torch.arange(T)),
        ("yoco", RESTART, torch.arange(T)),  # no source that the row could follow
        ("redllm", CONTINUOUS, LENGTHS[:, None] + torch.arange(T)),
        ("redllm", [*CONTINUOUS, "tie_layers=true"], LENGTHS[:, None] + torch.arange(T)),
        ("redllm", RESTART, torch.arange(T)),
        ("double", CONTINUOUS, torch.arange(T)),
        ("double", RESTART, torch.arange(T) % 5),  # in blocks of five
    ],
)
def test_a_stack_reads_the_sum_of_a_tokens_row_and_a_positions_row(family, overrides, positions):
    model = build(family, *overrides, "embedding.scaled=true")
    tokens, source = ids(2, T), ids(2, S)
    inputs = (source, tokens, LENGTHS) if family == "redllm" else (tokens,)
    state = model.state_dict()
    words = F.embedding(tokens, state["embedding.weight"]) * 32**0.5
    expected = words + F.embedding(positions, state["position_embedding.weight"])
    assert_close(stack_input(model.decoder, lambda: model(*inputs)), expected)
    if family in ("redllm", "double"):
        read = source if family == "redllm" else tokens[:, :5]  # the last block is read by nobody
        words = F.embedding(read, state["embedding.weight"]) * 32**0.5
        expected = words + state["encoder_position_embedding.weight"][: read.shape[1]]
        assert_close(stack_input(model.encoder, lambda: model(*inputs)), expected)


def test_the_norm_of_the_embeddings_is_over_the_sum():
    model, tokens = build("decllm", *CONTINUOUS, "embedding.norm=true", "norm.function=layer_norm"), ids(2, T)
    read = model.embedding.weight[tokens] + model.position_embedding.weight[:T]
    assert_close(stack_input(model.decoder, lambda: model(tokens)), F.layer_norm(read, (32,), eps=1e-6))


@torch.no_grad()
def test_without_rope_and_with_a_table_decllm_is_a_gpt2():
    """Its norms and its output matrix of attention have biases too, which are zero here."""
    from transformers import GPT2Config, GPT2LMHeadModel

    keys = ["attention.rope=none", "attention.qkv_bias=[q, k, v]", "norm.function=layer_norm", "norm.eps=1e-3"]
    keys += ["feed_forward.bias=true", "feed_forward.activation=gelu_tanh"]
    ours = build("decllm", *CONTINUOUS, *keys, double=False)
    for parameter in ours.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    shape = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": ROWS, "vocab_size": VOCABULARY}
    peer = GPT2LMHeadModel(GPT2Config(**shape, layer_norm_epsilon=1e-3, activation_function="gelu_new")).eval()
    for parameter in peer.parameters():
        parameter.zero_()
    peer.transformer.wte.weight.copy_(ours.embedding.weight)
    peer.transformer.wpe.weight.copy_(ours.position_embedding.weight)
    peer.transformer.ln_f.weight.copy_(ours.decoder.norm.scale)
    for theirs, block in zip(peer.transformer.h, ours.decoder.layers, strict=True):
        parts = [block.self_attention.q, block.self_attention.k, block.self_attention.v]
        # Its matrices are stored as inputs x outputs.
        theirs.attn.c_attn.weight.copy_(torch.cat([part.weight for part in parts]).T)
        theirs.attn.c_attn.bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.attn.c_proj.weight.copy_(block.self_attention.out.weight.T)
        for linear, mine in ((theirs.mlp.c_fc, block.feed_forward.up), (theirs.mlp.c_proj, block.feed_forward.down)):
            linear.weight.copy_(mine.weight.T)
            linear.bias.copy_(mine.bias)
        theirs.ln_1.weight.copy_(block.self_attention_norm.scale)
        theirs.ln_2.weight.copy_(block.feed_forward_norm.scale)
    tokens = ids(2, ROWS)
    assert_close(ours(tokens), peer(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("decllm", CONTINUOUS),
        ("redllm", CONTINUOUS),
        ("double", CONTINUOUS),
        # The last block of the longest example, of eleven tokens, is beyond the table: the encoder's is read by nobody.
        ("double", [RESTART[0], "embedding.max_positions=10"]),
    ],
)
def test_examples_that_share_a_row_count_as_they_do_alone(family, positions):
    model = build(family, *positions, "attention.rope=none")
    lengths = [(2, 4), (5, 6), (3, 2)]
    sources, targets = ([ids(1, pair[side])[0].numpy() for pair in lengths] for side in (0, 1))
    kind = model.config.family
    packed = collate_packed(sources, targets, kind, MasksConfig())
    assert len(packed) < len(lengths)
    alone = [collate([source], [target], kind) for source, target in zip(sources, targets, strict=True)]

    def nats(batch):
        logits = model.unembedding(model.hidden(**batch.inputs)).flatten(0, 1)
        return F.cross_entropy(logits, batch.targets.flatten(), reduction="none")[batch.places]

    assert_close(nats(packed).sort()[0], torch.cat([nats(batch) for batch in alone]).sort()[0])


# --- longer texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides", "source", "target", "needed"),
    [
        ("decllm", CONTINUOUS, 4, 9, 13),
        ("redllm", CONTINUOUS, 4, 9, 13),
        ("redllm", CONTINUOUS, 0, 9, 10),  # an empty source is one token
        ("redllm", RESTART, 4, 9, 9),
        ("double", CONTINUOUS, 4, 9, 13),
        ("double", RESTART, 4, 9, 10),  # the encoder's, of two complete blocks of five
    ],
)
def test_a_text_needs_the_positions_that_its_tokens_have(family, overrides, source, target, needed):
    """Judge: the largest position that either table is asked for."""
    model = build(family, *overrides)
    assert positions_read(model.config, source, target) == needed
    asked = []
    for name, module in model.named_modules():
        if name.endswith("position_embedding"):
            module.register_forward_pre_hook(lambda _, args: asked.append(int(args[0].max())))
    batch = collate([np.arange(2, 2 + source)], [np.arange(2, 2 + target)], model.config.family)
    model.hidden(**batch.inputs)
    assert max(asked) + 1 == needed


@pytest.mark.parametrize(
    ("family", "overrides", "inputs"),
    [
        ("decllm", CONTINUOUS, (ROWS + 1,)),
        ("redllm", RESTART, (ROWS + 1, 2)),
        ("redllm", RESTART, (2, ROWS + 1)),
        ("redllm", CONTINUOUS, (2, ROWS - 1)),
        ("double", CONTINUOUS, (ROWS + 1,)),
        ("double", RESTART, (ROWS + 6,)),
    ],
)
def test_a_pass_over_more_tokens_than_positions_is_refused(family, overrides, inputs):
    with pytest.raises(ValueError, match=r"the model learns 20 \(model.embedding.max_positions\)"):
        build(family, *overrides)(*(ids(1, length) for length in inputs))


@pytest.mark.parametrize("family", ["decllm", "redllm", "double"])
def test_generation_fills_the_table_and_goes_no_further(family):
    """Rows end at different steps: one that is full is read once more before another prompt takes its place."""
    prompts = [list(map(int, ids(1, 12)[0])) for _ in range(4)]
    keys = ["embedding.positions=continuous", "embedding.max_positions=18", "attention.rope=none"]
    model = recomputation.build(family, *keys)
    free = [recomputation.recomputed(model, prompt, 6)[0] for prompt in prompts]
    stop = free[1][1]
    found = generate(model, prompts, max_new_tokens=6, stop=(stop,), batch_size=2)
    for tokens, answer in zip(free, found, strict=True):
        assert answer.tokens == (tokens[: tokens.index(stop)] if stop in tokens else tokens)
    with pytest.raises(ValueError, match="max_new_tokens: a prompt of 12 tokens with 7 more: 19 positions are needed"):
        generate(model, prompts, max_new_tokens=7)
    with pytest.raises(ValueError, match="a prompt of 12 tokens with 7 more: 19 positions"):
        prefill(model, prompts, max_new_tokens=7)
    decoding = prefill(model, prompts[:1])
    for _ in range(6):
        decoding.step(torch.tensor([2]))
    with pytest.raises(ValueError, match="19 positions are needed"):
        decoding.step(torch.tensor([2]))


@pytest.mark.parametrize(("positions", "other"), [(CONTINUOUS, RESTART), (RESTART, CONTINUOUS)])
def test_an_adapted_model_generates_at_its_own_positions_and_not_at_its_sources(positions, other):
    """Judge: the whole forward pass for each token. The same tables at the source's positions give other logits."""
    source = recomputation.build("redllm", *other, "attention.rope=none")
    target = recomputation.build("redllm", *positions, "attention.rope=none")
    adaptation = adaptation_of(target.config, {"encoder": source.config, "decoder": source.config})
    assert not adaptation.newly_initialised
    given = source.state_dict()
    target.load_state_dict({name: given[origin] for name, (_, origin) in adaptation.taken.items()})
    prompts = [[5, 9, 13, 2], [4, 17, 60, 8, 3, 3, 12]]
    answers = generate(target, prompts, max_new_tokens=6, stop=())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.tokens) == recomputation.recomputed(target, prompt, 6)[0]
        assert not torch.allclose(
            recomputation.next_logits(target, prompt, []), recomputation.next_logits(source, prompt, [])
        )


def test_lit_llm_generate_refuses_a_longer_text_as_wrong_input():
    model = build("decllm", *CONTINUOUS, "vocabulary=300")
    with pytest.raises(InputError, match="a prompt of 12 tokens with 9 more: 21 positions are needed"):
        complete_texts(model, Bytes(), ["a" * 12], 9, Sampling())
    with pytest.raises(InputError, match="21 positions are needed"):
        next(stream_text(model, Bytes(), "a" * 12, 9, Sampling()))


def problems(preset, *overrides):
    """{key: message} of an experiment that is refused."""
    with pytest.raises(InputError) as error:
        load_experiment(preset, [*overrides])
    return {problem.key: problem.message for problem in error.value.problems}


WINDOW = 128
"""Tokens of a training window of the tiny presets."""
LEARNED = ["model.embedding.positions=continuous", "evaluate.extrapolation.lengths=[1, 2]"]


def test_texts_that_are_longer_than_the_table_are_refused_before_a_run():
    rows = f"model.embedding.max_positions={WINDOW}"
    learns = f"positions are needed, and the model learns {WINDOW} (model.embedding.max_positions)"
    assert problems("redllm-tiny", *LEARNED, rows, "evaluate.tasks.names=[x]") == {
        "evaluate.extrapolation.lengths": f"2 windows of {WINDOW} tokens: {2 * WINDOW} {learns}",
        "evaluate.tasks.max_length": f"a question and its answer of {WINDOW} tokens: {WINDOW + 1} {learns}",
    }
    load_experiment("redllm-tiny", [LEARNED[0], rows, "evaluate.extrapolation.lengths=[1]"])
    with pytest.raises(InputError, match=f"sequence_length {WINDOW}: {WINDOW} positions are needed"):
        load_experiment("redllm-tiny", [LEARNED[0], "model.embedding.max_positions=3"])


def test_texts_that_are_longer_than_all_of_the_training_are_refused_where_the_table_has_rows_for_them():
    """Those rows are as they were drawn. Judge: the lengths of the windows and of the finetuning's examples."""
    rows = f"model.embedding.max_positions={4 * WINDOW}"
    asked = [*LEARNED, rows, f"evaluate.likelihood.length={WINDOW + 1}", "evaluate.attention.sequence_length=150"]
    found = problems("decllm-tiny", *asked, f"evaluate.tasks={{names: [x], max_length: {WINDOW + 2}}}")
    untrained = f"and the longest text of the training has {WINDOW}: the other rows"
    needed = {"likelihood.length": 129, "extrapolation.lengths": 256, "attention.sequence_length": 150}
    needed["tasks.max_length"] = 130
    assert set(found) == {f"evaluate.{key}" for key in needed}
    for key, positions in needed.items():
        assert f"{positions} positions are needed, {untrained}" in found[f"evaluate.{key}"]
    # Half of a window is the longest target: more of it is untrained in the decoder's table that restarts there.
    restart = ["model.embedding.positions=restart", rows, "evaluate.extrapolation.lengths=[1]"]
    assert [*problems("redllm-tiny", *restart)] == ["evaluate.extrapolation.lengths"]
    load_experiment("redllm-tiny", [*restart, "evaluate.extrapolation.prefixes=[half]"])


def test_a_longer_finetuning_trains_the_rows_of_the_evaluations_after_it_alone(tmp_path):
    rows = f"model.embedding.max_positions={4 * WINDOW}"
    tuned = ["evaluate.extrapolation.lengths=[1, 2]", "evaluate.examples={}", "finetune.data.input_length=200"]
    asked = [LEARNED[0], rows, *tuned, "finetune.data.target_length=56"]
    path = tmp_path / "tuned.yaml"
    path.write_text("extends: [decllm-tiny, _glosses]\n")
    assert {*problems(path, *asked)} == {"evaluate.extrapolation.lengths", "evaluate.examples"}
    load_experiment(path, [*asked, "evaluate.after=[finetune]"])


def test_an_adapted_table_was_trained_by_its_source():
    adapted = [*LEARNED, f"model.embedding.max_positions={2 * WINDOW}"]
    source = f"{{extends: decllm-tiny, pretrain: {{data: {{sequence_length: {2 * WINDOW}}}}}}}"
    load_experiment("decllm-tiny", [*adapted, f"adapt.from={source}"])
    assert [*problems("decllm-tiny", *adapted, "adapt.from=decllm-tiny")] == ["evaluate.extrapolation.lengths"]


def test_a_teacher_with_too_few_positions_is_named_with_its_key():
    teacher = "{extends: decllm-tiny, model: {embedding: {positions: continuous, max_positions: 60}}, "
    teacher += "pretrain: {data: {sequence_length: 60}}}"
    (found,) = problems("decllm-tiny", f"adapt.from={teacher}", "adapt.distill={}").items()
    assert found[0] == "adapt.distill"
    assert found[1].startswith(
        f"the teacher has learned 60 positions (adapt.from.model.embedding.max_positions), and reads source and target "
        f"as one text of up to {WINDOW}, padding included"
    )


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("decllm", CONTINUOUS),
        ("yoco", CONTINUOUS),
        ("redllm", [*CONTINUOUS, "tie_layers=true", "tie_embeddings=all"]),
        ("redllm", [*RESTART, "encoder.d_model=16", "encoder.attention.heads=2", "tie_embeddings=decoder"]),
        ("double", RESTART),
    ],
)
def test_each_stack_has_a_table_of_its_own(family, overrides):
    model = resolved(family, *overrides)
    shapes, plain = parameter_shapes(model), parameter_shapes(resolved(family, *overrides[2:]))
    tables = {"position_embedding.weight": (ROWS, 32)}
    if model.encoder:
        tables["encoder_position_embedding.weight"] = (ROWS, model.width("encoder"))
    assert shapes == plain | tables
    built = build_model(model, device="meta").named_parameters()
    assert shapes == {name: tuple(parameter.shape) for name, parameter in built}


def test_a_table_is_trained_as_the_embedding_is():
    model = resolved("redllm", *CONTINUOUS, "parametrization={kind: mup, base_width: 8, base_head_dim: 2}")
    groups, deviations = parameter_groups(model), initial_deviations(model)
    for table in ("position_embedding.weight", "encoder_position_embedding.weight"):
        assert groups[table] == groups["embedding.weight"] == ("embeddings",)
        assert deviations[table] == deviations["embedding.weight"]
        for optimizer in (AdamW(lr=1e-3), Muon(lr=1e-3)):
            multipliers = multipliers_of(model, optimizer)
            assert multipliers[table] == multipliers["embedding.weight"]


def test_no_table_leaves_no_trace_and_words_without_effect_are_one_model():
    plain = resolved("redllm")
    assert resolved("redllm", "embedding.max_positions=20") == plain
    assert "embedding" not in plain.model_dump()
    assert config("redllm").embedding.model_dump() == {"scaled": False, "norm": False}
    assert resolved("decllm", *RESTART) == resolved("decllm", *CONTINUOUS)
    assert resolved("redllm", *RESTART) != resolved("redllm", *CONTINUOUS)
    with pytest.raises(InputError, match=r"embedding.max_positions: positions: restart needs the number"):
        config("redllm", "embedding.positions=restart")


def test_an_encoder_made_of_a_decoder_starts_from_its_positions():
    decoder, target = resolved("decllm", *CONTINUOUS), resolved("redllm", *CONTINUOUS)
    taken = adaptation_of(target, {"encoder": decoder, "decoder": decoder}).taken
    assert taken["encoder_position_embedding.weight"] == ("encoder", "position_embedding.weight")
    assert taken["position_embedding.weight"] == ("decoder", "position_embedding.weight")
    shorter = resolved("decllm", CONTINUOUS[0], "embedding.max_positions=8")
    made = adaptation_of(target, {"encoder": shorter, "decoder": shorter})
    assert made.left == ("position_embedding.weight",)
    assert {"position_embedding.weight", "encoder_position_embedding.weight"} <= {*made.newly_initialised}


@pytest.mark.parametrize("place", ["attention", "decoder.self_attention"])
def test_dynamic_scaling_is_refused_with_its_reason(place):
    with pytest.raises(InputError, match=f"{place}.rope_scaling: dynamic changes the base of the frequencies"):
        config("decllm", f"{place}.rope_scaling=dynamic")
