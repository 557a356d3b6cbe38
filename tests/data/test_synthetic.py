"""Synthetic tasks: every question has the one answer that a search of the source gives, for any settings."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.data.config import DataConfig
from lit_llm.data.corpora import open_corpus
from lit_llm.data.prepare import Prepared, prepare
from lit_llm.data.splits import SPLITS
from lit_llm.data.synthetic import Synthetic
from lit_llm.data.synthetic_tasks import (
    Arithmetic,
    Brackets,
    Compression,
    KHop,
    Memorisation,
    Recall,
    SelectiveCopying,
    Task,
)
from lit_llm.data.tokenizers import Symbols

EXAMPLES = 300
MQAR = Recall()
IN_CONTEXT = Recall(pairs=4, questions=3, noise=0.0, keys=8, values=8)
NOISY = Recall(pairs=4, questions=4, noise=0.25, noise_symbols=5)
FUZZY = Recall(pairs=5, questions=2, source_length=40, key_length=3, value_length=2, keys=6)
COPYING = SelectiveCopying(tokens=8, source_length=8)
TASKS = [
    MQAR, IN_CONTEXT, NOISY, FUZZY, SelectiveCopying(), COPYING, Memorisation(), Compression(),
    KHop(), KHop(hops=5, nodes=6, questions=6), Arithmetic(), Brackets(), Brackets(open=9, source_length=9),
]  # fmt: skip


def examples_of(task: Task, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    return [task.example(Random(f"{seed}/{number}"), seed) for number in range(EXAMPLES)]


def questions_in(task: Task, target: list[int]) -> list[tuple[list[int], list[int]]]:
    """(question, answer) pairs of a target."""
    _, question, answer, count = task.layout
    size = question + answer
    blocks = [target[start : start + size] for start in range(0, len(target), size)]
    assert len(blocks) == count
    return [(block[:question], block[question:]) for block in blocks]


def occurrences(source: list[int], key: list[int]) -> list[int]:
    """Where the key ends, wherever in the source it stands."""
    return [end for end in range(len(key), len(source)) if source[end - len(key) : end] == key]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_examples_have_the_lengths_and_symbols_that_the_settings_say(task: Task) -> None:
    seen = Counter[int]()
    for source, target in examples_of(task):
        assert len(source) == task.layout[0]
        assert len(source) + len(target) + 1 == task.length
        seen.update([*source, *target])
        questions = [tuple(question) for question, _ in questions_in(task, target)]
        assert len({*questions}) == len(questions)  # no answer stands in the target already
    unused = {0} if task in (IN_CONTEXT, COPYING) else set()  # no noise
    assert {*seen} == {*range(task.symbols)} - unused


@pytest.mark.parametrize("task", [MQAR, IN_CONTEXT, NOISY, FUZZY], ids=["mqar", "in context", "noisy", "fuzzy"])
def test_a_search_of_the_source_recalls_every_value(task: Recall) -> None:
    first_value = task.noise_symbols + task.keys
    for source, target in examples_of(task):
        for key, value in questions_in(task, target):
            places = occurrences(source, key)
            assert places
            assert all(source[end : end + len(value)] == value for end in places)
            assert all(task.noise_symbols <= symbol < first_value for symbol in key)
            assert len({*key}) == len(key)
            assert all(first_value <= symbol < task.symbols for symbol in value)


@pytest.mark.parametrize(
    ("task", "noise", "pairs"), [(MQAR, 16, 8), (IN_CONTEXT, 0, 16), (NOISY, 8, 12), (FUZZY, 15, 5)], ids=str
)
def test_a_source_holds_so_many_pairs_and_the_rest_is_noise(task: Recall, noise: int, pairs: int) -> None:
    """By hand: 32 tokens without 8 pairs; 16 pairs of 2; a quarter of 32, then 12 pairs; 40 without 5 pairs of 5."""
    for source, _ in examples_of(task):
        is_noise = [symbol < task.noise_symbols for symbol in source]
        assert sum(is_noise) == noise
        size, keys, place = task.key_length + task.value_length, [], 0
        while place < len(source):
            if is_noise[place]:
                place += 1
                continue
            keys.append(tuple(source[place : place + task.key_length]))
            place += size
        assert len(keys) == pairs
        assert len({*keys}) == task.pairs


def test_copied_symbols_are_those_of_the_source_without_noise() -> None:
    task = SelectiveCopying(tokens=5, source_length=20, noise_symbols=3)
    examples = examples_of(task)
    assert all([symbol for symbol in source if symbol >= 3] == target for source, target in examples)
    assert len({tuple(symbol < 3 for symbol in source) for source, _ in examples}) > EXAMPLES / 2


def test_facts_are_the_same_in_all_examples_and_others_under_another_seed() -> None:
    task = Memorisation(facts=10, questions=5)
    facts = []
    for seed in (0, 1):
        pairs = {(key, value) for _, target in examples_of(task, seed) for [key], [value] in questions_in(task, target)}
        assert len(pairs) == len(dict(pairs)) == len({value for _, value in pairs}) == 10
        facts.append(pairs)
    assert facts[0] != facts[1]
    assert all(source == [0] for source, _ in examples_of(task))


def test_answers_by_position_put_the_source_together_again() -> None:
    """And earlier answers tell nothing of later ones: each symbol is as likely at each position, to 4 errors."""
    task = Compression(source_length=6, compressed_symbols=3)
    examples = examples_of(task)
    orders, counts, pairs = set(), Counter[tuple[int, int]](), Counter[tuple[int, int, int]]()
    for source, target in examples:
        answers = {position - 4: symbol for [position], [symbol] in questions_in(task, target)}
        assert [answers[place] for place in range(5)] == source[:-1]
        assert source[-1] == 0
        counts.update(enumerate(source[:-1]))
        pairs.update((place, source[0], source[place]) for place in range(1, 5))
        orders.add(tuple(target[::2]))
    assert len(orders) > EXAMPLES / 3
    assert {*counts} == {(place, symbol) for place in range(5) for symbol in (1, 2, 3)}
    assert all(abs(count - EXAMPLES / 3) < 4 * np.sqrt(EXAMPLES * 2 / 9) for count in counts.values())
    assert len(pairs) == 4 * 9
    assert all(abs(count - EXAMPLES / 9) < 4 * np.sqrt(EXAMPLES * 8 / 81) for count in pairs.values())


@pytest.mark.parametrize("hops", [1, 2, 5])
def test_following_the_edges_of_the_source_leads_to_the_answer(hops: int) -> None:
    task = KHop(hops=hops, nodes=9, questions=4)
    for source, target in examples_of(task):
        edges = dict(zip(source[::2], source[1::2], strict=True))
        assert len(edges) == len({*edges.values()}) == 9
        for [start], [end] in questions_in(task, target):
            node = start
            for _ in range(hops):
                node = edges[node]
                assert node != start
            assert node == end


@pytest.mark.parametrize("task", [Arithmetic(numbers=2), Arithmetic(numbers=9, modulus=11)], ids=str)
def test_python_computes_the_same_value_of_an_expression(task: Arithmetic) -> None:
    shapes = set()
    for source, [answer] in examples_of(task):
        left = source.copy()

        def infix(left: list[int] = left) -> str:
            symbol = left.pop(0)
            return f"({infix()} {'+-*'[symbol - task.modulus]} {infix()})" if symbol >= task.modulus else str(symbol)

        assert eval(infix()) % task.modulus == answer
        assert not left
        shapes.add(tuple(symbol >= task.modulus for symbol in source))
    assert (len(shapes) > 1) == (task.numbers > 2)


@pytest.mark.parametrize("task", [Brackets(), Brackets(open=1, source_length=7, types=1)], ids=str)
def test_the_answer_leaves_no_bracket_when_pairs_are_struck_out(task: Brackets) -> None:
    def text(symbols: list[int]) -> str:
        return "".join("([{<)]}>"[symbol % task.types + 4 * (symbol >= task.types)] for symbol in symbols)

    def struck_out(word: str) -> str:
        while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", word)) != word:
            word = shorter
        return word

    for source, target in examples_of(task):
        assert len(struck_out(text(source))) == task.open
        assert struck_out(text([*source, *target])) == ""


def test_every_word_of_brackets_is_as_likely() -> None:
    """One bracket stays open in 5 words of 5 (a ballot sequence); each comes in a fifth of examples, to 4 errors."""
    task = Brackets(open=1, source_length=5, types=1)
    words = Counter(tuple(task.example(Random(f"0/{number}"), 0)[0]) for number in range(3000))
    assert len(words) == 5
    assert all(abs(count - 600) < 4 * np.sqrt(3000 * 0.2 * 0.8) for count in words.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "recall", "pairs": 17}, "16 symbols make 16"),
        ({"kind": "recall", "pairs": 3}, "4 are more than the 3 pairs"),
        ({"kind": "recall", "source_length": 15}, "need 16, and there is room for 14"),
        ({"kind": "recall", "noise": 0.6}, "need 16, and there is room for 12 in a source of 32 with noise 0.6"),
        ({"kind": "recall", "pairs": 8, "key_length": 3, "keys": 3}, "need as many keys, and 3 symbols make 6"),
        ({"kind": "selective_copying", "tokens": 40}, "40 do not fit"),
        ({"kind": "memorisation", "facts": 8}, "more than the 8 facts"),
        ({"kind": "k_hop", "hops": 16}, "16 lead around a cycle of 16"),
        ({"kind": "k_hop", "questions": 17}, "more than the 16 nodes"),
        ({"kind": "brackets", "open": 7}, "7 open brackets and pairs of closed ones do not fill a source of 30"),
        ({"kind": "brackets", "open": 32}, "do not fill a source of 30"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(Synthetic, tree({"task": settings}))


# --- as a corpus ---------------------------------------------------------------------------------------------------


def config(**more: object) -> DataConfig:
    settings = {
        "corpus": {"kind": "synthetic", "task": {"kind": "recall"}, "examples": 2000},
        "tokenizer": {"kind": "symbols", "vocabulary": 40},
        "sequence_length": 41,
        "batch_size": 4,
    }
    return validate(DataConfig, tree(settings | more))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(config(), tmp_path_factory.mktemp("data"))


def windows_of(data: Prepared, split: str) -> np.ndarray:
    (source,) = data.sources
    shards = data.open(source, split)
    return shards.read(np.arange(0, len(shards), 41), 41)


def test_windows_are_the_examples_each_in_one_split(data: Prepared) -> None:
    windows = {split: windows_of(data, split) for split in SPLITS}
    task = Recall()
    expected = {
        (*source, *target) for number in range(2000) for source, target in [task.example(Random(f"0/{number}"), 0)]
    }
    found = [tuple((window[:-1] - 2).tolist()) for split in SPLITS for window in windows[split]]
    assert len(found) == 2000
    assert {*found} == expected
    assert all((each[:, -1] == 0).all() for each in windows.values())  # the end of the document
    contents = [{*data.sources[0].contents(split).tolist()} for split in SPLITS]
    assert sum(map(len, contents)) == len(set.union(*contents))
    # Five in a hundred each, to four standard errors.
    assert all(abs(len(windows[split]) - 100) < 4 * np.sqrt(95) for split in ("validation", "test"))


def test_the_digest_depends_on_the_settings_alone(data: Prepared, tmp_path: Path) -> None:
    def digest(**settings: object) -> str:
        return open_corpus(validate(Synthetic, tree(settings))).digest

    assert digest() == digest(task={"kind": "recall", "pairs": 8})
    others = [digest(seed=1), digest(examples=10), digest(task={"kind": "recall", "pairs": 9}), digest(task="k_hop")]
    assert len({digest(), *others}) == 5
    again = prepare(config(), tmp_path)
    assert again.digest == data.digest
    assert all((windows_of(again, split) == windows_of(data, split)).all() for split in SPLITS)


def test_symbols_are_read_and_written() -> None:
    tokenizer = Symbols(10)
    assert [ids.tolist() for ids in tokenizer.encode(["0 7", " 3\n", ""])] == [[2, 9], [5], []]
    assert tokenizer.decode([2, 9, 0, 1, 10]) == "0 7"
    for wrong in ("8", "-1", "a", "1,2"):
        with pytest.raises(InputError, match="numbers from 0 to 7"):
            tokenizer.encode([wrong])


TWO = {
    "kind": "mixture",
    "sources": {
        "few": {"corpus": {"kind": "synthetic", "task": {"kind": "recall", "pairs": 8}}},
        "many": {"corpus": {"kind": "synthetic", "task": {"kind": "recall", "pairs": 16}}},
    },
}


def test_tasks_of_one_length_mix() -> None:
    assert [*config(corpus=TWO).tasks] == ["few", "many"]
    longer = {"corpus": {"kind": "synthetic", "task": {"kind": "recall", "source_length": 34}}}
    with pytest.raises(InputError, match="several lengths: few 41, many 43"):
        config(corpus={"kind": "mixture", "sources": {"few": TWO["sources"]["few"], "many": longer}})


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"sequence_length": 50}, "sequence_length", "write 41"),
        ({"tokenizer": "bytes"}, "tokenizer", "write `tokenizer: {kind: symbols, vocabulary: 35}`"),
        ({"tokenizer": {"kind": "symbols", "vocabulary": 34}}, "tokenizer", "vocabulary: 35}`, or more"),
        ({"corpus": "python-stdlib"}, "tokenizer", "this corpus is text"),
        (
            {
                "corpus": {
                    "kind": "mixture",
                    "sources": {"a": {"corpus": "python-stdlib"}, "b": {"corpus": "synthetic"}},
                }
            },
            "corpus.sources",
            "mix tasks with tasks",
        ),
    ],
)
def test_settings_of_the_data_that_fit_no_task_are_refused(settings: dict[str, object], key: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        config(**settings)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert message in problem.message
