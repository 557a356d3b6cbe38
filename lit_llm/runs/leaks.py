"""Leaks: documents that a run was both trained and judged on, and embeddings of other tokenizers.

Training documents are those of a pretraining, of its source pretrainings, and of the finetuning examples. A run is
judged on the held-out documents of its text, its held-out examples, and texts that only an evaluation reads. Documents
are the same if their normalised contents are (see `data.splits`), whatever their files and settings. The training data
of a checkpoint is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_llm.config.problems import Problem
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.fingerprints import digest_of_examples, digests_of_texts, identity_of_data

if TYPE_CHECKING:
    import numpy as np

    from lit_llm.data.examples import ExampleSet
    from lit_llm.data.prepare import Prepared, PreparedSource
    from lit_llm.store.store import Store

HELD_OUT = ("validation", "test")
_EXCERPT = 60
"""Characters of a document in a message."""


@dataclass(frozen=True)
class _Trained:
    """Documents that a run was trained on."""

    by: str
    """Stage that was trained on them."""
    contents: np.ndarray
    remedy: str = ""
    """Remedy where a source was trained on the run's text."""


@dataclass(frozen=True)
class _Judged:
    """Documents that a run is judged on."""

    what: str
    key: str
    contents: np.ndarray
    excerpt: Callable[[int], str]
    """The beginning of the document with a content hash."""
    remedy: str


def leaks_of(experiment: Experiment, store: Store) -> Iterator[Problem]:
    """Problems of embeddings from another tokenizer and of leaking documents, each with its key.

    Skips texts that are not tokenised yet.
    """
    yield from _other_tokenizers(experiment, store)
    evaluate = experiment.evaluate
    alone = experiment.adapt is None and experiment.finetune is None
    data = _prepared(experiment, store)
    if data is None or (alone and (evaluate is None or evaluate.likelihood is None)):
        return
    before = [*_source_texts(experiment, store)]
    pretraining = _Trained("its pretraining", _contents(data, "train"))
    tuned = [*_finetuning(experiment, store)]
    if before or (tuned and experiment.evaluate is not None):
        for judged in _held_out_text(data):
            yield from _leaks_into(judged, [*before, *tuned])
    if held_out := [*_held_out_examples(experiment, store)]:
        validation, test = held_out
        for judged in held_out:
            yield from _leaks_into(judged, [pretraining, *before, *tuned])
        yield from _validation_in_test(validation, test)
    for judged in _evaluation_texts(experiment, store, data):
        yield from _leaks_into(judged, [pretraining, *before, *tuned])


def _validation_in_test(validation: _Judged, test: _Judged) -> Iterator[Problem]:
    """Problem of test examples that are also validation examples, by which choices are made."""
    if common := _overlap(test, validation.contents):
        count, example = common
        message = (
            f"{count} are validation examples, by which choices are made, for example {example}; take them out of one "
            "of the two"
        )
        yield Problem(message, test.key)


def _leaks_into(judged: _Judged, trained: list[_Trained]) -> Iterator[Problem]:
    for each in trained:
        if common := _overlap(judged, each.contents):
            count, example = common
            message = f"{each.by} has trained on {count}, for example {example}; {each.remedy or judged.remedy}"
            yield Problem(message, judged.key)


def _overlap(judged: _Judged, contents: np.ndarray) -> tuple[str, str] | None:
    """(number of judged documents in `contents`, beginning of one of them); None without any."""
    import numpy as np

    shared = np.intersect1d(judged.contents, contents)
    if not len(shared):
        return None
    excerpt = " ".join(judged.excerpt(int(shared[0])).split())[:_EXCERPT]
    return f"{len(shared)} of the {len(np.unique(judged.contents))} {judged.what}", repr(excerpt)


def texts_of(experiment: Experiment) -> tuple[object, ...]:
    """Key of an experiment's leaks: equal keys mean equal leaks."""
    sources = experiment.adapt.experiments.values() if experiment.adapt else ()
    return (
        identity_of_data(experiment).digest,
        digest_of_examples(experiment),
        tuple(digests_of_texts(experiment).items()),
        tuple(texts_of(given.seeded(experiment.seed)) for given in sources),
        experiment.evaluate is None,
    )


# --- trained on ----------------------------------------------------------------------------------------------------


def _source_texts(experiment: Experiment, store: Store) -> Iterator[_Trained]:
    """The texts of all source pretrainings."""
    remedy = (
        "give it and its source (`adapt.from`) one validation_fraction and one test_fraction, or keep these documents "
        "out of the source's text"
    )
    for given in (experiment.adapt.experiments if experiment.adapt else {}).values():
        source = given.seeded(experiment.seed)
        if (data := _prepared(source, store)) is not None:
            yield _Trained("the pretraining of its source", _contents(data, "train"), remedy)
        yield from _source_texts(source, store)


def _finetuning(experiment: Experiment, store: Store) -> Iterator[_Trained]:
    if (examples := prepared_examples(experiment, store)) is not None:
        yield _Trained("its finetuning", examples.contents("train"))


# --- judged on -----------------------------------------------------------------------------------------------------


def _held_out_text(data: Prepared) -> Iterator[_Judged]:
    remedy = "take these out of the examples"
    for source in data.sources:
        for split in HELD_OUT:
            what, key = f"{split} documents", f"pretrain.data.corpus{source.name and f'.sources.{source.name}'}"
            yield _Judged(what, key, source.contents(split), _excerpt(data, source, split), remedy)


def _held_out_examples(experiment: Experiment, store: Store) -> Iterator[_Judged]:
    examples = prepared_examples(experiment, store)
    if experiment.finetune is None or examples is None:
        return
    config, data = experiment.finetune.data, _prepared(experiment, store)
    for split, files in (("validation", "validation_files"), ("test", "test_files")):
        contents, named = examples.contents(split), getattr(config, files) is not None

        def excerpt(content: int, split: str = split, contents: np.ndarray = contents) -> str:
            ids, _ = examples.read(split, contents.tolist().index(content))
            return data.tokenizer().decode(ids[:_EXCERPT].tolist()) if data else ""

        remedy = "take them out of what is trained on"
        if named:
            remedy += f", or leave {files} out: `{split}_fraction` of the examples is held out then"
        key = f"finetune.data.{files if named else 'examples'}"
        yield _Judged(f"{split} examples", key, contents, excerpt, remedy)


def _evaluation_texts(experiment: Experiment, store: Store, data: Prepared) -> Iterator[_Judged]:
    from lit_llm.data.checksums import is_complete
    from lit_llm.data.prepare import open_held_out

    digests = {
        name: digest for name, digest in digests_of_texts(experiment).items() if is_complete(store.data / digest)
    }
    remedy = (
        "take them out, or name the very files that were trained on: of these the documents are read that were held out"
    )
    for text in open_held_out(digests, data):
        key = f"evaluate.likelihood.corpora.{text.name}"
        yield _Judged("documents", key, text.contents("validation"), _excerpt(data, text, "validation"), remedy)


def _excerpt(data: Prepared, source: PreparedSource, split: str) -> Callable[[int], str]:
    return lambda content: data.text_of(source, split, content, _EXCERPT)


# --- prepared data -------------------------------------------------------------------------------------------------


def _prepared(experiment: Experiment, store: Store) -> Prepared | None:
    from lit_llm.data.prepare import is_prepared, open_prepared

    digest = identity_of_data(experiment).digest
    return open_prepared(experiment.pretrain.data, store.data, digest) if is_prepared(store.data, digest) else None


def _contents(data: Prepared, split: str) -> np.ndarray:
    import numpy as np

    return np.concatenate([source.contents(split) for source in data.sources])


def _other_tokenizers(experiment: Experiment, store: Store) -> Iterator[Problem]:
    """Problems of sources with other tokens, whose embedding rows stand for other tokens."""
    sides = experiment.adapt.experiments if experiment.adapt else {}
    for side, given in sides.items():
        if same_tokenizer(experiment, given.seeded(experiment.seed), store) is False:
            yield Problem(OTHER_TOKENIZER, f"adapt.from.{side}" if len(sides) > 1 else "adapt.from")


OTHER_TOKENIZER = (
    "was trained with another tokenizer, of the same settings but learnt from other text, so the rows of its embedding "
    "stand for other tokens; give both one `tokenizer: {kind: file, path: .../tokenizer.json}`: the source's lies in "
    "the store, under data/tokenizers"
)


def same_tokenizer(one: Experiment, other: Experiment, store: Store) -> bool | None:
    """True where two experiments have the same tokens under the same ids; None where a tokenizer is not trained yet.

    Compares the trained files, not the settings or the training text.
    """
    from lit_llm.data.prepare import tokenizer_folder
    from lit_llm.data.tokenizers import layout_of

    names = [identity_of_data(each).tokenizer for each in (one, other)]
    if names[0] == names[1]:
        return True
    folders = [tokenizer_folder(store.data, name) for name in names]
    choices = [each.pretrain.data.tokenizer for each in (one, other)]
    if any(choice.kind == "bpe" and not folder.is_dir() for choice, folder in zip(choices, folders, strict=True)):
        return None
    layouts = [layout_of(choice, folder) for choice, folder in zip(choices, folders, strict=True)]
    return layouts[0] == layouts[1]


def prepared_examples(experiment: Experiment, store: Store) -> ExampleSet | None:
    """The finetuning examples; None without any, or before they are tokenised."""
    from lit_llm.data.examples import ExampleSet, is_prepared

    digest = digest_of_examples(experiment)
    if not digest or not is_prepared(store.data, digest):
        return None
    return ExampleSet(store.data, digest, experiment.pretrain.data.tokenizer)
