"""`lit-llm studies`: every study of a store, and what share of their findings is expected to be false."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t
from statsmodels.stats.multitest import multipletests
from typer.testing import CliRunner

from lit_llm.cli import app
from lit_llm.report.pages.all_studies import discoveries_line, studies_of
from lit_llm.statistics.verdicts import LOST
from lit_llm.store.store import Store

P = {"b": 0.001, "c": 0.03, "d": 0.6}


def row(arm: str, p: float | None, mean: float = 0.1, error: float | None = 0.01) -> dict[str, Any]:
    """As a comparison writes it; None: a baseline."""
    difference = None if p is None else {"mean": mean, "error": error, "degrees": 2, "seeds": 3, "low": 0, "high": 0}
    verdict = None if p is None else "better" if p < 0.05 else "undecided"
    own = {"mean": 5.0 if p is None else 5.0 + mean, "deviation": 0.02}
    return own | {
        "arm": arm, "baseline": "a", "states": {"done": 3}, "difference": difference, "p": p, "verdict": verdict,
    }  # fmt: skip


def leave(store: Store, study: str, rows: list[dict[str, Any]], when: float, **more: Any) -> Path:
    folder = store.study(study)
    folder.mkdir(parents=True)
    content = {"metric": "val/target_nll", "correction": "none", "rows": rows, **more}
    (folder / "comparison.json").write_text(json.dumps(content))
    (folder / "answer.json").write_text(json.dumps({"question": f"What of {study}?", "answer": [f"{study} it is."]}))
    os.utime(folder / "comparison.json", (when, when))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store").open()
    rows = [row(arm, p, mean=0.1 + at) for at, (arm, p) in enumerate(P.items())]
    leave(store, "second", [row("a", None), *rows], 2e9)
    leave(store, "first", [row("a", None), row("e", 0.04, mean=7.0)], 1e9)
    return store


def test_all_differences_of_the_store_are_one_family(place: Store) -> None:
    found = studies_of(place)
    ps = [0.04, *P.values()]
    q = multipletests(ps, method="fdr_bh")[1]
    assert [test.p for test, _ in found.discoveries.q_values] == ps
    assert [value for _, value in found.discoveries.q_values] == pytest.approx(list(q))
    assert (found.discoveries.tested, found.discoveries.called, found.discoveries.studies) == (4, 3, 2)
    assert found.discoveries.expected_false == pytest.approx(max(q[:3]))
    assert "4 differences tested in 2 studies, 3 called; of these up to 5.3%" in discoveries_line(found.discoveries)


def test_the_same_runs_in_two_studies_are_tested_once(place: Store) -> None:
    """Beside other arms, which lend its difference another variance."""
    leave(place, "again", [row("a", None), row("other", 0.001, mean=0.1, error=0.02)], 3e9)
    assert studies_of(place).discoveries.tested == 4


def test_a_difference_of_an_arm_that_lost_runs_is_no_test(place: Store) -> None:
    """Its p is of the seeds that did not diverge."""
    leave(place, "lost", [row("a", None), row("x", 1e-5, mean=0.3) | {"verdict": LOST}], 3e9)
    assert studies_of(place).discoveries.tested == 4


def test_a_study_that_corrects_enters_with_its_p_alone(place: Store) -> None:
    """t = 0.1 / 0.01 with two degrees of freedom has p = 0.00985, whatever Holm made of it."""
    leave(place, "holm", [row("x", 0.5, mean=0.1001)], 3e9, correction="holm")
    p = {test.study: test.p for test, _ in studies_of(place).discoveries.q_values}
    assert p["holm"] == pytest.approx(2 * t.sf(10.01, 2))


def test_that_p_is_of_the_wider_interval_as_in_the_study(place: Store) -> None:
    """Seeds alone have fewer degrees of freedom, and here the larger p, though documents add to the error."""
    both = row("x", 0.5, mean=0.1, error=0.011)
    both["difference"] |= {"degrees": 40.0, "documents": 30, "seeds_error": 0.01, "seeds_degrees": 2}
    leave(place, "holm", [both], 3e9, correction="holm")
    p = {test.study: test.p for test, _ in studies_of(place).discoveries.q_values}
    assert p["holm"] == pytest.approx(2 * t.sf(0.1 / 0.01, 2))
    assert p["holm"] > 2 * t.sf(0.1 / 0.011, 40)


def test_a_study_in_rounds_enters_with_the_p_of_its_looks_without_its_share_for_the_arms(place: Store) -> None:
    rows = [row("a", None), row("x", 0.0123, mean=0.1002), row("y", 1.0, mean=0.1003), row("z", 0.3, mean=0.1004)]
    leave(place, "shared", rows, 3e9, correction="holm", bias_adjusted={})
    leave(place, "alone", [row("x", 0.0124, mean=0.1005)], 4e9, bias_adjusted={})
    found = [
        (test.study, test.p) for test, _ in studies_of(place).discoveries.q_values if test.study in ("shared", "alone")
    ]
    assert found == [("shared", 0.0123 / 3), ("shared", 1.0), ("shared", pytest.approx(0.1)), ("alone", 0.0124)]


def test_baselines_single_seeds_and_equal_arms_are_no_tests(place: Store) -> None:
    leave(place, "none", [row("a", None), row("one", None), row("same", 1.0, mean=0.0, error=0.0)], 3e9)
    assert studies_of(place).discoveries.tested == 4


def test_the_command_lists_the_oldest_first_and_says_what_it_cannot_read(place: Store) -> None:
    broken = place.study("broken")
    broken.mkdir()
    (broken / "comparison.json").write_text("{half")
    shown = CliRunner().invoke(app, ["studies", "--store", str(place.root)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[1].split()[:4] == ["first", "What", "of", "first?"]
    assert "first it is." in lines[1]
    assert lines[2].startswith("second")
    assert "Benjamini-Hochberg over all; effects of factors are not counted" in shown.output
    assert "broken/comparison.json: is damaged" in "".join(lines)
    content = json.loads(CliRunner().invoke(app, ["studies", "--store", str(place.root), "--json"]).output)
    assert [entry["study"] for entry in content["studies"]] == ["first", "second"]
    assert content["studies"][0]["states"] == {"done": 6}
    assert content["studies"][0]["answer"] == "first it is."
    assert content["false_discoveries"]["called"] == 3
    assert len(content["problems"]) == 1


def test_an_empty_store_has_no_studies(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["studies", "--store", str(tmp_path / "nothing")])
    assert shown.exit_code == 0
    assert "There is no study in" in shown.output
