"""On one GPU: training steps and generation of the 150M and 1B presets, beside transformers' Llama of the same shape.

    python benchmarks/gpu.py [--presets decllm-150m redllm-150m decllm-1b redllm-1b] [--steps 6]

bf16, random weights and tokens of sequence_length 2048, four micro-batches of eight. A step is `lit_llm.training.fit`'s
own; Llama's is a plain loop with autocast and fused AdamW. Its peer among ours is `llama`, decllm without norms on Q, K
and V. For each: tokens/s, MFU of useful FLOPs (masks as they are), peak memory and that over the plan's `memory_bytes`.
Then prompts of 1000 tokens and 64 tokens each after them, with a cache and weights in bf16. One JSON object a line; a
part that fails says so and the next one goes on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from lit_llm.experiment.cost import cost_of
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.generation import generate
from lit_llm.models.build import build_model
from lit_llm.models.cost import decode_flops, prefill_flops
from lit_llm.models.families import LanguageModel
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.step_timing import train_on_random_tokens
from lit_llm.training.throughput import peak_flops

LLAMA = ["model.attention.qkv_norm=[]", "model.norm.scale=true"]
PROMPT, NEW, ROWS = 1000, 64, 8


def say(**found: Any) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    print(json.dumps(rounded), flush=True)


def experiment_of(preset: str, steps: int, *overrides: str) -> Experiment:
    how = [f"max_steps={steps}", "optimizer=adamw", "schedule={kind: constant, warmup_steps: 1}"]
    keys = [*(f"pretrain.training.{key}" for key in how), "pretrain.data.batch_size=32", *overrides]
    return load_experiment(preset, keys)


def random_model(experiment: Experiment, device: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Drawn on the device itself, which for a billion parameters is quicker than the seeded way; for timing only."""
    model = build_model(experiment.model, device="meta").to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter) if parameter.dim() < 2 else torch.nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


def llama_of(experiment: Experiment) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = resolve_model(experiment.model)
    attention, network = shape.decoder[0].self_attention, shape.decoder[0].feed_forward
    assert attention is not None
    assert network is not None
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=network.d_ff,
        num_hidden_layers=len(shape.decoder),
        num_attention_heads=attention.heads,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config)


def reset() -> None:
    gc.collect()  # a trainer and its model refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def train(name: str, experiment: Experiment, device: str) -> None:
    """Seconds between the ends of `fit`'s steps, the first two left out."""
    ends: list[float] = []

    def after_each_step() -> bool:
        ends.append(time.perf_counter())
        return False

    reset()
    before, cost = memory(), cost_of(experiment)
    train_on_random_tokens(random_model(experiment, device), experiment, "pretrain", after_each_step)
    found = memory() - before
    step = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    report_step(name, experiment, step, device)
    precision, checkpointing = experiment.pretrain.training.precision, experiment.pretrain.training.execution
    say(
        memory=name,
        precision=precision,
        checkpointing=checkpointing.activation_checkpointing,
        measured_gb=found / 1e9,
        planned_gb=cost.memory_bytes / 1e9,
        planned_over_measured=cost.memory_bytes / found if found else None,
    )


def report_step(name: str, experiment: Experiment, step: float, device: str) -> None:
    data, cost = experiment.pretrain.data, cost_of(experiment)
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    say(
        train=name,
        precision=experiment.pretrain.training.precision,
        step_seconds=step,
        tokens_per_second=data.batch_size * data.sequence_length / step,
        tflops_per_second=cost.flops_per_step / step / 1e12,
        mfu=cost.flops_per_step / step / peak if peak else None,
    )


def train_llama(name: str, experiment: Experiment, device: str) -> None:
    """The same batches in a plain loop."""
    reset()
    before = memory()
    torch.set_default_dtype(torch.float32)
    with torch.device(device):
        llama = llama_of(experiment).train()
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3, fused=True)
    data, execution = experiment.pretrain.data, experiment.pretrain.training.execution
    micro = execution.micro_batch_size or data.batch_size
    tokens = torch.randint(2, experiment.model.vocabulary, (data.batch_size, data.sequence_length), device=device)
    seconds: list[float] = []
    for _ in range(experiment.pretrain.training.max_steps):
        began = time.perf_counter()
        for piece in tokens.split(micro):
            with torch.autocast(device, torch.bfloat16):
                loss = llama(input_ids=piece, labels=piece, use_cache=False).loss
            (loss * len(piece) / len(tokens)).backward()
        norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        norm.item()  # waits for the device, as ours does
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    report_step(name, experiment, statistics.median(seconds[2:]), device)
    say(memory=name, precision="bf16", measured_gb=(memory() - before) / 1e9)


def timed(work: Callable[[], object], turns: int = 3) -> float:
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def answer(name: str, experiment: Experiment, device: str) -> None:
    """Prefill by one new token, decoding by what the others take."""
    reset()
    model = random_model(experiment, device, torch.bfloat16).eval()
    prompts = torch.randint(2, experiment.model.vocabulary, (ROWS, PROMPT)).tolist()

    def run(new: int) -> object:
        return generate(model, prompts, max_new_tokens=new, stop=(), batch_size=ROWS)

    first, whole = timed(lambda: run(1)), timed(lambda: run(NEW))
    shape = resolve_model(experiment.model)
    report_answer(name, first, whole, prefill_flops(shape, PROMPT) * PROMPT, decode_flops(shape, PROMPT, NEW))


def report_answer(name: str, first: float, whole: float, prefill: float, decode: float) -> None:
    each = (whole - first) / (NEW - 1)
    say(
        generate=name,
        prefill_ms=1000 * first,
        decode_ms_per_step=1000 * each,
        decode_tokens_per_second=ROWS / each,
        prefill_gflops_per_prompt=prefill / 1e9,
        prefill_tflops_per_second=ROWS * prefill / first / 1e12,
        decode_gflops_per_token=decode / 1e9,
        peak_gb=memory() / 1e9,
    )


def answer_llama(name: str, experiment: Experiment, device: str) -> None:
    reset()
    with torch.device(device):
        llama = llama_of(experiment).to(torch.bfloat16).eval()
    tokens = torch.randint(2, experiment.model.vocabulary, (ROWS, PROMPT + 1), device=device)

    def run(new: int) -> object:
        return llama.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)

    first, whole = timed(lambda: run(1)), timed(lambda: run(NEW))
    shape = resolve_model(experiment.model)
    report_answer(name, first, whole, prefill_flops(shape, PROMPT) * PROMPT, decode_flops(shape, PROMPT, NEW))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["decllm-150m", "redllm-150m", "decllm-1b", "redllm-1b"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("-o", "--override", nargs="*", default=[], help="of every experiment")
    parser.add_argument("--only", nargs="*", default=["train", "train_llama", "answer", "answer_llama"])
    options = parser.parse_args()
    if options.steps < 4:
        parser.error("--steps: at least 4, of which the first two and the last are not timed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    import transformers

    where = torch.cuda.get_device_name() if device == "cuda" else device
    say(device=where, torch=torch.__version__, transformers=transformers.__version__, cuda=torch.version.cuda)
    for preset in options.presets:
        given = options.override
        ours, peer = experiment_of(preset, options.steps, *given), None
        if resolve_model(ours.model).family == "decoder":
            peer = experiment_of(preset, options.steps, *LLAMA, *given)
        works: list[tuple[Callable[[str, Experiment, str], None], str, Experiment]] = [(train, preset, ours)]
        bits = experiment_of(preset, options.steps, "pretrain.training.precision=bf16_master", *given)
        works.append((train, preset, bits))
        again = "pretrain.training.execution.activation_checkpointing=true"
        works.append((train, f"{preset} recomputed", experiment_of(preset, options.steps, again, *given)))
        works.append((answer, preset, ours))
        if peer is not None:
            works += [(train, f"{preset} as llama", peer), (train_llama, f"{preset} transformers", peer)]
            works += [(answer, f"{preset} as llama", peer), (answer_llama, f"{preset} transformers", peer)]
        for work, name, experiment in works:
            if work.__name__ not in options.only:
                continue
            try:
                work(name, experiment, device)
            except Exception:
                say(failed=f"{work.__name__} of {name}", why=traceback.format_exc().splitlines()[-4:])


if __name__ == "__main__":
    main()
