"""Small runs of all families, a sweep and an import: their losses and weights, to the bit.

`python run.py OUT.json` runs them with the lit_llm that Python finds and writes a digest of each.
`python run.py --against REVISION` runs them in this checkout and in a worktree of the revision, and compares.
What computes the same gives the same bits; this is the proof that a refactoring owes. Fingerprints, names of folders
and times are left out. Bits hold for one machine, so that no digest is kept anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def texts(folder: Path) -> None:
    """What the runs read: random words, and sums as instructions."""
    words = "the a of to in is that it was for on as with his they be at one have this from or had by hot but".split()
    draw = random.Random(0)
    (folder / "text").mkdir()
    for number in range(48):
        (folder / "text" / f"{number:02}.txt").write_text(" ".join(draw.choices(words, k=400)))
    sums = [{"inputs": f"{a}+{b}=", "targets": f"{a + b}", "task": "even" if (a + b) % 2 == 0 else "odd"}
            for a in range(12) for b in range(12)]  # fmt: skip
    (folder / "sums.jsonl").write_text("".join(json.dumps(each) + "\n" for each in sums))


def checkpoint(folder: Path) -> None:
    """A random Llama as transformers writes it."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = ["<s>", "</s>", *map(chr, range(64, 126))]
    tokenizer = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, "@"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(letters[:2])
    tokenizer.save(str(folder / "tokenizer.json"))


def digest(*parts: Any) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return total.hexdigest()[:16]


def weights(file: Path) -> str:
    """Of the tensors by their names; the file's header may say more."""
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except (TypeError, KeyError):  # bfloat16, which NumPy does not have
        return digest(file.read_bytes())
    return digest(*(part for name in sorted(tensors) for part in (name, tensors[name].tobytes())))


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "throughput" not in name and "seconds" not in name}


def of_stage(folder: Path) -> dict[str, Any]:
    """State, final metrics and digests of a stage's curves and weights."""
    result = json.loads((folder / "result.json").read_bytes())
    courses = []
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []:
        record = json.loads(line)
        courses.append([record["step"], numbers(record["metrics"])])
    file = folder / "checkpoints" / "model.safetensors"
    return {
        "state": result["state"],
        "metrics": numbers(result["metrics"]),
        "curves": digest(courses),
        "weights": weights(file) if file.exists() else None,
    }


def run(folder: Path) -> dict[str, Any]:
    """All runs, in an empty folder of which nothing is kept."""

    def lit_llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "lit_llm", *arguments]
        return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout

    texts(folder)
    checkpoint(folder / "llama")
    for file in HERE.glob("*.yaml"):
        shutil.copy(file, folder)
    results: dict[str, Any] = {}
    for study in ("families", "two_stages", "encoder"):
        lit_llm("run", f"{study}.yaml", "-j", "2")
        for each in json.loads(lit_llm("status", f"{study}.yaml", "--json"))["runs"]:
            results[f"{study} {each['arm']} {each['stage']}"] = of_stage(
                folder / "mlruns" / "stages" / each["fingerprint"]
            )
    before = set((folder / "mlruns" / "stages").iterdir())
    lit_llm("sweep", "search.yaml", "-j", "1")
    trials = [of_stage(stage) for stage in set((folder / "mlruns" / "stages").iterdir()) - before]
    results["sweep"] = sorted(trials, key=lambda trial: trial["curves"])
    lit_llm("import", "llama", "--out", "imported")
    results["import"] = {
        "weights": weights(folder / "imported" / "weights.safetensors"),
        "text": lit_llm("generate", "imported", "ABC"),
    }
    return results


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", nargs="?", type=Path, help="file to write")
    arguments.add_argument("--against", metavar="REVISION", help="compare with the runs of another commit")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if asked.against is None:
            (Path(work) / "runs").mkdir()
            results = run(Path(work) / "runs")
            text = json.dumps(results, indent=1, sort_keys=True)
            asked.out.write_text(text + "\n") if asked.out else print(text)
            return
        tree = Path(work) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", tree, asked.against], cwd=ROOT, check=True)
        try:
            both = []
            for root in (tree, ROOT):
                out = Path(work) / f"{len(both)}.json"
                command = [sys.executable, root / "tests" / "same_bits" / "run.py", out]
                subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
                both.append(json.loads(out.read_text()))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    theirs, ours = both
    different = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
    for name in different:
        print(f"{name}: {asked.against} {theirs.get(name)}\n{' ' * len(name)}  here {ours.get(name)}")
    if different:
        sys.exit(f"{len(different)} of {len(ours)} results differ from {asked.against}")
    print(f"{len(ours)} results are equal to those of {asked.against}, to the bit")


if __name__ == "__main__":
    main()
