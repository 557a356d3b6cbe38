"""Hugging Face in and out: checkpoints of transformers as directories of ours, and back.

>>> from lit_llm.huggingface import export_checkpoint, import_checkpoint, open_checkpoint
>>> import_checkpoint(Path("gemma-2-2b"), Path("imported/gemma-2-2b"))
>>> config, state = open_checkpoint(Path("imported/gemma-2-2b"))
>>> export_checkpoint(config, state, Path("exported"))

`source_config.py` has transformers' own classes read a config.json and refuses what we do not have. `from_config.py`
makes a model section of the result, `to_config.py` writes a config.json, `tensor_names.py` says which tensors are
which; each has one plain function per architecture, and `architectures.py` lists them. `checkpoint.py` converts and
opens, `tensors.py` reads safetensors, `export.py` writes. `modeling_lit_llm.py` is the code that an export of DecLLM or
RedLLM takes along, and `hub.py` uploads a folder.
"""

from lit_llm.huggingface.checkpoint import import_checkpoint, is_checkpoint, open_checkpoint, open_model
from lit_llm.huggingface.export import export_checkpoint, export_folder

__all__ = [
    "export_checkpoint", "export_folder", "import_checkpoint", "is_checkpoint", "open_checkpoint", "open_model"
]  # fmt: skip
