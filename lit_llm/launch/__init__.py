"""Runs callables in processes with given resources. Knows no experiment."""

from lit_llm.launch.child import ask_coordinator, stop_requested
from lit_llm.launch.devices import cores
from lit_llm.launch.local import Interrupted, run_tasks
from lit_llm.launch.process import Outcome, Task
from lit_llm.launch.signals import stopped_as_by_ctrl_c

__all__ = [
    "Interrupted",
    "Outcome",
    "Task",
    "ask_coordinator",
    "cores",
    "run_tasks",
    "stop_requested",
    "stopped_as_by_ctrl_c",
]
