"""bench: this machine, measured beside peers."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from lit_llm.cli.app import app
from lit_llm.cli.options import AsJson, console
from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.launch import cores


@app.command()
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WHAT]...",
            help="training, decode, memory, families (RedLLM against DecLLM of as many parameters); all when absent.",
        ),
    ] = None,
    size: Annotated[
        str, typer.Option(metavar="[tiny|small|base|150m|1b]", help="Shape of the models; the last two for a GPU.")
    ] = "small",
    precision: Annotated[str, typer.Option(metavar="[fp32|bf16]", help="Precision of all contestants.")] = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; all cores when absent.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Timed turns, each of which times every contestant once.")] = 15,
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPT+ANSWER",
            help="Tokens of prompt and answer for decode and families, repeatable, e.g. --lengths 1000+64",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")] = 1,
    heap: Annotated[
        bool | None,
        typer.Option(
            "--heap/--no-heap",
            show_default=False,
            help="All contestants keep freed memory, or none does; both are measured when absent.",
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="In training, each contestant also under torch.compile.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="[cpu|cuda]", help="Device; the GPU when there is one.", show_default=False)
    ] = None,
    figure: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a figure: FILE.png and FILE.svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure training steps, generation and memory on this machine, ours beside transformers and litgpt.

    The contestants compute the same with the same weights and take turns, so read the ratios. Nothing is stored.
    Example: lit-llm bench training decode --size tiny --turns 5 --figure bench
    """
    from lit_llm.bench.settings import SIZES, BenchSettings, lengths_from, what_of
    from lit_llm.launch.devices import has_gpu

    chosen = device or ("cuda" if has_gpu() else "cpu")
    allowed = {"--size": (size, [*SIZES]), "--precision": (precision, ["fp32", "bf16"])}
    for option, (value, words) in {**allowed, "--device": (chosen, ["cpu", "cuda"])}.items():
        if value not in words:
            raise InputError(Problem(f"{value!r} is unknown{did_you_mean(value, words)}", option))
    if chosen == "cuda" and not has_gpu():
        raise InputError(Problem("there is no GPU; `--device cpu` measures the processor", "--device"))
    settings = BenchSettings(
        size,
        cast(Literal["fp32", "bf16"], precision),
        threads or cores(),
        turns,
        tuple(map(lengths_from, lengths or ())),
        prompts,
        compiled,
        cast(Literal["cpu", "cuda"], chosen),
    )
    measured = what_of(what or [])
    if figure is not None:
        try:
            figure.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(Problem(f"{figure.parent} cannot be written to: {error.strerror}", "--figure")) from None
    print(f"measuring {', '.join(measured)} at size {size}; some minutes ...", file=sys.stderr, flush=True)
    from lit_llm.bench.run import heaps_of, run_benchmarks

    result = run_benchmarks(measured, settings, heaps_of(heap, chosen))
    if as_json:
        print(json.dumps(asdict(result), indent=1))
    else:
        from lit_llm.report.tables.bench import bench_tables
        from lit_llm.report.tables.table import stacked

        screen = console()
        screen.print(*stacked(bench_tables(result), screen.width), sep="\n")
    if figure is not None and result.comparisons:
        from lit_llm.report.figures.bench import bench_figure
        from lit_llm.report.figures.style import save

        files = save(bench_figure(result), figure, pdf=False)
        print(f"figure: {', '.join(map(str, files))}", file=sys.stderr)
    for line in result.failed:
        print(f"failed: {line}", file=sys.stderr)
    raise typer.Exit(1 if result.failed else 0)
