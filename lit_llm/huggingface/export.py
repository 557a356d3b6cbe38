"""Models of ours for transformers: safetensors, and a config.json where it knows the architecture or where the folder
takes the code along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.config.problems import InputError, some
from lit_llm.data import tokenizer_file
from lit_llm.huggingface.architectures import EOI, Architecture, nearest, with_ties_of, without_scales
from lit_llm.huggingface.checkpoint import (
    SOURCE,
    TOKENIZER,
    ends_of,
    new_folder,
    read_config,
    read_folder,
    refuse_full,
    reordered,
    write_folder,
)
from lit_llm.huggingface.tensors import read_json
from lit_llm.huggingface.to_config import SpecialTokens
from lit_llm.models.config import ModelConfig
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel
from lit_llm.objectives.config import BOS, EOD
from lit_llm.store.files import replacing

if TYPE_CHECKING:
    from torch import Tensor


def export_checkpoint(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    out: Path,
    tokenizer: Path | None = None,
    end: str | None = None,
    begin: str | None = None,
) -> str:
    """Write a model for transformers' `from_pretrained`; one of another architecture as a directory of ours.

    DecLLM and RedLLM take their code along: `from_pretrained(out, trust_remote_code=True)`.

    Args:
        config: Model section of an experiment.
        state: Its parameters.
        out: Directory to write; nothing may be there.
        tokenizer: The tokenizer.json whose ids the model was trained with. Rows of embeddings go back to its order.
        end: Token that ends a document, as `FileTokenizer` has it.
        begin: Token that begins a text, as `FileTokenizer` has it.

    Returns:
        What was written, in one sentence.

    Raises:
        InputError: Something is at `out` already.
    """
    layout = None if tokenizer is None else tokenizer_file.read(tokenizer, end, begin)
    if layout:
        state = reordered(state, layout.order(config.vocabulary, back=True))
    return _export(config, state, out, tokenizer, layout)


def export_folder(folder: Path, out: Path) -> str:
    """Write an imported directory for transformers, with the config.json that it came with.

    Args:
        folder: Directory that `import_checkpoint` has written.
        out: Directory to write; nothing may be there.

    Returns:
        What was written, in one sentence.

    Raises:
        InputError: Something is at `out` already.
    """
    model, state, layout = read_folder(folder)
    tokenizer = folder / TOKENIZER
    source = folder / SOURCE
    return _export(
        model, state, out, tokenizer if tokenizer.is_file() else None, layout, source if source.is_file() else None
    )


def _export(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    out: Path,
    tokenizer: Path | None,
    layout: tokenizer_file.Layout | None,
    source: Path | None = None,
) -> str:
    """state: rows in the order of the tokenizer's file."""
    refuse_full(out)
    model = resolve_model(config)
    tokens = SpecialTokens(layout.end, layout.begin) if layout else SpecialTokens(EOD, BOS)
    architecture, values, differences = nearest(model, tokens)
    values = {"model_type": architecture.model_type, "architectures": [architecture.model], **values}
    if source is not None and not differences and (read := _read_if_same(source, model)):
        architecture, values = read
    with new_folder(out) as work:
        if tokenizer is not None:
            shutil.copyfile(tokenizer, work / TOKENIZER)
        if differences:
            read_by = None if tokenizer is None or layout is None else ends_of(tokenizer, layout)
            place = None if read_by is None else {"path": TOKENIZER, **read_by}
            write_folder(work, config, state, place, "Exported by lit-llm")
            return f"model.yaml and weights.safetensors, not for transformers: {_outside(architecture, differences)}"
        _write(work, architecture, model, values, state)
        if tokenizer is not None and layout is not None:
            if model.family == "decoder" or architecture.code:
                _set_first_token(work / TOKENIZER, layout, model.family == "decoder")
            _describe(work, tokenizer, layout, values.get("pad_token_id"))
        if model.decoder:
            _write_generation(work, values, range(layout.vocabulary, model.vocabulary) if layout else ())
    note = ", its images' part untrained" if architecture.model_type == "t5gemma2" else ""
    if architecture.code:
        note = f" with trust_remote_code=True; its code is {architecture.code} beside the weights"
    return f"{architecture.model} for transformers' from_pretrained{note}"


def _read_if_same(source: Path, model: ResolvedModel) -> tuple[Architecture, dict[str, Any]] | None:
    """Architecture and values of a config.json, if it describes this model."""
    try:
        architecture, described = read_config(source)
    except InputError:
        return None
    if with_ties_of(model, architecture, described) != model:
        return None
    return architecture, dict(json.loads(source.read_text(encoding="utf-8")))


def _outside(architecture: Architecture, differences: Mapping[str, str]) -> str:
    listed = [f"{key} {difference}" for key, difference in differences.items()]
    return f"the nearest is {architecture.model}, and {some(listed)}"


def _write(
    folder: Path,
    architecture: Architecture,
    model: ResolvedModel,
    values: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> None:
    from safetensors.torch import save_file

    kind = state["embedding.weight"].dtype
    tensors = tensors_of(architecture, model, state)
    if architecture.model_type == "t5gemma2":
        tensors[EOI] = _end_of_image(values, tensors)
    values = {**values, "dtype": str(kind).removeprefix("torch.")}
    (folder / SOURCE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if architecture.code:
        shutil.copyfile(Path(__file__).with_name(architecture.code), folder / architecture.code)
    with replacing(folder / "model.safetensors") as work:
        save_file(tensors, work, {"format": "pt"})


def tensors_of(architecture: Architecture, model: ResolvedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the names of an architecture of transformers, in the dtype of the embedding."""
    import torch

    tensors: dict[str, Tensor] = {}
    if architecture.unscaled:
        factors = without_scales(model)[1]
        state = {name: tensor * factors[name] if name in factors else tensor for name, tensor in state.items()}
    for theirs, ours in architecture.names(model).items():
        tensor = torch.cat([state[name] for name in ours]) if len(ours) > 1 else state[ours[0]]
        from_one = architecture.scales_from_one and tensor.dim() == 1
        tensors[theirs] = (tensor - 1.0 if from_one else tensor).to(state["embedding.weight"].dtype).contiguous()
    return tensors


def _set_first_token(tokenizer: Path, layout: tokenizer_file.Layout, begins: bool) -> None:
    """Have the file put the token that begins a text before each text, or none, as `lit-llm generate` does.

    Other tools, such as lm-evaluation-harness, read a text with the tokens that tokenizer.json adds; transformers takes
    no word on it from the tokenizer_config.json. A file that does so already stays as it is, as does one without such a
    token.
    """
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tokenizer))
    token = library.id_to_token(layout.begin)
    if library.encode("").ids == [layout.begin] * begins or (begins and token is None):
        return
    content = read_json(tokenizer)
    steps = [*_offset_steps(content.get("post_processor"))]
    if begins and token is not None:
        steps.append(_template(token, layout.begin))
    content["post_processor"] = {"type": "Sequence", "processors": steps} if len(steps) > 1 else next(iter(steps), None)
    tokenizer.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _offset_steps(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Steps of a post-processor that add no tokens: ByteLevel's, which leave spaces out of the offsets of words."""
    if processor and processor["type"] == "Sequence":
        for step in processor["processors"]:
            yield from _offset_steps(step)
    elif processor and processor["type"] == "ByteLevel":
        yield processor


def _template(token: str, index: int) -> dict[str, Any]:
    """Post-processor that puts a token before a text.

    As tokenizer.json has it: the library's own constructor splits the template at spaces, and reads `:` and `$` in it.
    """
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    one, other = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, other],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _describe(folder: Path, tokenizer: Path, layout: tokenizer_file.Layout, pad: Any) -> None:
    """Write the tokenizer_config.json. Without it the model_type decides AutoTokenizer's class, which may want other
    tokens.

    pad: the config.json's id for it. A token that the file does not have is left out.
    """
    named = {index: token for token, index in tokenizer_file.tokens_of(read_json(tokenizer)).items()}
    ids = {"eos_token": layout.end, "bos_token": layout.begin, "pad_token": pad if isinstance(pad, int) else layout.end}
    tokens = {key: named[index] for key, index in ids.items() if index in named}
    content = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokens}, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(content + "\n", encoding="utf-8")


def _write_generation(folder: Path, values: Mapping[str, Any], without_text: Sequence[int]) -> None:
    """Write the generation_config.json.

    without_text: ids that the tokenizer does not have, and `lit-llm generate` does not choose either.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    content = {name: values[name] for name in names if values.get(name) is not None}
    if without_text:
        content["suppress_tokens"] = [*without_text]
    (folder / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _end_of_image(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """Input of the token that ends an image: its row of the table, scaled, so that it is a token like all others."""
    import torch

    table_VD = tensors["model.encoder.embed_tokens.weight"]
    token = (values.get("encoder") or {}).get("eoi_token_index", 256_000)
    if token is None or not token < len(table_VD):
        return torch.zeros_like(table_VD[0])
    return table_VD[token] * torch.tensor(table_VD.shape[1] ** 0.5, dtype=table_VD.dtype)
