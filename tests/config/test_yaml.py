"""A configuration file is data: read as YAML 1.2 reads it, never executed, and every value knows its line."""

import time

import pytest

from lit_llm.config.problems import InputError
from lit_llm.config.tree import leaves, read_file, read_override, read_yaml, to_yaml


def read(text):
    return read_yaml(text, "file.yaml").plain()


def refused(text):
    with pytest.raises(InputError) as caught:
        read_yaml(text, "file.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "12345678e1234567",
        "1234567890123456",
        "0x1f",
        "1e3",
        ".5",
        "yes",
        "true",
        "null",
        "~",
        "",
        "1:30",
        "a: b",
        "2026-01-01",
    ],
)
def test_what_is_written_is_read_as_it_was(value):
    """A fingerprint may look like a number, and is none."""
    content = {"parent": value, "list": [value, 1, 0.5, 1e-5, 1e30, True, None], value or "key": 1}
    assert read(to_yaml(content)) == content


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("3e4", 30000.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("+5", 5),
        ("007", 7),
        ("0", 0),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
    ],
)
def test_numbers_words_and_nothing_are_what_yaml_1_2_says(text, value):
    """PyYAML follows YAML 1.1, where 1e-3 is a word."""
    found = read(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "word", ["no", "on", "off", "yes", "y", "NO", "0o7", "0x1F", "1_000", "1:30", "2001-01-01", "1e"]
)
def test_what_yaml_1_1_would_turn_into_booleans_dates_or_sixties_stays_a_word(word):
    assert read(f"a: {word}") == {"a": word}


def test_quotes_make_a_word_of_a_number():
    assert read("a: '1e-3'\nb: \"true\"\nc: !!str 5") == {"a": "1e-3", "b": "true", "c": "5"}


def test_keys_are_words_whatever_they_look_like():
    """Layer 0 and the level 1e-3 are names."""
    assert read("0: a\n1e-3: b\ntrue: c\nnull: d") == {"0": "a", "1e-3": "b", "true": "c", "null": "d"}


def test_a_key_written_twice_is_refused_at_its_second_line():
    assert refused("a:\n  b: 1\n  c: 2\n  b: 3") == "file.yaml:4: b: is written twice"


def test_all_repeated_keys_are_told_at_once():
    assert refused("a: 1\na: 2\nb: {c: 1, c: 2}").splitlines() == [
        "file.yaml:2: a: is written twice",
        "file.yaml:3: c: is written twice",
    ]


def test_anchors_and_aliases_repeat_a_value():
    assert read("a: &x {b: [1, 2]}\nc: *x\nd: [*x]") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": [{"b": [1, 2]}]}


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch {}']",
        "a: !!python/object/new:os.system ['touch {}']",
        "a: !!python/object:os.system {{command: 'touch {}'}}",
        "a: !!python/name:os.system 'touch {}'",
        "a: !!python/tuple [1, 2]",
        "? !!python/object/apply:os.system ['touch {}']\n: 1",
        "? !!python/name:os.system 'x'\n: 1",
        "a: !!set {{b, c}}",
        "a: !!binary aGVsbG8=",
        "a: !mine 1",
        "- !mine {{a: 1}}",
    ],
)
def test_tags_are_refused_and_run_nothing(text, tmp_path):
    trap = tmp_path / "executed"
    message = refused(text.format(trap))
    assert message.startswith("file.yaml:1: ")
    assert "a file is data, never code" in message or "a key must be a plain word" in message
    assert not trap.exists()


@pytest.mark.parametrize("text", ["a: !!int abc", "a: !!bool maybe", "a: !!float x", "a: " + "9" * 5000])
def test_a_value_that_does_not_fit_its_tag_is_an_error_with_its_line(text):
    assert refused(f"x: 1\n{text}").startswith("file.yaml:2: ")


def test_merge_keys_are_refused_because_extends_does_it():
    assert refused("a: &x {b: 1}\nc:\n  <<: *x") == "file.yaml:3: '<<' is not supported, use `extends`"
    assert read("'<<': 1") == {"<<": 1}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1, 2\nb: 3", 2),
        ("a: b: c", 1),
        ("a: 1\nb: 'open\n\n", 4),
        ("a: 1\n\tb: 2", 2),
        ("a: 1\nb: *nowhere", 2),
        ("a: 1\n---\nb: 2", 2),
        ("a: 1\n\nb: \x00", 3),
        ("a: \x1b[0m", 1),
        ("? [a, b]\n: 1", 1),
        ("%YAML 3.0\n---\na: 1", 1),
    ],
)
def test_broken_yaml_is_one_message_with_its_line(text, line):
    message = refused(text)
    assert message.startswith(f"file.yaml:{line}: ")
    assert len(message.splitlines()) == 1


def bomb(levels, width=10):
    lines = [f"a0: &a0 [{','.join('x' * width)}]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text", [bomb(9), "[" * 3000, "[" * 300 + "]" * 300, "{a: " * 300 + "}" * 300, "a: &a [*a]", "a: &a {b: *a}"]
)
def test_deep_nesting_and_alias_bombs_are_refused_quickly(text):
    """Nine levels of ten aliases are a billion values: no message should cost that."""
    started = time.process_time()
    message = refused(text)
    assert time.process_time() - started < 5
    assert "levels deep" in message or "values" in message


def test_a_configuration_of_ordinary_size_is_no_bomb():
    items = ", ".join(str(n) for n in range(5000))
    assert len(read(f"a: [{items}]")["a"]) == 5000
    assert read("a: {b: {c: {d: {e: {f: {g: {h: [[[1]]]}}}}}}}")


def test_an_empty_file_is_an_empty_mapping_and_a_list_is_refused(tmp_path):
    empty, comment, listed = tmp_path / "empty.yaml", tmp_path / "comment.yaml", tmp_path / "list.yaml"
    empty.write_text("")
    comment.write_text("# nothing\n")
    listed.write_text("\n- a\n- b\n")
    assert read_file(empty).plain() == {}
    assert read_file(comment).plain() == {}
    with pytest.raises(InputError, match="mapping of keys to values") as caught:
        read_file(listed)
    assert str(caught.value).startswith(f"{listed}:2: ")


def test_a_file_that_is_not_utf_8_or_not_there_is_an_error_with_its_name(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("a: é".encode("latin-1"))
    for path in (latin, tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InputError) as caught:
            read_file(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_byte_order_mark_and_windows_lines_do_not_matter(tmp_path):
    path = tmp_path / "windows.yaml"
    path.write_bytes("\ufeffa: 1\r\nb: [x,\r\n  y]\r\n".encode())
    assert read_file(path).plain() == {"a": 1, "b": ["x", "y"]}


def test_every_value_knows_the_line_of_its_key_or_of_itself_in_a_list():
    node = read_yaml("a:\n  b: 1\n  c:\n    - x\n    - d: 2\ne: {f:\n  3}\n", "file.yaml")
    lines = {"a": 1, "a.b": 2, "a.c": 3, "a.c.0": 4, "a.c.1": 5, "a.c.1.d": 5, "e": 6, "e.f": 6}
    assert {path: node.mark_of(path.split(".")).line for path in lines} == lines


def test_what_was_not_written_has_the_line_of_its_nearest_ancestor():
    node = read_yaml("a:\n  b:\n    c: 1", "file.yaml")
    assert node.mark_of(["a", "b", "x", "y"]).line == 2
    assert node.mark_of(["a", "x"]).line == 1


def test_an_override_is_yaml_behind_an_equals_sign():
    assert read_override("a.b=1e-3").plain() == {"a": {"b": 0.001}}
    assert read_override("a=[q, k]").plain() == {"a": ["q", "k"]}
    assert read_override("a={b: no}").plain() == {"a": {"b": "no"}}
    assert read_override("a.b=").plain() == {"a": {"b": None}}
    assert read_override("a=b=c").plain() == {"a": "b=c"}


@pytest.mark.parametrize(
    "option", ["a", "=3", "a..b=1", ".a=1", "a.=1", "a=[", "a=!!python/name:os.system x", "a=\x00"]
)
def test_an_override_that_cannot_be_read_names_itself(option):
    with pytest.raises(InputError) as caught:
        read_override(option)
    assert str(caught.value).startswith(f"-o {option}")


def test_leaves_keep_lists_whole_and_an_empty_mapping_has_none():
    assert dict(leaves({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None})) == {"a.b": [1, {"c": 2}], "e": None}
