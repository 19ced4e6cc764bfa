"""Which rows of a layer's feed-forward projections are gate, up and down, seen in one run.

What goes into the activation is the gate; what shares the gate's input and is multiplied with it
is up; what takes their product back to the layer's width is down. Where nothing is multiplied,
what goes into the activation is called up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_lightning.roae.capture import Leaf, Trace, is_inside


class Rows(NamedTuple):
    """Some output rows of one projection."""

    projection: str
    rows: tuple[int, ...]


def layer_of(path: str) -> str:
    """The decoder layer that a module stands in: its path up to the last number."""
    parts = path.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def feed_forward(trace: Trace, attention: str) -> dict[str, list[Rows]]:
    """The gate, up and down rows of the layer around an attention module.

    Mixtures of experts show their shared experts only: routed ones hold one parameter for all
    experts, or run on some tokens alone.
    """
    layer = layer_of(attention)
    attentions = [call.path for call in trace.attentions]
    leaves = [
        leaf
        for leaf in trace.leaves
        if is_inside(leaf.path, layer) and not any(is_inside(leaf.path, a) for a in attentions)
    ]
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.path.rpartition(".")[0], []).append(leaf)
    found: dict[str, list[Rows]] = {}
    for group in groups.values():
        for target, rows in _read_group(group, leaves):
            found.setdefault(target, []).append(rows)
    return found


def _read_group(group: list[Leaf], leaves: list[Leaf]) -> Iterator[tuple[str, Rows]]:
    """The rows of one feed-forward block; nothing if its activation is no module."""
    projections = {leaf.path: leaf for leaf in group if leaf.is_projection}
    activated = [leaf.given for leaf in leaves if _is_activation(leaf)]
    gates = {
        path: rows
        for path, leaf in projections.items()
        if (rows := _activated_rows(leaf.output, activated))
    }
    if len(gates) != 1:
        return
    (path, gate), *_ = gates.items()
    leaf = projections[path]
    ups = [
        Rows(other.path, tuple(range(other.output.shape[-1])))
        for other in projections.values()
        if other.path != path and other.given is leaf.given and other.output.shape[-1] == len(gate)
    ]
    taken = set(gate)
    rest = tuple(row for row in range(leaf.output.shape[-1]) if row not in taken)
    ups += [Rows(path, rest)] if rest else []
    if len(ups) > 1:
        return
    yield from [("gate", Rows(path, gate)), ("up", ups[0])] if ups else [("up", Rows(path, gate))]
    for other in projections.values():
        widths = other.given.shape[-1], other.output.shape[-1]
        if widths == (len(gate), leaf.given.shape[-1]) and other.given is not leaf.given:
            yield "down", Rows(other.path, tuple(range(other.output.shape[-1])))


def _is_activation(leaf: Leaf) -> bool:
    """A module without weights that changes its input; dropout at rest does not."""
    bare = not any(True for _ in leaf.module.parameters())
    return (
        bare
        and leaf.given.is_floating_point()
        and leaf.output.shape == leaf.given.shape
        and not torch.equal(leaf.output, leaf.given)
    )


def _activated_rows(output: Tensor, activated: list[Tensor]) -> tuple[int, ...]:
    """The rows of a projection's output that are an activation's input: all, or one half."""
    width = output.shape[-1]
    halves = [range(width), range(width // 2), range(width // 2, width)]
    halves += [range(0, width, 2), range(1, width, 2)]
    for rows in halves:
        part = output[..., rows.start : rows.stop : rows.step]
        if any(part.shape == given.shape and torch.equal(part, given) for given in activated):
            return tuple(rows)
    return ()
