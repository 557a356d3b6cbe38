"""A config.json as something to be asked: what is never asked for has to be harmless."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_llm.config.problems import Problem

HARMLESS = {
    # What the file is, and how it is loaded and trained.
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache",
    "cache_implementation", "initializer_range", "initializer_cutoff_factor", "attention_dropout", "dropout_rate",
    "embedding_dropout", "mlp_dropout", "classifier_dropout", "classifier_dropout_rate", "gradient_checkpointing",
    "reference_compile", "deterministic_flash_attn", "chunk_size_feed_forward", "pretraining_tp",
    # Longest text of the training: RoPE has no table that ends.
    "max_position_embeddings", "original_max_position_embeddings",
    # Ids of tokens, and what is done with outputs.
    "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id",
    "decoder_start_token_id", "is_decoder", "is_encoder_decoder", "output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "problem_type", "classifier_pooling", "sparse_prediction",
    "sparse_pred_ignore_index", "repad_logits_with_grad",
}  # fmt: skip
"""Keys that do not change what a network computes of a text."""


class Asked:
    """The values of a config.json; `defaults` are those of transformers' class, for keys that are left out.

    Collects in `problems` what is asked for and not to be had.
    """

    def __init__(
        self, values: Any, defaults: Mapping[str, Any], problems: list[Problem], at: str = "", known: str = ""
    ) -> None:
        """at: the path of these values in the file; known: more keys, in one string, that are harmless here."""
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}
        self.defaults, self.problems, self.at = defaults, problems, at
        self._seen = HARMLESS | set(known.split())
        if not isinstance(values, dict):
            self.refuse("", "should be a mapping")

    def refuse(self, key: str, message: str) -> None:
        """Note a problem of a key."""
        self.problems.append(Problem(message, ".".join(filter(None, (self.at, key)))))

    def get(self, key: str, *kinds: type) -> Any:
        """The value of a key, or its default where it is left out; what is of none of these types is refused."""
        self._seen.add(key)
        value = self.values.get(key, self.defaults.get(key))
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if value is not None and kinds and not fits:
            self.refuse(key, f"{value!r} cannot be read here")
            return self.defaults.get(key)
        return value

    def size(self, key: str) -> int:
        """A number of things, at least one."""
        value = self.get(key, int)
        if value is None or value < 1:
            self.refuse(key, "is missing" if value is None else f"{value} is too few; at least 1")
            return 1
        return int(value)

    def number(self, key: str) -> float | None:
        """A positive number, or nothing."""
        value = self.get(key, int, float)
        if value is not None and value <= 0:
            self.refuse(key, f"{value} should be above 0")
            return None
        return None if value is None else float(value)

    def must(self, key: str, *allowed: Any) -> None:
        """Refuse a key whose value is another one; left out, it is fine."""
        self._seen.add(key)
        if self.values.get(key) not in (None, *allowed):
            here = " or ".join(map(repr, allowed)) or "nothing"
            self.refuse(key, f"{self.values[key]!r} is not supported; only {here}")

    def finish(self) -> None:
        """Refuse every key that was not asked for and is set to something."""
        for key, value in self.values.items():
            if key not in self._seen and value not in (None, False, 0, [], {}, ""):
                self.refuse(
                    key, f"{value!r} is not known here; if the network is the same without it, take it out of the file"
                )
