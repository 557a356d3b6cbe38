"""Many workers take the stages of a study: each once, in the order of the graph, with few looks."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from lit_llm.store.locks import locked
from lit_llm.store.store import Store
from lit_llm.studies import picking
from lit_llm.studies.picking import Picker

Graph = dict[str, tuple[str, ...]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store").open()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """{stage: number of looks at its files}."""
    counts: Counter[str] = Counter()
    look = Picker._state

    def counted(picker: Picker, name: str) -> str | None:
        counts[name] += 1
        return look(picker, name)

    monkeypatch.setattr(Picker, "_state", counted)
    return counts


def name_of(number: int) -> str:
    return f"{number:016x}"


def chains(count: int, length: int = 3) -> Graph:
    """Runs of several stages, each after the one before it."""
    graph: Graph = {}
    for run in range(count):
        for at in range(length):
            graph[name_of(run * length + at)] = (name_of(run * length + at - 1),) if at else ()
    return graph


def compute(picker: Picker, name: str, state: str = "done") -> None:
    stage = picker.store.stage(name)
    with stage.claim():
        assert stage.result() is None, "computed twice"
        if state in ("done", "diverged"):
            stage.finish({"state": state})
        else:
            stage.set_state("failed", "it broke")
    picker.ended(name, state)


def work(pickers: list[Picker], seed: int, states: dict[str, str]) -> list[str]:
    """Let workers take stages in a random order of turns until all say that all is over; the stages in that order."""
    turns, order = random.Random(seed), []
    while not all(picker.over for picker in pickers):
        picker = turns.choice(pickers)
        if (name := picker.take()) is not None:
            order.append(name)
            compute(picker, name, states.get(name, "done"))
    return order


@pytest.mark.parametrize("notes", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_workers_compute_each_stage_once_after_its_parents_and_none_after_a_failed_one(
    store: Store, seed: int, notes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picking, "BLOCK", 5)
    graph = chains(12)
    graph[name_of(99)] = (name_of(2), name_of(5))  # after two runs
    graph[name_of(98)] = (name_of(2), name_of(10))  # of which one stage fails
    states = {name_of(10): "failed", name_of(30): "diverged"}
    lost = {name_of(11), name_of(98), name_of(31), name_of(32)}
    folder = store.root / "notes" if notes else None
    pickers = [Picker(store, graph, worker / 4, folder) for worker in range(4)]
    order = work(pickers, seed, states)
    assert sorted(order) == sorted(graph.keys() - lost)
    for name in order:
        assert all(order.index(parent) < order.index(name) for parent in graph[name])
    late = Picker(store, graph, 0.3, folder)
    assert late.take() is None
    assert late.over


def test_what_another_worker_holds_is_left_to_it_and_picked_once_it_is_free(store: Store) -> None:
    picker = Picker(store, chains(2, length=1))
    with locked(store.stage(name_of(0)).folder / "lock"):
        assert picker.take() == name_of(1)
        compute(picker, name_of(1))
        assert picker.take() is None
        assert not picker.over
    assert picker.take() == name_of(0)


def test_a_taken_stage_is_taken_once_and_again_when_it_is_put_back(store: Store) -> None:
    picker = Picker(store, chains(2, length=1))
    assert [picker.take() for _ in range(3)] == [name_of(0), name_of(1), None]
    picker.put_back(name_of(0))
    assert [picker.take() for _ in range(2)] == [name_of(0), None]


def test_what_a_worker_gives_up_is_left_to_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "BLOCK", 2)
    graph, folder = chains(2, length=2), store.root / "notes"
    picker = Picker(store, graph, 0.0, folder)
    assert picker.take() == name_of(0)
    picker.give_up(name_of(0))
    assert picker.take() == name_of(2)
    compute(picker, name_of(2))
    assert picker.take() == name_of(3)
    compute(picker, name_of(3))
    assert picker.over
    assert [path.name[:2] for path in folder.iterdir()] == ["1-"]
    assert Picker(store, graph, 0.0, folder).take() == name_of(0)


def test_a_worker_begins_at_its_own_place(store: Store) -> None:
    graph = chains(8, length=1)
    assert [Picker(store, graph, offset).take() for offset in (0.0, 0.5, 0.99, 1.25)] == [
        name_of(0), name_of(4), name_of(7), name_of(2),
    ]  # fmt: skip


def test_a_stage_that_has_ended_is_looked_at_once_and_children_only_after_their_parents(
    store: Store, looks: Counter[str]
) -> None:
    graph = chains(6)
    first = Picker(store, graph)
    for _ in range(3):
        name = first.take()
        assert name is not None
        compute(first, name)
    looks.clear()
    other = Picker(store, graph)
    assert other.take() == name_of(3)
    assert looks == {name_of(0): 1, name_of(1): 1, name_of(2): 1, name_of(3): 1}
    with locked(store.stage(name_of(3)).folder / "lock"):
        for _ in range(4):
            other.take()
    assert looks[name_of(0)] == 1
    assert looks[name_of(4)] == looks[name_of(5)] == 0


def test_the_end_is_known_from_notes_without_a_look_at_each_stage(
    store: Store, looks: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picking, "BLOCK", 20)
    graph, folder = chains(200, length=1), store.root / "notes"
    work([Picker(store, graph, worker / 5, folder) for worker in range(5)], 0, {name_of(7): "diverged"})
    looks.clear()
    late = Picker(store, graph, 0.4, folder)
    assert late.take() is None
    assert late.over
    assert not looks
    assert late._ended[name_of(7)] == "diverged"
    (next(folder.glob("0-*.mixed"))).write_text("{")  # damaged: its 20 stages are looked at
    again = Picker(store, graph, 0.4, folder)
    assert again.take() is None
    assert again.over
    assert sum(looks.values()) == 20


def test_notes_of_another_list_are_not_taken(store: Store, looks: Counter[str]) -> None:
    folder = store.root / "notes"
    work([Picker(store, chains(4), 0.0, folder)], 0, {})
    longer = Picker(store, chains(5), 0.0, folder)
    looks.clear()
    assert longer.take() == name_of(12)
    assert len(looks) == 13


def test_a_parent_outside_the_list_has_to_be_done(store: Store) -> None:
    outside = store.stage(name_of(50))
    picker = Picker(store, {name_of(0): (name_of(50),)})
    assert picker.over
    with outside.claim():
        outside.finish({"state": "done"})
    assert Picker(store, {name_of(0): (name_of(50),)}).take() == name_of(0)
