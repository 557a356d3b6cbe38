"""Who a stage is: fingerprints that form a chain, and where a result came from."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_llm.config.code_digest import digest_of_code
from lit_llm.config.fingerprint import fingerprint
from lit_llm.config.tree import leaves
from lit_llm.data.config import InstructionConfig
from lit_llm.data.instructions import identify_examples
from lit_llm.data.sources import Identity, Source, blamed_at, identify, identify_held_out
from lit_llm.evaluation.task_files import read_task_files
from lit_llm.experiment.config import Checkpoint, Experiment, Trained
from lit_llm.models.adapt import Side
from lit_llm.models.resolve import resolve_model

COMPUTES = (
    "components",
    "models",
    "generation",
    "objectives",
    "data",
    "training",
    "evaluation",
    "experiment/stages.py",
    "experiment/beginning.py",
    "interop/checkpoint.py",
)
"""The code that decides what a result is. A change elsewhere makes no result stale."""


_identities: dict[tuple[str, ...], Any] = {}
"""What has been found out about texts, by what was asked: plain data, so that a store can keep it."""


def read_corpora_again(known: Sequence[Sequence[Any]] = ()) -> None:
    """Look at the files anew when an identity is next asked for: a notebook may have edited its corpus.

    known: what `identities` has returned earlier; of these texts nothing is read.
    """
    _identities.clear()
    _identities.update({tuple(asked): identity for asked, identity in known})


def identities() -> list[list[Any]]:
    """[what was asked, its identity] of every text that was asked for since `read_corpora_again`, as plain data."""
    return [[list(asked), identity] for asked, identity in _identities.items()]


def _identity(asked: tuple[str, ...], find: Callable[[], Any]) -> Any:
    """Found out once until `read_corpora_again`."""
    if asked not in _identities:
        _identities[asked] = find()
    return _identities[asked]


def identity_of_data(experiment: Experiment) -> Identity:
    """Identity of the stage's tokens. Reads the corpus, once until `read_corpora_again`. Raises InputError if it cannot
    be read."""
    data = experiment.pretrain.data
    found = _identity(("data", data.model_dump_json()), lambda: asdict(identify(data)))
    return Identity(found["digest"], found["tokenizer"], tuple(Source(**source) for source in found["sources"]))


def digest_of_data(experiment: Experiment) -> str:
    """The same in one word."""
    return identity_of_data(experiment).digest


def digest_of_examples(experiment: Experiment) -> str:
    """Identity of the instruction data; as `identity_of_data`. Empty where there is none."""
    if experiment.finetune is None:
        return ""
    data, tokenizer = experiment.finetune.data, identity_of_data(experiment).tokenizer
    return _identity(("examples", data.model_dump_json(), tokenizer), lambda: identify_examples(data, tokenizer))


def digests_of_texts(experiment: Experiment) -> dict[str, str]:
    """Identities of the texts that only the evaluation reads, by their names; as `identity_of_data`."""
    evaluate, data = experiment.evaluate, experiment.pretrain.data
    if evaluate is None or evaluate.likelihood is None or not evaluate.likelihood.corpora:
        return {}
    likelihood, tokenizer = evaluate.likelihood, identity_of_data(experiment).tokenizer

    def find() -> dict[str, str]:
        with blamed_at("evaluate.likelihood.corpora", instead_of="corpora"):
            return identify_held_out(likelihood.corpora, data, tokenizer)

    return _identity(("texts", likelihood.model_dump_json(), data.model_dump_json(), tokenizer), find)


def digest_of_tasks(experiment: Experiment) -> str:
    """Identity of the task files of one's own; empty where there are none. Raises InputError as `read_task_files`."""
    tasks = experiment.evaluate.tasks if experiment.evaluate is not None else None
    folder = None if tasks is None else tasks.folder
    return "" if folder is None else _identity(("tasks", str(folder)), lambda: read_task_files(Path(folder)))


def pretrain_fingerprint(experiment: Experiment) -> str:
    """H(resolved model, pretrain, data, seed, and its adaptation where it has one). Names, paths and how the machine
    does it are not in it."""
    pretrain, length = experiment.pretrain, experiment.pretrain.data.sequence_length
    stage = pretrain.model_dump(mode="json")
    stage["objective"] = pretrain.objective.resolved(length).model_dump(mode="json")
    stage["validation"]["prefix_length"] = pretrain.validation.prefix(length)
    stage["validation"]["final_sequences"] = pretrain.validation.most_sequences
    del stage["training"]["execution"]
    for key in ("corpus", "tokenizer", "validation_fraction", "test_fraction", "near_duplicates"):
        del stage["data"][key]
    content = {
        "stage": "pretrain",
        "model": resolve_model(experiment.model).model_dump(mode="json"),
        "pretrain": stage,
        "data": digest_of_data(experiment),
        "seed": experiment.seed,
    }
    if (adapt := experiment.adapt) is not None:
        distill = adapt.distill.model_dump(mode="json") if adapt.distill else None
        content["adapt"] = {"from": origins(experiment), "warmup_steps": adapt.warmup_steps, "distill": distill}
    return fingerprint(content)


def origins(experiment: Experiment) -> dict[Side, str]:
    """Whose weights a pretraining begins with: the fingerprint of either side's, or a checkpoint's digest."""
    return {
        side: given.digest if isinstance(given, Checkpoint) else pretrain_fingerprint(given.seeded(experiment.seed))
        for side, given in (experiment.adapt.sides.items() if experiment.adapt else ())
    }


CODE = digest_of_code(Path(__file__).parents[1], COMPUTES)
"""Digest of the code that computes, as it was when this process (or the server it was forked from) read it: a file
edited while runs wait is not what they execute."""


def provenance(
    experiment: Experiment, stage: Trained = "pretrain", evaluates: bool = False, weights: str | None = None
) -> dict[str, Any]:
    """What a result computed by this process depends on beside its configuration.

    evaluates: the result is that of an evaluation after the stage. weights: digest of those that it begins with.
    """
    from lit_llm import __version__

    data, training = experiment.section(stage).data, experiment.section(stage).training
    execution = training.execution
    cut_matters = not evaluates and (training.dropout > 0 or training.precision == "bf16_master")
    packed = isinstance(data, InstructionConfig) and data.packing == "greedy"
    at_once = execution.micro_batch_size or data.batch_size
    eight_bit = (
        not evaluates and "adamw_8bit" in dict(leaves(training.optimizer.model_dump())).values()
    )  # alone, or beside Muon
    return {
        "version": __version__,
        "code": CODE,
        "torch": _version("torch"),
        "python": platform.python_version(),
        "device": _device(execution.accelerator),
        "precision": experiment.evaluate.precision if evaluates and experiment.evaluate else training.precision,
        "kernels": "torch",
        "threads": execution.threads,
        "micro_batch_size": execution.micro_batch_size,
        "packing": "greedy" if packed else None,
        "cut": (f"{at_once} packed" if packed else at_once) if cut_matters else None,
        "bitsandbytes": _version("bitsandbytes") if eight_bit else None,
        "weights": weights,
    }


def weights_digest(digests: Sequence[str | None]) -> str | None:
    """One word for the weights that a stage begins with: those of one parent, or of the two of an adaptation."""
    known = [digest for digest in digests if digest is not None]
    return known[0] if len(known) == 1 else fingerprint(known) if known else None


_version = cache(version)


def version_or_none(library: str) -> str | None:
    """Of a library that may not be installed, as what is known of texts: an evaluation depends on it."""

    def find() -> str | None:
        try:
            return _version(library)
        except PackageNotFoundError:
            return None

    return _identity(("library", library), find)


COMPARABLE = ("code", "torch", "device", "kernels", "threads")
"""Parts of the provenance that have to be equal for two results to be compared."""
REPEATABLE = (*COMPARABLE, "cut", "bitsandbytes")
"""Parts that decide the numbers of one experiment; the last two are absent (None) where they decide nothing, so arms
may differ in them. cut: sequences at once, and whether examples share them, which change what dropout draws and how
bfloat16 gradients are added."""


def same_origin(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether one experiment gives the same numbers under both provenances, from the same weights."""
    return all(left.get(key) == right.get(key) for key in (*REPEATABLE, "weights"))


def origin_digest(origin: Mapping[str, Any]) -> str:
    """Equal for provenances of the same origin."""
    return fingerprint({key: origin.get(key) for key in REPEATABLE})


def has_gpu() -> bool:
    """Whether there is a device for which torch is worth asking; torch takes seconds to import."""
    return Path("/dev/nvidiactl").exists()


@cache
def _device(accelerator: str) -> str:
    if accelerator != "cpu" and has_gpu():
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return f"cpu ({_instruction_set()})"


def _instruction_set() -> str:
    """What decides which kernels a CPU takes, and so the last bits of a result."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]))
    except OSError:
        flags = set()
    widest = next((name for name in ("avx512f", "avx2") if name in flags), "")
    bfloat16 = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    return " ".join([platform.machine(), widest, *bfloat16]).strip()
