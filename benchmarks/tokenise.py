"""Tokens per second and peak memory of tokenising a corpus, beside `datasets.map` on the same text.

    python benchmarks/tokenise.py [--megabytes 200] [--rounds 3]       # both, taking turns; medians
    python benchmarks/tokenise.py --megabytes 2000 --rounds 1 --alone  # ours: memory does not grow with the corpus

The text is the standard library's sources with their words varied, so that a copy is not a repetition. Both are given
the same trained tokenizer, the same files and every core, and leave ids in files; neither time holds the training of
the tokenizer nor the digest of the corpus. Memory is the sum of the resident sets of the process and all its children,
ten times a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

DOCUMENT = 32_000
"""Characters of a document."""


def write_corpus(folder: Path, megabytes: int) -> None:
    """`megabytes` of text in files of DOCUMENT characters, a hundred in a folder; the same on every call."""
    from lit_llm.data.config import PythonStdlib
    from lit_llm.data.corpora import open_corpus

    words = re.compile(r"(\w+)").split("\n".join(open_corpus(PythonStdlib())).replace("\r", ""))  # the peer drops it
    longer = [index for index in range(1, len(words), 2) if len(words[index]) > 3]
    draw, size, number = random.Random(0), 0, 0
    while size < megabytes * 10**6:
        for place in draw.sample(longer, len(longer) // 20):  # another word of the same text, so still real words
            words[place] = words[draw.choice(longer)]
        text = "".join(words)
        for begin in range(0, len(text), DOCUMENT):
            path = folder / f"{number // 100:05}" / f"{number:07}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            size += path.write_bytes(text[begin : begin + DOCUMENT].encode())
            number += 1
            if size >= megabytes * 10**6:
                break


class Memory:
    """Samples the memory of this process and its children; `peak` in bytes."""

    def __enter__(self) -> Memory:
        self.peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._over.wait(0.1):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # has ended meanwhile
                    continue
            self.peak = max(self.peak, total)


def ours(files: str, tokenizer: Path, out: Path) -> int:
    """Tokens that `write_shards` wrote."""
    from lit_llm.data.config import BytePairTokenizer, TextFiles
    from lit_llm.data.corpora import open_corpus
    from lit_llm.data.shards import Job, write_shards

    out.mkdir()
    parts = open_corpus(TextFiles(files=(files,))).parts()
    job = Job(out, BytePairTokenizer(), tokenizer, 0.05, 0.05, "")
    write_shards(job, parts, lambda *_: None)
    return sum(sum((job.finished(number) or {})["tokens"].values()) for number in range(len(parts)))


def peer(files: str, tokenizer: Path, out: Path) -> int:
    """Tokens of `datasets.map`, batched, a process for each core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar
    from tokenizers import Tokenizer

    disable_progress_bar()
    library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # As ours: a text that spells <s> holds no such token. Lost on the way into another process, so set here.
        library.encode_special_tokens = True
        return {"ids": [[*found.ids, 0] for found in library.encode_batch_fast(batch["text"])]}

    cores = len(os.sched_getaffinity(0))
    cache = str(out / "cache")
    loaded = load_dataset("text", data_files=files, sample_by="document", split="train", cache_dir=cache)
    mapped = loaded.map(encode, batched=True, num_proc=cores, remove_columns=["text"])
    return sum(len(ids) for batch in mapped.with_format("arrow").iter(1000) for ids in batch["ids"])


def _measured(run: Callable[[str, Path, Path], int], files: str, tokenizer: Path, out: Path, answer: Path) -> None:
    with Memory() as memory:
        began = time.perf_counter()
        tokens = run(files, tokenizer, out)
        seconds = time.perf_counter() - began
    answer.write_text(json.dumps({"tokens": tokens, "seconds": seconds, "peak": memory.peak}))


def measured(run: Callable[[str, Path, Path], int], files: str, tokenizer: Path, folder: Path) -> dict[str, float]:
    """One run in a process of its own, so that neither inherits the other's memory."""
    out, answer = folder / "out", folder / "answer.json"
    process = multiprocessing.get_context("spawn").Process(target=_measured, args=(run, files, tokenizer, out, answer))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{run.__name__} failed"
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(answer.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the corpus; 2000 for the claim on memory")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; medians are printed")
    parser.add_argument("--alone", action="store_true", help="without the peer, which needs five times the disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        needed = options.megabytes * 10**6 * (2 if options.alone else 6)
        assert shutil.disk_usage(folder).free > needed, f"{folder} has less than {needed / 1e9:.0f} GB left; set TMPDIR"
        write_corpus(folder / "corpus", options.megabytes)
        from lit_llm.data.tokenizers import train_bpe

        files = f"{folder}/corpus/**/*.txt"
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        train_bpe((p.read_text() for p in (folder / "corpus" / "00000").iterdir()), 4096, tokenizer / "tokenizer.json")
        contestants = {"ours": ours} | ({} if options.alone else {"datasets": peer})
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for contestant, run in contestants.items():
                rounds[contestant].append(measured(run, files, tokenizer, folder))
    counts = {run["tokens"] for runs in rounds.values() for run in runs}
    assert len(counts) == 1, f"they disagree about the tokens: {counts}"
    found: dict[str, float] = {"tokens": counts.pop(), "megabytes": options.megabytes}
    for contestant, runs in rounds.items():
        rate = statistics.median(run["tokens"] / run["seconds"] for run in runs)
        found[f"{contestant}_tokens_per_second"] = round(rate)
        found[f"{contestant}_peak_megabytes"] = round(statistics.median(run["peak"] for run in runs) / 10**6)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
