"""EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on models of every family.

Its tasks ask for the log-probability of a continuation after a context, for that of a whole text, or for what the model
writes after a context. A decoder-only model reads <s>, the context and the continuation; an encoder-decoder has the
context as its source and the continuation as its target. The tokens are the same for both: context and continuation are
tokenised together and cut where the context's own tokens end, as the harness does for decoder-only models.

Nothing here is loaded without the library: pip install 'lit-llm[eval]'.
"""

from lit_llm.evaluation.harness.evaluate import evaluate_tasks
from lit_llm.evaluation.harness.model import harness_model
from lit_llm.evaluation.harness.scores import score_pairs

__all__ = ["evaluate_tasks", "harness_model", "score_pairs"]
