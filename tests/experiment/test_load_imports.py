"""A wrong study is answered within a second: what only reads configuration loads nothing heavy."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "lightning", "mlflow", "numpy", "tokenizers", "transformers", "optuna", "scipy")


@pytest.mark.parametrize(
    "code",
    [
        "import lit_llm",
        "import lit_llm.experiment.load",
        "import lit_llm.studies.load",
        "import lit_llm; lit_llm.load_experiment('redllm-tiny', ['model.decoder.cross_attention.rope=none'])",
        "from lit_llm.studies.load import load_study; load_study('decllm-tiny')",
    ],
)
def test_reading_configuration_loads_no_heavy_library(code):
    check = f"{code}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
