"""coordinates: activations by width and depth, before and after a few training steps."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from lit_llm.cli.app import app
from lit_llm.cli.options import AsJson, Overrides, StudyArgument, console
from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.report.tables.table import slug

if TYPE_CHECKING:
    from lit_llm.experiment.schema import Experiment
    from lit_llm.runs.coordinates import Sized

FACTORS = (Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))
"""Widths over an arm's, without --widths and --depths."""


@app.command()
def coordinates(
    study: StudyArgument,
    override: Overrides = None,
    only: Annotated[str | None, typer.Option(metavar="GLOB", help="Only arms whose name matches, e.g. 'red*'.")] = None,
    widths: Annotated[
        str | None,
        typer.Option(metavar="D,D,...", help="Values of d_model; by default 1/2, 1, 2 and 4 times an arm's."),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(metavar="F,F,...", help="Multiples of each stack's layers, e.g. --depths 1,2,4; none by default."),
    ] = None,
    grow: Annotated[
        str, typer.Option(metavar="[heads|head_dim]", help="What grows with d_model: more heads, or wider ones.")
    ] = "heads",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Models of each size.")] = 2,
    figure: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a figure: FILE.png and FILE.svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check whether activations, and their changes in training, depend on width and depth (the coordinate check).

    Each size trains a few steps on one batch of random tokens, in this process; nothing is stored. d_ff and heads, or
    head_dim, follow d_model. Example: lit-llm coordinates redllm-tiny -o model.parametrization='{kind: mup, base_width:
    64, base_head_dim: 16}' --figure coordinates
    """
    from lit_llm.studies.load import load_study

    loaded = load_study(study, override or ())
    chosen = [arm for arm in loaded.arms if only is None or fnmatch(arm.name, only)]
    if not chosen:
        raise InputError(
            Problem(f"no arm matches {only!r}{did_you_mean(only or '', [arm.name for arm in loaded.arms])}", "--only")
        )
    if grow not in ("heads", "head_dim"):
        raise InputError(Problem(f"{grow!r} is unknown{did_you_mean(grow, ('heads', 'head_dim'))}", "--grow"))
    given = _numbers(widths, "--widths", Fraction(1)), _numbers(depths, "--depths", Fraction(1, 64))
    if figure is not None:
        try:
            figure.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(Problem(f"{figure.parent} cannot be written to: {error.strerror}", "--figure")) from None
    sizes = {arm.name: _sizes(arm.experiment, given, cast(Literal["heads", "head_dim"], grow)) for arm in chosen}
    from lit_llm.report.tables.coordinates import conclusion, coordinate_tables
    from lit_llm.report.tables.table import stacked
    from lit_llm.runs.coordinates import measure_coordinates
    from lit_llm.statistics.coordinate_slopes import part_slopes

    screen, content = console(), list[dict[str, Any]]()
    for arm in chosen:
        sized = sizes[arm.name]

        def log(done: int, name: str, arm: str = arm.name, models: int = len(sized) * seeds) -> None:
            print(f"{arm}: training {done + 1} of {models}: {name}", file=sys.stderr, flush=True)

        measured = measure_coordinates(sized, steps, range(seeds), log)
        slopes = part_slopes(measured)
        if as_json:
            parts = [asdict(one) | {"verdict": one.verdict} for one in slopes]
            content.append({"arm": arm.name, "parts": parts, "coordinates": [asdict(one) for one in measured]})
        else:
            screen.print(*stacked(coordinate_tables(slopes, steps, arm.name), screen.width), sep="\n")
            screen.print(conclusion(slopes), soft_wrap=True, highlight=False)
        if figure is not None:
            from lit_llm.report.figures.coordinates import coordinate_figure
            from lit_llm.report.figures.style import save

            title = f"{arm.name}, {arm.experiment.model.parametrization.kind} parametrization"
            path = figure if len(chosen) == 1 else figure.with_name(f"{figure.name}-{slug(arm.name)}")
            files = save(coordinate_figure(measured, title), path, pdf=False)
            print(f"figure: {', '.join(map(str, files))}", file=sys.stderr)
    if as_json:
        print(json.dumps({"study": loaded.study.study, "steps": steps, "arms": content}, indent=1))


def _numbers(text: str | None, option: str, least: Fraction) -> list[Fraction]:
    """The numbers of an option, such as `1/2,1,2`, in rising order. Raises InputError."""
    if text is None:
        return []
    try:
        numbers = sorted({Fraction(word.strip()) for word in text.split(",")})
    except (ValueError, ZeroDivisionError):
        raise InputError(Problem(f"{text!r} is no list of numbers such as 1,2,4", option)) from None
    if numbers[0] < least or len(numbers) < 2:
        raise InputError(Problem(f"{text!r}: a slope needs two different sizes or more, of at least {least}", option))
    return numbers


def _sizes(
    experiment: Experiment, given: tuple[list[Fraction], list[Fraction]], grow: Literal["heads", "head_dim"]
) -> list[Sized]:
    """The experiment at each width and depth. Raises InputError for one that cannot be built."""
    from lit_llm.runs.coordinates import at_depth, at_width

    widths, depths = given
    if any(width.denominator != 1 for width in widths):
        raise InputError(Problem("d_model is a whole number", "--widths"))
    sized = [at_width(experiment, int(width), grow) for width in widths]
    sized += [at_depth(experiment, depth) for depth in depths]
    if sized:
        return sized
    for factor in FACTORS:
        try:
            sized.append(at_width(experiment, int(factor * experiment.model.d_model), grow))
        except InputError:
            if factor >= 1:
                raise
    return sized
