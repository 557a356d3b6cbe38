"""Generation of text by a model, on token ids only.

>>> from lit_llm.generation import Sampling, generate
>>> generate(model, [[5, 9, 2], []], max_new_tokens=20, sampling=Sampling(temperature=0.8, top_p=0.95))
"""

from lit_llm.generation.decoding import Decoding, prefill
from lit_llm.generation.generate import Generated, NewToken, generate, stream
from lit_llm.generation.sampling import Sampling

__all__ = ["Decoding", "Generated", "NewToken", "Sampling", "generate", "prefill", "stream"]
