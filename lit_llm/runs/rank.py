"""A process of a stage that trains on several devices, other than rank 0: `python -m lit_llm.runs.rank ROOT STAGE`.

The environment says which one: RANK and LOCAL_RANK, or those that srun sets; WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
`ranks.py` starts it, and says how it ends.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from pathlib import Path

from lit_llm.launch.child import leave_stopping_to_another
from lit_llm.runs.ranks import DISCONNECTED, FAILED, OUT_OF_MEMORY, execution_of_first

END_SECONDS = 5.0
"""Time after the end of rank 0 for a rank that has finished, too, to end by itself."""


def main(root: Path, fingerprint: str) -> int:
    """Train as rank 0 does, and write nothing. Returns the exit code."""
    leave_stopping_to_another()
    environment = os.environ
    rank = int(environment.get("RANK") or environment["SLURM_PROCID"])
    if rank == 0:  # a task of srun in the place of the stage's own process
        _wait_for_the_end_of_rank_0()
        return 0
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    from torch.distributed import TCPStore

    from lit_llm.runs.run_one_stage import ran_out_of_memory
    from lit_llm.runs.stage_config import load_stage_config
    from lit_llm.runs.stage_training import Control
    from lit_llm.runs.stages import STAGES
    from lit_llm.store.store import Store
    from lit_llm.training.devices import DeviceGroup, is_connection_error

    try:
        local_rank = int(environment.get("LOCAL_RANK") or environment["SLURM_LOCALID"])
        store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
        group = DeviceGroup(rank, int(environment["WORLD_SIZE"]), local_rank, store)
        stage = Store(root).stage(fingerprint)
        frozen = load_stage_config(stage)
        STAGES[frozen.kind](frozen, stage, Store(root), Control(follows=(group, execution_of_first(store))))
    except Exception as error:
        print(f"rank {rank}:", file=sys.stderr)
        traceback.print_exc()
        if ran_out_of_memory(error):
            return OUT_OF_MEMORY
        return DISCONNECTED if is_connection_error(error) else FAILED
    return 0


def _wait_for_the_end_of_rank_0() -> None:
    """Return when rank 0 closes this process's standard input, or is gone."""
    # Without Python's buffer, whose lock would be held when this process ends before rank 0.
    while os.read(0, 1 << 10):
        pass


def _end_with_rank_0() -> None:
    _wait_for_the_end_of_rank_0()
    time.sleep(END_SECONDS)
    os._exit(DISCONNECTED)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
