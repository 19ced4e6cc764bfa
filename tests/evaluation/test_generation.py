from __future__ import annotations

import pytest
import torch

from rosa_lightning.evaluation import generation as greedy
from rosa_lightning.evaluation.generation import write_greedily
from rosa_lightning.models.kv_cache import new_cache
from tests.conftest import FAMILIES, build

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}


def model_of(family: str):
    """With a window that prompts outgrow, where there is one."""
    return build(family, **({**SLIDING, "sliding_window": 6} if family == "gemma3" else {}))


def ids(count: int) -> list[int]:
    return torch.randint(3, 96, (count,)).tolist()


@torch.no_grad()
def token_by_token(model, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """Without cache, padding or company."""
    row = list(prompt)
    while len(row) < len(prompt) + count:
        row.append(
            int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax())
        )
        if row[-1] in ends:
            break
    return row[len(prompt) :]


@pytest.mark.parametrize("start", [0, 24])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_are_written_as_each_would_be_alone_token_by_token(family, start):
    """Some rows end early, so that others go on without them; some begin alike."""
    model, common = model_of(family), ids(start)
    prompts = [[*common, *ids(count)] for count in (9, 1, 17, 5, 12)]
    free = [token_by_token(model, prompt, 12, set()) for prompt in prompts]
    ends = {free[0][2], free[3][6], free[4][1]}
    wanted = [token_by_token(model, prompt, 12, ends) for prompt in prompts]
    assert write_greedily(model, prompts, 12, 0, ends=ends) == wanted
    assert write_greedily(model, prompts, 12, 0) == free


def test_rows_that_have_ended_are_not_computed_on(monkeypatch):
    model, sizes = model_of("llama"), []
    forward = model.forward

    def counted(input_ids, **options):
        sizes.append(len(input_ids))
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    # A row's limit is told from its first token, so these must differ.
    some = [ids(5) for _ in range(12)]
    by_first = {row[0]: p for row, p in zip(write_greedily(model, some, 1, 0), some, strict=True)}
    prompts = list(by_first.values())[:4]
    limits = dict(zip(by_first, [2, 3, 3, 9], strict=False))
    sizes.clear()
    written = write_greedily(model, prompts, 9, 0, has_ended=lambda row: len(row) >= limits[row[0]])
    assert [len(row) for row in written] == [2, 3, 3, 9]
    assert sizes == [4, 4, 3, *[1] * 6]


def test_a_model_whose_rotation_hangs_on_the_length_is_left_to_transformers():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build("llama", rope_parameters=scaling)
    assert new_cache(model) is None
    assert greedy.write_greedily(model, [ids(4)], 3, 0) is None
