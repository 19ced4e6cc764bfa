"""Lengths and padding, on real records and on disk."""

import numpy as np
import pytest

from rosa_lightning.data.settings import LoadingConfig
from tests.conftest import data_module
from tests.data.test_datamodule import data, on_disk
from tests.data.test_datamodule import folder as folder  # a fixture

NAMES = ("boolq", "openbookqa", "arc_easy", "arc_challenge")


def commonsense(real_data, **settings):
    """The commonsense records, in file's order of sources."""
    given = [{"path": str(real_data / "train" / f"{name}.json")} for name in NAMES]
    module = data_module(sources=given, tokenizer="tiny", **settings)
    module.setup("fit")
    return module


def lengths_of(module, exact):
    return np.concatenate([examples.lengths(exact) for examples in module._set.train])


def batches(module, ranks=1):
    """Positions of an epoch's records, batch by batch."""
    return list(module.train_dataloader().sampler)


def padding(batches, lengths):
    """Part of the tokens of padded batches that is padding."""
    tokens = sum(lengths[batch].max() * len(batch) for batch in batches)
    return 1 - sum(lengths[batch].sum() for batch in batches) / tokens


@pytest.mark.filterwarnings("ignore:source .* are longer than")
def test_batches_of_real_records_have_little_padding_and_keep_the_shares(real_data):
    module = commonsense(real_data)
    lengths = lengths_of(module, True)
    by_length = batches(module)
    assert padding(by_length, lengths) < 0.015
    order = np.concatenate(by_length)
    assert sorted(order) == list(range(len(lengths)))
    source = np.repeat(range(4), [len(examples) for examples in module._set.train])[order]
    shares = np.bincount(source) / len(source)
    for quarter in np.array_split(source, 4):
        np.testing.assert_allclose(np.bincount(quarter) / len(quarter), shares, atol=0.01)
    # Other ways of making batches, of the same records.
    module.batching = "random"
    assert padding(batches(module), lengths) > 0.3
    module.batching, module.loading = "length", LoadingConfig(tokens_per_batch=4096)
    by_tokens = batches(module)
    assert padding(by_tokens, lengths) < 0.05
    filled = [lengths[batch].max() * len(batch) for batch in by_tokens]
    assert max(filled) <= 4096
    assert np.mean(filled) > 0.9 * 4096


def test_lengths_of_records_on_disk_are_exact_where_batches_are_made_by_tokens(folder):
    settings = {"prompt_style": "plain", "val_fraction": 0.1}
    memory = data(folder, **settings, tokenizer="tiny")
    disk = data(folder, **settings, tokenizer="tiny", sources=on_disk(folder))
    for module in (memory, disk):
        module.setup("fit")
    expected = [e.num_tokens for source in memory._set.train for e in source]
    assert lengths_of(disk, True).tolist() == expected
    estimated = lengths_of(disk, False)
    assert np.abs(estimated - expected).max() <= 3


def test_estimated_lengths_of_real_records_on_disk_leave_little_padding(real_data, tmp_path):
    import json

    rows = json.loads((real_data / "train" / "boolq.json").read_text())[:3000]
    path = tmp_path / "boolq.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [{"path": str(path), "stream": True}]
    module = data_module(sources=given, tokenizer="tiny")
    module.setup("fit")
    lengths = lengths_of(module, True)
    assert padding(batches(module), lengths) < 0.06
