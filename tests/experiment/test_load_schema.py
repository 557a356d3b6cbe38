"""The JSON Schema that editors get: every field explained, and everything we ship is valid by it."""

from functools import cache
from pathlib import Path

import pytest
import yaml

from lit_llm import load_experiment
from lit_llm.config.tree import ConfigNode, read_file
from lit_llm.experiment.load import preset_names, read_layers
from lit_llm.experiment.schema import Experiment
from lit_llm.studies.json_schema import study_schema
from lit_llm.studies.schema import Study

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[2]


def sections(schema):
    return {schema["title"]: schema, **schema.get("$defs", {})}


@cache
def validator(model):
    return jsonschema.Draft202012Validator(study_schema() if model is Study else model.model_json_schema())


def errors(model, content):
    return [f"{'.'.join(map(str, e.path))}: {e.message}" for e in validator(model).iter_errors(content)]


@pytest.mark.parametrize("model", [Experiment, Study])
def test_every_section_and_every_field_has_a_description(model):
    for name, section in sections(model.model_json_schema()).items():
        assert section.get("description"), name
        for field, schema in section.get("properties", {}).items():
            assert schema.get("description"), f"{name}.{field}"


@pytest.mark.parametrize("model", [Experiment, Study])
def test_the_schema_is_a_schema_and_strict(model):
    schema = model.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for name, section in sections(schema).items():
        assert section["additionalProperties"] is False, name


@pytest.mark.parametrize("name", preset_names())
def test_the_presets_are_valid_as_they_are_written_and_as_they_are_dumped(name):
    written = read_layers(ConfigNode([ConfigNode(name)]), Path.cwd()).plain()
    assert errors(Experiment, written) == []
    assert errors(Experiment, load_experiment(name).model_dump(mode="json")) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("ablations/*.yaml")), ids=lambda path: path.name)
def test_the_studies_that_we_ship_are_valid(path):
    assert errors(Study, read_file(path).plain()) == []


def test_a_study_has_a_question_or_one_that_it_is_like():
    assert (
        errors(Study, {"study": "s", "question": "Does it?"})
        == errors(Study, {"study": "s", "extends_study": "t.yaml"})
        == []
    )
    assert len(errors(Study, {"study": "s"})) == 1


def test_a_study_with_everything_in_it_is_valid():
    study = """
    study: everything
    question: Is it all there?
    extends: [redllm-tiny]
    base: {pretrain: {training: {max_steps: 10}}}
    arms: {red: {}, dec: {extends: decllm-tiny, grid: false}, none: null}
    grid:
      design: factorial
      factors:
        model.attention.output_norm: [head, none]
        split: {3/3: {model.encoder.layers: 3}, 5/1: {model.encoder.layers: 5}}
      exclude: [{split: 3/3}]
    seeds: [0, 1]
    compare: {baseline: red, stratify_by: [split], metric: val/target_nll}
    allow: [{key: pretrain.data, because: it is the question}]
    """
    assert errors(Study, yaml.safe_load(study)) == []


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({"objective": "prefix_lm"}, True),
        ({"objective": {"split": "half", "kind": "prefix_lm"}}, True),
        ({"objective": {}}, True),
        ({"objective": "mask_lm"}, False),
        ({"objective": {"kind": "causal_lm", "split": 3}}, False),
        ({"masks": {"prefix": "open"}}, False),
        ({"masks": {"intra_document": True}}, True),
        ({"masks": {"intra_document": "apart"}}, False),
        ({"extra": 1}, False),
        ({"validation": {"times": 0}}, False),
        ({"validation": {"times": "4"}}, False),
    ],
)
def test_the_schema_takes_short_forms_and_refuses_what_we_refuse(change, valid):
    experiment = load_experiment("decllm-tiny").model_dump(mode="json")
    experiment["pretrain"] |= change
    assert (errors(Experiment, experiment) == []) is valid
