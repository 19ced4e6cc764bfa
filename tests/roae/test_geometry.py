from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rosa_lightning.roae import geometry
from rosa_lightning.roae.geometry import read_geometry

HEADS, DIM = 3, 6
PAIRS = {(0, 4): 0.5, (1, 3): 0.01}  # dimensions 2 and 5 are not rotated


class Attention(nn.Module):
    """Queries, keys and values in one projection, its rows in any order, multiplied by hand."""

    def __init__(
        self, order: torch.Tensor, mix: torch.Tensor, values_are_keys: bool, speed: float = 1.0
    ) -> None:
        super().__init__()
        self.speed = speed
        self.everything = nn.Linear(8, 3 * HEADS * DIM)
        self.back = nn.Linear(HEADS * DIM, 8)
        self.order, self.mix, self.values_are_keys = order, mix, values_are_keys

    def rotated(self, x):
        turn = torch.eye(DIM).repeat(x.shape[2], 1, 1)
        for t in range(x.shape[2]):
            for (a, b), angle in PAIRS.items():
                cosine, sine = math.cos(t * angle * self.speed), math.sin(t * angle * self.speed)
                turn[t, a, a] = turn[t, b, b] = cosine
                turn[t, a, b], turn[t, b, a] = -sine, sine
        return torch.einsum("tij,bhtj->bhti", turn, x)

    def forward(self, x):
        rows = self.everything(x)[..., self.order]
        q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in rows.chunk(3, -1))
        q, k = self.rotated(q @ self.mix), self.rotated(k)
        weights = torch.matmul(q, k.transpose(-1, -2)).softmax(-1)
        out = torch.matmul(weights, k if self.values_are_keys else v)
        return self.back(out.transpose(1, 2).flatten(2))


class Language(nn.Module):
    def __init__(self, order=None, mix=None, values_are_keys=False) -> None:
        super().__init__()
        order = torch.arange(3 * HEADS * DIM) if order is None else order
        self.words = nn.Embedding(9, 8)
        mix = torch.eye(DIM) if mix is None else mix
        self.layer = Attention(order, mix, values_are_keys)

    def forward(self, input_ids, use_cache=False):
        return self.layer(self.words(input_ids))


class Stack(nn.Module):
    def __init__(self, *layers: Attention) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(9, 8), nn.ModuleList(layers)

    def forward(self, input_ids, use_cache=False):
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_of_a_model_have_the_geometry_that_they_have_alone(monkeypatch):
    straight, turned = torch.arange(3 * HEADS * DIM), torch.arange(3 * HEADS * DIM).flip(0)
    kinds = [(straight, 1.0), (straight, 1.0), (turned, 1.0), (straight, 0.5), (turned, 1.0)]
    layers = [Attention(order, torch.eye(DIM), False, speed) for order, speed in kinds]
    measured = []
    measure = geometry._measure
    monkeypatch.setattr(geometry, "_measure", lambda *a: measured.append(a) or measure(*a))
    together, _ = read_geometry(Stack(*layers))
    assert len(measured) == 3  # of each kind one
    for number, (layer, found) in enumerate(zip(layers, together, strict=True)):
        ((alone,), _) = read_geometry(Stack(layer))
        path = f"layers.{number}"
        assert (found.path, found.output) == (path, f"{path}.back")
        assert (found.table, found.notes) == (alone.table, alone.notes)
        for kind in "qkv":
            assert found.sources[kind].rows == alone.sources[kind].rows
            assert found.sources[kind].projection == f"{path}.everything"


def test_rows_in_any_order_are_found_head_by_head_with_their_pairs():
    order = torch.randperm(3 * HEADS * DIM)
    (layer,), _ = read_geometry(Language(order))
    assert layer.path == "layer"
    assert layer.table.pairs == tuple(PAIRS)
    assert layer.table.inv_freq == pytest.approx(tuple(PAIRS.values()), rel=1e-4)
    wanted = [tuple(map(tuple, part.view(HEADS, DIM).tolist())) for part in order.chunk(3)]
    # Queries and keys are mapped in every dimension, those that are not rotated included.
    assert [layer.sources[kind].rows for kind in "qkv"] == wanted
    assert {source.projection for source in layer.sources.values()} == {"layer.everything"}
    assert layer.output == "layer.back"


def test_states_that_mix_rows_are_refused_with_class_layer_and_reason():
    mix = torch.linalg.qr(torch.randn(DIM, DIM)).Q
    with pytest.raises(
        ValueError, match=r"Language: .*layer \(Attention\).*mixes several"
    ) as error:
        read_geometry(Language(mix=mix))
    assert "\n" not in str(error.value)


def test_keys_that_are_values_too_are_named_instead_of_mapped():
    (layer,), _ = read_geometry(Language(values_are_keys=True))
    assert set(layer.sources) == {"q"}
    assert layer.notes["k"] == "its rows are those of other states too"


def test_a_model_that_never_attends_is_refused():
    model = nn.Sequential()
    model.forward = lambda input_ids, use_cache: input_ids
    model.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="Sequential has no attention"):
        read_geometry(model)


def test_a_model_that_needs_more_than_token_ids_is_refused_with_its_own_words():
    class Picture(Language):
        def forward(self, input_ids, use_cache=False):
            raise KeyError("pixel_values")

    with pytest.raises(ValueError, match=r"Picture cannot be run on two token ids.*pixel_values"):
        read_geometry(Picture())
