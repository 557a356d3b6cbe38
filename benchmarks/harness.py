"""Seconds of lm-evaluation-harness on our model, beside the harness's own `hf` model on a Llama of the same weights.

    python benchmarks/harness.py [--questions 200] [--rounds 5]

Needs pip install 'lit-llm[eval]' 'lm-eval[hf]', and WordNet (apt install wordnet-base) for the questions: multiple
choice with and without five worked examples, the log-probability of texts, and short written answers. Both build the
same prompts, tokenise them with the same tokenizer and must agree on every metric; the time is that of all of it but
for loading the tasks. They take turns; medians are printed, and their ratio, of which at most 1.3 is wanted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

WORDNET = Path("/usr/share/wordnet")
D, LAYERS, HEADS, D_FF, VOCABULARY, LENGTH = 256, 6, 4, 704, 4096, 1024
KINDS = {"choices": ("glosses", 0), "five shots": ("glosses", 5), "texts": ("texts", 0), "written": ("written", 0)}


def write_tasks(folder: Path) -> None:
    """The questions of the glosses; as texts; and to be answered in writing."""
    import yaml

    from lit_llm.data.tokenizers import train_bpe

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from glosses import write_gloss_tasks, write_glosses

    write_glosses(WORDNET, folder, limit=20_000)
    write_gloss_tasks(folder / "choices.jsonl", folder / "tasks")
    questions = [json.loads(line)["inputs"] for line in (folder / "choices.jsonl").read_text().splitlines()]
    texts = [{"text": " ".join(questions[at : at + 20])} for at in range(0, 10_000, 20)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    shared: dict[str, object] = {"dataset_path": "json", "test_split": "test", "doc_to_target": "text"}
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}}}
    rolling: dict[str, object] = {
        "task": "texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        **shared,
        **data,
    }
    rolling["metric_list"] = [{"metric": "bits_per_byte"}]
    written: dict[str, object] = {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_text": "text",
        **shared,
        **data,
    }
    written |= {"generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 16}}
    written["metric_list"] = [{"metric": "exact_match"}]
    for task in (rolling, written):
        (folder / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    train_bpe(questions, VOCABULARY, folder / "tokenizer.json")


def our_model(folder: Path, batch: int) -> Any:
    from lit_llm.config.section import validate
    from lit_llm.config.tree import tree
    from lit_llm.data.library_tokenizer import FromFile
    from lit_llm.data.tokenizers import SPECIAL
    from lit_llm.evaluation.harness import harness_model
    from lit_llm.models.build import build_model
    from lit_llm.models.config import DecoderModel

    node = {"d_model": D, "vocabulary": VOCABULARY, "decoder": {"layers": LAYERS}, "norm": {"eps": 1e-6}}
    node |= {"attention": {"heads": HEADS, "rope_theta": 10_000.0}, "feed_forward": {"d_ff": D_FF}}
    model = build_model(validate(DecoderModel, tree(node))).eval()
    tokenizer = FromFile(folder / "tokenizer.json", *SPECIAL)
    return harness_model(model, tokenizer, max_length=LENGTH, batch_tokens=batch)


def their_model(ours: Any, folder: Path, batch: int, begin: bool) -> Any:
    """A Llama with our weights; begin: whether <s> goes before a context, which the harness's texts have anyway."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    renamed = {"embedding.": "model.embed_tokens.", "decoder.norm.scale": "model.norm.weight", "decoder.": "model."}
    renamed |= {"self_attention_norm.scale": "input_layernorm.weight", "self_attention.out": "self_attn.o_proj"}
    renamed |= {"feed_forward_norm.scale": "post_attention_layernorm.weight"}
    renamed |= {f"self_attention.{x}.": f"self_attn.{x}_proj." for x in "qkv"}
    renamed |= {f"feed_forward.{x}.": f"mlp.{x}_proj." for x in ("gate", "up", "down")}
    state = {}
    for name, tensor in ours.model.state_dict().items():
        for mine, yours in renamed.items():
            name = name.replace(mine, yours)
        state[name] = tensor
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "<eod>", "pad_token": "<eod>"}
    tokens = PreTrainedTokenizerFast(tokenizer_object=library, add_bos_token=begin, **special)
    return HFLM(model.eval(), tokenizer=tokens, max_length=LENGTH, batch_size=batch, add_bos_token=begin)


def loaded(folder: Path, name: str, shots: int) -> Any:
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_path=str(folder / "tasks"), include_defaults=False).load(name)
    for task in found["tasks"].values():
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)
    return found


def timed(model: Any, tasks: Any, questions: int) -> tuple[float, dict[str, float]]:
    from lm_eval.evaluator import evaluate

    began = time.perf_counter()
    results = evaluate(model, tasks, limit=questions, bootstrap_iters=0)
    seconds = time.perf_counter() - began
    assert results is not None
    values = {f"{task} {key}": value for task, found in results["results"].items() for key, value in found.items()}
    return seconds, {key: value for key, value in values.items() if isinstance(value, float)}


def rounds_of(contestants: dict[str, Callable[[], tuple[float, dict[str, float]]]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns, after one round that does not count; and the ratio."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        said = {}
        for name, run in contestants.items():
            took, said[name] = run()
            seconds[name] += [took] if number else []
        first, second = said.values()
        different = [key for key in first if abs(first[key] - second[key]) > 1e-4 * max(1.0, abs(first[key]))]
        assert not different, f"they disagree: {different} of {said}"
    found = {name: statistics.median(took) for name, took in seconds.items()}
    mine, theirs = found.values()
    return {**{name: round(value, 2) for name, value in found.items()}, "ratio": round(mine / theirs, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200, help="of each task")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each; medians are printed")
    parser.add_argument("--batch", type=int, default=16, help="questions of a batch of `hf`; ours gets as many tokens")
    options = parser.parse_args()
    wanted = {"lm_eval": "pip install 'lit-llm[eval]'", "accelerate": "pip install 'lm-eval[hf]'"}
    missing = [how for name, how in wanted.items() if importlib.util.find_spec(name) is None]
    missing += [] if (WORDNET / "data.noun").exists() else ["apt install wordnet-base"]
    if missing:
        print(f"not measured: needs {', '.join(missing)}")
        return
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {"questions": options.questions, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere:
        folder = Path(name)
        write_tasks(folder)
        for kind, (task, shots) in KINDS.items():
            print(f"{kind} ...", file=sys.stderr, flush=True)
            with contextlib.redirect_stderr(nowhere):  # progress bars
                # A batch of ours is bounded by tokens: as many as the longest prompts of theirs come to.
                length = {"choices": 64, "five shots": 300, "texts": 512, "written": 512}[kind]
                ours = our_model(folder, options.batch * length)
                theirs = their_model(ours, folder, options.batch, begin=task != "texts")
                models = {"ours": ours, "hf": theirs}

                def run(model: Any, task: str = task, shots: int = shots) -> tuple[float, dict[str, float]]:
                    return timed(model, loaded(folder, task, shots), options.questions)

                found[kind] = rounds_of({which: partial(run, model) for which, model in models.items()}, options.rounds)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
