"""The double decoder family (arXiv 2605.18807): two causal stacks, of which the second reads the first block by block.

blocks of 2      <s> a  │ b  c  │ d  e         the row, cut into blocks
encoder          <s> a  │ b  c  │              causal over the row; the last block is read by nobody
                  └──┬──┘   └─┬─┘
decoder          <s> a  │ b  c  │ d  e         its own block, causally, and the encoder's states of all earlier blocks
targets           a  b  │ c  d  │ e  f         every token has a loss

No token reads a later one: the encoder is causal, only later blocks read a block's states, and the decoder is causal
within a block. Seen from one block, the model is an encoder-decoder with a causal encoder: the source is all text
before the block, and the target is the block. Its parameters are those of an encoder-decoder with equal stacks.

The paper's abstract has block-based doubly causal masks, a loss on every token and static packing. The code of its
authors (github.com/ashlab11/block-based-double-decoder) has these masks, and one softmax over both kinds of keys with
the same matrices, here `decoder.cross_attention_mode: merged`. It differs from this one:

- Its blocks are cut at random places in training. Here all have one length.
- Its first stack has about twice as many layers as its second. The presets here have equal stacks.
- Its first block sees the first token's state. Here it sees none, and a separate cross-attention adds zero.
- Its answers stay in one block. Here the encoder reads each block of an answer once it is complete.
- It has no separate cross-attention, which is the default here, as in RedLLM.
"""

from __future__ import annotations

from typing import Unpack, cast

import torch
from torch import Tensor

from lit_llm.components.forward_context import ForwardContext, SourceInput
from lit_llm.components.masks import AttentionMask
from lit_llm.models.families import (
    DecoderInputs,
    OneRowModel,
    WithEncoder,
    document_pair,
    positions_of,
    refuse_beyond_table,
    refuse_open,
)
from lit_llm.models.positions import positions_read
from lit_llm.models.resolved import ResolvedModel


class DoubleDecoder(OneRowModel, WithEncoder):
    """Two causal stacks, of which the second reads the first one's states of earlier blocks:

    x ─┬─ drop ─ encoder ─▶ states of earlier blocks ─┐
       └─ drop ─ decoder within the own block ◀───────┘ ─ unembedding
    """

    def __init__(self, config: ResolvedModel) -> None:
        super().__init__(config)
        assert config.block is not None
        self.block = config.block
        """Tokens of a block."""

    def encode(
        self, tokens_BS: Tensor, documents_BS: Tensor | None = None, positions_BS: Tensor | None = None
    ) -> Tensor:
        """B x S ids -> B x S x D."""
        if positions_BS is None:  # where positions begin anew in a row, a row may be longer than the table
            refuse_beyond_table(self.config, tokens_BS.shape[1])
        position = positions_of(tokens_BS, positions_BS)
        x_BSD = self.embed_source(tokens_BS, position)
        mask = AttentionMask(causal=True, documents=document_pair(documents_BS, documents_BS))
        context = ForwardContext(x_BSD, mask, {"self": position})
        return cast(Tensor, self.encoder(x_BSD, context))

    def hidden(self, tokens_BT: Tensor, **inputs: Unpack[DecoderInputs]) -> Tensor:
        """B x T ids -> B x T x D. Examples that share a row are cut into blocks from their own first token on.

        Raises ValueError for a `prefix_length` above one. `source_length` changes nothing.
        """
        opened, prefix = inputs.get("open_BT"), inputs.get("prefix_length")
        refuse_open(self.config, prefix if opened is None else opened)
        documents_BT, positions_BT = inputs.get("documents_BT"), inputs.get("positions_BT")
        position, tokens = positions_of(tokens_BT, positions_BT), tokens_BT.shape[1]
        # The last block of an example in a shared row may have positions beyond the encoder's table: nobody reads it.
        refuse_beyond_table(self.config, positions_read(self.config, 0, tokens))
        block_BT = torch.atleast_2d(position // self.block)
        # Where positions begin anew in a row, later blocks may read any of its tokens.
        read = int(self.config.read_by_encoder(tokens)) if positions_BT is None else tokens
        documents_BS = None if documents_BT is None else documents_BT[:, :read]
        source_position = position[..., :read]
        encoder_BSD = self.encode(tokens_BT[:, :read], documents_BS, source_position)
        # One number for a document and a block in it.
        own_BT = block_BT if documents_BT is None else documents_BT * (1 + tokens // self.block) + block_BT
        mask = AttentionMask(causal=True, documents=(own_BT, own_BT))
        earlier = block_BT, block_BT[:, :read]
        source_mask = AttentionMask(documents=document_pair(documents_BT, documents_BS), blocks=earlier)
        within = position % self.block
        positions = {"self": within, "restart": within, "source": source_position, "continuous": position}
        x_BTD = self.embed(tokens_BT, positions)
        context = ForwardContext(x_BTD, mask, positions, SourceInput(source_mask, read, encoder_BSD))
        return cast(Tensor, self.decoder(x_BTD, context))
