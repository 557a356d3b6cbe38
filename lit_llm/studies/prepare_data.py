"""Preparation of the data of a study's runs: every text is tokenised once, before the runs begin."""

from __future__ import annotations

from collections.abc import Iterable

from lit_llm.data.sources import error_context
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.fingerprints import digest_of_examples, identity_of_data
from lit_llm.store.store import Store
from lit_llm.studies.observer import Observer


def prepare_data(
    experiments: Iterable[Experiment], store: Store, observer: Observer, keep_prepared: bool = False
) -> None:
    """Tokenise the texts that are not tokenised yet, each once. Raises InputError for unreadable texts.

    keep_prepared: use tokenised texts even where their files have changed.
    """
    from lit_llm.data.prepare import is_prepared, open_prepared, prepare, prepare_held_out, tokenizer_folder

    seen: set[tuple[str, int]] = set()
    for experiment in experiments:
        config = experiment.pretrain.data
        identity = identity_of_data(experiment)
        key = (identity.digest, config.sequence_length)
        if key not in seen and not (keep_prepared and is_prepared(store.data, identity.digest)):
            prepare(config, store.data, observer.preparing, identity)
        seen.add(key)
        if texts := experiment.evaluate and experiment.evaluate.likelihood and experiment.evaluate.likelihood.corpora:
            with error_context("evaluate.likelihood.corpora", instead_of="corpora"):
                prepare_held_out(texts, open_prepared(config, store.data, identity.digest), observer.preparing)
        examples = digest_of_examples(experiment)
        if experiment.finetune is not None and (examples, 0) not in seen:
            from lit_llm.data.examples import prepare_examples

            folder = tokenizer_folder(store.data, identity.tokenizer)
            prepare_examples(
                experiment.finetune.data, config.tokenizer, folder, store.data, examples, observer.preparing
            )
            seen.add((examples, 0))
