"""Tasks of EleutherAI's lm-evaluation-harness: the paper's, by one name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

REDLLM: Mapping[str, int] = MappingProxyType(
    {
        "boolq": 5,
        "hellaswag": 5,
        "rte": 5,
        "arc_easy": 5,
        "arc_challenge": 5,
        "anli_r1": 5,
        "anli_r2": 5,
        "anli_r3": 5,
        "commonsense_qa": 7,
        "triviaqa": 5,
        "mmlu_flan_cot_fewshot": 4,
        "gsm8k_cot": 8,
        "bbh_cot_fewshot": 3,
        "wmt16-en-de": 5,
        "wmt16-de-en": 5,
    }
)
"""{task: shots} of arXiv 2510.26622, section 5: the eleven of its 13 tasks that the harness (0.4.13) has, some in part.

StrategyQA (6 shots) is missing: the harness only has BIG-bench's version, whose prompts differ. UnifiedQA is missing.
WMT lacks English and Chinese. MMLU has worked examples for 5 shots in all subjects but three, so 4 are used.
The paper decodes greedily and compares the text; the harness ranks the answers of BoolQ, HellaSwag, RTE, ARC, ANLI and
CommonsenseQA by their probability. The metric to read is `acc`, for WMT `chrf`, elsewhere `exact_match`.
"""

SUITES: Mapping[str, Mapping[str, int]] = MappingProxyType({"redllm": REDLLM})
"""Tasks and their shots, by the name that stands for all of them."""
