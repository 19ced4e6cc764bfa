"""Packed batches against single rows."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rosa_lightning.data.collators import PackedCollator, TrainCollator
from rosa_lightning.data.encoding import Example
from rosa_lightning.tasks.records import Record
from rosa_lightning.training import support
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.packing import check_can_pack
from tests.conftest import FAMILIES, build
from tests.model_zoo.small import build_small
from tests.training.test_loss import Widths, adapted, gradients, single_rows

LENGTHS = [(8, 9), (3, 2), (14, 5), (1, 1)]
ALIKE = {1: (0, 2), 2: (0, 6)}
"""Rows that begin as another does, and with how many tokens."""


def examples(lengths=LENGTHS, alike=ALIKE):
    """Rows of random tokens, as many of a prompt and of a response; the answer is the last."""
    from array import array

    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 96, (sum(some),), generator=generator).tolist() for some in lengths]
    made = []
    for number, (ids, (prompt, response)) in enumerate(zip(rows, lengths, strict=True)):
        other, count = alike.get(number, (0, 0))
        ids = [*rows[other][:count], *ids[count:]]
        record = Record("", "", "", "", "boolq", "a", number + 1)
        rest = array("i", ids[prompt:])
        made.append(Example(record, array("i", ids[:prompt]), rest, response - 1))
    return made


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
    ("mistral", {"sliding_window": 19}),  # the longest row's
]


@pytest.mark.parametrize(
    ("family", "changes", "kernel"),
    [(*case, kernel) for case in CASES for kernel in KERNELS if (case[0], kernel) != NO_SUCH],
)
def test_packed_rows_have_the_loss_and_gradients_of_single_rows(family, changes, kernel):
    model = adapted(build(family, torch.float64, attn_implementation=kernel, **changes)).eval()
    rows, run, widths = examples(), LossComputer(model), Widths(model)
    expected = single_rows(model, TrainCollator(("a",), pad_id=0)(rows))
    loss = run.loss(PackedCollator(("a",))(rows))
    # Norms are in float32 in a model of float64, too.
    assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-5, atol=1e-6)
    # Windows of fewer tokens than a row are left to the masks of transformers.
    assert widths.decoder[-1] == (1, 43 if changes == SLIDING else 43 - 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_frequencies_that_depend_on_the_longest_row_are_those_of_the_batch(monkeypatch, kernel):
    changes = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 12}
    model = adapted(build("phi3", attn_implementation=kernel, **changes)).eval()
    # Its rows are longer than that.
    monkeypatch.setattr(support, "check_can_pack", lambda *_: None)
    rows = examples()
    padded, packed = TrainCollator(("a",), pad_id=0)(rows), PackedCollator(("a",))(rows)
    logits = model(**{n: padded[n] for n in ("input_ids", "attention_mask", "position_ids")}).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), padded["labels"][:, 1:].flatten())
    loss = LossComputer(model).loss(packed)
    assert_close(loss, expected, rtol=0, atol=1e-5)
    assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-4, atol=1e-5)


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
        correct = LossComputer(model).score(batch).correct
        assert set(batch["index"][correct].tolist()) == {2, 4}


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
