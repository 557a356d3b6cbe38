"""Equal content, equal name; nothing else goes in."""

import math

import pytest

from lit_llm.config.hashing import Template, digest_of_files, fingerprint


def test_the_order_of_keys_and_the_spelling_of_numbers_do_not_matter():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": (1.0, 2), "a": 1.0})
    assert fingerprint({"a": -0.0}) == fingerprint({"a": 0})


@pytest.mark.parametrize(
    "other",
    [
        {"a": [2, 1]},
        {"a": [1, 2, 2]},
        {"b": [1, 2]},
        {"a": "[1, 2]"},
        {"a": [1, 2.5]},
        {"a": [1, None]},
        {"a": {"0": 1}},
    ],
)
def test_what_differs_has_another_name(other):
    assert fingerprint({"a": [1, 2]}) != fingerprint(other)


def test_words_and_truth_are_not_numbers():
    names = [fingerprint({"a": value}) for value in (1, "1", True, None, "true", [1])]
    assert len(set(names)) == len(names)


def test_floats_close_to_each_other_differ():
    assert fingerprint(0.1) != fingerprint(math.nextafter(0.1, 1))
    assert fingerprint(2.0**53) == fingerprint(2.0**53)


def test_what_is_not_finite_has_no_name():
    with pytest.raises(ValueError):
        fingerprint({"a": math.nan})


@pytest.mark.parametrize("name", ["a", "seed", "zz"])
@pytest.mark.parametrize("value", [0, 2.0, "parent", '"', None, [1, {"b": 2}]])
def test_a_template_gives_the_fingerprint_of_the_whole_content(name, value):
    content = {"b": [1, "x", "\0"], "seed": 3, "y": {"seed": 4}}
    assert Template(content, name).fingerprint(value) == fingerprint({**content, name: value})


def test_files_are_told_apart_by_name_content_order_and_where_one_ends(tmp_path):
    def digest(*files):
        for name, content in files:
            (tmp_path / name).write_bytes(content)
        return digest_of_files((name, tmp_path / name) for name, _ in files)

    digests = [
        digest(("a", b"12"), ("b", b"3")),
        digest(("a", b"1"), ("b", b"23")),
        digest(("b", b"3"), ("a", b"12")),
        digest(("a", b"12"), ("c", b"3")),
        digest(("a", b"12b\x003")),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(("a", b"12"), ("b", b"3")) == digests[0]
