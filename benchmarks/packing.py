"""Finetuning steps on short examples, one in each row beside several (`finetune.data.packing`), on one thread.

    python benchmarks/packing.py [--wordnet /usr/share/wordnet] [--steps 30] [--batch-size 32]

Examples are WordNet's glosses, as `examples/glosses.py` writes them, of up to 64 + 32 tokens as the preset `_glosses`
has them. A step is a forward and backward pass and one of AdamW over the same examples;
both ways take turns, so that a busy machine slows both. Printed is the median step, and the median over steps of the
ratio of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from lit_llm.components.loss.module import target_loss
from lit_llm.data.batches import ExampleBatches
from lit_llm.data.config import InstructionConfig
from lit_llm.data.examples import ExampleSet, prepare_examples
from lit_llm.data.instructions import identify_examples
from lit_llm.data.prepare import prepare
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import Batch
from lit_llm.objectives.config import MasksConfig

ARMS = {
    "dec": ("decllm-tiny", MasksConfig()),
    "dec + BiAttn": ("decllm-tiny", MasksConfig(prefix="bidirectional")),
    "red": ("redllm-tiny", MasksConfig()),
}


def seconds_of(model: LanguageModel, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Of one step."""
    began = time.perf_counter()
    nats = target_loss(model.hidden(**batch.inputs), model.unembedding, (batch.targets, batch.places)).objective
    (nats / batch.weights.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        from glosses import write_glosses

        write_glosses(options.wordnet, folder, limit=20_000)
        text = load_experiment(
            "decllm-tiny", [f'pretrain.data.corpus={{kind: jsonl, files: ["{folder}/text.jsonl"]}}']
        ).pretrain.data
        prepared = prepare(text, folder / "store")
        data = InstructionConfig.model_validate(
            {
                "examples": {"kind": "jsonl", "files": [f"{folder}/train.jsonl"]},
                "targets": " {targets}",
                "input_length": 64,
                "target_length": 32,
                "batch_size": options.batch_size,
            }
        )
        digest = identify_examples(data, prepared.tokenizer_folder.name)
        prepare_examples(data, text.tokenizer, prepared.tokenizer_folder, folder / "store", digest)
        examples = ExampleSet(folder / "store", digest, text.tokenizer)
        for arm, (preset, masks) in ARMS.items():
            model = build_model(load_experiment(preset).model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            both = [
                ExampleBatches(examples, data.batch_size, model.config.family, masks, 0, packed)
                for packed in (False, True)
            ]
            times: list[tuple[float, float]] = []
            rows, tokens = [], []
            for k in range(-3, options.steps):
                one, two = (batches[max(k, 0)] for batches in both)
                pair = seconds_of(model, optimizer, one), seconds_of(model, optimizer, two)
                if k >= 0:  # the first ones are slow for reasons of their own
                    times.append(pair)
                    rows.append(len(two))
                    tokens.append(_tokens(two) / _tokens(one))
            alone, packed = (statistics.median(each) for each in zip(*times, strict=True))
            found[arm] = {
                "alone_ms": round(1000 * alone, 1),
                "packed_ms": round(1000 * packed, 1),
                "ratio": round(statistics.median(two / one for one, two in times), 2),
                "rows": statistics.median(rows),
                "tokens_ratio": round(statistics.median(tokens), 2),
            }
            print(arm, json.dumps(found[arm]), flush=True)


def _tokens(batch: Batch) -> int:
    """Read by the model, padding included."""
    return sum(value.numel() for name, value in batch.inputs.items() if name in ("tokens_BT", "source_BS", "target_BT"))


if __name__ == "__main__":
    main()
