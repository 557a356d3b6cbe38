"""Layers of a configuration: the stronger wins key by key, and what it brings keeps its mark."""

from lit_llm.config.tree import at, difference, merge, read_yaml


def merged(*texts):
    node = read_yaml(texts[0], "layer0")
    for number, text in enumerate(texts[1:], 1):
        node = merge(node, read_yaml(text, f"layer{number}"))
    return node


def test_mappings_merge_key_by_key_and_scalars_are_replaced():
    assert merged("a: {b: 1, c: 2}\nd: 3", "a: {c: 4, e: 5}").plain() == {"a": {"b": 1, "c": 4, "e": 5}, "d": 3}


def test_lists_are_replaced_whole():
    assert merged("a: [q, k, v]", "a: [q]").plain() == {"a": ["q"]}
    assert merged("a: [q]", "a: []").plain() == {"a": []}
    assert merged("a: {b: 1}", "a: [1]").plain() == {"a": [1]}


def test_null_replaces_a_mapping_and_a_mapping_replaces_null():
    assert merged("a: {b: 1}", "a: null").plain() == {"a": None}
    assert merged("a: null", "a: {b: 1}").plain() == {"a": {"b": 1}}


def test_another_kind_replaces_and_the_same_kind_merges():
    """The keys of cosine mean nothing to constant."""
    assert merged("s: {kind: cosine, final: 0.1}", "s: {kind: constant}").plain() == {"s": {"kind": "constant"}}
    assert merged("s: {kind: cosine, final: 0.1}", "s: {kind: cosine, warm: 3}").plain() == {
        "s": {"kind": "cosine", "final": 0.1, "warm": 3}
    }
    assert merged("s: {kind: cosine, final: 0.1}", "s: {warm: 3}").plain() == {
        "s": {"kind": "cosine", "final": 0.1, "warm": 3}
    }


def test_a_short_form_is_the_mapping_with_that_kind():
    assert merged("o: adamw", "o: {lr: 1}").plain() == {"o": {"kind": "adamw", "lr": 1}}
    assert merged("o: adamw", "o: {kind: adafactor, lr: 1}").plain() == {"o": {"kind": "adafactor", "lr": 1}}
    assert merged("o: {kind: adamw, lr: 1}", "o: adafactor").plain() == {"o": "adafactor"}


def test_marks_travel_with_the_values_that_they_belong_to():
    node = merged("a:\n  b: 1\n  c: 2", "\n\na:\n  c: 3\n  d: 4", "x: 1\na: {d: 5}")
    where = {path: str(node.mark_of(["a", *path])) for path in "bcd"}
    assert where == {"b": "layer0:2", "c": "layer1:4", "d": "layer2:2"}


def test_a_short_form_keeps_its_own_mark_under_a_stronger_layer():
    node = merged("\no: adamw", "o:\n  lr: 1")
    assert str(node.mark_of(["o", "kind"])) == "layer0:2"
    assert str(node.mark_of(["o", "lr"])) == "layer1:2"


def test_merging_leaves_the_layers_as_they_were():
    base, over = read_yaml("a: {b: 1}", "base"), read_yaml("a: {c: 2}", "over")
    merge(base, over)
    assert (base.plain(), over.plain()) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_a_dotted_path_is_a_tree_with_one_branch():
    assert at("a.b.c", read_yaml("{d: 1}", "s")).plain() == {"a": {"b": {"c": {"d": 1}}}}


def test_a_difference_lists_each_leaf_that_is_not_equal():
    left = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    right = {"a": {"b": 1, "c": [1]}, "e": 5}
    assert difference(left, right) == {"a.c": [[1, 2], [1]], "d": [4, None], "e": [None, 5]}
    assert difference(left, left) == {}


def test_a_bare_word_merges_as_the_kind_that_it_is_short_for():
    """`adamw` over `{kind: adamw, lr: 1}` keeps the rate, as `{kind: adamw}` does."""
    base = read_yaml("o: {kind: adamw, lr: 1}", "a")
    for over in ("o: adamw", "o: {kind: adamw}"):
        assert merge(base, read_yaml(over, "b")).plain() == {"o": {"kind": "adamw", "lr": 1}}
    for over in ("o: muon", "o: {kind: muon}"):
        assert merge(base, read_yaml(over, "b")).plain()["o"] in ("muon", {"kind": "muon"})
