"""The presets of published architectures are what transformers builds of its own configurations."""

import pytest
import torch
import transformers

from lit_llm.experiment.load import load_experiment
from lit_llm.huggingface.architectures import ARCHITECTURES, read_values
from lit_llm.models.cost import count_parameters
from lit_llm.models.resolve import resolve_model


def _gemma3(**shape):
    """Gemma 3's text part as T5Gemma 2 has it twice, with the smallest of eyes."""
    own = {"vocab_size": 262144, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512, **shape}
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = {"text_config": dict(own), "vision_config": eyes}
    return transformers.T5Gemma2Config(encoder=encoder, decoder=dict(own))


PUBLISHED = {
    "llama2-7b": transformers.LlamaConfig,
    "gemma2-2b": transformers.Gemma2Config,
    "t5gemma-2b-2b": transformers.T5GemmaConfig,
    "t5gemma2-270m-270m": lambda: _gemma3(hidden_size=640, intermediate_size=2048, num_hidden_layers=18),
    "t5gemma2-1b-1b": lambda: _gemma3(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26),
    "modernbert-base": transformers.ModernBertConfig,
    "modernbert-large": lambda: transformers.ModernBertConfig(
        hidden_size=1024, intermediate_size=2624, num_hidden_layers=28, num_attention_heads=16
    ),
}
ROUNDED = {
    "llama2-7b": 6.74e9, "gemma2-2b": 2.61e9, "t5gemma2-270m-270m": 0.37e9, "t5gemma2-1b-1b": 1.7e9,
    "modernbert-base": 149e6, "modernbert-large": 395e6,
}  # fmt: skip
"""Parameters as published, without a part for images."""


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_is_the_model_that_transformers_configuration_describes(preset):
    values = PUBLISHED[preset]().to_dict()
    model = read_values(ARCHITECTURES[values["model_type"]], values)
    assert resolve_model(load_experiment(preset).model) == resolve_model(model)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_transformers_model(preset):
    config = PUBLISHED[preset]()
    with torch.device("meta"):
        theirs = getattr(transformers, ARCHITECTURES[config.model_type].model)(config)
    theirs.tie_weights()
    images = ("vision_tower", "multi_modal_projector", "eoi_embedding")
    counted = sum(p.numel() for name, p in theirs.named_parameters() if not any(part in name for part in images))
    assert count_parameters(resolve_model(load_experiment(preset).model)).total == counted


@pytest.mark.parametrize("preset", ROUNDED)
def test_a_preset_has_the_published_number_of_parameters(preset):
    total = count_parameters(resolve_model(load_experiment(preset).model)).total
    assert total == pytest.approx(ROUNDED[preset], rel=0.03)
