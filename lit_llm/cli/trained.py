"""Finished runs and checkpoints: evaluate, generate, import, export, push."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lit_llm.cli.app import app
from lit_llm.cli.options import (
    DEFAULT_STORE,
    AsJson,
    LinesOfJson,
    Overrides,
    StoreOption,
    Tracking,
    open_store,
    relative_path,
    same_command,
)
from lit_llm.config.problems import InputError, Problem


@app.command()
def evaluate(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY[:ARM]",
            help="A study that was run (its file, its name in the store), or one of its arms; an experiment.",
        ),
    ],
    override: Overrides = None,
    jobs: Annotated[int | None, typer.Option("-j", "--jobs", min=1, help="Evaluations at once.")] = None,
    as_json: LinesOfJson = False,
    store: StoreOption = DEFAULT_STORE,
    tracking: Tracking = None,
) -> None:
    """Add evaluations to finished runs; trains nothing.

    The `evaluate` section, of the file or given by -o, names the evaluations; finished ones are not repeated. The same
    -o with `report` shows them. Example: lit-llm evaluate
    ablations/quickstart.yaml:dec -o evaluate.extrapolation={}
    """
    import glob

    from lit_llm.cli.studies import run
    from lit_llm.studies.load import file_and_arm
    from lit_llm.studies.runs import runs_of_arm

    place = open_store(store)
    runs = runs_of_arm(study, override or (), place)
    if any(each.experiment.evaluate is None for each in runs):
        message = "has no `evaluate` section; give one, e.g. -o evaluate.likelihood={} or -o evaluate.extrapolation={}"
        raise InputError(Problem(message, study))
    states = [step.status()["state"] for each in runs for step in each.trained if each.status()["state"] != "diverged"]
    file, arm = file_and_arm(study)
    if left := len(states) - states.count("done"):
        command = same_command("run", file, None, store, tracking)
        raise InputError(Problem(f"{left} of its trainings are not finished: `{command}` goes on", study))
    run(file, jobs, glob.escape(arm) or None, None, override, as_json, store, tracking)


@app.command()
def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="STUDY:ARM (a file, or its name in the store), an experiment file, a preset, the fingerprint of a "
            "stage (status --json), or a folder that `import` wrote.",
        ),
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to go on from; '-' reads one a line.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which run of the arm; the first when absent.")] = None,
    after: Annotated[
        str | None,
        typer.Option(metavar="[pretrain|finetune|source]", help="Which stage's weights; the last when absent."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most, for each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among this many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens with this total probability.")
    ] = 1.0,
    draw: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    override: Overrides = None,
    as_json: AsJson = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write a finished run's continuation of each prompt, up to an end of document.

    One prompt's continuation is written as it is generated. An encoder-decoder reads the prompt in its encoder.
    Example: lit-llm generate ablations/quickstart.yaml:dec "def f("
    """
    given = [line.rstrip("\n") for line in sys.stdin] if prompts == ["-"] else prompts or [""]
    imported = _is_imported(source)
    fingerprint = "" if imported else _stage(source, override, store, seed, after)
    from lit_llm.generation import Sampling
    from lit_llm.huggingface import open_model
    from lit_llm.runs.trained_model import complete_texts, open_finished, stream_text
    from lit_llm.store.store import Store

    try:
        sampling = Sampling(temperature, top_k, top_p, draw)
    except ValueError as error:
        raise InputError(Problem(str(error))) from None
    stream: Callable[[str, int, Sampling], Iterator[str]]
    complete: Callable[[list[str], int, Sampling], list[str]]
    if imported:
        model, tokenizer, begin = open_model(Path(source))
        stream = partial(stream_text, model, tokenizer, begin=begin)
        complete = partial(complete_texts, model, tokenizer, begin=begin)
    else:
        finished = open_finished(Store(store), fingerprint)
        stream, complete = finished.stream, finished.generate
    if len(given) == 1 and not as_json:
        pieces = stream(given[0], max_new_tokens, sampling)
        print(given[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    for prompt, answer in zip(given, complete(given, max_new_tokens, sampling), strict=True):
        print(json.dumps({"prompt": prompt, "generated": answer}) if as_json else f"{prompt}{answer}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint: config.json and *.safetensors.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; imported/NAME when absent.")] = None,
) -> None:
    """Make a checkpoint of transformers one of ours.

    Llama, Mistral, Qwen 2 and 3, OLMo 2, Gemma 2 and 3, T5 v1.1, mT5, T5Gemma, T5Gemma 2, ModernBERT; exported DecLLM
    and RedLLM.

    Writes model.yaml, which an experiment can `extends`, weights.safetensors and the tokenizer.json. It names features
    that are not supported, and then writes nothing; pickled weights are never opened. Example:
    lit-llm import ~/models/gemma-2-2b; lit-llm generate imported/gemma-2-2b "Once"
    """
    from lit_llm.huggingface import import_checkpoint
    from lit_llm.models.cost import count_parameters
    from lit_llm.models.resolve import resolve_model

    place = out or Path("imported") / folder.resolve().name
    model = resolve_model(import_checkpoint(folder, place))
    layers = f"{len(model.encoder)} + {len(model.decoder)}" if model.decoder and model.encoder else len(model.layers)
    print(f"{relative_path(place)}: {count_parameters(model).total:,} parameters, {layers} layers ({model.family})")


@app.command("export")
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="As `generate` takes it: STUDY:ARM, ..., or a folder of `import`.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    seed: Annotated[int | None, typer.Option(help="Which run of the arm; the first when absent.")] = None,
    after: Annotated[
        str | None,
        typer.Option(metavar="[pretrain|finetune|source]", help="Which stage's weights; the last when absent."),
    ] = None,
    override: Overrides = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write a finished run for transformers: model.safetensors, config.json, tokenizer.json.

    DecLLM and RedLLM take their code along, which trust_remote_code=True runs. Other architectures that transformers
    does not have become model.yaml and weights.safetensors, with the reason. Example: lit-llm export study.yaml:dec
    exported; AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True) reads it
    """
    if _is_imported(source):
        from lit_llm.huggingface import export_folder

        print(f"{relative_path(out)}: {export_folder(Path(source), out)}")
        return
    fingerprint = _stage(source, override, store, seed, after)
    from lit_llm.runs.trained_model import export_finished
    from lit_llm.store.store import Store

    print(f"{relative_path(out)}: {export_finished(Store(store), fingerprint, out)}")


@app.command()
def push(
    source: Annotated[str, typer.Argument(metavar="STUDY:ARM", help="An arm of a study, an experiment, or a preset.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hugging Face Hub: user/model.")],
    seed: Annotated[int | None, typer.Option(help="Which run of the arm; the first when absent.")] = None,
    after: Annotated[
        str | None,
        typer.Option(metavar="[pretrain|finetune|source]", help="Which stage's weights; the last if absent."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Hide a new repository from others.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder with its card, and upload nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write and to keep; pushed/MODEL for --dry-run, else none.")
    ] = None,
    override: Overrides = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Upload a finished run to the Hugging Face Hub, with a model card drawn from the study.

    The folder is that of `export`. The card has the question, what differs from the baseline, data, tokens, FLOPs,
    metrics with intervals over seeds, provenance, and how to load it. Needs a token: `hf auth login`, or HF_TOKEN.
    Example: lit-llm push ablations/quickstart.yaml:dec me/quickstart-dec --dry-run
    """
    import tempfile

    from lit_llm.huggingface.hub import check_repo, upload
    from lit_llm.report.model_card import Pushed, model_card
    from lit_llm.runs.trained_model import export_finished
    from lit_llm.studies.load import file_and_arm
    from lit_llm.studies.runs import runs_of, runs_of_one_arm, trained_stage
    from lit_llm.studies.stored import open_study

    check_repo(repo)
    place = open_store(store)
    run, step = trained_stage(runs_of_one_arm(source, override or (), place), source, seed, after or "")
    ablation = open_study(file_and_arm(source)[0], override or (), place)
    runs = runs_of(ablation, place)
    with tempfile.TemporaryDirectory() as work:
        name = repo.rpartition("/")[2]
        kept = out or (Path("pushed") / name if dry_run else None)
        folder = kept or Path(work) / name
        print(f"{relative_path(kept) if kept else repo}: {export_finished(place, step.node.fingerprint, folder)}")
        card = model_card(Pushed(ablation, runs, run, step, folder, repo))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if not dry_run:
            print(upload(folder, repo, private))


def _is_imported(source: str) -> bool:
    """True where `source` is a folder of `import`. Raises InputError for a checkpoint that is not imported yet."""
    from lit_llm.experiment.load import is_preset
    from lit_llm.huggingface import is_checkpoint

    if is_checkpoint(Path(source)):
        return True
    if (Path(source) / "config.json").is_file() and not is_preset(source):
        raise InputError(
            Problem(f"is a checkpoint of transformers; `lit-llm import {shlex.quote(source)}` first", source)
        )
    return False


def _stage(source: str, override: list[str] | None, store: Path, seed: int | None, after: str | None) -> str:
    """The fingerprint of a run's stage."""
    from lit_llm.studies.runs import trained_fingerprint

    place = open_store(store)
    return trained_fingerprint(source, override or (), place, seed, after or "")
