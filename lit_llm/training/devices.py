"""Training of one model on several devices: its processes, what they agree on, and how they share the model.

rank 0   its share of batch k ─ forward, backward ─┐                     ┌─ step ─ metrics, checkpoints, decisions
rank 1   its share of batch k ─ forward, backward ─┼─ gradients summed ──┼─ step ─ the same decisions, no files
...      ...                                       ┘   once a step       └─ ...

A share is filled up with rows that do not count, so that all ranks have the same number of rows and micro-batches
(`Batch.share`). Losses are sums over targets, divided by the count of the whole batch, which every rank knows. All
ranks evaluate, since a sharded model needs all of them for a forward pass.

A sharded model (FSDP2) is a module whose parameters are DTensors outside a forward pass. Checkpoints hold whole
tensors, so a run may go on with another number of devices, or another strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import lightning as L
import torch
import torch.distributed
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lit_llm.models.families import LanguageModel
from lit_llm.models.stacks import Stack
from lit_llm.training.config import ExecutionConfig
from lit_llm.training.optimizers.shards import divided_as

LONGEST_WAIT = timedelta(hours=2)
"""Longest wait of a rank for the others: for their start, an evaluation or a checkpoint. Ranks that have died are
noticed at once."""


def is_hopper() -> bool:
    """True where the first GPU is of NVIDIA's generation Hopper, by its compute capability, 9.0."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@dataclass(frozen=True)
class DeviceGroup:
    """The processes of one training, seen from one of them; by default a process that trains alone."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    """Number of this rank on its node, which is the number of its GPU."""
    store: torch.distributed.Store | None = None
    """Key-value store through which the ranks find each other."""
    wait_until_ready: Callable[[DeviceGroup], None] = lambda group: None
    """Waits, on rank 0, until all ranks are about to connect; raises an error where one of them has died."""

    @staticmethod
    def ready_key(rank: int) -> str:
        """Key by which a rank says that it is about to connect."""
        return f"ready/{rank}"

    @contextmanager
    def connected(self, accelerator: str) -> Iterator[None]:
        """Context in which the ranks can communicate. Without effect for one rank, or where they are connected."""
        if self.ranks == 1 or torch.distributed.is_initialized():
            yield
            return
        assert self.store is not None
        if self.rank:
            self.store.set(self.ready_key(self.rank), "")
        else:
            self.wait_until_ready(self)
        device = None
        if accelerator == "cuda":
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "gloo" if device is None else "nccl",
            store=self.store,
            rank=self.rank,
            world_size=self.ranks,
            timeout=LONGEST_WAIT,
            device_id=device,
        )
        try:
            yield
        finally:
            if torch.distributed.is_initialized():  # not after `abort_communication`
                torch.distributed.destroy_process_group()

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on all ranks. It may be any object that can be pickled."""
        if self.ranks == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def trainer_options(self, execution: ExecutionConfig, strategy: Strategy | Literal["auto"]) -> dict[str, Any]:
        """Arguments of Lightning's Trainer."""
        environment = _Environment(self.local_rank, self.rank // execution.devices)
        return {
            "devices": execution.devices,
            "num_nodes": execution.nodes,
            "strategy": strategy,
            "plugins": [environment],
        }


class _Environment(LightningEnvironment):
    """Place of a process in its group. It reads no environment variables: those of a cluster describe the job."""

    def __init__(self, local_rank: int, node_rank: int) -> None:
        super().__init__()
        self._local_rank, self._node_rank = local_rank, node_rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._local_rank

    def node_rank(self) -> int:
        return self._node_rank

    def teardown(self) -> None:
        pass


def is_connection_error(error: BaseException) -> bool:
    """True for an error of the communication with another rank, whose end is then the cause."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def abort_communication() -> None:
    """Make this process's communication on GPUs fail, where it would wait for a rank that has died."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        torch.distributed.distributed_c10d._abort_process_group()


def stops_by_first(trainer: L.Trainer, stop: bool) -> bool:
    """Rank 0's decision to stop, on all ranks of a trainer."""
    if trainer.world_size == 1:
        return stop
    decision = torch.tensor(float(stop), device=trainer.strategy.root_device)
    torch.distributed.broadcast(decision, 0)
    return bool(decision)


def lightning_strategy(execution: ExecutionConfig) -> Strategy | Literal["auto"]:
    """Lightning's strategy; `auto` is ddp here."""
    if execution.ranks == 1:
        return "auto"
    if execution.strategy == "fsdp":
        return Sharded(data_parallel_size=execution.ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)
    # Gradients as views, so that they exist once.
    return Replicated(gradient_as_bucket_view=True)


class Replicated(DDPStrategy):
    """DDP, whose processes somebody else starts."""

    def _configure_launcher(self) -> None:
        self._launcher = None  # Lightning's would set the number of threads, too


class Sharded(ModelParallelStrategy):
    """FSDP2 with the checkpoints of a training on one device: whole tensors in one file.

    Lightning's own form renames the optimiser's state, and begins by steps of zero gradients, which would decay
    weights.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return cast("dict[str, Any]", self.gathered(self.lightning_module.state_dict()))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return cast("dict[str, Any]", self.gathered(ParallelStrategy.optimizer_state(self, optimizer)))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        now = self.lightning_module.state_dict()
        divided = {name: divided_as(now[name], saved) for name, saved in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(divided, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def gathered(self, state: Any) -> Any:
        """The state with whole tensors in main memory on rank 0, and without sharded ones elsewhere."""

        def gather(tensor: DTensor) -> Tensor | None:
            complete = tensor.full_tensor()  # all ranks take part, one tensor after another
            return complete.cpu() if self.is_global_zero else None

        return apply_to_collection(state, DTensor, gather)


def shard(model: LanguageModel, mesh: torch.distributed.device_mesh.DeviceMesh) -> None:
    """Divide a model's parameters among the devices of a mesh, each block's for itself.

    The rest is gathered for a whole step, since the loss reads the embedding after the forward pass.
    """
    for module in [module for module in model.modules() if isinstance(module, Stack)]:
        for block in [*module.layers, *module.future]:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")


def is_sharded(model: LanguageModel) -> bool:
    """True for a model whose parameters are divided among devices."""
    return isinstance(model, FSDPModule)


def discard_gathered(model: LanguageModel) -> None:
    """Free parameters that a sharded model has gathered, so that it gathers them again after they have changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
