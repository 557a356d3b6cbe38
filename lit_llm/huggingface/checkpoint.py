"""Checkpoints of transformers as directories of ours:

    model.yaml           the model section, and where there is a tokenizer, which of its tokens end and begin a text:
                         an experiment or a study may `extends` it
    weights.safetensors  our names, the source's dtype; scales of norms in float64, where they are 1 + w exactly
    tokenizer.json       of the `tokenizers` library, where the source had one
    config.json          the source's, for the way back

Rows of embeddings are in the order of the tokenizer's file. Our tokenizers exchange the first two ids with those of the
end and the beginning (see `FileTokenizer`), and `open_checkpoint` does the same with the rows.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.config.hashing import digest_of_file, fingerprint
from lit_llm.config.problems import InputError, Problem, SourceLocation, did_you_mean
from lit_llm.config.section import validate
from lit_llm.config.tree import ConfigNode, read_file, to_yaml, tree
from lit_llm.data import tokenizer_file
from lit_llm.data.config import FileTokenizer, identity_of
from lit_llm.huggingface.architectures import ARCHITECTURES, BUFFERS, Architecture, ModelFile, read_values
from lit_llm.huggingface.tensors import Tensors, compare, read_json
from lit_llm.models.config import ModelConfig
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel
from lit_llm.store.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from lit_llm.data.library_tokenizer import FromFile
    from lit_llm.models.families import LanguageModel

MODEL, WEIGHTS, TOKENIZER, SOURCE = "model.yaml", "weights.safetensors", "tokenizer.json", "config.json"
TABLES = ("embedding.weight", "encoder_embedding.weight", "output.weight", "output_bias")
"""Our tensors with a row for each token."""


def import_checkpoint(folder: Path, out: Path) -> ModelConfig:
    """Write a checkpoint of transformers as a directory of ours.

    Knows Llama, Mistral, Qwen 2 and 3, OLMo 2, Gemma 2 and 3 (its text part), T5 v1.1 and mT5, T5Gemma, T5Gemma 2 (its
    text part), ModernBERT (for masked tokens), and exported DecLLM and RedLLM. Runs no code of the folder and opens no
    pickle.

    Args:
        folder: Directory with config.json and *.safetensors.
        out: Directory to write.

    Returns:
        The model section of an experiment.

    Raises:
        InputError: The checkpoint needs something that we do not have, and nothing was written. The message holds
            everything that it needs.
    """
    if not folder.is_dir():
        raise InputError(Problem("there is no such directory", str(folder)))
    refuse_full(out)
    architecture, model = read_config(folder / SOURCE)
    tokenizer = folder / TOKENIZER
    layout = _layout(tokenizer, read_json(folder / SOURCE)) if tokenizer.is_file() else None
    tensors = Tensors(folder)
    if architecture.tied_by_file:
        tie = architecture.tied_by_file[_has_output(tensors, architecture)]
        model = model.model_copy(update={"tie_embeddings": tie})
    state = _state(tensors, architecture, resolve_model(model))
    fits = layout is not None and layout.vocabulary <= model.vocabulary
    read_by = {"path": TOKENIZER, **ends_of(tokenizer, layout)} if layout and fits else None
    with new_folder(out) as work:
        write_folder(work, model, state, read_by, f"{architecture.model}, imported from {folder}")
        shutil.copyfile(folder / SOURCE, work / SOURCE)
        if layout:
            shutil.copyfile(tokenizer, work / TOKENIZER)
    return model


def read_config(path: Path) -> tuple[Architecture, ModelConfig]:
    """The architecture and the model of a config.json. Raises InputError."""
    values = read_json(path)
    try:
        architecture = _architecture_of(values)
        return architecture, read_values(architecture, values)
    except InputError as error:
        location = SourceLocation(str(path))
        raise InputError(*(replace(problem, location=location) for problem in error.problems)) from None


def _architecture_of(values: Mapping[str, Any]) -> Architecture:
    name, models = str(values.get("model_type")), values.get("architectures") or []
    if name not in ARCHITECTURES:
        raise InputError(Problem(f"{name!r} cannot be imported{did_you_mean(name, ARCHITECTURES)}", "model_type"))
    model = ARCHITECTURES[name].model
    if not isinstance(models, list) or (models and model not in models):
        raise InputError(Problem(f"{models!r} cannot be imported; of {name} only {model}", "architectures"))
    return ARCHITECTURES[name]


def _layout(tokenizer: Path, values: Mapping[str, Any]) -> tokenizer_file.Layout:
    """Ids of a tokenizer's file. A decoder begins with the token that the config.json names, such as T5's <pad>."""
    start, layout = values.get("decoder_start_token_id"), tokenizer_file.read(tokenizer)
    if start in (None, layout.end):
        return layout
    named = {index: token for token, index in tokenizer_file.tokens_of(read_json(tokenizer)).items()}
    return tokenizer_file.read(tokenizer, begin=named.get(start))


def _has_output(tensors: Tensors, architecture: Architecture) -> bool:
    """True where a file holds an output matrix that is not its embedding: transformers then does not tie them."""
    import torch

    output, embedding = architecture.tied[0], "shared.weight"
    if not {output, embedding} <= tensors.shapes.keys():
        return False
    return not torch.equal(tensors.read(output), tensors.read(embedding))


def _state(tensors: Tensors, architecture: Architecture, model: ResolvedModel) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names. Raises InputError where they are not those of the model."""
    import torch

    shapes, names = shapes_of(model), architecture.names(model)
    tied = [name for name in architecture.tied if name not in names and name in tensors.shapes]
    ignored_tensors = architecture.ignored_tensors
    parameters = {
        name: shape
        for name, shape in tensors.shapes.items()
        if name not in tied and not name.endswith(BUFFERS) and not name.startswith(ignored_tensors)
    }
    expected = {theirs: _stacked([shapes[name] for name in ours]) for theirs, ours in names.items()}
    if problems := [*compare(expected, parameters, architecture.model)]:
        raise InputError(*problems)
    state: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        tensor = tensors.read(theirs)
        if architecture.scales_from_one and ours[0] in shapes and len(shapes[ours[0]]) == 1:
            tensor = 1.0 + tensor.double()
        parts = tensor.split([shapes[name][0] for name in ours])
        state |= {name: part.contiguous() for name, part in zip(ours, parts, strict=True)}
    for name in tied:
        if not torch.equal(tensors.read(name), state["embedding.weight"]):
            message = "differs from the embedding, though the config.json has tie_word_embeddings: true"
            raise InputError(Problem(message, name))
    return state


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def shapes_of(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """The shapes of our tensors."""
    from lit_llm.models.build import build_model

    return {name: tuple(value.shape) for name, value in build_model(model, device="meta").state_dict().items()}


# --- directories of ours -------------------------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    """True where a path is a directory with a model and weights of lit-llm."""
    return (path / MODEL).is_file() and (path / WEIGHTS).is_file()


def digest_of_checkpoint(folder: Path) -> str:
    """Digest of what `open_checkpoint` reads: the resolved model, the weights and the tokenizer, without comments and
    paths. Raises OSError where the weights are missing, InputError where the rest cannot be read."""
    model = resolve_model(_model_of(read_file(folder / MODEL)))
    return fingerprint(
        {
            "model": model.model_dump(mode="json"),
            "weights": digest_of_file(folder / WEIGHTS),
            "tokenizer": digest_of_tokenizer(folder),
        }
    )


def digest_of_tokenizer(folder: Path) -> str | None:
    """Digest of the tokenizer that model.yaml names, with the file in the folder: `fingerprint(identity_of(...))`. None
    where it names none. Raises InputError where it cannot be read."""
    named = _tokenizer_of(read_file(folder / MODEL))
    if named is None:
        return None
    return fingerprint(identity_of(validate(FileTokenizer, tree({**named, "path": str(folder / TOKENIZER)}))))


def open_checkpoint(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read an imported directory: `build_model(config).load_state_dict(state)`.

    Args:
        folder: Directory that `import_checkpoint` has written.

    Returns:
        The model section, and the parameters in float32. Where the directory has a tokenizer, the rows of embeddings
        are in the order of `tokenizer: {kind: file, path: FOLDER/tokenizer.json, ...}` as model.yaml has it.

    Raises:
        InputError: A parameter is missing, too much, or of another shape.
    """
    model, state, layout = read_folder(folder)
    if layout:
        state = reordered(state, layout.order(model.vocabulary))
    return model, {name: value.float() for name, value in state.items()}


def open_model(folder: Path) -> tuple[LanguageModel, FromFile, int]:
    """The model of a directory of ours, its tokenizer, and the token that a text begins with: where the tokenizer has
    none for that, the one that ends a document. Raises InputError, also where there is no tokenizer, and for a model
    that writes no text.
    """
    from lit_llm.data.library_tokenizer import FromFile
    from lit_llm.models.build import build_model
    from lit_llm.objectives.config import BOS, EOD

    config, state = open_checkpoint(folder)
    ends = _tokenizer_of(read_file(folder / MODEL))
    if ends is None:
        raise InputError(Problem("has no tokenizer that model.yaml names, so it reads and writes no text", str(folder)))
    if config.family == "encoder_only":
        raise InputError(Problem("is an encoder-only model, which writes no text", str(folder)))
    tokenizer = FromFile(folder / TOKENIZER, ends.get("end_of_document"), ends.get("begin"))
    layout = tokenizer_file.read(folder / TOKENIZER, ends.get("end_of_document"), ends.get("begin"))
    model = build_model(config)
    model.load_state_dict(state)
    return model.eval(), tokenizer, BOS if layout.begin < layout.ids else EOD


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor], tokenizer_file.Layout | None]:
    """Read a directory as it is on disk: rows in the order of the tokenizer's file. Raises InputError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not is_checkpoint(folder):
        message = f"is no directory with {MODEL} and {WEIGHTS}; `lit-llm import` makes one of a checkpoint"
        raise InputError(Problem(message, str(folder)))
    file = read_file(folder / MODEL)
    model = _model_of(file)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(Problem(f"is no readable safetensors file: {error}", str(folder / WEIGHTS))) from None
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if problems := [*compare(shapes_of(resolve_model(model)), shapes, str(folder / MODEL))]:
        raise InputError(*problems)
    ends = _tokenizer_of(file)
    if ends is None:
        return model, state, None
    return model, state, tokenizer_file.read(folder / TOKENIZER, ends.get("end_of_document"), ends.get("begin"))


def _model_of(file: ConfigNode) -> ModelConfig:
    return validate(ModelFile, ConfigNode({"model": file.find(["model"]) or ConfigNode({})})).model


def _tokenizer_of(file: ConfigNode) -> dict[str, Any] | None:
    node = file.find(["pretrain", "data", "tokenizer"])
    plain = None if node is None else node.plain()
    return plain if isinstance(plain, dict) and plain.get("kind") == "file" else None


def reordered(state: Mapping[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """The state with row i of each table from row order[i]."""
    import torch

    rows = torch.tensor(order)
    return {name: value[rows] if name in TABLES else value for name, value in state.items()}


def ends_of(tokenizer: Path, layout: tokenizer_file.Layout) -> dict[str, str]:
    """The tokens of the file that end and begin a text, by name: the file may be read by other rules one day."""
    named = {index: token for token, index in tokenizer_file.tokens_of(read_json(tokenizer)).items()}
    ends = {"end_of_document": named.get(layout.end), "begin": named.get(layout.begin)}
    return {key: token for key, token in ends.items() if token is not None}


def write_folder(
    folder: Path, model: ModelConfig, state: Mapping[str, Tensor], tokenizer: Mapping[str, str] | None, about: str
) -> None:
    """Write model.yaml and weights.safetensors. tokenizer: keys of a `FileTokenizer`, whose file the caller copies."""
    from safetensors.torch import save_file

    content: dict[str, Any] = {"model": written(model)}
    if tokenizer is not None:
        content["pretrain"] = {"data": {"tokenizer": {"kind": "file", **tokenizer}}}
    text = to_yaml(content, default_flow_style=None, width=110, allow_unicode=True)
    (folder / MODEL).write_text(f"# {about}.\n{text}", encoding="utf-8")
    with replacing(folder / WEIGHTS) as work:
        save_file({name: value.contiguous() for name, value in state.items()}, work, {"format": "pt"})


def written(model: ModelConfig) -> dict[str, Any]:
    """A model section with the keys that are set, and with what the shipped presets set: to stand on any of them."""
    plain = model.model_dump(mode="json", exclude_defaults=True)
    attention = model.attention
    plain["attention"] |= {"qkv_norm": list(attention.qkv_norm), "output_norm": attention.output_norm}
    plain["norm"] = {"function": model.norm.function, "scale": model.norm.scale, **plain.get("norm", {})}
    plain["feed_forward"] = {"activation": model.feed_forward.activation, **plain["feed_forward"]}
    for side in ("encoder", "decoder"):
        if side in plain:
            plain[side] = dict(sorted(plain[side].items(), key=lambda item: _PLACES.get(item[0], 2)))
    return {"family": model.family, "tie_embeddings": model.tie_embeddings, **plain}


_PLACES = {"layers": 0, "d_model": 1, "layer_ranges": 3}
"""Places of the keys of a stack, for a reader."""


def refuse_full(out: Path) -> None:
    """Raises InputError where something is at the place that is to be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(Problem("is there already; name another place, or remove it", str(out)))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that is at its place when all of it is written, and not before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        inner = Path(work) / out.name
        inner.mkdir()
        yield inner
        os.replace(inner, out)  # an empty folder at its place gives way
