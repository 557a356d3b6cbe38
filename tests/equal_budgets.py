"""What tests share that are not about budgets: studies whose arms may cost what they cost, and all other findings."""

from __future__ import annotations

from collections.abc import Iterable

from lit_llm.config.tree import under
from lit_llm.studies.audit.budgets import BUDGET
from lit_llm.studies.audit.findings import Finding
from lit_llm.studies.audit.tuning import ALL

RULE = f"{{key: {BUDGET}, because: this test is about something else}}"


def budgets_allowed(text: str) -> str:
    """A study or a sweep, as text, with its budgets allowed, beside what else it allows."""
    if "\nallow:\n  - " in text:
        return text.replace("\nallow:\n", f"\nallow:\n  - {RULE}\n", 1)
    if "allow: [" in text:
        return text.replace("allow: [", f"allow: [{RULE}, ", 1)
    return f"{text}\nallow: [{RULE}]"


def others(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that are neither of a budget nor of the learning rate that all arms have."""
    return [finding for finding in findings if not under(finding.key, BUDGET) and finding.arm != ALL]
