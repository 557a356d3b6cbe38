"""Fair, resumable ablations of language-model architectures.

>>> from lit_llm import build_model, load_experiment
>>> experiment = load_experiment("redllm-tiny", overrides=["model.attention.qkv_norm=[]"])
>>> model = build_model(experiment.model, seed=0)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from lit_llm.experiment.load import load_experiment as load_experiment
    from lit_llm.models.build import build_model as build_model
    from lit_llm.runs.lightning_modules import LitData as LitData
    from lit_llm.runs.lightning_modules import LitExperiment as LitExperiment
    from lit_llm.runs.trainer_parts import TrainerParts as TrainerParts

    run: Callable[..., Any]  # of `report`: an import would lead upwards from all that reads `__version__`
    __version__: str

__all__ = ["LitData", "LitExperiment", "TrainerParts", "build_model", "load_experiment", "run"]
_PLACES = {
    "LitData": "lit_llm.runs.lightning_modules",
    "LitExperiment": "lit_llm.runs.lightning_modules",
    "TrainerParts": "lit_llm.runs.trainer_parts",
    "build_model": "lit_llm.models.build",
    "load_experiment": "lit_llm.experiment.load",
    "run": "lit_llm.report.run",
}
"""{name: its module}, imported on first use: torch takes seconds to import, and half of the commands never need it."""


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            installed = version("lit-llm")
        except PackageNotFoundError:  # a tree that is not installed
            installed = "0+unknown"
        globals()[name] = installed  # read once: the provenance of each run has it
        return installed
    raise AttributeError(f"module 'lit_llm' has no attribute {name!r}")
