"""The model of a finished stage, with its tokenizer and masks, for generation, export and later stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_llm.config.problems import InputError, Problem
from lit_llm.experiment.schema import Experiment
from lit_llm.models.positions import prompt_beyond_table
from lit_llm.objectives.config import BOS, MasksConfig, continues
from lit_llm.runs.stage_config import StageConfig, load_stage_config
from lit_llm.runs.stage_graph import PRETRAINS
from lit_llm.store.files import Damaged, check_digest, file_digest, replacing
from lit_llm.store.store import FINAL, RECOMPUTE, Stage, Store

if TYPE_CHECKING:
    from torch import Tensor

    from lit_llm.data.tokenizers import Tokenizer
    from lit_llm.generation import Sampling
    from lit_llm.models.families import LanguageModel

WEIGHTS = "model.safetensors"
"""File with a finished stage's weights, in its checkpoints."""


@dataclass(frozen=True)
class Finished:
    """A trained model with its tokenizer, masks and experiment."""

    experiment: Experiment
    model: LanguageModel
    tokenizer: Tokenizer
    masks: MasksConfig
    """Masks of the stage."""
    weights: str | None
    """Digest of the model's weights; None where the result lacks it."""

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, batch_size: int = 16
    ) -> list[str]:
        """Continuation of each prompt, up to an end of document. Raises InputError for a model that writes no text."""
        self._refuse_masked()
        prefix = self.masks.prefix
        return complete_texts(self.model, self.tokenizer, prompts, max_new_tokens, sampling, batch_size, prefix)

    def stream(self, prompt: str, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Pieces of one prompt's continuation, as they are generated; together they are the result of `generate`."""
        self._refuse_masked()
        return stream_text(self.model, self.tokenizer, prompt, max_new_tokens, sampling, self.masks.prefix)

    def _refuse_masked(self) -> None:
        if not continues(family := self.model.config.family):
            raise InputError(Problem(f"the run is of an {family} model, which fills in tokens and writes no text"))


def complete_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int = 16,
    prefix: Literal["causal", "bidirectional"] = "causal",
    begin: int = BOS,
) -> list[str]:
    """Continuation of each prompt by a model, up to an end of document, with tokens of the tokenizer only.

    begin: first token of every text.
    """
    from lit_llm.generation import generate

    ids = [tokens.tolist() for tokens in tokenizer.encode(list(prompts))]
    _refuse_beyond_table(model, ids, max_new_tokens)
    answers = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=replace(sampling, vocabulary=tokenizer.vocabulary),
        prefix=prefix,
        batch_size=batch_size,
        begin=begin,
    )
    return [tokenizer.decode(answer.tokens) for answer in answers]


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    prefix: Literal["causal", "bidirectional"] = "causal",
    begin: int = BOS,
) -> Iterator[str]:
    """Pieces of the text that `complete_texts` gives for one prompt, each as soon as its last character is whole."""
    from lit_llm.generation import stream

    tokens, text, written = [], "", ""
    arguments = {"sampling": replace(sampling, vocabulary=tokenizer.vocabulary), "prefix": prefix, "begin": begin}
    ids = [tokenizer.encode([prompt])[0].tolist()]
    _refuse_beyond_table(model, ids, max_new_tokens)
    for new in stream(model, ids, max_new_tokens=max_new_tokens, **arguments):  # type: ignore[arg-type]
        if new.token is not None:
            tokens.append(new.token)
            text = tokenizer.decode(tokens)
            # The first bytes of a character are shown as U+FFFD until the others follow.
            if text.startswith(written) and not text.endswith("\ufffd"):
                yield text[len(written) :]
                written = text
    if text != written:
        yield text[len(written) :]


def _refuse_beyond_table(model: LanguageModel, prompts: Sequence[Sequence[int]], more: int) -> None:
    """Raise InputError for a prompt that leaves no learned positions for so many more tokens."""
    longest = max(map(len, prompts), default=0)
    if problem := prompt_beyond_table(model.config, longest, more):
        raise InputError(Problem(problem))


def export_finished(store: Store, fingerprint: str, out: Path) -> str:
    """Write the model of a stage for transformers, with its tokenizer; see `huggingface.export_checkpoint`.

    Returns one sentence on the written files. Raises InputError as `open_finished` does.
    """
    from lit_llm.data.config import BytePairTokenizer, FileTokenizer
    from lit_llm.data.prepare import open_prepared
    from lit_llm.data.tokenizers import FILE, SPECIAL
    from lit_llm.huggingface import export_checkpoint

    finished = open_finished(store, fingerprint)
    data = finished.experiment.pretrain.data
    state = finished.model.state_dict()
    prepared = open_prepared(data, store.data, load_stage_config(store.stage(fingerprint)).data)
    file: Path | None = prepared.tokenizer_folder / FILE
    ends: tuple[str | None, str | None] = SPECIAL
    if isinstance(data.tokenizer, FileTokenizer):
        ends = data.tokenizer.end_of_document, data.tokenizer.begin
    elif not isinstance(data.tokenizer, BytePairTokenizer):
        file = None  # the byte tokenizer has no file
    summary = export_checkpoint(finished.experiment.model, state, out, file, *ends)
    opened = "; it was trained to see its prefix both ways, which transformers' causal mask hides"
    return summary + opened * (finished.masks.prefix == "bidirectional")


def write_weights(stage: Stage, state: Mapping[str, Tensor]) -> str:
    """Write the weights of a stage; returns their digest, which its result records."""
    from safetensors.torch import save_file

    with replacing(stage.checkpoints / WEIGHTS, check=stage.check_claim) as work:
        save_file(dict(state), work)
    return file_digest(stage.checkpoints / WEIGHTS)


def check_weights(stage: Stage) -> None:
    """Raise Damaged where a finished stage's weights differ from the digest in its result."""
    if (digest := (stage.result() or {}).get("weights")) is not None:
        check_digest(stage.checkpoints / WEIGHTS, digest)


def has_lost_weights(stage: Stage) -> bool:
    """True where a finished stage's weights, or the last checkpoint of a trunk, are damaged or gone."""
    try:
        check_weights(stage)
        if stage.is_trunk:
            end_of_trunk(stage)
    except (Damaged, InputError):
        return True
    return False


def trunk_before(frozen: StageConfig, store: Store) -> Stage | None:
    """The trunk whose end a stage goes on from; None for a stage that begins otherwise."""
    if frozen.kind not in PRETRAINS or not frozen.parent:
        return None
    stage = store.stage(frozen.parent)
    return stage if load_stage_config(stage).kind == "trunk" else None


def end_of_trunk(stage: Stage) -> Path:
    """The last checkpoint of a finished trunk. Raises InputError where it is damaged or gone."""
    from lit_llm.training.checkpoints import LAST, check_checkpoint

    path = stage.checkpoints / LAST
    try:
        if not path.exists():
            raise Damaged(path, "is missing")
        check_checkpoint(path)
    except Damaged as damage:
        raise InputError(Problem(f"{damage}; {RECOMPUTE}")) from None
    return path


def open_finished(store: Store, fingerprint: str) -> Finished:
    """The model of a stage that has finished its training.

    Raises InputError for an unknown fingerprint, a stage without weights, and damaged weights.
    """
    from safetensors.torch import load_file

    from lit_llm.data.prepare import open_prepared
    from lit_llm.models.build import build_model

    stage = store.stage(fingerprint)
    if not stage.config_file.exists():
        raise InputError(Problem(f"there is no stage {fingerprint} in {store.root}; `lit-llm status` names them"))
    frozen, status = load_stage_config(stage), stage.status()
    if status.get("damaged"):  # the digest of its weights is lost
        raise InputError(Problem(status["error"]))
    state = status["state"]
    try:
        check_weights(stage)
    except Damaged as damage:
        raise InputError(Problem(f"{damage}; {RECOMPUTE}")) from None
    if not (stage.checkpoints / WEIGHTS).exists():
        reason = f"is an evaluation of {frozen.parent}" if frozen.kind == "evaluate" else f"is {state}"
        then = "; `lit-llm run` goes on with it" if state not in FINAL else ""
        raise InputError(Problem(f"the stage {fingerprint} {reason} and has no weights{then}"))
    experiment = frozen.experiment
    model = build_model(experiment.model, experiment.seed)
    model.load_state_dict(load_file(stage.checkpoints / WEIGHTS))
    tokenizer = open_prepared(experiment.pretrain.data, store.data, frozen.data).tokenizer()
    weights = (stage.result() or {}).get("weights")
    return Finished(experiment, model.eval(), tokenizer, experiment.section(frozen.after).masks, weights)
