"""Files of a text lie beside the file that names them, and what is wrong with them is told at its line, all at once."""

import pytest

from lit_llm.config.problems import InputError
from lit_llm.studies.load import load_study
from lit_llm.studies.preflight import check_texts

STUDY = """\
study: places
question: Where do they lie?
extends: [decllm-tiny, ../texts/text.yaml]
base:
  pretrain:
    data:
      sequence_length: 8
      batch_size: 2
{data}
arms:
  one: {{}}
  two:
    pretrain: {{data: {{corpus: {{kind: text, files: [{other}]}}}}}}
seeds: [0]
allow:
  - {{key: pretrain.data.corpus, because: two texts}}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A study in studies/, a file that it extends and a text in texts/; the working directory is another one."""
    for name in ("studies", "texts", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "text.yaml").write_text(
        "pretrain:\n  data:\n    corpus: {kind: text, files: ['*.txt']}\n    tokenizer: bytes\n"
    )
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"some text {number}")
    monkeypatch.chdir(tmp_path / "elsewhere")

    def written(other, data=""):
        path = tmp_path / "studies" / "places.yaml"
        path.write_text(STUDY.format(other=other, data=data))
        return path

    return written


def test_paths_are_relative_to_the_file_that_names_them(write, tmp_path):
    ablation = load_study(write("../texts/1*.txt"))
    files = {arm.name: arm.experiment.pretrain.data.corpus.files for arm in ablation.arms}
    assert files == {"one": (f"{tmp_path}/texts/*.txt",), "two": (f"{tmp_path}/texts/1*.txt",)}
    check_texts(ablation)


def test_a_path_on_the_command_line_is_relative_to_the_working_directory(write, tmp_path):
    (tmp_path / "elsewhere" / "here.txt").write_text("here")
    ablation = load_study(write("../texts/1*.txt"), ["pretrain.data.corpus.files=[here.txt]"])
    assert {arm.experiment.pretrain.data.corpus.files for arm in ablation.arms} == {(f"{tmp_path}/elsewhere/here.txt",)}


def test_what_is_wrong_with_files_is_told_at_their_lines_all_at_once(write, tmp_path):
    (tmp_path / "texts" / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "texts" / "b.txt").write_bytes(b"gr\xf6\xdfe")
    study = write("missing/*.txt")
    with pytest.raises(InputError) as error:
        check_texts(load_study(study))
    told = [str(problem).split("; ")[0] for problem in error.value.problems]
    beside, key = tmp_path / "texts" / "text.yaml", "pretrain.data.corpus.files"
    assert sorted(told) == sorted(
        [
            f"{beside}:3: {key}: {tmp_path}/texts/a.txt: is not UTF-8 (byte 0)",
            f"{beside}:3: {key}: {tmp_path}/texts/b.txt: is not UTF-8 (byte 2)",
            f"{study}:13: {key}: {tmp_path}/studies/missing/*.txt: no file matches",
        ]
    )


def test_a_tokenizer_lies_beside_the_file_that_names_it(write, tmp_path):
    with pytest.raises(InputError) as error:
        load_study(write("../texts/1*.txt", "      tokenizer: {kind: file, path: tokenizer.json}"))
    assert f"{tmp_path}/studies/tokenizer.json cannot be read: No such file" in str(error.value)
