"""No-op arms, which compute the same function as another arm, recognised by building both small.

Equal configurations, and studies whose arms share one network, need no build and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from threading import Timer
from typing import TYPE_CHECKING

from lit_llm.components.registry import PACKAGES
from lit_llm.config.hashing import fingerprint
from lit_llm.config.problems import InputError, some
from lit_llm.config.tree import under
from lit_llm.models.parameters import parameter_shapes
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.stage_graph import stage_graph
from lit_llm.studies.audit.findings import INTERVENTION, Finding, differs
from lit_llm.studies.load import Ablation, Arm

if TYPE_CHECKING:
    from lit_llm.studies.audit.equivalence import EquivalenceChecker

PATIENCE = 2.0
"""Seconds after which a line reports what takes so long."""


def probe(ablation: Ablation, log: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Findings on no-op arms, and on parameters that only one of two arms has.

    log: called with one line where this takes more than two seconds.
    """
    message = f"building {len(ablation.arms)} arms small, to compare what they compute ..."
    timer = Timer(PATIENCE, log, [message])
    timer.daemon = True
    timer.start()
    try:
        return list(_findings(ablation))
    finally:
        timer.cancel()


def _findings(ablation: Ablation) -> Iterator[Finding]:
    @cache
    def checker() -> EquivalenceChecker:
        from lit_llm.studies.audit.equivalence import EquivalenceChecker

        return EquivalenceChecker(ablation.arms)

    controls = {arm.name: _controls(arm, ablation.arms[0]) for arm in ablation.arms}
    by_computation, by_controls = dict[str, list[Arm]](), dict[str, list[Arm]]()  # else each arm meets all before it
    for arm in ablation.arms:
        baseline = ablation.arm(arm.baseline)
        same = by_computation.setdefault(arm.computation, [])
        alike = by_controls.setdefault(controls[arm.name], [])
        others = _in_order(arm, baseline, same, baseline.computation == arm.computation)
        candidates = _in_order(arm, baseline, alike, controls[baseline.name] == controls[arm.name])
        same.append(arm)
        alike.append(arm)
        if others:
            twin = others[0]
            if _compared(arm, twin):
                message = f"is the same computation as {twin.name}: it costs nothing and shows nothing"
                yield Finding("no_op", arm.name, "", message)
            else:
                yield Finding("note", arm.name, "", f"is the same computation as {twin.name}, done once for both")
            continue
        try:
            equal = next((other for other in candidates if checker().same_function(arm, other)), None)
        except Exception as error:
            if isinstance(error, InputError) or not _from_outside([arm, *candidates]):
                raise
            message = f"is not compared by what it computes: built small, its component ends in {error}"
            yield Finding("note", arm.name, "", message)
        else:
            if equal is not None:
                yield _same_function(arm, equal)
        yield from _parameters(arm, baseline)


def _in_order(arm: Arm, baseline: Arm, earlier: Sequence[Arm], baseline_counts: bool) -> list[Arm]:
    """The baseline, if it counts, and earlier arms; those of the arm's comparison first."""
    others = [baseline] * (baseline_counts and baseline is not arm)
    others += [other for other in earlier if other is not baseline]
    return sorted(others, key=lambda other: not _compared(arm, other))


def _controls(arm: Arm, reference: Arm) -> str:
    """Fingerprint of an arm's controls: its stages with the reference's network and objective."""
    stage = reference.experiment.pretrain
    pretrain = arm.experiment.pretrain.model_copy(update={"objective": stage.objective, "masks": stage.masks})
    update = {"model": reference.experiment.model, "pretrain": pretrain}
    return fingerprint([node.fingerprint for node in stage_graph(arm.experiment.model_copy(update=update))])


def _same_function(arm: Arm, twin: Arm) -> Finding:
    from lit_llm.studies.audit.equivalence import LONGEST

    keys = [key for key in differs(arm, twin) if under(key, *INTERVENTION)]
    seen = f" on windows of {LONGEST} tokens" if arm.experiment.pretrain.data.sequence_length > LONGEST else ""
    message = f"is the same function as {twin.name}{seen}, in spite of {some(keys)}: it trains to the same losses"
    return Finding("no_op" if _compared(arm, twin) else "note", arm.name, "", message)


def _compared(arm: Arm, twin: Arm) -> bool:
    """True where the two arms belong to one comparison; else each may serve its own."""
    return arm.baseline in (twin.name, twin.baseline)


def _from_outside(arms: Sequence[Arm]) -> bool:
    """True where an arm has a component of another package, whose code may fail in any way."""
    layers = [layer for arm in arms for layer in resolve_model(arm.experiment.model).layers]
    return any(layer.part(key) for layer in layers for key in PACKAGES)


def _parameters(arm: Arm, baseline: Arm) -> Iterator[Finding]:
    """A note on tensors that only one of two arms has; none for two families."""
    if arm.experiment.model.family != baseline.experiment.model.family:
        return
    models = [resolve_model(each.experiment.model) for each in (arm, baseline)]
    if models[0] == models[1]:
        return
    # Only layers that both have count.
    depths = {side: min(len(getattr(model, side)) for model in models) for side in ("encoder", "decoder")}
    names = [{name for name in parameter_shapes(model) if _is_within(name, depths)} for model in models]
    arm_only, baseline_only = sorted(names[0] - names[1]), sorted(names[1] - names[0])
    parts = [
        f"only {where}: {some(together(names))}"
        for where, names in (("here", arm_only), (f"in {baseline.name}", baseline_only))
        if names
    ]
    if parts:
        yield Finding("note", arm.name, "parameters", "; ".join(parts))


def together(names: Iterable[str]) -> list[str]:
    """`decoder.layers.*.self_attention.qkv_scale.{k,q}` for four parameters of two layers."""
    leaves: dict[str, dict[str, None]] = {}
    for name in names:
        parent, _, leaf = _any_layer(name).rpartition(".")
        leaves.setdefault(parent, {})[leaf] = None
    ends = [",".join(ends_of_parent) for ends_of_parent in leaves.values()]
    return [f"{p}.{{{end}}}" if "," in end else f"{p}.{end}" for p, end in zip(leaves, ends, strict=True)]


def _is_within(name: str, depths: Mapping[str, int]) -> bool:
    """True where a parameter is outside the layers, or in one of the first `depths` layers."""
    match = re.match(r"(encoder|decoder)\.layers\.(\d+)\.", name)
    return match is None or int(match[2]) < depths[match[1]]


def _any_layer(name: str) -> str:
    """`decoder.layers.3.feed_forward` as `decoder.layers.*.feed_forward`."""
    return re.sub(r"\.layers\.\d+", ".layers.*", name)
