"""What holds for every mixer with a state: no look ahead, documents, padding, decoding, both directions, and cost."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.components.kv_cache import CacheLengths
from lit_llm.components.masks import AttentionMask
from lit_llm.components.part import Example, Widths
from lit_llm.components.recurrence.cache import RecurrentState
from lit_llm.config.problems import InputError
from lit_llm.models.build import build_model
from tests.recurrent_mixers import (
    CAUSAL,
    MIXERS,
    SHAPE,
    SYSTEMS,
    D,
    behind_the_masks,
    built,
    convolutions_counted,
    decoded,
    inputs_of,
    mixer_of,
    resolved,
    whole,
)
from tests.tiny_models import config

B, T = 2, 13
CHUNKS = [5, 256]
TIGHT = {"rtol": 1e-5, "atol": 1e-5}
TWO_WAY = [name for name in MIXERS if name != "retention"]
every_mixer = pytest.mark.parametrize("name", MIXERS)
every_two_way_mixer = pytest.mark.parametrize("name", TWO_WAY)


def x_of(tokens=T, rows=B, dtype=torch.float64):
    return torch.randn(rows, tokens, D, dtype=dtype)


@every_mixer
def test_no_token_sees_a_later_one(name):
    module, x = mixer_of(name, chunk=4), x_of()
    changed = x.clone()
    changed[:, 7:] = torch.randn(B, T - 7, D, dtype=x.dtype)
    here, there = whole(module, x), whole(module, changed)
    assert_close(there[:, :7], here[:, :7], rtol=0, atol=0)
    assert ((there - here)[:, 7:].abs().amax(-1) > 1e-3).all()


@every_mixer
@pytest.mark.parametrize("prefix", [2, T, torch.tensor([0, 5])])
def test_an_open_prefix_is_refused(name, prefix):
    with pytest.raises(ValueError, match="is causal: a token cannot see later ones"):
        whole(mixer_of(name), x_of(), AttentionMask(causal=True, prefix=prefix))


@every_mixer
@pytest.mark.parametrize("prefix", [0, 1])
def test_a_prefix_of_one_token_is_not_open(name, prefix):
    module, x = mixer_of(name), x_of()
    assert_close(whole(module, x, AttentionMask(causal=True, prefix=prefix)), whole(module, x), rtol=0, atol=0)


@every_mixer
@pytest.mark.parametrize("chunk", [8, 1024])
def test_under_autocast_gates_and_states_are_summed_in_float32(name, chunk):
    """Hundreds of log-gates sum to tens, where neighbours in bfloat16 are more than a tenth apart."""
    module, x = mixer_of(name, torch.float32, chunk=chunk), x_of(1024, rows=1, dtype=torch.float32)
    exact = whole(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = whole(module, x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


# --- documents --------------------------------------------------------------------------------------------------------

DOCUMENTS = torch.tensor([[0] * 3 + [1] * 6 + [2] * 4, [5] * 8 + [0] + [5] * 4])
BORDERS = [(0, 3, 9), (0, 8, 9)]


@every_mixer
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_document_is_read_as_if_it_stood_alone(name, chunk, causal):
    """At its place in the row, which distances do not show. A number that comes back is another document."""
    if not causal and name not in TWO_WAY:
        return
    module, x = mixer_of(name, chunk=chunk, causal=causal), x_of()
    out = whole(module, x, AttentionMask(causal=causal, documents=(DOCUMENTS, DOCUMENTS)))
    for row, starts in enumerate(BORDERS):
        for start, end in zip(starts, (*starts[1:], T), strict=True):
            document, places = x[row : row + 1, start:end], torch.arange(start, end)
            alone = module(document, inputs_of(module, document, AttentionMask(causal=causal), places))
            assert_close(out[row : row + 1, start:end], alone)


# --- both directions --------------------------------------------------------------------------------------------------


def one_way(name, both, direction, **values):
    """A causal mixer with the matrices of one that reads both ways, and the parameters of one of its directions."""
    module = mixer_of(name, **values)
    state = both.state_dict()
    taken = {key: state[key.replace("directions.0", f"directions.{direction}")] for key in module.state_dict()}
    module.load_state_dict(taken)
    return module


@every_two_way_mixer
def test_an_encoders_mixer_is_the_sum_of_one_forwards_and_one_on_the_row_turned_around(name):
    both, x = mixer_of(name, causal=False, chunk=5), x_of()
    forwards, backwards = (one_way(name, both, direction) for direction in (0, 1))
    wanted = whole(forwards, x) + whole(backwards, x.flip(1)).flip(1)
    assert_close(whole(both, x, AttentionMask()), wanted)


@every_two_way_mixer
def test_in_an_encoder_a_row_is_read_as_if_its_padding_were_not_there(name):
    both, x, lengths = mixer_of(name, causal=False, chunk=5), x_of(), torch.tensor([T, 6])
    loud = x.clone()
    loud[1, 6:] = 1e3
    out = whole(both, loud, AttentionMask(key_lengths=lengths))
    for row, length in enumerate(lengths.tolist()):
        assert_close(out[row, :length], whole(both, x[row : row + 1, :length], AttentionMask())[0])


# --- decoding ---------------------------------------------------------------------------------------------------------


@every_mixer
@pytest.mark.parametrize("chunk", [2, 256])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [6, 6, 6], [8, 1, 5]])
def test_decoding_is_reading_it_all_at_once(name, lengths, chunk):
    module, x = mixer_of(name, torch.float32, chunk=chunk), x_of(rows=3, dtype=torch.float32)
    out, _ = decoded(module, x, lengths)
    at_once = whole(module, x)
    for row, length in enumerate(lengths):
        assert_close(out[row], at_once[row, length - 1 : length - 1 + out.shape[1]], rtol=1e-4, atol=1e-4)


@every_mixer
def test_padding_of_a_shorter_prompt_does_not_enter_its_state(name):
    module, x = mixer_of(name, chunk=3), x_of()
    (clean, cache), (loud, other) = decoded(module, x, [9, 4]), decoded(module, x, [9, 4], padding=1e3)
    assert_close(loud, clean, rtol=0, atol=0)
    assert_close(other.cached(), cache.cached(), rtol=0, atol=0)


@every_mixer
def test_kept_rows_go_on_as_if_the_others_had_never_been(name):
    module, x = mixer_of(name), x_of(rows=3)
    _, cache = decoded(module, x[:, :8], [8, 3, 5])
    cache.rows.keep([2, 0])
    cache.keep([2, 0])
    new = x_of(tokens=1)
    out = module(new, inputs_of(module, new, cache.rows.mask(more=1), cache.rows.next_positions(), cache))
    for row, (old, length) in enumerate([(2, 5), (0, 8)]):
        alone = torch.cat([x[old : old + 1, :length], new[row : row + 1]], dim=1)
        assert_close(out[row], whole(module, alone)[0, -1:])


@every_mixer
@pytest.mark.parametrize("autocast", [False, True])
def test_the_state_takes_its_bytes_at_every_length_and_precision(name, autocast):
    module, x = mixer_of(name, torch.float32), x_of(dtype=torch.float32)
    part = resolved(name, {**SHAPE, **MIXERS[name][1]})
    states = part.cache_bytes(2 if autocast else 4, False, Widths(D, D)).states
    for tokens, lengths in ((1, [1, 1]), (12, [5, 12]), (T, [5, 12])):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, cache = decoded(module, x[:, :tokens], lengths)
        assert cache.bytes() == [states] * B
        kept = [cache.cached(), *cache.convolution.states.values()]
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == B * states


# --- cost -------------------------------------------------------------------------------------------------------------

WIDTHS = [SHAPE, {"heads": 1, "head_dim": 2, "value_dim": 9}]
every_width = pytest.mark.parametrize("values", WIDTHS)


@every_mixer
@every_width
@pytest.mark.parametrize("causal", [True, False])
def test_parameters_are_those_of_the_built_module(name, values, causal):
    if not causal and name not in TWO_WAY:
        return
    part = resolved(name, {**values, **({"groups": 1} if "groups" in name else {})}, causal=causal)
    shapes = {key: tuple(parameter.shape) for key, parameter in built(part, causal).named_parameters()}
    assert part.shapes(Widths(D, D)) == shapes


def counted(module, tokens, cache=None, mask=CAUSAL):
    """FLOPs by torch's counter."""
    x = torch.randn(1, tokens, D)
    with convolutions_counted(module), FlopCounterMode(display=False, custom_mapping=SYSTEMS) as counter:
        module(x, inputs_of(module, x, mask, cache=cache))
    return counter.get_total_flops()


@every_mixer
@every_width
@pytest.mark.parametrize("tokens", [1, 4, 14])
@pytest.mark.parametrize("keep_state", [False, True])
def test_flops_are_those_of_torchs_counter_without_the_masked_pairs(name, values, tokens, keep_state):
    part = resolved(name, {**values, **({"groups": 1} if "groups" in name else {}), "chunk": 4})
    cache = RecurrentState(CacheLengths([tokens], torch.device("cpu"))) if keep_state else None
    module = built(part, dtype=torch.float32)
    assert part.flops(Example(tokens, keep_state=keep_state), Widths(D, D)) == (
        counted(module, tokens, cache) - behind_the_masks(part, tokens)
    )


@every_two_way_mixer
def test_flops_of_both_directions_are_those_of_torchs_counter(name):
    part = resolved(name, {**SHAPE, **MIXERS[name][1], "chunk": 4}, causal=False)
    module = built(part, causal=False, dtype=torch.float32)
    wanted = counted(module, 14, mask=AttentionMask()) - behind_the_masks(part, 14)
    assert part.flops(Example(14, causal=False), Widths(D, D)) == wanted


@every_mixer
def test_a_step_costs_what_torchs_counter_says_however_long_the_row(name):
    part = resolved(name, {**SHAPE, **MIXERS[name][1]})
    module = built(part, dtype=torch.float32)
    for before in (1, 30):
        cache = RecurrentState(CacheLengths([before], torch.device("cpu")))
        counted(module, before, cache)
        wanted = counted(module, 1, cache)
        assert part.flops(Example(1, before=before, decoding=True), Widths(D, D)) == wanted


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "sizes"),
    [
        ("retention", (64, 64)),
        ("gla", (32, 64)),
        ("gated_deltanet", (64, 64)),
        ("mamba2", (128, 128)),
    ],
)
def test_heads_share_the_width_as_each_paper_does(component, sizes):
    part = resolved(component, {"heads": 8}, width=512)
    assert (part.head_dim, part.value_dim) == sizes


@pytest.mark.parametrize("name", ["retention", "gla", "gated_deltanet", "mamba2"])
def test_heads_that_do_not_divide_the_width_are_refused_with_a_reason(name):
    with pytest.raises(ValueError, match="3 heads do not divide .*d_model,? (20|10|40); choose a divisor or set"):
        resolved(name, {"heads": 3})


def test_groups_divide_the_heads():
    with pytest.raises(ValueError, match="2 groups do not divide 3 heads"):
        resolved("mamba2", {"groups": 2})


@every_two_way_mixer
def test_a_mixer_is_refused_where_keys_are_read(name):
    component = MIXERS[name][0]
    with pytest.raises(InputError, match="write it into the self-decoder"):
        config("yoco", f"cross_decoder.{component}={{}}")
    with pytest.raises(InputError, match="layer . would read no source"):
        config("redllm", "decoder.cross_attention_mode=merged", f"decoder.{component}={{}}")


@pytest.mark.parametrize("component", ["gated_deltanet", "mamba2"])
def test_decays_start_from_the_range_of_the_authors_code(component):
    """Rates of 1 to 16 and steps of 0.001 to 0.1, of 64 heads."""
    model = build_model(config("decllm", f"decoder.{component}={{heads: 64, head_dim: 2, value_dim: 2}}"))
    steps = model.decoder.layers[0].part(component).directions[0].steps
    rates, sizes = steps.a_log.exp(), F.softplus(steps.dt_bias)
    assert 1 <= rates.min() < 4
    assert 12 < rates.max() <= 16
    assert 0.001 <= sizes.min() < 0.003
    assert 0.03 < sizes.max() <= 0.1001
