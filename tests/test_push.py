"""`lit-llm push`: the folder, the card and the upload, to a hub on this machine that answers the requests of
huggingface_hub itself."""

import base64
import hashlib
import json
import re
import statistics
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import ModelCard, constants
from scipy import stats

from lit_llm.report.model_card import Pushed, model_card
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.runs import runs_of
from tests.commands import lit_llm
from tests.made_up_results import finish
from tests.remote_code import modules_in

STUDY = """
study: norms
question: Does a norm on each head's output help?
extends: decllm-tiny
base:
  model: {d_model: 16, vocabulary: 300, attention: {heads: 2}, feed_forward: {d_ff: 32}, decoder: {layers: 1}}
  pretrain:
    data:
      corpus: {kind: text, files: ["*.txt"]}
      tokenizer: {kind: bpe, vocabulary: 280}
      sequence_length: 32
      batch_size: 4
      validation_fraction: 0.3
      test_fraction: 0.2
      near_duplicates: keep
    training: {max_steps: 4, schedule: {warmup_steps: 1}}
    validation: {times: 1, sequences: 4}
arms:
  plain: {}
  normed: {model: {attention: {output_norm: head}}}
seeds: [0, 1, 2]
"""


def write_study(folder: Path, text: str = STUDY) -> Path:
    for number in range(12):
        words = (f"line {(7 * n + number) % 57} of text" for n in range(80))
        (folder / f"{number}.txt").write_text("\n".join(words))
    (folder / "norms.yaml").write_text(text)
    return folder


RED = (
    STUDY[: STUDY.index("arms:")]
    .replace("study: norms", "study: reds")
    .replace("extends: decllm-tiny", "extends: redllm-tiny")
    .replace("decoder: {layers: 1}", "encoder: {layers: 1}, decoder: {layers: 1}")
    + "arms: {red: {}}\nseeds: [0]\n"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a store in which one run of each study is finished."""
    folder = write_study(tmp_path_factory.mktemp("trained"), STUDY.replace("[0, 1, 2]", "[0]"))
    (folder / "reds.yaml").write_text(RED)
    for line in (("norms.yaml", "--only", "normed"), ("reds.yaml",)):
        done = lit_llm("run", *line, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what it is sent: {path: bodies}. Weights go to its large file storage, as the Hub has it:
    `lfs` is the answer to the question where a file belongs, the batch endpoint names the addresses of the object and
    of its verification."""
    sent = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body, status=200):
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self):
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            sent.setdefault("calls", []).append(f"POST {path}")
            if sent.get("refuses") or self.headers.get("authorization") != "Bearer hf_made_up":
                return self.answer({"error": "Invalid username or password."}, 401)
            lines = [json.loads(line) for line in raw.splitlines()]
            body = lines[0]
            sent.setdefault(path, []).append(lines if path.endswith("/commit/main") else body)
            if path == "/api/repos/create":
                return self.answer({"url": f"{endpoint}/me/tiny", "name": "me/tiny", "id": "1"})
            if path.endswith("/preupload/main"):
                large = {True: "lfs", False: "regular"}
                files = [
                    {**file, "uploadMode": large[file["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for file in body["files"]
                ]
                return self.answer({"files": files})
            if path.endswith("/objects/batch"):
                actions = {name: {"href": f"{endpoint}/{name}/1"} for name in ("upload", "verify")}
                return self.answer({"objects": [{**each, "actions": actions} for each in body["objects"]]})
            if path == "/verify/1":
                stored = sent.get("/upload/1", b"")
                same = body == {"oid": hashlib.sha256(stored).hexdigest(), "size": len(stored)}
                return self.answer({}, 200 if same else 404)
            if path.endswith("/commit/main"):
                return self.answer({"success": True, "commitUrl": f"{endpoint}/me/tiny/commit/1", "commitOid": "1"})
            return self.answer({"errors": [], "warnings": []})

        def do_PUT(self):
            """The object, in whatever way its bytes come; storage answers `sent["lost"]` where it is out of order."""
            sent["calls"].append(f"PUT {self.path}")
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                raw = b""
                while size := int(self.rfile.readline(), 16):
                    raw += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
            sent[self.path] = raw
            return self.answer({}, sent.get("lost", 200))

        def do_GET(self):
            return self.answer({"id": "me/tiny", "sha": "0", "siblings": []})

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet storage has a protocol of its own
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    yield sent
    server.shutdown()
    server.server_close()


def test_a_push_is_the_files_of_the_dry_run_in_one_commit(trained, hub):
    dry = lit_llm("push", "norms.yaml:normed", "me/tiny", "--dry-run", cwd=trained)
    assert dry.returncode == 0, dry.stderr
    assert not hub
    folder = trained / "pushed" / "tiny"
    done = lit_llm("push", "norms.yaml:normed", "me/tiny", "--private", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("/me/tiny")
    (made,) = hub["/api/repos/create"]
    assert (made["name"], made["organization"], made["visibility"]) == ("tiny", "me", "private")
    ((head, *files),) = hub["/api/models/me/tiny/commit/main"]
    assert head["key"] == "header"
    contents = {
        file["value"]["path"]: base64.b64decode(file["value"]["content"]) for file in files if file["key"] == "file"
    }
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = whole.pop("model.safetensors")
    assert contents == whole
    assert {"README.md", "config.json", "generation_config.json", "modeling_lit_llm.py"} < {*contents}
    (large,) = (file["value"] for file in files if file["key"] == "lfsFile")
    named = {"oid": hashlib.sha256(weights).hexdigest(), "size": len(weights)}
    assert large == {"path": "model.safetensors", "algo": "sha256", **named}
    assert hub["/upload/1"] == weights
    assert hub["/me/tiny.git/info/lfs/objects/batch"][0]["objects"] == [named]
    assert hub["calls"][-5:] == [
        "POST /api/models/me/tiny/preupload/main", "POST /me/tiny.git/info/lfs/objects/batch", "PUT /upload/1",
        "POST /verify/1", "POST /api/models/me/tiny/commit/main",
    ]  # fmt: skip


def test_weights_that_the_storage_refuses_leave_no_commit(trained, hub):
    """huggingface_hub puts an error of its own around the storage's answer."""
    hub["lost"] = 403
    done = lit_llm("push", "norms.yaml:normed", "me/tiny", cwd=trained)
    assert done.returncode == 2
    assert "was refused by the Hub (403)" in done.stderr
    assert "hf auth login" in done.stderr
    assert "/api/models/me/tiny/commit/main" not in hub


def test_the_card_is_one_that_the_hub_reads(trained, tmp_path):
    out = tmp_path / "out"
    done = lit_llm("push", "norms.yaml:normed", "me/tiny", "--dry-run", "--out", out, cwd=trained)
    assert done.returncode == 0, done.stderr
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"lit-llm", "custom_code", "decllm"} == {*card.data.tags}
    for text in (
        "# norms: normed",
        "Does a norm on each head's output help?",
        "model.attention.output_norm",
        "4 steps",
    ):
        assert text in card.text


@pytest.mark.parametrize("arm", ["norms.yaml:normed", "reds.yaml:red"])
def test_the_snippet_of_a_card_writes_what_generate_writes(arm, trained, tmp_path, capsys):
    out = tmp_path / "out"
    done = lit_llm("push", arm, "me/tiny", "--dry-run", "--out", out, cwd=trained)
    assert done.returncode == 0, done.stderr
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    capsys.readouterr()
    with modules_in(tmp_path / "modules"):
        exec(snippet.replace('"me/tiny"', repr(str(out))), {})
    said = capsys.readouterr().out
    ours = lit_llm("generate", arm, "Once", "--max-new-tokens", "40", cwd=trained)
    source = "Once" if arm == "reds.yaml:red" else ""  # an encoder-decoder does not write its source anew
    assert source + said == ours.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("norms.yaml:normed", "no such/name/here"), "user/model"),
        (("norms.yaml:nromed", "me/tiny"), "did you mean 'normed'"),
        (("norms.yaml", "me/tiny"), "several arms"),
        (("norms.yaml:normed", "me/tiny", "--seed", "7"), "no seed 7"),
        (("norms.yaml:plain", "me/tiny"), "there is no stage"),
    ],
)
def test_what_cannot_be_pushed_says_so_and_leaves_nothing(arguments, named, trained, hub):
    done = lit_llm("push", *arguments, "--out", "left", cwd=trained)
    assert done.returncode == 2
    assert named in done.stderr
    assert not hub
    assert not (trained / "left").exists()


def test_a_refusal_of_the_hub_names_the_next_step(trained, hub):
    hub["refuses"] = True
    done = lit_llm("push", "norms.yaml:normed", "me/tiny", cwd=trained)
    assert done.returncode == 2
    assert "401" in done.stderr
    assert "hf auth login" in done.stderr


def test_a_hub_that_is_not_there_is_named(trained, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = lit_llm("push", "norms.yaml:normed", "me/tiny", cwd=trained)
    assert done.returncode == 2
    assert "http://127.0.0.1:9 was not reached" in done.stderr


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """The card of an arm of three seeds, with losses from a formula, as exported without an architecture."""
    folder = write_study(tmp_path_factory.mktemp("card"))
    ablation, store = load_study(folder / "norms.yaml"), Store(folder / "store")
    runs = runs_of(ablation, store)
    for run in runs:
        finish(run, loss(run.arm.name, run.seed))
    mine = next(run for run in runs if run.arm.name == "normed" and run.seed == 1)
    return model_card(Pushed(ablation, runs, mine, mine.trained[-1], folder / "nothing", "me/tiny"))


def loss(arm, seed):
    return 3.0 + 0.01 * seed**2 - 0.5 * (arm == "normed")


def row_of(card, name):
    (line,) = (line for line in card.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_metric_has_the_interval_of_its_mean_over_seeds(card):
    """The t interval, by scipy."""
    values = [loss("normed", seed) for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, loc=statistics.fmean(values), scale=stats.sem(values))
    expected = [f"{loss('normed', 1):.3f}", "3", f"{statistics.fmean(values):.3f}", f"[{low:.3f}, {high:.3f}]"]
    assert row_of(card, "test/target_nll") == ["test/target_nll", "nats per token", *expected]


def test_the_card_has_the_studys_answer_and_the_difference_from_the_baseline(card):
    assert row_of(card, "model.attention.output_norm")[1:] == ["none", "head"]
    assert "normed is better than plain by 0.500" in card
    assert "with seed 1" in card


def test_the_card_names_no_folder_of_the_machine(card):
    assert row_of(card, "data")[1] == r"text (files: [\*.txt])"


def test_a_folder_of_lit_llm_says_how_lit_llm_reads_it(card):
    assert "library_name: lit-llm" in card
    assert 'lit-llm generate tiny "Once"' in card


def test_a_baseline_names_the_arms_that_are_compared_with_it(tmp_path):
    write_study(tmp_path)
    ablation, store = load_study(tmp_path / "norms.yaml"), Store(tmp_path / "store")
    runs = runs_of(ablation, store)
    mine = runs[0]
    finish(mine, 3.0)
    card = model_card(Pushed(ablation, runs, mine, mine.trained[-1], tmp_path, "me/tiny"))
    assert "baseline of the study's other arms: normed" in card
    assert "95% interval" not in card


def test_a_mean_is_of_seeds_that_did_not_diverge_and_of_numbers(tmp_path):
    folder = write_study(tmp_path, STUDY.replace('{kind: text, files: ["*.txt"]}', MIXTURE))
    ablation, store = load_study(folder / "norms.yaml"), Store(folder / "store")
    runs = runs_of(ablation, store)
    for run in runs:
        finish(run, loss(run.arm.name, run.seed))
    mine, other, diverged = (run for run in runs if run.arm.name == "normed")
    for run, change in ((diverged, {"state": "diverged"}), (mine, {"metrics": {"test/bytes": None}})):
        result = run.last.result()
        metrics = {**result["metrics"], **change.pop("metrics", {})}
        run.last.finish({**result, **change, "metrics": metrics})
    card = model_card(Pushed(ablation, runs, mine, mine.trained[-1], folder / "nothing", "me/tiny"))
    mean = statistics.fmean(loss("normed", run.seed) for run in (mine, other))
    assert row_of(card, "test/target_nll")[2:5] == [f"{loss('normed', mine.seed):.3f}", "2", f"{mean:.3f}"]
    assert "test/bytes" not in card
    assert str(folder) not in card


MIXTURE = (
    '{kind: mixture, sources: {one: {corpus: {kind: text, files: ["[0-4].txt"]}, weight: 1}, '
    'two: {corpus: {kind: text, files: ["[5-9].txt"]}, weight: 1}}}'
)
