"""Arms that compute what another computes are found before anything runs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lit_llm.components.attention.module import Attention
from lit_llm.models import resolve as resolution
from lit_llm.studies.audit import equivalence
from lit_llm.studies.audit import no_ops as module
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from tests.equal_budgets import others

Study = Callable[..., Path]
LR = "pretrain.training.optimizer.lr"
NORM = "model.attention.output_norm"
ROPE = "model.decoder.cross_attention.rope"


@pytest.fixture
def found(write_study: Study) -> Callable[..., list[tuple[str, str, str]]]:
    """[(kind, arm, key)] of findings of a small study, but for budgets; its one named arm is called "baseline"."""

    def of(rest: str, *overrides: str, extends: str = "redllm-tiny") -> list[tuple[str, str, str]]:
        planned = plan(load_study(write_study("probed", rest, extends=extends), overrides))
        return [(finding.kind, finding.arm, finding.key) for finding in others(planned.findings)]

    return of


def grid(*factors: str, design: str = "one_at_a_time") -> str:
    return f"grid: {{design: {design}, factors: {{{', '.join(factors)}}}}}"


def no_ops(findings: list[tuple[str, str, str]]) -> list[str]:
    return [arm for kind, arm, _ in findings if kind == "no_op"]


def test_a_no_op_of_its_own_comparison_is_told_though_an_arm_of_another_computes_the_same(found) -> None:
    """`y` and `z` are compared with `dec`; that `other`, of another comparison, is the same too changes nothing."""
    same = "extends: decllm-tiny, model: {attention: {output_norm: head}}"
    dec = "dec: {extends: decllm-tiny}, other: {baseline: other, " + same + "}"
    findings = found(f"arms: {{{dec}, y: {{{same}}}, z: {{{same}}}}}\ncompare: {{baseline: dec}}")
    assert no_ops(findings) == ["z"]


# --- the same function -----------------------------------------------------------------------------------------------


def test_with_one_source_token_the_weights_of_cross_attention_are_one_whatever_its_positions_and_norms(found) -> None:
    """A softmax over one key is 1: neither a rotation nor a norm of queries and keys can change it. Values count."""
    factors = f"{ROPE}: [continuous, restart, none]", "model.decoder.cross_attention.qkv_norm: [[q, k, v], [v], [q, k]]"
    base = "pretrain.objective.split=1"
    assert no_ops(found(grid(*factors), base)) == ["baseline/rope=restart", "baseline/rope=none", "baseline/qkv_norm=v"]
    assert no_ops(found(grid(*factors))) == []


def test_an_encoder_decoder_that_is_given_no_source_does_not_use_its_cross_attentions_positions(found) -> None:
    """An empty source is one end-of-document token."""
    assert no_ops(found(grid(f"{ROPE}: [continuous, restart]"), "pretrain.objective=causal_lm"))


def test_a_head_of_two_entries_has_one_frequency_which_is_one_whatever_theta(found) -> None:
    factor = grid("model.attention.rope_theta: [1e4, 5e5]")
    assert no_ops(found(factor, "model.attention.head_dim=2")) == ["baseline/rope_theta=500000"]
    assert no_ops(found(factor, "model.attention.head_dim=4")) == []


def test_what_else_differs_in_training_keeps_an_arm_from_being_a_no_op(found, write_study: Study) -> None:
    """Of 2 x 2 arms, that of the other theta repeats the one of its own learning rate, which is not the baseline."""
    rest = grid("model.attention.rope_theta: [1e4, 5e5]", f"{LR}: [1e-3, 1e-2]", design="factorial")
    planned = plan(load_study(write_study("crossed", rest), ["model.attention.head_dim=2"]))
    said = {finding.arm: finding.message for finding in planned.findings if finding.kind == "no_op"}
    assert said.keys() == {"baseline/rope_theta=500000", "baseline/rope_theta=500000/lr=0.01"}
    assert "the same function as baseline," in said["baseline/rope_theta=500000"]
    assert "the same function as baseline/lr=0.01," in said["baseline/rope_theta=500000/lr=0.01"]
    assert all("in spite of model.attention.rope_theta:" in message for message in said.values())


def test_a_scaling_that_changes_slow_frequencies_alone_is_no_no_op(found) -> None:
    """With a head of four entries there is none that turns fewer than once in 1024 tokens."""
    factor = grid("model.attention.rope_factor: [1.0, 8.0]", "model.attention.rope_fraction: [1.0, 0.5, 0.25]")
    scaled = "model.attention.rope_scaling=llama3", "model.attention.rope_original_length=1024"
    assert no_ops(found(factor, *scaled)) == []


@pytest.mark.parametrize("family", ["redllm-tiny", "decllm-tiny"])
def test_what_does_something_is_no_no_op(found, family: str) -> None:
    """The smallest steps of every kind, an eps of 1e-6 to 2e-6 among them."""
    factors = [
        "model.attention.qkv_norm: [[q, k, v], [q, k], [v], []]",
        f"{NORM}: [head, none, concat, after_out]",
        "model.attention.output_norm_scale: [false, true]",
        "model.attention.relative_bias: [none, alibi]",
        "model.attention.qkv_bias: [[], [q]]",
        "model.feed_forward.bias: [false, true]",
        "model.attention.norm_function: [rms_norm, layer_norm]",
        "model.attention.qkv_norm_over: [head, concat]",
        "model.attention.gate: [none, per_head, per_element]",
        "model.attention.value_residual: [none, fixed, learned]",
        "model.attention.convolution: [[], [input], [qkv]]",
        "model.feed_forward.convolution: [[], [input], [hidden]]",
        "model.attention.norm_eps: [1e-6, 2e-6]",
        "model.attention.rope: [continuous, none]",
        "model.attention.rope_theta: [1e4, 1.1e4]",
        "model.attention.kv_heads: [2, 1]",
        "model.norm.function: [rms_norm, layer_norm]",
        "model.norm.scale: [false, true]",
        "model.norm.eps: [1e-6, 2e-6]",
        "model.feed_forward.activation: [swiglu, geglu, gelu]",
        "model.feed_forward.d_ff: [32, 33]",
        "model.vocabulary: [258, 259]",
        "model.decoder.layers: [2, 3]",
        "model.tie_embeddings: [all, none]",
        "pretrain.objective.split: [half, 1, 15, random]",
    ]
    norm = "{model: {attention: {output_norm: head}}, pretrain: {objective: prefix_lm}}"
    findings = found(f"arms: {{baseline: {norm}}}\n{grid(*factors)}", extends=family)
    assert {kind for kind, _, _ in findings} <= {"note"}


def test_the_balance_of_experts_is_no_no_op_though_it_acts_in_training_alone(found) -> None:
    factor = "model.decoder.experts.balance: [none, bias, loss]"
    experts = "{model: {decoder: {experts: {count: 3}}}}"
    assert no_ops(found(f"arms: {{baseline: {experts}}}\n{grid(factor)}")) == []


def test_a_parametrization_is_no_no_op_though_a_small_model_may_not_show_it(found) -> None:
    mup, completep = (f"{{kind: {kind}, base_width: 8, base_depth: 2}}" for kind in ("mup", "completep"))
    arms = f"{{model: {{parametrization: {mup}}}}}, deep: {{model: {{parametrization: {completep}}}}}"
    assert no_ops(found(f"arms: {{baseline: {arms}}}", extends="decllm-tiny")) == []


def test_a_prediction_of_further_tokens_is_no_no_op_though_it_acts_in_training_alone(found) -> None:
    assert no_ops(found(grid("model.output.future_tokens: [0, 1, 2]"))) == []


def test_an_arm_of_another_comparison_that_computes_the_same_is_a_note(found) -> None:
    """`high` is compared with the baseline of 1e-3; that of 1e-2, which computes the same, stands for itself."""
    arms = "red: {}, high: {grid: false, pretrain: {training: {optimizer: {lr: 1e-2}}}}"
    allow = f"allow: [{{key: {LR}, because: meant}}]"
    rest = f"arms: {{{arms}}}\n{grid(f'{LR}: [1e-3, 1e-2]')}\ncompare: {{stratify_by: [{LR}]}}\n{allow}"
    said = [finding for finding in found(rest) if finding[2] == ""]
    assert [kind for kind, _, _ in said] == ["note"]


def test_an_open_prefix_is_no_no_op_even_where_it_is_one_token(found) -> None:
    """<s> belongs to it, so there are two tokens that see each other."""
    factors = "pretrain.objective.split: [half, 1]", "pretrain.masks.prefix: [causal, bidirectional]"
    base = "arms: {baseline: {pretrain: {objective: prefix_lm}}}\n"
    findings = found(base + grid(*factors, design="factorial"), extends="decllm-tiny")
    assert no_ops(findings) == []


def test_sizes_of_the_paper_are_compared_without_being_allocated(corpus: Path, tmp_path: Path) -> None:
    """8 billion parameters, windows of 2048 tokens: one token more in the prefix, one layer more, another theta."""
    path = tmp_path / "large.yaml"
    data = f"{{corpus: {{kind: text, files: ['{corpus}/*.txt']}}}}"
    factors = "pretrain.objective.split: [1024, 1025]", "model.decoder.layers: [14, 15]", "model.d_model: [4096, 4160]"
    bundle = "theta: {a: {model.attention.rope_theta: 1e4}, b: {model.attention.rope_theta: 1.01e4}}"
    keys = f"pretrain: {{data: {data}}}, model: {{attention: {{head_dim: 128}}}}"
    path.write_text(f"study: s\nquestion: q\nextends: redllm-8b\nbase: {{{keys}}}\n{grid(*factors, bundle)}\n")
    assert {finding.kind for finding in plan(load_study(path)).findings} <= {"note"}


def test_a_key_that_the_code_ignores_is_found(found, monkeypatch: pytest.MonkeyPatch) -> None:
    factor = grid(f"{NORM}: [head, after_out, none]")
    assert no_ops(found(factor)) == []
    monkeypatch.setattr(Attention, "output_norm", lambda self, x: x)
    assert no_ops(found(factor)) == ["baseline/output_norm=after_out", "baseline/output_norm=none"]


def test_a_finding_says_on_which_windows_it_was_seen(write_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the study have 32 tokens."""
    rest = grid("model.attention.rope_theta: [1e4, 5e5]")
    ablation = load_study(write_study("seen", rest), ["model.attention.head_dim=2"])
    for longest, said in ((32, "baseline, in spite"), (16, "baseline on windows of 16 tokens, in spite")):
        monkeypatch.setattr(equivalence, "LONGEST", longest)
        (finding,) = others(plan(ablation).findings)
        assert f"is the same function as {said}" in finding.message


def test_a_parameter_without_effect_leaves_two_arms_the_same_function(found, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of the output norm is there, and nothing reads it."""
    from lit_llm.components.norm.module import rms_norm

    def unscaled(self: Attention, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, None, self.config.norm_eps)

    factor = grid("model.attention.output_norm_scale: [false, true]")
    assert no_ops(found(factor)) == []
    monkeypatch.setattr(Attention, "output_norm", unscaled)
    arm = "baseline/output_norm_scale=true"
    assert found(factor) == [("no_op", arm, ""), ("note", arm, "parameters")]


def test_equal_nats_with_other_gradients_are_another_function(found, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm passes its input on, and stops its gradient."""
    monkeypatch.setattr(Attention, "output_norm", lambda self, x: x.detach())
    assert no_ops(found(grid(f"{NORM}: [none, head]"))) == []


def test_no_small_parameter_is_a_constant(write_study: Study) -> None:
    """Scales begin at one, where a product with them shows nothing."""
    (arm,) = load_study(write_study("moved", ""), ["model.norm.scale=true"]).arms
    assert all(parameter.std() > 0.1 for parameter in equivalence.EquivalenceChecker([arm]).model(arm).parameters())


# --- parameters ------------------------------------------------------------------------------------------------------


def test_parameters_that_one_arm_has_alone_are_named_once_for_all_layers(write_study: Study) -> None:
    factors = "model.tie_embeddings: [none, inputs, all]", "model.decoder.self_attention.qkv_scale: [false, true]"
    rest = grid(factors[0], factors[1].replace("qkv_scale", "qkv_norm_scale"), "model.decoder.layers: [2, 3]")
    findings = plan(load_study(write_study("named", rest))).findings
    assert {finding.arm: finding.message for finding in findings if finding.key == "parameters"} == {
        "baseline/tie_embeddings=inputs": "only in baseline: encoder_embedding.weight",
        "baseline/tie_embeddings=all": "only in baseline: encoder_embedding.weight, output.weight",
        "baseline/qkv_norm_scale=true": "only here: decoder.layers.*.self_attention.qkv_scale.{k,q,v}",
    }


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "loaded"),
    [
        (grid(f"{LR}: [1e-3, 1e-2]"), False),  # arms that share their network
        ("arms: {a: {}, b: {model: {attention: {output_norm: none}}, pretrain: {training: {max_steps: 9}}}}", False),
        ("arms: {a: {}, same: {}}", False),
        (grid(f"{NORM}: [head, none]"), True),
    ],
)
def test_torch_is_loaded_only_where_two_fair_arms_have_to_be_built(write_study: Study, rest: str, loaded: bool) -> None:
    code = (
        "import sys; from lit_llm.studies.load import load_study; from lit_llm.studies.plan import plan\n"
        f"plan(load_study({str(write_study('lazy', rest))!r})); plan(load_study('redllm-tiny'))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(loaded)


def test_360_arms_of_two_networks_resolve_each_configuration_once_and_build_and_compute_two(
    write_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, counted = list[object](), Counter[str]()

    def counting(owner: ModuleType, name: str) -> None:
        function = getattr(owner, name)

        def count(*given: object) -> object:
            counted[name] += 1
            return function(*given)

        monkeypatch.setattr(owner, name, count)

    resolve = resolution._resolve
    monkeypatch.setattr(resolution, "_resolve", lambda config: resolved.append(config) or resolve(config))
    counting(equivalence, "build_small")
    counting(equivalence, "_nats")
    rates, clips = [round(1e-4 * (n + 1), 4) for n in range(12)], [n + 1.0 for n in range(15)]
    factors = f"{NORM}: [head, none]", f"{LR}: {rates}", f"pretrain.training.clip_norm: {clips}"
    ablation = load_study(write_study("many", grid(*factors, design="factorial")))
    planned = plan(ablation)
    assert len(planned.arms) == 360
    assert not planned.refused
    assert counted == {"build_small": 2, "_nats": 2}
    assert set(Counter(map(id, resolved)).values()) == {1}
    assert len(resolved) <= 360


def test_what_takes_long_is_said_and_what_does_not_is_not(write_study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    ablation, told = load_study(write_study("told", grid(f"{NORM}: [head, none]"))), list[str]()
    monkeypatch.setattr(module, "PATIENCE", 600.0)
    plan(ablation, log=told.append)
    assert told == []
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    plan(ablation, log=told.append)
    assert told == ["building 2 arms small, to compare what they compute ..."]


def test_a_plan_leaves_torchs_threads_and_random_state_as_they_were(write_study: Study) -> None:
    ablation = load_study(write_study("calm", grid(f"{NORM}: [head, none]")))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        plan(ablation)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def test_small_sizes_keep_order_equality_and_evenness() -> None:
    sizes = [1, 2, 3, 8, 9, 64, 128, 4096, 4097, 16384]
    small = equivalence._small(sizes, 8)
    assert sorted(small.values()) == list(dict.fromkeys(small.values())) == list(small.values())
    assert all(small[size] % 2 == size % 2 and small[size] <= size for size in sizes)
    assert [small[size] for size in sizes if size <= 8] == [1, 2, 3, 8]
    assert max(small.values()) <= 8 + 2 * len(sizes)


# --- decoder-decoder -------------------------------------------------------------------------------------------------


def test_another_chunk_of_retention_is_the_same_function_and_a_window_beyond_the_text_is_no_window(found) -> None:
    chunks = grid("model.self_decoder.retention.chunk: [256, 7]")
    assert len(no_ops(found(chunks, extends="yoco-tiny"))) == 1
    mixers = grid("model.self_decoder.gated_deltanet.chunk: [64, 7]")
    assert len(no_ops(found(mixers, extends="yoco-tiny"))) == 1
    windows = grid("model.attention.window: [32, 1000, 4]")
    findings = found(windows, extends="yoco-tiny")
    assert len(no_ops(findings)) == 1
    assert "1000" in no_ops(findings)[0]


@pytest.mark.parametrize(
    "factor",
    [
        "model.attention.kv_heads: [2, 1]",
        "model.attention.qkv_norm: [[q, k, v], [q]]",
        "model.self_decoder.layer_ranges.0.self_attention.window: [3, 5]",
        "model.self_decoder.retention.value_dim: [8, 4]",
        "model.cross_decoder.cross_attention.output_norm: [none, head]",
    ],
)
def test_a_factor_of_a_decoder_decoder_excuses_what_it_changes(found, factor: str) -> None:
    assert [kind for kind, *_ in found(grid(factor), extends="yoco-tiny") if kind in ("no_op", "refused")] == []
