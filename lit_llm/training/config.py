"""Settings of the training of a stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lit_llm.config.section import Section, config_error
from lit_llm.training.averaging import WeightAveraging
from lit_llm.training.optimizers.config import AdamW, Optimizer
from lit_llm.training.schedules import Constant, Cosine, Schedule


class StabilityConfig(Section):
    """Definition of loss spikes and divergence, and measurement of attention logits."""

    spike_window: int = Field(20, ge=2)
    """Number of preceding steps that a loss is compared with."""
    spike_deviations: float = Field(6.0, gt=0)
    """A loss that lies this many standard deviations above the mean of the window is a spike."""
    diverged_margin: float = Field(2.0, gt=0)
    """Nats per token above the first loss beyond which a step counts as diverged."""
    diverged_patience: int = Field(20, gt=0)
    """Consecutive steps above that margin that end the run as diverged. A loss or gradient that is not finite ends it
    at once."""
    logit_every: int = Field(50, ge=0)
    """Steps between two measurements of the largest attention logit; 0: never."""
    logit_sequences: int = Field(2, gt=0)
    """Sequences of the batch whose attention scores are computed again for the measurement."""


class ExecutionConfig(Section):
    """Execution on the machine. Not part of a run's fingerprint; recorded with its result, which is stale where another
    value would change it."""

    threads: int = Field(1, gt=0)
    """CPU threads of one run. Results are bit-equal for equal threads only."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Sequences per forward and backward pass on one device; the whole batch when absent. Shorter rows of a
    sequence_warmup count by the sequence of which they are parts. The loss stays the same,
    except with dropout, which is drawn for each micro-batch, with bf16_master, which adds their gradients in bfloat16,
    and with experts balanced by a loss over a micro-batch: there a result of another size is stale."""
    workers: int = Field(0, ge=0)
    """Processes that read data ahead."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass, which then computes the layer again: less memory, one
    forward pass more, the same gradient."""
    kernels: Literal["auto", "reference", "compiled", "liger", "flex", "fla"] = "auto"
    """auto: attention by the kernel that is fastest for the device and the shapes. reference: by torch's kernels alone,
    to check the others. compiled: each block of layers compiled by torch, for long runs. liger: norms, rotations, gates
    and the loss by Liger's kernels in training, on a GPU with the extra `gpu`. flex: attention with masks, caps or
    ALiBi by torch's FlexAttention in training, on a GPU. fla: recurrent mixers by the kernels of flash-linear-attention
    in training, on a GPU with the extra `gpu`. Set it for all arms: a result of another setting is stale."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device type."""
    devices: int = Field(1, gt=0)
    """Devices of one node that train one run together, each in a process of its own: GPUs, or groups of `threads` on a
    CPU. Each computes its share of every batch. The loss stays the same, except with dropout and bf16_master, as for
    micro_batch_size."""
    nodes: int = Field(1, gt=0)
    """Nodes of one run, each with `devices`. More than one needs an allocation of SLURM, whose srun starts the rest."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """What several devices share. ddp: each has the whole model and optimiser, and they average their gradients. fsdp:
    each has its part of parameters, gradients and optimiser state, and gathers a layer's parameters while it computes
    the layer (FSDP2). auto: ddp, or fsdp on GPUs whose memory is too small for ddp by the plan's arithmetic."""
    log_every: int = Field(10, gt=0)
    """Steps between two lines of metrics."""
    checkpoint_every: int = Field(500, gt=0)
    """Steps between two checkpoints; an interrupted run saves one more."""

    @property
    def ranks(self) -> int:
        """Number of processes that train one run, one for each device of all nodes."""
        return self.devices * self.nodes

    def share(self, batch_size: int) -> int:
        """Largest number of sequences of a batch on one device."""
        return -(-batch_size // self.ranks)

    def rows_at_once(self, batch_size: int) -> int:
        """Largest number of sequences in one forward and backward pass on one device."""
        return min(self.share(batch_size), self.micro_batch_size or batch_size)


class DistillConfig(Section):
    """Learning from a teacher's distribution over each target token (Hinton et al., arXiv 1503.02531)."""

    weight: float = Field(0.5, gt=0, le=1)
    """Weight of the divergence from the teacher; the text's negative log-likelihood has 1 - weight."""
    temperature: float = Field(1.0, gt=0)
    """Divisor of both models' logits; the divergence is multiplied by its square, so that the gradient's size does not
    depend on it."""


class BatchWarmup(Section):
    """Batches that grow in equal increments to `data.batch_size`, each size for equally many steps."""

    begin: int = Field(gt=0)
    """Sequences of the first batch."""
    increment: int = Field(gt=0)
    """Sequences by which batches grow."""
    steps: int = Field(gt=0)
    """Steps with smaller batches."""

    def sequences(self, steps: int, batch_size: int) -> int:
        """Number of sequences in the first `steps` batches."""
        sizes = self.sizes(batch_size)
        # Size number n begins at the first step k with k * sizes // self.steps >= n.
        since = (max(0, steps - -(-number * self.steps // sizes)) for number in range(1, sizes + 1))
        return self.begin * steps + self.increment * sum(since)

    def sizes(self, batch_size: int) -> int:
        """Number of sizes below `batch_size`."""
        return (batch_size - self.begin) // self.increment

    def problem(self, batch_size: int, execution: ExecutionConfig) -> tuple[str, str] | None:
        """(key, reason why these batches cannot grow to `batch_size`), or None."""
        sizes, rest = self.sizes(batch_size), (batch_size - self.begin) % self.increment
        if sizes < 1:
            return "begin", f"{self.begin} does not grow to batch_size {batch_size} by increments of {self.increment}"
        if rest:
            message = f"batch_size {batch_size} is not {self.begin} and a multiple of {self.increment}"
            return "increment", f"{message}; change one of the three"
        if sizes > self.steps:
            return "steps", f"{self.steps} are too few for {sizes} sizes"
        if self.begin < execution.ranks:
            return "begin", f"{self.begin} sequences for {execution.ranks} devices; begin with as many or more"
        at_once = execution.ranks * execution.rows_at_once(batch_size)
        if execution.kernels in ("compiled", "flex") and (self.begin % at_once or self.increment % at_once):
            message = f"kernels: {execution.kernels} compiles for each size; set execution.micro_batch_size so that"
            return "increment", f"{message} begin and increment are multiples of it, on all devices together"
        return None


class SequenceWarmup(Section):
    """Rows that double to `data.sequence_length`, each length for equally many steps.

    A window of the text is cut into rows, so a step reads the same tokens as without.
    """

    begin: int = Field(gt=0)
    """Tokens of the first rows."""
    steps: int = Field(gt=0)
    """Steps with shorter rows, fewer than `max_steps` and than the first of `branch_at`."""

    def rows(self, step: int, length: int) -> int:
        """Number of rows of a window in step 0, 1, ..."""
        doublings = self.doublings(length)
        return 1 << (doublings - min(doublings, step * doublings // self.steps))

    def doublings(self, length: int) -> int:
        """Number of lengths below `length`."""
        return (length // self.begin).bit_length() - 1

    def ends(self, length: int) -> list[int]:
        """Steps at which the rows double."""
        doublings = self.doublings(length)
        return [-(-number * self.steps // doublings) for number in range(1, doublings + 1)]

    def lengths(self, length: int) -> list[int]:
        """Lengths of the rows below `length`, in their order."""
        return [self.begin << number for number in range(self.doublings(length))]

    def problem(self, length: int) -> tuple[str, str] | None:
        """(key, reason why rows cannot grow to `length`), or None."""
        doublings = self.doublings(length)
        if doublings < 1 or self.begin << doublings != length:
            example = ", ".join(str(length >> shift) for shift in (1, 2, 3) if length % (1 << shift) == 0)
            message = f"{self.begin} does not double to sequence_length {length}"
            return "begin", f"{message}; take one of {example}" if example else f"{message}, which is odd"
        if doublings > self.steps:
            return "steps", f"{self.steps} are too few for {doublings} lengths"
        return None


class TrainingConfig(Section):
    """Optimisation of a stage."""

    max_steps: int = Field(gt=0)
    """Optimiser steps."""
    optimizer: Optimizer = AdamW()
    """Optimiser with its settings."""
    schedule: Schedule = Cosine()
    """Learning rate by step."""
    batch_warmup: BatchWarmup | None = Field(None, exclude_if=lambda value: value is None)
    """Smaller batches at the beginning of a pretraining, `{begin: 8, increment: 8, steps: 300}`; none when absent."""
    sequence_warmup: SequenceWarmup | None = Field(None, exclude_if=lambda value: value is None)
    """Shorter rows at the beginning of a pretraining, `{begin: 64, steps: 300}`; none when absent."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the whole gradient; null: no clipping."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the squared log-normaliser, per target token."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of entries set to zero, on embeddings and on the output of each attention and feed-forward network before
    it is added. The entries depend on the seed, the step and the micro-batch: with dropout, another micro_batch_size
    is another draw."""
    attention_dropout: float = Field(0.0, ge=0, lt=1, exclude_if=lambda value: not value)
    """Share of attention weights set to zero after the softmax, as in T5, drawn like `dropout`. torch's kernels compute
    the attention then: not blocks of queries, and not FlexAttention. On a CPU they keep all weights of a layer."""
    feed_forward_dropout: float = Field(0.0, ge=0, lt=1, exclude_if=lambda value: not value)
    """Share of a feed-forward network's hidden entries set to zero before its last matrix, as in T5, drawn like
    `dropout`. In experts too."""
    weight_averaging: WeightAveraging | None = Field(None, exclude_if=lambda value: value is None)
    """Average of the weights over steps, in float32: `ema`, or `{kind: last_k, k: 5, every: 100}`. It is what the stage
    saves. Evaluations during the training, and val/ metrics, are of the average as soon as there is one."""
    precision: Literal["fp32", "bf16", "bf16_master"] = "fp32"
    """bf16: matrix products in bfloat16, parameters and sums in float32. bf16_master: parameters, gradients and
    activations in bfloat16, the loss in float32; the optimiser updates float32 copies of the parameters, which are the
    weights that are saved. Gradients of micro-batches are then added in bfloat16."""
    stability: StabilityConfig = StabilityConfig()
    """Spikes and divergence."""
    execution: ExecutionConfig = ExecutionConfig()
    """Execution on the machine."""

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        if problem := self.schedule.problem(self.max_steps):
            raise config_error((f"schedule.{problem[0]}", problem[1]))
        if self.weight_averaging is not None and (problem := self.weight_averaging.problem(self.max_steps)):
            raise config_error((f"weight_averaging.{problem[0]}", problem[1]))
        if self.attention_dropout and self.execution.kernels == "flex":
            message = "FlexAttention has no dropout of attention weights; set kernels to auto in all arms"
            raise config_error(("execution.kernels", f"{message}, or attention_dropout to 0"))
        if self.weight_averaging is not None and self.trunks:
            message = "branches share a trunk's weights, and not their average; leave out branch_at or weight_averaging"
            raise config_error(("weight_averaging", message))
        first = (self.trunks or (self.max_steps,))[0]
        end = "the first branch" if self.trunks else "the end"
        for key in ("batch_warmup", "sequence_warmup"):
            if (warmup := getattr(self, key)) and warmup.steps > first:
                raise config_error((f"{key}.steps", f"{warmup.steps} last beyond {end} at step {first}"))
        if self.sequence_warmup and self.sequence_warmup.steps == first:
            # Evaluations read whole windows, whose last positions no step would have trained.
            message = f"{first} leave no step with whole windows before {end}; write fewer than {first}"
            raise config_error(("sequence_warmup.steps", message))
        if obstacle := self.sharding_obstacle:
            raise config_error(("execution.strategy", obstacle))
        return self

    @property
    def draws(self) -> bool:
        """True where a step drops entries, which are drawn for each micro-batch."""
        return bool(self.dropout or self.attention_dropout or self.feed_forward_dropout)

    @property
    def trunks(self) -> tuple[int, ...]:
        """Steps at which the stages of its trunk end, the last where it branches off; empty without `branch_at`."""
        return self.schedule.trunks(self.max_steps)

    def trunk(self, steps: int) -> TrainingConfig:
        """The training of its trunk up to a step."""
        schedule = Constant(warmup_steps=self.schedule.warmup_steps)
        return self.model_copy(update={"max_steps": steps, "schedule": schedule})

    @property
    def sharding_obstacle(self) -> str:
        """Reason why `strategy: fsdp` cannot train this; '' where it can, or is not used."""
        if self.execution.strategy != "fsdp" or self.execution.ranks == 1 or not self.eight_bit:
            return ""
        reason = "bitsandbytes quantises its moments in blocks of 256 entries, which the parts of a matrix would cut"
        return f"fsdp does not work with adamw_8bit: {reason}; use `strategy: ddp`, or `optimizer: adamw`"

    @property
    def eight_bit(self) -> bool:
        """True where an optimiser, or the one within Muon, keeps its moments in 8 bits."""
        return "adamw_8bit" in (self.optimizer.kind, getattr(getattr(self.optimizer, "adamw", None), "kind", ""))
