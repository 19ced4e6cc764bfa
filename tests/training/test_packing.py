"""Packed batches against padded ones and single rows."""

import pytest
import torch
import torch.nn.functional as F

from rosa_lightning.data.collators import PackedCollator, TrainCollator
from rosa_lightning.data.encoding import Example
from rosa_lightning.tasks.records import Record
from rosa_lightning.training import loss as forward
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.packing import check_can_pack
from tests.conftest import FAMILIES, build
from tests.model_zoo.small import build_small
from tests.training.test_loss import adapted, gradients

LENGTHS = [(3, 2), (14, 5), (1, 1), (8, 9)]


def examples(lengths=LENGTHS):
    """Rows of random tokens, as many of a prompt and of a response; the answer is the last."""
    from array import array

    generator = torch.Generator().manual_seed(1)
    made = []
    for number, (prompt, response) in enumerate(lengths):
        record = Record("", "", "", "", "boolq", "a", number + 1)
        ids = torch.randint(3, 96, (prompt + response,), generator=generator).tolist()
        rest = array("i", ids[prompt:])
        made.append(Example(record, array("i", ids[:prompt]), rest, response - 1))
    return made


def padded_loss(model, batch):
    names = ("input_ids", "attention_mask", "position_ids")
    logits = model(**{name: batch[name] for name in names}, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


KERNELS = ["eager", "sdpa"]
NO_SUCH = ("gemma2", "sdpa")
SLIDING = {"sliding_window": 6}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [4.0] * 8,
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 12,
}
CASES = [
    *((family, {}) for family in FAMILIES),
    ("gemma2", SLIDING),
    ("gemma3", SLIDING),
    ("mistral", SLIDING),
    # Frequencies that depend on the longest row: of the batch, padded or packed.
    ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 12}),
]


@pytest.mark.parametrize(
    ("family", "changes", "kernel"),
    [(*case, kernel) for case in CASES for kernel in KERNELS if (case[0], kernel) != NO_SUCH],
)
def test_packed_rows_have_the_loss_and_gradients_of_padded_rows(
    monkeypatch, family, changes, kernel
):
    model = adapted(build(family, attn_implementation=kernel, **changes)).eval()
    if "original_max_position_embeddings" in changes:  # the check's rows are longer than that
        monkeypatch.setattr(forward, "check_can_pack", lambda *_: None)
    rows = examples()
    expected = padded_loss(model, TrainCollator(("a",), pad_id=0)(rows))
    loss = LossComputer(model).loss(PackedCollator(("a",))(rows))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    found, wanted = gradients(model, loss), gradients(model, expected)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_answers_are_right_row_by_row():
    model, rows = build("llama"), examples()
    padded = TrainCollator(("a",), pad_id=0)(rows)
    with torch.no_grad():
        logits = model(**{n: padded[n] for n in ("input_ids", "attention_mask", "position_ids")})
    written = [int(i) for i in logits.logits[:, -2].argmax(-1)]
    # The model's own choice as the last token of the second and the fourth row.
    for row in (1, 3):
        rows[row].response[-1] = written[row]
    packed, padded = PackedCollator(("a",))(rows), TrainCollator(("a",), pad_id=0)(rows)
    for batch in (packed, padded):
        batch["answer_mask"][:] = False
    ends = packed["row_lengths"].cumsum(0) - 1
    packed["answer_mask"][0, ends] = True
    padded["answer_mask"][:, -1] = True
    for batch in (packed, padded):
        assert LossComputer(model).score(batch).correct.tolist() == [False, True, False, True]


# Models that cannot.


SLOW = pytest.param("FalconH1Config", marks=pytest.mark.slow)  # its scan takes seconds
MIXING = ("JambaConfig", "Qwen3NextConfig", SLOW, "BloomConfig")


@pytest.mark.parametrize("name", MIXING)
def test_model_with_a_state_across_rows_is_refused_in_one_line(name):
    model = build_small(name)
    with pytest.raises(ValueError, match=r"mixes packed rows.*Set data\.batching: len") as e:
        check_can_pack(model)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_no_mixing(dtype):
    for family in ("llama", "gemma2", "neox"):
        check_can_pack(build(family, dtype))
