"""Rotation in few passes: error against float64, and which models are left as they are."""

import sys

import pytest
import torch
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2

from rosa_lightning.training.rotary import fast_rotation, rotating_files
from tests.conftest import FAMILIES, build

OTHERS = {"cohere", "glm"}
"""Families that rotate neighbours, or a part of a head in a function of another kind."""
KEEP_DTYPE = {"olmo2"}
SHAPES = {"q": (2, 4, 5, 8), "k": (2, 2, 5, 8), "cos": (2, 5, 8), "sin": (2, 5, 8)}


def given(dtype=torch.float32, **changes):
    shapes = SHAPES | changes
    q, k = (torch.randn(shapes[name]).to(dtype).requires_grad_() for name in "qk")
    return q, k, torch.randn(shapes["cos"]), torch.randn(shapes["sin"])


def run(function, tensors, **options):
    out = function(*tensors, **options)
    seeds = [torch.arange(1.0, 1 + one.numel()).sin().view(one.shape) for one in out]
    total = sum((one.double() * seed).sum() for one, seed in zip(out, seeds, strict=True))
    return [*out, *torch.autograd.grad(total, tensors[:2])]


def doubles(tensors):
    return [one.detach().double().requires_grad_(one.requires_grad) for one in tensors]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
def test_outputs_and_gradients_are_those_of_float64(dtype, bound):
    own, tensors = modeling_llama.apply_rotary_pos_emb, given(dtype)
    with (
        fast_rotation([(modeling_llama, False)]),
        torch.autocast("cpu", enabled=dtype != torch.float32),
    ):
        found = run(modeling_llama.apply_rotary_pos_emb, tensors)
    assert modeling_llama.apply_rotary_pos_emb is own
    for one, wanted in zip(found, run(own, doubles(tensors)), strict=True):
        assert one.dtype == dtype
        assert (one - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"unsqueeze_dim": 2}, {"q": (2, 5, 4, 8), "k": (2, 5, 2, 8)}),
        ({}, {"q": (5, 5, 5, 8), "k": (5, 5, 5, 8), "cos": (5, 8), "sin": (5, 8)}),
    ],
)
def test_other_arguments_are_left_to_the_function(options, changes):
    tensors = given(**changes)
    wanted = run(modeling_llama.apply_rotary_pos_emb, tensors, **options)
    with fast_rotation([(modeling_llama, False)]):
        found = run(modeling_llama.apply_rotary_pos_emb, tensors, **options)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_known_by_what_their_function_does(family):
    model = build(family)
    file = sys.modules[type(model).__module__]
    rotates = hasattr(file, "apply_rotary_pos_emb")
    found = rotating_files(model)
    assert [one for one, _ in found] == ([file] if rotates and family not in OTHERS else [])
    assert all(keeps == (family in KEEP_DTYPE) for _, keeps in found)


@pytest.mark.parametrize("keeps", [True, False])
def test_dtypes_are_those_of_the_function(keeps):
    file = modeling_olmo2 if keeps else modeling_llama
    tensors = given(torch.bfloat16)
    wanted = file.apply_rotary_pos_emb(*tensors)
    with fast_rotation([(file, keeps)]):
        found = file.apply_rotary_pos_emb(*tensors)
    assert [one.dtype for one in found] == [one.dtype for one in wanted]
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)


def test_a_function_that_rotates_neighbours_is_left_alone():
    assert callable(modeling_glm.apply_rotary_pos_emb)
    assert rotating_files(build("glm")) == []
