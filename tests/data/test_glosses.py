"""Instructions from WordNet's glosses: judged by lines of its files as wndb(5) describes them, and by its own `wn`."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from glosses import TASKS, read_wordnet, write_glosses

from lit_llm.config.problems import InputError

pytestmark = pytest.mark.xdist_group("wordnet")
REAL = Path("/usr/share/wordnet")
SCRIPT = Path(__file__).parents[2] / "examples" / "glosses.py"
LICENSE = "  1 This software and database is being provided to you, the LICENSEE, by\n"
# Lines of WordNet 3.0, without the pointers that lead out of the excerpt, and one of ours: "quoted".
EXCERPT = {
    "noun": """\
00001740 03 n 01 entity 0 000 | that which is perceived or known or inferred to have its own distinct existence
00002684 03 n 02 object 0 physical_object 0 001 @ 00001740 n 0000 | a tangible and visible entity; an entity that \
can cast a shadow; "it was full of rackets, balls and other objects"
02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 00002684 n 0000 | a member of the genus Canis; \
"the dog barked all night"
08524735 15 n 01 Rome 0 001 @i 00002684 n 0000 | capital and largest city of Italy
02403454 05 n 02 cow 1 moo-cow 0 001 @ 00002684 n 0000 | female of domestic cattle: "`moo-cow' is a child's term"
06000000 10 n 01 quoted 0 000 | the word "quoted" as it stands; "an example"
""",
    "verb": """\
00004032 29 v 02 sigh 0 suspire 4 000 01 + 02 00 | heave or utter a sigh; breathe deeply and heavily; "She sighed sadly"
00004227 29 v 0b exhale 0 expire 0 breathe_out 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 k 0 000 02 + 02 00 + 08 00 | expel air; \
"Exhale when you lift the weight"
""",
    "adj": """\
00003939 00 s 01 dying(a) 0 001 & 00003829 a 0000 | in the process of passing from life; "a dying man"; "his dying wish"
""",
    "adv": """\
00001837 02 r 01 a_cappella 0 000 | without musical accompaniment; "they performed a cappella"
""",
}


def write_excerpt(folder, **changed):
    for name, lines in {**EXCERPT, **changed}.items():
        (folder / f"data.{name}").write_text((LICENSE + lines).replace("\n", "  \n"))
    return folder


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def definition(gloss):
    """What stands before the first example."""
    return gloss.split('"')[0].strip().rstrip(";: ")


def held_out(gloss):
    return int.from_bytes(hashlib.sha256(gloss.encode()).digest()[:8], "big") % 10 == 0


def test_lines_of_wndb_are_read_as_its_manual_says(tmp_path):
    """A word count in hexadecimal, signs of an adjective's place, verb frames after the pointers, examples."""
    found = {synset.word: synset for synset in read_wordnet(write_excerpt(tmp_path)).values()}
    assert found["dog"].words == ("dog", "domestic dog", "Canis familiaris")
    assert {word: synset.gloss for word, synset in found.items()} == {
        "entity": "that which is perceived or known or inferred to have its own distinct existence",
        "object": "a tangible and visible entity; an entity that can cast a shadow",
        "dog": "a member of the genus Canis",
        "Rome": "capital and largest city of Italy",
        "cow": "female of domestic cattle",
        "quoted": "",
        "sigh": "heave or utter a sigh; breathe deeply and heavily",
        "exhale": "expel air",
        "dying": "in the process of passing from life",
        "a cappella": "without musical accompaniment",
    }
    assert len(found["exhale"].words) == 11
    assert found["dog"].kinds == ("n00002684",)
    assert found["Rome"].kinds == ()  # an instance


def test_instructions_pair_a_word_with_its_gloss_and_its_kind(tmp_path):
    write_glosses(write_excerpt(tmp_path), tmp_path / "out")
    train = records(tmp_path / "out" / "train.jsonl")
    entries = records(tmp_path / "out" / "text.jsonl")
    assert {"text": "dog, domestic dog, Canis familiaris (noun): a member of the genus Canis"} in [
        {"text": entry["text"].split(";")[0]} for entry in entries
    ]
    glosses = {synset.word: synset.gloss for synset in read_wordnet(tmp_path).values()}
    for word in ("dog", "sigh", "a cappella", "dying"):
        assert not held_out(glosses[word])
        (defined,) = [r for r in train if r["task"] == "define" and r["targets"] == glosses[word]]
        assert f'"{word}"' in defined["inputs"]
    (asked,) = [r for r in train if r["task"] == "word" and r["targets"] == "dog"]
    assert "a member of the genus Canis" in asked["inputs"]
    assert not [r for r in train if r["task"] == "word" and r["targets"] == "sigh"]  # its gloss says it
    (kind,) = [r for r in train if r["task"] == "hypernym" and "dog" in r["inputs"]]
    assert kind["targets"] == "object"
    assert not [r for r in train if r["task"] == "hypernym" and "Rome" in r["inputs"]]


@pytest.fixture(scope="module")
def installed():
    if not (REAL / "data.noun").exists():
        pytest.skip(f"needs WordNet in {REAL}: apt install wordnet-base")


@pytest.fixture(scope="module")
def real(installed, tmp_path_factory):
    """(folder, counts) of the whole of WordNet."""
    folder = tmp_path_factory.mktemp("glosses")
    return folder, write_glosses(REAL, folder)


@pytest.fixture
def extract(installed, tmp_path):
    """A folder with every twentieth synset."""
    folder = tmp_path / "extract"
    folder.mkdir()
    for name in EXCERPT:
        synsets = [line for line in (REAL / f"data.{name}").read_text().splitlines() if not line.startswith("  ")]
        (folder / f"data.{name}").write_text("\n".join(synsets[::20]) + "\n")
    return folder


@pytest.fixture(scope="module")
def lines():
    """(part, words, gloss with examples, parents) by place in the file, read without the code under test."""
    found = {}
    for name in ("noun", "verb", "adj", "adv"):
        for line in (REAL / f"data.{name}").read_text().splitlines():
            if match := re.match(r"(\d{8}) \d\d ([nvasr]) ([0-9a-f]{2}) (.*) \| (.*)$", line):
                offset, part, count, rest, gloss = match.groups()
                words = [re.sub(r"\(.*\)$", "", w).replace("_", " ") for w in rest.split()[: 2 * int(count, 16) : 2]]
                parents = re.findall(r" @i? (\d{8}) [nv]", rest)
                found[name, offset] = ("a" if part == "s" else part, words, gloss, [(name, p) for p in parents])
    return found


@pytest.mark.slow
def test_each_answer_stands_with_its_question_in_wordnet(real, lines):
    folder, counts = real
    glosses = {}
    for _, words, gloss, _ in lines.values():
        glosses.setdefault(words[0], []).append(gloss)
    train = records(folder / "train.jsonl")
    assert {task for task in TASKS if counts[f"train/{task}"] > 10_000} == set(TASKS)
    for record in train[:20_000]:
        if record["task"] == "define":
            word = re.search('"(.*)"', record["inputs"])[1]
            assert any(gloss.strip().startswith(record["targets"]) for gloss in glosses[word])
        elif record["task"] != "hypernym":
            assert any(definition(gloss) in record["inputs"] for gloss in glosses[record["targets"]])


@pytest.mark.slow
def test_no_gloss_stands_on_both_sides(real, lines):
    """Neither as the question, nor as the answer, nor as a wrong choice; and so no synset does."""
    folder, _ = real
    train, choices = records(folder / "train.jsonl"), records(folder / "choices.jsonl")
    taught = {record["targets"] for record in train if record["task"] == "define"}
    asked = {gloss for record in choices if record["task"] == "define" for gloss in record["choices"]}
    assert len(taught) > 50_000
    assert len(asked) > 5_000
    assert not any(map(held_out, taught))
    assert all(map(held_out, asked))
    others = {record["targets"] for record in records(folder / "held_out.jsonl") if record["task"] == "define"}
    assert len(others) > 5_000
    assert all(map(held_out, others))
    read = {definition(record["text"].partition("): ")[2]) for record in records(folder / "text.jsonl")}
    assert taught <= read
    assert not read & (others | asked)
    # A word that is a wrong choice or a kind has a synset on the right side at least.
    sides = {}
    for _, words, gloss, _ in lines.values():
        sides.setdefault(words[0], set()).add(held_out(definition(gloss)))
    for record in choices:
        if record["task"] != "define":
            assert all(True in sides[word] for word in record["choices"])
    assert all(False in sides[record["targets"]] for record in train if record["task"] == "hypernym")


@pytest.mark.slow
def test_wrong_choices_are_neither_synonyms_nor_kinds_that_fit(real, lines):
    folder, _ = real
    senses = {}
    for key, (part, words, _, _) in lines.items():
        for word in words:
            senses.setdefault((part, word.casefold()), []).append(key)

    def above(keys):
        return keys and set(keys) | above({parent for key in keys for parent in lines[key][3]})

    answered = [record for record in records(folder / "choices.jsonl") if record["task"] in ("choose", "hypernym")]
    answers = [0] * 4
    for record in answered[:4000]:
        right = record["choices"][record["answer"]]
        answers[record["answer"]] += 1
        assert len({choice.casefold() for choice in record["choices"]}) == 4
        part = "n"
        if record["task"] == "choose":
            parts = [part for part in "nvar" if (part, right.casefold()) in senses]
            part = parts[0] if len(parts) == 1 else None
            assert all(choice in record["inputs"] for choice in record["choices"])
        if part is None:
            continue
        fits = {word.casefold() for key in above(set(senses[part, right.casefold()])) for word in lines[key][1]}
        if record["task"] == "hypernym":
            word = re.sub(r'^"?(What kind of thing is ")?|"? is a kind of.*$|"\?$', "", record["inputs"])
            fits |= {word.casefold() for key in above(set(senses["n", word.casefold()])) for word in lines[key][1]}
            assert right.casefold() in fits
        assert not {choice.casefold() for choice in record["choices"] if choice != right} & fits
        assert all((part, choice.casefold()) in senses for choice in record["choices"])
    assert min(answers) > 850  # 1000 each are expected, with a standard deviation of 27


def test_the_same_files_each_time_and_the_same_questions_whatever_the_limit_and_seed(extract, tmp_path):
    """A process of its own hashes strings otherwise, so an order by chance would show."""
    folder = tmp_path / "whole"
    write_glosses(extract, folder)
    command = [sys.executable, str(SCRIPT), "--wordnet", str(extract), "--limit", "50"]
    subprocess.run([*command, "--out", str(tmp_path / "again")], check=True)
    counts = write_glosses(extract, tmp_path / "other", limit=50, seed=1)
    train = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    assert len(train) > 5_000
    assert (tmp_path / "again" / "train.jsonl").read_text() == "".join(train[:50])
    for name in ("again", "other"):
        for file in ("choices.jsonl", "held_out.jsonl", "text.jsonl"):
            assert len(records(folder / file)) > 500
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()
    other = records(tmp_path / "other" / "train.jsonl")
    assert len(other) == 50 == sum(count for key, count in counts.items() if key.startswith("train"))
    assert other != list(map(json.loads, train[:50]))


def test_no_held_out_question_is_trained_on_in_another_spelling(real):
    """WordNet has "lemon sole" and "Lemon sole", whose kinds are the same."""

    def questions(file):
        return {(*(" ".join(r[k].casefold().split()) for k in ("inputs", "targets")),) for r in records(file)}

    folder, _ = real
    assert not questions(folder / "train.jsonl") & questions(folder / "held_out.jsonl")


def test_the_first_questions_are_a_fair_sample(real):
    """The share of each task among 2000 of them differs from that among all by less than five standard deviations."""
    folder, counts = real
    choices = records(folder / "choices.jsonl")
    for task in TASKS:
        share = counts[f"choices/{task}"] / len(choices)
        first = sum(record["task"] == task for record in choices[:2000]) / 2000
        assert abs(first - share) < 5 * (share * (1 - share) / 2000) ** 0.5


def test_short_glosses_fit_a_small_model(real, tmp_path):
    """64 input and 32 target tokens, with a vocabulary of 4096 that was trained on such text."""
    from lit_llm.data.library_tokenizer import FromFile
    from lit_llm.data.tokenizers import SPECIAL, train_bpe

    train = records(real[0] / "train.jsonl")[:20_000]
    train_bpe((f"{record['inputs']} {record['targets']}" for record in train), 4096, tmp_path / "tokenizer.json")
    tokenizer = FromFile(tmp_path / "tokenizer.json", *SPECIAL)
    for key, longest in (("inputs", 64), ("targets", 32)):
        lengths = sorted(map(len, tokenizer.encode([record[key] for record in train])))
        assert lengths[int(0.999 * len(lengths))] <= longest


def test_wordnets_own_program_gives_the_same_glosses(real):
    if not shutil.which("wn"):
        pytest.skip("needs WordNet's own program: apt install wordnet")
    train = records(real[0] / "train.jsonl")
    for record in [record for record in train if record["task"] == "define"][:40]:
        word = re.search('"(.*)"', record["inputs"])[1]
        told = subprocess.run(["wn", word.replace(" ", "_"), "-over"], capture_output=True, text=True).stdout
        assert record["targets"] in told


def test_what_is_missing_or_of_another_format_is_told(tmp_path):
    with pytest.raises(InputError, match=r"has no data.noun.*apt install wordnet-base"):
        write_glosses(tmp_path, tmp_path / "out")
    write_excerpt(tmp_path, adv="00001837 02 r 01 a_cappella\n", verb="nonsense | gloss\n")
    with pytest.raises(InputError) as raised:
        write_glosses(tmp_path, tmp_path / "out")
    assert [(p.location.line, Path(p.location.source).name) for p in raised.value.problems] == [
        (2, "data.verb"),
        (2, "data.adv"),
    ]
    assert not (tmp_path / "out").exists()


def test_the_command_writes_both_files(tmp_path):
    options = ["--wordnet", str(write_excerpt(tmp_path)), "--out", str(tmp_path / "out")]
    answer = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert f"{tmp_path}/out/train.jsonl: {len(records(tmp_path / 'out' / 'train.jsonl'))}" in answer.stdout
    assert (tmp_path / "out" / "choices.jsonl").exists()
    assert (tmp_path / "out" / "tasks" / "glosses.yaml").exists()
