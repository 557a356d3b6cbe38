"""A training step: forward, backward, clipping and AdamW, the same for every contestant."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import nn

from lit_llm.bench.contestants import Contestant, Text
from lit_llm.bench.entries import KINDS, Entry, available, built, families, same_function
from lit_llm.bench.machine import parameters_of, set_heap, synchronize
from lit_llm.bench.results import Comparison
from lit_llm.bench.settings import BenchSettings, Size
from lit_llm.bench.turns import Turn, measure_between_ceilings
from lit_llm.models.cost import Shape, train_flops
from lit_llm.models.resolved import ResolvedModel


def measure_training(settings: BenchSettings, heap: str) -> list[Comparison]:
    """Seconds of a training step in this process, which keeps its heap setting afterwards."""
    set_heap(heap)
    return [
        compare_steps(entries(settings.shape), f"training step, {kind}", settings, heap)
        for kind, entries in {**KINDS, "RedLLM against DecLLM": families}.items()
    ]


def compare_steps(entries: list[Entry], title: str, settings: BenchSettings, heap: str) -> Comparison:
    """Steps of these contestants in turns."""
    there, missing = available(entries)
    contestants, different = built(there, random_text(settings.shape, bool(entries[0].model.encoder), rows=1))
    models = {entry.name: entry.model for entry in there}
    steps: dict[str, Turn] = {}
    for name, contestant in contestants.items():
        contestant.module.to(settings.device).train()
        text = random_text(settings.shape, bool(models[name].encoder)).to(settings.device)
        steps[name] = training_step(contestant, text, settings)
        if settings.compiled:
            steps[f"{name}, compiled"] = training_step(contestant.compiled(), text, settings)
            models[f"{name}, compiled"] = models[name]
    measurements, ceilings = measure_between_ceilings(steps, settings, f"{title}, {heap} heap")
    rows = [
        replace(
            row,
            of_machine=step_flops(models[row.contestant], settings.shape) / row.value.median / ceilings.product_flops,
        )
        for row in measurements
    ]
    counts = parameters_of({name: models[name] for name in steps})
    return Comparison(
        "training",
        title,
        heap,
        tuple(rows),
        counts,
        same_function([entry for entry in there if entry.name in contestants]),
        ceilings,
        (*missing, *different),
    )


def training_step(contestant: Contestant, text: Text, settings: BenchSettings) -> Turn:
    """A function that makes one step and returns its seconds."""
    parameters = list(contestant.module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step() -> dict[str, float]:
        began = time.perf_counter()
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = contestant.loss(text)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(settings.device)
        return {"step": time.perf_counter() - began}

    return step


def random_text(size: Size, encoder: bool, rows: int | None = None) -> Text:
    """A batch of random tokens; half of each sequence is the source where there is an encoder."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, size.vocabulary, (rows or size.batch, size.length + 1), generator=generator)
    split = size.length // 2 if encoder else 0
    source, row = tokens[:, :split], tokens[:, split:]
    return Text(source.contiguous() if encoder else None, row[:, :-1].contiguous(), row[:, 1:].contiguous())


def step_flops(model: ResolvedModel, size: Size) -> float:
    """FLOPs of a step, forward and backward."""
    source = size.length // 2 if model.encoder else 0
    target = size.length - source
    return size.batch * train_flops(model, Shape(source, target, outputs=target))
