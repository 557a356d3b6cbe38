"""What the README shows is what the tool does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_llm.ablation.arms import load_study
from lit_llm.ablation.plan import plan
from lit_llm.components.attention.config import AttentionConfig, ResolvedAttention

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split("\n", 1)[0])
def test_every_study_in_the_readme_is_planned_and_fair(snippet: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(snippet)
    found = plan(load_study(path))
    assert len(found.arms) > 1
    assert not [finding for finding in found.findings if finding.kind in ("refused", "no_op")]


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_an_attention_resolves_every_key_that_can_be_written() -> None:
    """A key that is left out of the resolved form would be outside a run's identity."""
    assert AttentionConfig.model_fields.keys() == ResolvedAttention.model_fields.keys()
