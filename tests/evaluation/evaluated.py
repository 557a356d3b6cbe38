"""What both evaluations are tested with."""

import torch
import torch.nn.functional as F

from lit_llm.objectives.config import BOS
from tests.tiny_models import PAPER_NORMS, build

FAMILIES = ["decllm", "redllm"]
BYTES = 258


def model_of(family, *overrides, **options):
    """With the paper's norms, and random enough that every token has a probability of its own."""
    return build(family, f"vocabulary={BYTES}", *PAPER_NORMS[family], *overrides, **options)


def uniform(family):
    """Every token has the probability 1 / 258."""
    model = model_of(family)
    torch.nn.init.zeros_(model.unembedding.weight_VD)
    return model


@torch.no_grad()
def plain_nats(model, source, target, **options):
    """Nats of each target token, from one full forward pass over this example alone, and torch's cross-entropy."""
    source, target = torch.as_tensor(source).long(), torch.as_tensor(target).long()
    begin = torch.tensor([BOS])
    if model.config.family == "decoder":
        logits_TV = model(torch.cat([begin, source, target[:-1]])[None], **options)[0, len(source) :]
    else:
        logits_TV = model(source[None], torch.cat([begin, target[:-1]])[None], **options)[0]
    return F.cross_entropy(logits_TV, target, reduction="none")
