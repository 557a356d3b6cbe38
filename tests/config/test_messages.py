"""What a user reads when a value is wrong: its place, its key, what it should be, and nothing of pydantic's."""

import re
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from lit_llm.config.problems import InputError, Problem, SourceLocation, collect_errors, did_you_mean
from lit_llm.config.section import Items, OneOf, Section, config_error, partial, set_fields, validate
from lit_llm.config.tree import merge, read_yaml


class Cosine(Section):
    kind: Literal["cosine"] = "cosine"
    final: float = Field(0.1, ge=0, le=1)


class Steps(Section):
    kind: Literal["steps", "stairs"] = "steps"
    at: Items[int] = Field(min_length=1, max_length=3)


class Inner(Section):
    width: int = Field(gt=0)
    ratio: float = Field(1.0, lt=2)
    name: str = "x"
    parts: Items[Literal["q", "k", "v"]] = ()
    maybe: int | None = None
    flag: bool = False
    free: dict[str, int] = Field({})


InnerOverride = partial(Inner)


class Outer(Section):
    inner: Inner
    schedule: Annotated[Cosine | Steps, OneOf(default=Cosine)] = Cosine()
    only: Annotated[Steps, OneOf(default=Steps)] = Steps(at=(1,))
    split: Literal["half", "random"] | int = "half"
    names: str | Items[str] = ()
    ranges: dict[str, InnerOverride] = Field({})  # type: ignore[valid-type]
    seeds: Items[int] = Field((0,), min_length=1)
    question: str = Field("why", min_length=1)

    @model_validator(mode="after")
    def _fits(self):
        findings = []
        if self.inner.width == 13:
            findings += [("inner.width", "13 brings bad luck"), (("ranges", "a.b"), "neither here")]
        if findings:
            raise config_error(*findings)
        return self


def problems(text, at=()):
    with pytest.raises(InputError) as caught:
        validate(Outer, read_yaml(text, "file.yaml"), at)
    return str(caught.value).splitlines()


def message(value, key="inner.width"):
    """What is said about a wrong value, without its place."""
    *path, last = key.split(".")
    text = f"{last}: {value}" if last != "width" else f"width: {value}"
    if path == ["inner"]:
        text = "inner: {" + text + ("}" if last == "width" else ", width: 1}")
    else:
        text = "inner: {width: 1}\n" + text
    (line,) = problems(text)
    place = re.match(r"file\.yaml:\d+: ", line)
    assert place
    return line.removeprefix(place[0])


def test_a_message_is_place_key_and_what_is_wrong():
    assert problems("inner:\n  width: abc") == ["file.yaml:2: inner.width: should be an integer, not 'abc'"]
    assert problems("inner:\n  width: abc", at=("base", "x")) == [
        "file.yaml:2: base.x.inner.width: should be an integer, not 'abc'"
    ]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("inner.width", "true", "should be an integer, not true"),
        ("inner.width", "1.5", "should be an integer, not 1.5"),
        ("inner.width", "1e3", "should be an integer, not 1000.0 - write 1000"),
        ("inner.width", "null", "should be an integer, not null"),
        ("inner.width", "[1]", "should be an integer, not a list"),
        ("inner.width", "{a: 1}", "should be an integer, not a mapping"),
        ("inner.width", "0", "should be greater than 0, not 0"),
        ("inner.ratio", "abc", "should be a number, not 'abc'"),
        ("inner.ratio", "false", "should be a number, not false"),
        ("inner.ratio", ".inf", "should be a finite number, not inf"),
        ("inner.ratio", "2", "should be less than 2, not 2"),
        ("inner.name", "3", "should be a string, not 3 - write '3', in quotes"),
        ("inner.name", "null", "should be a string, not null"),
        ("inner.parts", "q", "should be a list, not 'q' - write [q]"),
        ("inner.parts", "{q: k}", "should be a list, not a mapping"),
        ("inner.maybe", "x", "should be an integer, not 'x'"),
        ("inner.flag", "yes", "should be true or false, not 'yes'"),
        ("inner.flag", "1", "should be true or false, not 1"),
        ("inner.free", "[1]", "should be a mapping of keys to values, not a list"),
        ("inner.free", "null", "should be a mapping of keys to values, not null"),
        ("inner", "3", "should be a mapping of keys to values, not 3"),
        ("inner", "[1]", "should be a mapping of keys to values, not a list"),
        ("inner", "null", "should be a mapping of keys to values, not null"),
        ("schedule", "3", "should be a mapping of keys to values, not 3"),
        ("schedule", "[a]", "should be a mapping of keys to values, not a list"),
        ("schedule", "null", "should be a mapping of keys to values, not null"),
        ("only", "3", "should be a mapping of keys to values, not 3"),
        ("split", "third", "should be 'half' or 'random' or an integer, not 'third'"),
        ("split", "1.5", "should be 'half' or 'random' or an integer, not 1.5"),
        ("split", "[1]", "should be 'half' or 'random' or an integer, not a list"),
        ("names", "3", "should be a string or a list, not 3"),
        ("seeds", "3", "should be a list, not 3 - write [3]"),
        ("seeds", "[]", "needs at least 1 of them, has 0"),
        ("question", "''", "should not be empty"),
    ],
)
def test_a_wrong_type_is_told_in_the_words_of_yaml(key, value, said):
    if key == "inner":
        assert problems(f"inner: {value}") == [f"file.yaml:1: inner: {said}"]
    else:
        assert message(value, key) == f"{key}: {said}"


def test_an_integer_is_a_number_and_a_list_is_a_tuple():
    outer = validate(Outer, read_yaml("inner: {width: 1, ratio: 1, parts: [v, q]}\nnames: a", "f"))
    assert (outer.inner.ratio, outer.inner.parts, outer.names) == (1.0, ("v", "q"), "a")
    assert validate(Outer, read_yaml("inner: {width: 1}\nnames: [a, b]\nsplit: 3", "f")).names == ("a", "b")


def test_a_wrong_item_is_told_by_its_place_and_not_as_a_list_that_is_too_short():
    assert problems("inner: {width: 1}\nseeds:\n - 1\n - x\n") == [
        "file.yaml:4: seeds.1: should be an integer, not 'x'"
    ]
    assert problems("inner: {width: 1}\nseeds: [x]") == ["file.yaml:2: seeds.0: should be an integer, not 'x'"]
    assert problems("inner: {width: 1}\nnames: [a, 3]") == [
        "file.yaml:2: names.1: should be a string, not 3 - write '3', in quotes"
    ]
    assert problems("inner: {width: 1, parts: [q, x]}") == [
        "file.yaml:1: inner.parts.1: 'x' is not possible - allowed here: k, q, v"
    ]


def test_a_needed_key_is_told_where_its_mapping_was_written():
    assert problems("a: 1\ninner:\n  name: y")[0] == "file.yaml:2: inner.width: is needed, and there is no default"
    assert problems("inner: {width: 1}\nschedule: steps") == [
        "file.yaml:2: schedule.at: is needed, and there is no default"
    ]


def test_an_unknown_key_comes_with_the_nearest_or_with_all_that_there_are():
    assert problems("inner:\n  width: 1\n  witdh: 2") == [
        "file.yaml:3: inner.witdh: unknown key - did you mean 'width'?"
    ]
    assert problems("inner: {width: 1}\nschedule: {kind: cosine, zzz: 2}") == [
        "file.yaml:2: schedule.zzz: unknown key - allowed here: final, kind"
    ]
    assert problems("inner: {width: 1}\nranges:\n  0-2:\n    wdth: 2") == [
        "file.yaml:4: ranges.0-2.wdth: unknown key - did you mean 'width'?"
    ]


def test_a_variant_is_chosen_by_kind_by_a_bare_word_or_by_default():
    def schedule(text):
        return validate(Outer, read_yaml(f"inner: {{width: 1}}\nschedule: {text}", "f")).schedule

    assert schedule("cosine") == schedule("{}") == schedule("{kind: cosine, final: 0.1}") == Cosine()
    assert schedule("{kind: steps, at: [3]}") == Steps(at=(3,))


def test_one_section_may_go_by_several_names():
    """All names of the section's `kind` can be chosen, not its default alone."""
    both = validate(
        Outer, read_yaml("inner: {width: 1}\nschedule: {kind: stairs, at: [1]}\nonly: {kind: stairs, at: [1]}", "f")
    )
    assert both.schedule == both.only == Steps(kind="stairs", at=(1,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schedule: cosin", "schedule.kind: 'cosin' is not possible - did you mean 'cosine'?"),
        ("schedule: {kind: stpes}", "schedule.kind: 'stpes' is not possible - did you mean 'steps'?"),
        ("schedule: {kind: null}", "schedule.kind: null is not possible - allowed here: cosine, stairs, steps"),
        ("schedule: {kind: [1]}", "schedule.kind: a list is not possible - allowed here: cosine, stairs, steps"),
        ("schedule: {kind: {a: 1}}", "schedule.kind: a mapping is not possible - allowed here: cosine, stairs, steps"),
        ("schedule: {kind: steps, at: [1, 2, 3, 4]}", "schedule.at: takes at most 3 of them, has 4"),
        ("schedule: {final: 2}", "schedule.final: should be less than or equal to 1, not 2"),
        ("only: {kind: cosine}", "only.kind: 'cosine' is not possible - allowed here: stairs, steps"),
    ],
)
def test_a_wrong_variant_is_told_by_the_users_own_key(text, said):
    assert problems(f"inner: {{width: 1}}\n{text}") == [f"file.yaml:2: {said}"]


def test_all_problems_are_told_at_once_and_none_twice():
    lines = problems("inner:\n  width: x\n  flag: 1\n  extra: 1\nseeds: [a, b]\nschedul: 1\nquestion: ''")
    assert [line.split(": ")[0:2] for line in lines] == [
        ["file.yaml:2", "inner.width"],
        ["file.yaml:3", "inner.flag"],
        ["file.yaml:4", "inner.extra"],
        ["file.yaml:5", "seeds.0"],
        ["file.yaml:5", "seeds.1"],
        ["file.yaml:7", "question"],
        ["file.yaml:6", "schedul"],
    ]
    assert len(set(lines)) == len(lines)


def test_an_impossible_value_is_blamed_on_its_key_also_where_the_key_has_dots():
    assert problems("inner:\n  width: 13\nranges:\n  a.b: {width: 2}") == [
        "file.yaml:2: inner.width: 13 brings bad luck",
        "file.yaml:4: ranges.a.b: neither here",
    ]


def test_each_message_names_the_layer_that_brought_the_value_in():
    preset = read_yaml("inner: {width: 1,\n  ratio: 3}", "preset.yaml")
    study = read_yaml("inner:\n  flag: 3", "study.yaml")
    with pytest.raises(InputError) as caught:
        validate(Outer, merge(preset, study))
    assert str(caught.value).splitlines() == [
        "preset.yaml:2: inner.ratio: should be less than 2, not 3",
        "study.yaml:2: inner.flag: should be true or false, not 3",
    ]


PYDANTIC = re.compile(
    r"Input|valid|dictionary|tuple|instance|discriminator|tag_of|literal|None|True|False|validation|\["
)


@pytest.mark.parametrize(
    "key", ["inner", *(f"inner.{name}" for name in Inner.model_fields), *list(Outer.model_fields)[1:]]
)
@pytest.mark.parametrize(
    "value", ["abc", "''", "true", "1.5", "1.0", "-1", "null", "[1]", "[[1]]", "{a: 1}", "{}", "1e400"]
)
def test_no_message_speaks_pydantic(key, value):
    """Whatever is put wherever: either it fits, or the message is in the user's words."""
    path = key.split(".")
    node = read_yaml("inner: {width: 1}", "file.yaml")
    wrong = read_yaml(": {".join(path) + f": {value}" + "}" * (len(path) - 1), "file.yaml")
    try:
        validate(Outer, merge(node, wrong))
    except InputError as error:
        for problem in error.problems:
            assert problem.key.startswith(key)
            assert problem.location is not None
            said = re.sub(r" - write .*", "", problem.message)
            assert not PYDANTIC.search(said), said


def test_a_partial_section_has_the_same_fields_all_optional():
    assert set_fields(validate(InnerOverride, read_yaml("width: 3\nparts: [q]", "f"))) == {"width": 3, "parts": ("q",)}
    assert set_fields(InnerOverride()) == set_fields(None) == {}
    with pytest.raises(InputError, match="width: should be greater than 0, not 0"):
        validate(InnerOverride, read_yaml("width: 0", "f"))


def test_a_report_counts_the_problems_and_says_what_to_do_next():
    two = InputError(Problem("is wrong", "a.b", SourceLocation("f.yaml", 3)), "and this", hint="Look there.")
    assert two.report() == "f.yaml:3: a.b: is wrong\nand this\n2 problems, nothing was started. Look there."
    assert InputError("x", "x").report() == "x\n1 problem, nothing was started."


def test_noting_a_problem_goes_on_to_the_next():
    problems = []
    for name in "ab":
        with collect_errors(problems):
            raise InputError(name)
    assert [problem.message for problem in problems] == ["a", "b"]


def test_did_you_mean_is_silent_where_nothing_is_allowed():
    assert did_you_mean("x", []) == ""
    assert did_you_mean("headz", ["heads", "d_ff"]) == " - did you mean 'heads'?"
    assert did_you_mean("zzz", ["b", "a"]) == " - allowed here: a, b"
