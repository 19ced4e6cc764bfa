"""Which output rows of which projection become which head dimension, and how RoPE rotates them.

Each attention module is run alone, the outputs of its projections replaced by chosen numbers.
Numbers that spell out each output row's index show which row becomes which dimension of which
head; unit vectors then show how those dimensions turn. Weights play no part, so the cost is small
whatever the model's size, and fused, latent or shared projections need no case of their own. A
module that makes of the first numbers what another made is taken to be like it.

Axes: N runs at once, T = 2 tokens, H heads, D head dimension, R rows of all projections of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rosa_lightning.roae.rope import PairTable, read_pair_table
from rosa_lightning.roae.tracing import (
    AttentionCall,
    MatmulTracer,
    Trace,
    intercept_attention,
    run_on_meta,
    trace,
)
from rosa_lightning.utils.modules import replaced
from rosa_lightning.utils.text import one_line

NO_ROW = -1
"""Stands for a state dimension that is no output row of a projection."""
_TOLERANCE = 1e-2
"""How far from 0 or 1 a bit may be read."""
_NOISE = 1e-5
"""Rounding that tells runs apart in states that no projection's output goes into."""
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "THD": lambda x_NTHD: x_NTHD,
    "HTD": lambda x_NTHD: x_NTHD.transpose(1, 2),
    "T(HD)": lambda x_NTHD: x_NTHD.flatten(2),
}


@dataclass(frozen=True)
class StateRows:
    """The output rows of one projection that become queries, keys or values."""

    projection: str
    """Dotted path of the projection in the model."""
    rows: tuple[tuple[int, ...], ...]
    """Output row of each dimension of each head, (H, D); ``NO_ROW`` if it comes from elsewhere."""
    norm: str = ""
    """Dotted path of the norm that these rows go through before they are rotated, if any."""
    norm_layout: str = ""
    """Axes of that norm's input: ``THD``, ``HTD`` or ``T(HD)``."""

    def rows_of(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        """The rows of these dimensions in every head, ascending."""
        return tuple(sorted(row for head in self.rows for d in dims if (row := head[d]) != NO_ROW))


@dataclass(frozen=True)
class AttentionGeometry:
    """What one attention module does with its projections."""

    path: str
    table: PairTable
    """RoPE pairs of a head; empty where nothing is rotated."""
    output: str | None
    """Dotted path of the projection that follows the attention."""
    sources: dict[str, StateRows] = field(default_factory=dict)
    """Where q, k and v come from; a kind is missing where ``notes`` says why."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why a kind of state, or ``state`` for the placement after the norms, cannot be adapted."""


def read_geometry(model: nn.Module) -> tuple[tuple[AttentionGeometry, ...], Trace]:
    """Measure each attention module of a causal language model that rotates its states.

    Also the run that showed them. ValueError, with class, layer and reason, if nothing rotates or
    a rotation cannot be read.
    """
    kind = type(model).__name__
    with run_on_meta(model):
        seen = trace(model)
        known: list[_Known] = []
        layers = [_read_layer(call, kind, known) for call in seen.attentions]
    rotated = tuple(layer for layer in layers if layer.table.pairs)
    if not rotated:
        what = "rotates neither Q nor K, so it has no rotary position embedding to adapt"
        if not layers:
            what = (
                "has no attention: none of its modules calls the attention interface of "
                "transformers or multiplies queries with keys"
            )
        raise ValueError(f"{kind} {what}. Give a RoPE model, such as Llama, Qwen or Gemma.")
    return rotated, seen


def _read_layer(call: AttentionCall, kind: str, known: list[_Known]) -> AttentionGeometry:
    try:
        codes_NTR = _row_codes(call.num_rows)
        states = _states(call, codes_NTR)
        same = (found for one in known if (found := _renamed(one, call, states)) is not None)
        if (found := next(same, None)) is None:
            found = _measure(call, codes_NTR, states)
            if not found.notes:  # which name paths in words
                known.append(_Known(call, states, found))
        return found
    except Exception as error:  # of whatever code the model has
        reason = one_line(error) or type(error).__name__
        raise ValueError(
            f"{kind}: the rotation in layer {call.path} ({type(call.module).__name__}) cannot be "
            f"read from its own forward: {reason} Give a model whose attention turns pairs of "
            "dimensions."
        ) from error


def _renamed(known: _Known, call: AttentionCall, states: _States) -> AttentionGeometry | None:
    """What is known of a module, for another with the same states; None where they differ."""

    def own(path: str) -> str:
        return call.path + path.removeprefix(known.call.path)

    def shapes(outputs: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(path, output.shape) for path, output in outputs.items()]

    projections = {own(path): output for path, output in known.call.projections.items()}
    norm_inputs = {own(path): inputs for path, inputs in known.states.norm_inputs.items()}
    alike = shapes(projections) == shapes(call.projections)
    if not alike or not states.equal(known.states._replace(norm_inputs=norm_inputs)):
        return None
    sources = {
        kind: replace(rows, projection=own(rows.projection), norm=rows.norm and own(rows.norm))
        for kind, rows in known.found.sources.items()
    }
    return replace(known.found, path=call.path, output=call.output, sources=sources)


def _measure(call: AttentionCall, codes_NTR: Tensor, states: _States) -> AttentionGeometry:
    """Map the rows of one attention module's projections, then read how they turn."""
    maps = {"q": _decode(states.query, len(codes_NTR)), "k": _decode(states.key, len(codes_NTR))}
    mapped = [kind for kind, rows_HD in maps.items() if (rows_HD != NO_ROW).any()]
    if not mapped:
        raise ValueError("neither Q nor K comes from a projection of this module.")
    table, *others = (_read_table(call, kind, maps[kind]) for kind in mapped)
    for other in others:  # queries may carry a scale, which costs a rounding
        both = torch.tensor(table.inv_freq), torch.tensor(other.inv_freq)
        same_pairs = (table.head_dim, table.pairs) == (other.head_dim, other.pairs)
        if not same_pairs or not torch.allclose(*both, rtol=1e-4, atol=1e-12):
            raise ValueError("Q and K are not rotated alike.")
    maps["v"] = _decode(states.value, len(codes_NTR), strict=False)
    found = AttentionGeometry(call.path, table, call.output)
    _name_sources(call, found, maps)
    for kind in sorted({"q", "k"} & set(found.sources)):
        norm, layout, reason = _find_norm(maps[kind], states.norm_inputs, codes_NTR)
        found.sources[kind] = replace(found.sources[kind], norm=norm, norm_layout=layout)
        found.notes.update({"state": reason} if reason else {})
    return found


def _row_codes(num_rows: int) -> Tensor:
    """Outputs (N, T, R): zeros, ones, then the bits of each row's number, the lowest first."""
    numbers = torch.arange(1, num_rows + 1)
    bits = [((numbers >> bit) & 1).float() for bit in range(num_rows.bit_length())]
    codes = torch.stack([torch.zeros(num_rows), torch.ones(num_rows), *bits])
    return codes[:, None, :].repeat(1, 2, 1)


def _decode(states_NHTD: Tensor, num_codes: int, *, strict: bool = True) -> Tensor:
    """The row of the R that each dimension of each head is at position 0; (H, D).

    If ``strict``, a dimension that rotates must be a multiple of one row.
    """
    states = states_NHTD.double().cpu()
    if states.shape[0] != num_codes:
        return torch.full(states.shape[1::2], NO_ROW)
    states = states - states[:1]
    start_NHD, turned_NHD = states[:, :, 0], states[:, :, 1]
    scale_HD = start_NHD[1]
    depends_HD = (states.abs() > _NOISE).any(0).any(1)
    bits_NHD = start_NHD[2:] / torch.where(scale_HD == 0, 1, scale_HD)
    whole_NHD = bits_NHD.round()
    is_bit_HD = (
        ((bits_NHD - whole_NHD).abs() < _TOLERANCE) & ((whole_NHD == 0) | (whole_NHD == 1))
    ).all(0)
    powers_N = 2 ** torch.arange(len(bits_NHD), dtype=torch.float64)
    rows_HD = torch.einsum("nhd,n->hd", whole_NHD, powers_N).long() - 1
    is_row_HD = depends_HD & (scale_HD.abs() > _NOISE) & is_bit_HD & (rows_HD >= 0)
    moves_HD = ~torch.isclose(start_NHD, turned_NHD, atol=1e-6).all(0)
    if strict and (depends_HD & ~is_row_HD & moves_HD).any():
        raise ValueError("a rotated dimension mixes several outputs of its projections.")
    return torch.where(is_row_HD, rows_HD, NO_ROW)


def _read_table(call: AttentionCall, kind: str, rows_HD: Tensor) -> PairTable:
    """The pair table of the queries or keys, every head checked against the others."""
    used = (rows_HD != NO_ROW).all(0).nonzero().flatten().tolist()
    others = [dim for dim in range(rows_HD.shape[1]) if dim not in used]

    def rotate(x_NTU: Tensor) -> Tensor:
        rows_NTR = torch.zeros(len(used) + 1, 2, call.num_rows)
        for column, dim in enumerate(used):
            rows_NTR[:-1, :, rows_HD[:, dim]] = x_NTU[..., column, None]
        states = _states(call, rows_NTR)
        states_NHTD = (states.query if kind == "q" else states.key).float().cpu()
        turned_NHTD = states_NHTD[:-1] - states_NHTD[-1:]
        if not torch.equal(turned_NHTD, turned_NHTD[:, :1].expand_as(turned_NHTD)):
            raise ValueError("its heads are not rotated alike.")
        if (turned_NHTD[..., others].abs() > _NOISE).any():
            raise ValueError("a rotated dimension turns into one that is no projection's output.")
        return turned_NHTD[:, 0][..., used]

    table = read_pair_table(rotate, len(used))
    pairs = tuple((used[first], used[second]) for first, second in table.pairs)
    return PairTable(rows_HD.shape[1], pairs, table.inv_freq)


def _name_sources(call: AttentionCall, found: AttentionGeometry, maps: dict[str, Tensor]) -> None:
    """Name the projections, or say of a kind of state why it cannot be adapted."""
    # All widths at once: asking a tensor for its shape is slow where a model is made under a mode.
    widths = [(path, output.shape[-1]) for path, output in call.projections.items()]
    owners = [(path, row) for path, width in widths for row in range(width)]
    rotated = {*found.table.rotated_dims}
    for kind, rows_HD in maps.items():
        dims = [d for d in range(rows_HD.shape[1]) if kind == "v" or d in rotated]
        others = torch.cat([rows.flatten() for other, rows in maps.items() if other != kind])
        wanted_HD = rows_HD[:, dims]
        paths = {owners[row][0] for row in set(wanted_HD.flatten().tolist()) - {NO_ROW}}
        if (wanted_HD == NO_ROW).any() or not paths:
            found.notes[kind] = "its states are not outputs of a projection of this layer"
        elif len(paths) > 1:
            names = ", ".join(sorted(paths))
            found.notes[kind] = f"its states come from several projections, {names}"
        elif torch.isin(wanted_HD, others).any():
            found.notes[kind] = "its rows are those of other states too"
        else:
            (path,) = paths
            own = {i: row for i, (owner, row) in enumerate(owners) if owner == path}
            heads = [tuple(own.get(i, NO_ROW) for i in head) for head in rows_HD.tolist()]
            # A head that is repeated for several others is given once.
            found.sources[kind] = StateRows(path, tuple(dict.fromkeys(heads)))


def _find_norm(
    rows_HD: Tensor, norm_inputs: dict[str, list[Tensor]], codes_NTR: Tensor
) -> tuple[str, str, str]:
    """The norm before the rotation, the axes of its input, and why no term can follow it."""
    heads = list(dict.fromkeys(tuple(rows) for rows in rows_HD.tolist()))
    wanted_NTHD = codes_NTR[..., torch.tensor(heads)]
    reason = ""
    for path, inputs in norm_inputs.items():
        for layout, arrange in _LAYOUTS.items():
            wanted = arrange(wanted_NTHD)
            same_shape = [seen.cpu().float() for seen in inputs if seen.shape == wanted.shape]
            if any(torch.equal(seen, wanted) for seen in same_shape):
                shared = f"{path} is the norm of other states too" if len(inputs) > 1 else ""
                return path, layout, shared
            # Once rotated, the first token spells rows still, and the second no longer does.
            axis = 1 + layout.index("T")
            if any(torch.equal(s.select(axis, 0), wanted.select(axis, 0)) for s in same_shape):
                reason = f"{path} comes after the rotation"
    return "", "", reason


# An attention module run alone.


class _States(NamedTuple):
    """The states of one attention call, (N, H, T, D) each, and what each norm inside was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    norm_inputs: dict[str, list[Tensor]]

    def equal(self, other: _States) -> bool:
        """Whether two calls gave the same numbers, bit for bit."""
        if [*self.norm_inputs] != [*other.norm_inputs]:
            return False
        both = [*zip(self[:3], other[:3], strict=True)]
        for path, inputs in self.norm_inputs.items():
            if len(inputs) != len(other.norm_inputs[path]):
                return False
            both += zip(inputs, other.norm_inputs[path], strict=True)
        # A model may lie on several devices, between which nothing is compared.
        return all(a.device == b.device and a.dtype == b.dtype and a.equal(b) for a, b in both)


class _Known(NamedTuple):
    """A module that was measured, and the states that tell whether another one is like it."""

    call: AttentionCall
    states: _States
    found: AttentionGeometry


class AttentionReached(Exception):  # noqa: N818
    """Carries the states out of an attention module, past code that needs no running."""

    def __init__(self, *states: Tensor) -> None:
        self.states = states


@torch.no_grad()
def _states(call: AttentionCall, rows_NTR: Tensor) -> _States:
    """The states when the projections' outputs are the given rows, and norms change nothing."""
    try:
        return _replay(call, rows_NTR)
    except Exception:
        # Code that does not broadcast over the batch: one run at a time.
        runs = [_replay(call, row_TR[None]) for row_TR in rows_NTR]
    norm_inputs = {
        path: [torch.cat(part) for part in zip(*(r.norm_inputs[path] for r in runs), strict=True)]
        for path in runs[0].norm_inputs
    }
    query, key, value = (torch.cat(part) for part in zip(*(r[:3] for r in runs), strict=True))
    return _States(query, key, value, norm_inputs)


def _replay(call: AttentionCall, rows_NTR: Tensor) -> _States:
    num_runs, hidden = rows_NTR.shape[0], call.hidden_states
    # The same call in float32, with its hidden states repeated.
    repeated = hidden[:1].float().expand(num_runs, *hidden.shape[1:])
    args = [repeated if value is hidden else value for value in call.args]
    kwargs = {name: repeated if v is hidden else v for name, v in call.kwargs.items()}
    widths = [output.shape[-1] for output in call.projections.values()]
    outputs = dict(
        zip(call.projections, torch.split(rows_NTR.to(hidden.device), widths, -1), strict=True)
    )
    norm_inputs: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for name, part in call.module.named_modules():
            path = f"{call.path}.{name}"
            if path in outputs:
                like = call.projections[path]
                shape = (num_runs, *like.shape[1:]) if like.ndim > 2 else (-1, like.shape[-1])
                forward = _constant(outputs[path].reshape(shape))
            elif name and "norm" in type(part).__name__.lower():
                # A norm on Q or K scales unit vectors; it does not turn them.
                forward = _identity(norm_inputs.setdefault(path, []))
            else:
                continue
            stack.enter_context(replaced(part, "forward", forward))
        stack.enter_context(_stop_at_attention(call))
        try:
            call.module(*args, **kwargs)
        except AttentionReached as reached:
            # Products over (N * H, T, D) come apart again.
            query, key, value = (
                s.reshape(num_runs, -1, *s.shape[-2:]) if s.ndim == 3 else s for s in reached.states
            )
            return _States(query, key, value, norm_inputs)
    raise ValueError("its queries and keys never met when it was run alone.")


def _constant(output: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: output


def _identity(seen: list[Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(x)
        return x

    return forward


@contextmanager
def _stop_at_attention(call: AttentionCall) -> Iterator[None]:
    """Raise `AttentionReached` once queries, keys and values are known."""
    scores: list[tuple[Tensor, Tensor]] = []

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise AttentionReached(query, key, value)

    def see_values(value: Tensor) -> None:
        if scores:
            raise AttentionReached(*scores[0], value)

    tracer = MatmulTracer(lambda query, key: scores.append((query, key)), see_values)
    with intercept_attention(call.module, attend), nullcontext() if call.by_interface else tracer:
        yield
