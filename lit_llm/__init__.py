"""Fair, resumable ablations of language-model architectures.

>>> from lit_llm import build_model, load_experiment
>>> experiment = load_experiment("redllm-tiny", overrides=["model.attention.qkv_norm=[]"])
>>> model = build_model(experiment.model, seed=0)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_llm.experiment.load import load_experiment as load_experiment
    from lit_llm.models.build import build_model as build_model

    __version__: str

__all__ = ["build_model", "load_experiment"]


def __getattr__(name: str) -> Any:
    # Looked up on first use: torch takes seconds to import, and half of the commands never need it.
    if name == "build_model":
        from lit_llm.models.build import build_model

        return build_model
    if name == "load_experiment":
        from lit_llm.experiment.load import load_experiment

        return load_experiment
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            installed = version("lit-llm")
        except PackageNotFoundError:  # a tree that is not installed
            installed = "0+unknown"
        globals()[name] = installed  # read once: the provenance of each run has it
        return installed
    raise AttributeError(f"module 'lit_llm' has no attribute {name!r}")
