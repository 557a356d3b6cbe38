"""Sources whose every token says where it stands."""

import numpy as np
import pytest

from lit_llm.data.config import DataConfig
from lit_llm.data.prepare import Prepared, PreparedSource
from lit_llm.data.splits import SPLITS


@pytest.fixture
def mixed(tmp_path):
    """mixed({name: (share, windows)}, length, batch_size): sources of tokens 0, 1, 2 ..., beyond 20,000 x number."""

    def prepared(sources, length=4, batch_size=3, rest=2, shard=7):
        config = DataConfig.model_validate(
            {"sequence_length": length, "batch_size": batch_size, "tokenizer": {"kind": "bpe", "vocabulary": 60000}}
        )
        found = []
        for number, (name, (share, windows)) in enumerate(sources.items()):
            tokens = np.arange(windows * length + rest, dtype=np.uint16) + np.uint16(20_000 * number)
            shards = np.split(tokens, range(shard, len(tokens), shard))
            folder = tmp_path / f"{number}-{windows}-{shard}"
            folder.mkdir(exist_ok=True)
            for split in SPLITS:
                for place, part in enumerate(shards):
                    part.tofile(folder / f"{place:05}.{split}.bin")
            counts = tuple(map(len, shards))
            found.append(PreparedSource(name, share, folder, dict.fromkeys(SPLITS, counts)))
        return Prepared(config, "digest", tmp_path, tuple(found))

    return prepared
