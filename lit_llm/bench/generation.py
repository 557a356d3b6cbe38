"""Generation: reading a prompt, the first token, each further token, and how near that is to the memory's speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lit_llm.bench.contestants import Contestant, Text, begun
from lit_llm.bench.entries import KINDS, Entry, available, built, families, same_function
from lit_llm.bench.machine import parameters_of, set_heap, synchronize
from lit_llm.bench.results import Comparison
from lit_llm.bench.settings import BenchSettings, Lengths, What
from lit_llm.bench.turns import Turn, measure_between_ceilings
from lit_llm.components.part import BFLOAT16, FLOAT32
from lit_llm.models.cost import cache_bytes, prefill_flops
from lit_llm.models.resolved import ResolvedModel


def measure_decode(settings: BenchSettings, heap: str) -> list[Comparison]:
    """Generation beside the peers, in this process, which keeps its heap setting afterwards."""
    set_heap(heap)
    return [
        compare_generation("decode", entries(settings.shape), (kind, lengths), settings, heap)
        for lengths in settings.lengths_of("decode")
        for kind, entries in KINDS.items()
    ]


def measure_families(settings: BenchSettings, heap: str) -> list[Comparison]:
    """RedLLM against DecLLM of as many parameters, in this process, which keeps its heap setting afterwards."""
    set_heap(heap)
    return [
        compare_generation("families", families(settings.shape), ("RedLLM against DecLLM", lengths), settings, heap)
        for lengths in settings.lengths_of("families")
    ]


@torch.inference_mode()
def compare_generation(
    what: What, entries: list[Entry], of: tuple[str, Lengths], settings: BenchSettings, heap: str
) -> Comparison:
    """Answers of these contestants in turns. of: what they are, and how long prompts and answers are."""
    kind, lengths = of
    title = f"{kind}, {lengths} tokens"
    prompts_BP = random_prompts(settings, lengths.prompt)
    there, missing = available(entries)
    models = {entry.name: entry.model for entry in there}
    contestants, different = built(there, _as_text(prompts_BP, bool(entries[0].model.encoder)))
    prompts_BP = prompts_BP.to(settings.device)
    answers: dict[str, Turn] = {}
    for name, contestant in contestants.items():
        dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
        contestant.module.to(settings.device, dtype).eval()
        answers[name] = answering(contestant, prompts_BP, lengths.answer)
    measurements, ceilings = measure_between_ceilings(answers, settings, f"{title}, {heap} heap")
    rows = []
    for row in measurements:
        model, seconds = models[row.contestant], row.value.median
        if row.quantity == "prefill":
            flops = settings.prompts * lengths.prompt * prefill_flops(model, lengths.prompt)
            row = replace(row, of_machine=flops / seconds / ceilings.product_flops)
        elif row.quantity == "token":
            read = bytes_per_step(model, settings, lengths)
            row = replace(row, of_machine=read / seconds / ceilings.read_bytes)
        rows.append(row)
    counts = parameters_of({name: models[name] for name in answers})
    return Comparison(
        what,
        title,
        heap,
        tuple(rows),
        counts,
        same_function([entry for entry in there if entry.name in contestants]),
        ceilings,
        (*missing, *different),
    )


def answering(contestant: Contestant, prompts_BP: Tensor, answer: int) -> Turn:
    """A function that reads and answers the prompts, and returns the seconds of its parts."""
    device = prompts_BP.device.type

    def seconds_of(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - began

    def turn() -> dict[str, float]:
        prefill = seconds_of(lambda: contestant.prefill(prompts_BP))
        first = seconds_of(lambda: contestant.generate(prompts_BP, 1))
        whole = seconds_of(lambda: contestant.generate(prompts_BP, answer))
        token = (whole - first) / (answer - 1)
        return {"prefill": prefill, "first token": first, "token": token, "answer": whole}

    return turn


def random_prompts(settings: BenchSettings, length: int) -> Tensor:
    """B x P random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, settings.shape.vocabulary, (settings.prompts, length), generator=generator)


def _as_text(prompts_BP: Tensor, encoder: bool) -> Text:
    """The prompts as a text whose logits are compared."""
    row_BT = begun(prompts_BP)
    return Text(prompts_BP if encoder else None, row_BT, row_BT)


def bytes_per_step(model: ResolvedModel, settings: BenchSettings, lengths: Lengths) -> float:
    """Bytes that one decoding step reads: the weights once, and the cache of each prompt, mean over the answer."""
    entry = FLOAT32 if settings.precision == "fp32" else BFLOAT16
    cache = cache_bytes(model, entry)
    # The first token comes from the prefill. A step reads what was kept before it, and its own keys and values.
    read = statistics.fmean(cache.total(lengths.prompt, number) for number in range(2, lengths.answer + 1))
    return entry * decode_weights(model) + settings.prompts * read


def decode_weights(model: ResolvedModel) -> int:
    """Entries of the matrices that one decoding step multiplies with, each read once for all rows of a batch."""
    widths = model.widths("decoder")
    in_layers = sum(part.products(widths) for layer in model.decoder for _, part in layer.parts)
    return in_layers + model.vocabulary * model.d_model
