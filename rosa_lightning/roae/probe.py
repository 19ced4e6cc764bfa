"""Where a model's queries and keys come from and how RoPE turns them, measured layer by layer.

The outputs of an attention module's projections are replaced by chosen numbers. Numbers that spell
out each output row's index show which row becomes which dimension of which head; unit vectors then
show how those dimensions turn. Weights play no part, so the cost is small whatever the model's
size, and fused, latent or shared projections need no case of their own.

Axes: N probes, T = 2 tokens, H heads, D head dimension, R rows of all projections of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from rosa_lightning.models.standin import stand_ins
from rosa_lightning.roae.capture import AttentionCall, Trace, trace
from rosa_lightning.roae.replay import States, states_of
from rosa_lightning.roae.rope import PairTable, read_pair_table

NO_ROW = -1
"""Stands for a state dimension that is no output row of a projection."""

_TOLERANCE = 1e-2
"""How far from 0 or 1 a bit may be read."""
_NOISE = 1e-5
"""Rounding that tells runs apart in states that no projection's output goes into."""


@dataclass(frozen=True)
class Source:
    """The output rows of one projection that become the states of one kind."""

    projection: str
    """Dotted path of the projection in the model."""
    rows: tuple[tuple[int, ...], ...]
    """Output row of each dimension of each head; ``NO_ROW`` where it comes from elsewhere."""
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
    """Dotted path of the attention module."""
    table: PairTable
    """RoPE pairs of a head; empty where nothing is rotated."""
    sources: dict[str, Source]
    """Where q, k and v come from; a kind is missing where ``notes`` says why."""
    notes: dict[str, str]
    """Why a kind of state, or ``state`` for the placement after the norms, cannot be adapted."""
    output: str | None
    """Dotted path of the projection that follows the attention."""


def read_geometry(model: nn.Module) -> tuple[tuple[AttentionGeometry, ...], Trace]:
    """Measure every attention module of a causal language model.

    Args:
        model: A `transformers` language model that can be run on token ids.

    Returns:
        The geometry of each attention module that rotates its states, in the order of the calls,
        and the run that showed them. Layers without rotation are left out.

    Raises:
        ValueError: No attention, no rotation anywhere, or one that cannot be read; names the
            class, the layer and the reason.
    """
    with stand_ins(model):
        return _read_model(model)


def _read_model(model: nn.Module) -> tuple[tuple[AttentionGeometry, ...], Trace]:
    kind = type(model).__name__
    seen = trace(model)
    if not seen.attentions:
        raise ValueError(
            f"{kind} has no attention: none of its modules calls the attention interface of "
            "transformers or multiplies queries with keys, so RoAE cannot be added. Give a RoPE "
            "model, such as Llama, Qwen, Mistral or Gemma."
        )
    layers = []
    for call in seen.attentions:
        try:
            layers.append(_read_layer(call))
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{kind}: the rotation in layer {call.path} ({type(call.module).__name__}) cannot "
                f"be read from its own forward: {reason} Give a model whose attention turns pairs "
                "of dimensions."
            ) from error
    rotated = tuple(layer for layer in layers if layer.table.pairs)
    if not rotated:
        raise ValueError(
            f"{kind} rotates neither Q nor K, so it has no rotary position embedding and no RoPE "
            "dimensions to adapt. Give a RoPE model, such as Llama, Qwen, Mistral or Gemma."
        )
    return rotated, seen


def _read_layer(call: AttentionCall) -> AttentionGeometry:
    """Map the rows of one attention module's projections, then read how they turn."""
    codes_NTR = _row_codes(call.num_rows)
    states = states_of(call, codes_NTR)
    maps = {
        "q": _decode(states.query, codes_NTR.shape[0]),
        "k": _decode(states.key, codes_NTR.shape[0]),
    }
    tables = {}
    for kind, rows_HD in maps.items():
        if (rows_HD != NO_ROW).any():
            tables[kind] = _read_table(call, kind, rows_HD)
    if not tables:
        raise ValueError("neither Q nor K comes from a projection of this module.")
    table = next(iter(tables.values()))
    if any(not _alike(table, other) for other in tables.values()):
        raise ValueError("Q and K are not rotated alike.")
    maps["v"] = _decode(states.value, codes_NTR.shape[0], strict=False)
    return _geometry(call, table, maps, states, codes_NTR)


def _row_codes(num_rows: int) -> Tensor:
    """Probes (N, T, R): zeros, ones, then the bits of each row's number, the lowest first."""
    numbers = torch.arange(1, num_rows + 1)
    bits = [(numbers >> bit) & 1 for bit in range(num_rows.bit_length())]
    probes = torch.stack([torch.zeros(num_rows), torch.ones(num_rows), *(b.float() for b in bits)])
    return probes[:, None, :].repeat(1, 2, 1)


def _decode(states_NHTD: Tensor, num_probes: int, *, strict: bool = True) -> Tensor:
    """The row of the R that each dimension of each head is at position 0; (H, D).

    Raises:
        ValueError: A dimension that changes with its position is no multiple of one row. Where it
            does not change with its position, it is marked as no row.
    """
    states = states_NHTD.double().cpu()
    if states.shape[0] != num_probes:
        return torch.full(states.shape[1::2], NO_ROW)
    states = states - states[:1]
    start_NHD, turned_NHD = states[:, :, 0], states[:, :, 1]
    scale_HD = start_NHD[1]
    depends_HD = (states.abs() > _NOISE).any(0).any(1)
    bits_NHD = start_NHD[2:] / torch.where(scale_HD == 0, 1, scale_HD)
    whole_HD = ((bits_NHD - bits_NHD.round()).abs() < _TOLERANCE).all(0)
    within_HD = ((bits_NHD.round() == 0) | (bits_NHD.round() == 1)).all(0)
    powers_N = 2 ** torch.arange(len(bits_NHD), dtype=torch.float64)
    rows_HD = torch.einsum("nhd,n->hd", bits_NHD.round(), powers_N).long() - 1
    is_row_HD = depends_HD & (scale_HD.abs() > _NOISE) & whole_HD & within_HD & (rows_HD >= 0)
    moves_HD = ~torch.isclose(start_NHD, turned_NHD, atol=1e-6).all(0)
    if strict and (depends_HD & ~is_row_HD & moves_HD).any():
        raise ValueError("a rotated dimension mixes several outputs of its projections.")
    return torch.where(is_row_HD, rows_HD, NO_ROW)


def _read_table(call: AttentionCall, kind: str, rows_HD: Tensor) -> PairTable:
    """The pair table of the queries or keys, every head checked against the others."""
    head_dim = rows_HD.shape[1]
    used = (rows_HD != NO_ROW).all(0).nonzero().flatten().tolist()

    def rotate(x_NTU: Tensor) -> Tensor:
        rows_NTR = torch.zeros(len(used) + 1, 2, call.num_rows)
        for column, dim in enumerate(used):
            rows_NTR[:-1, :, rows_HD[:, dim]] = x_NTU[..., column, None]
        states = states_of(call, rows_NTR)
        states_NHTD = (states.query if kind == "q" else states.key).float().cpu()
        turned_NHTD = states_NHTD[:-1] - states_NHTD[-1:]
        if not torch.equal(turned_NHTD, turned_NHTD[:, :1].expand_as(turned_NHTD)):
            raise ValueError("its heads are not rotated alike.")
        others = [dim for dim in range(head_dim) if dim not in used]
        if (turned_NHTD[..., others].abs() > _NOISE).any():
            raise ValueError("a rotated dimension turns into one that is no projection's output.")
        return turned_NHTD[:, 0][..., used]

    table = read_pair_table(rotate, len(used))
    pairs = tuple((used[first], used[second]) for first, second in table.pairs)
    return PairTable(head_dim, pairs, table.inv_freq)


def _alike(one: PairTable, other: PairTable) -> bool:
    """Whether two tables agree; queries may carry a scale, which costs a rounding."""
    return (one.head_dim, one.pairs) == (other.head_dim, other.pairs) and torch.allclose(
        torch.tensor(one.inv_freq), torch.tensor(other.inv_freq), rtol=1e-4, atol=1e-12
    )


def _geometry(
    call: AttentionCall,
    table: PairTable,
    maps: dict[str, Tensor],
    states: States,
    codes_NTR: Tensor,
) -> AttentionGeometry:
    """Name the projections, and say of each kind of state why it cannot be adapted, if so."""
    sources: dict[str, Source] = {}
    notes: dict[str, str] = {}
    places = _places(call)
    for kind, rows_HD in maps.items():
        dims = [d for d in range(rows_HD.shape[1]) if kind == "v" or d in table.rotated_dims]
        others = torch.cat([rows.flatten() for other, rows in maps.items() if other != kind])
        wanted_HD = rows_HD[:, dims]
        shared = torch.isin(wanted_HD[wanted_HD != NO_ROW], others).any()
        paths = {places[row][0] for row in set(wanted_HD.flatten().tolist()) - {NO_ROW}}
        if (wanted_HD == NO_ROW).any() or not paths:
            notes[kind] = "its states are not outputs of a projection of this layer"
        elif len(paths) > 1:
            notes[kind] = f"its states come from several projections, {', '.join(sorted(paths))}"
        elif shared:
            notes[kind] = "its rows are those of other states too"
        else:
            sources[kind] = _source(places, paths.pop(), rows_HD)
    for kind in sorted({"q", "k"} & set(sources)):
        norm, layout, reason = _find_norm(maps[kind], states.norm_inputs, codes_NTR)
        sources[kind] = replace(sources[kind], norm=norm, norm_layout=layout)
        notes |= {"state": reason} if reason else {}
    return AttentionGeometry(call.path, table, sources, notes, call.output)


def _places(call: AttentionCall) -> list[tuple[str, int]]:
    """The projection and its output row that stand at each of the R rows."""
    # All at once: asking a tensor for its shape takes long where a model is made under a mode.
    widths = [(path, output.shape[-1]) for path, output in call.projections.items()]
    return [(path, row) for path, width in widths for row in range(width)]


def _source(places: list[tuple[str, int]], path: str, rows_HD: Tensor) -> Source:
    """The rows of one projection, a head that is repeated for several others given once."""

    def row_in_path(index: int) -> int:
        other, row = places[index] if index != NO_ROW else ("", NO_ROW)
        return row if other == path else NO_ROW

    heads = [tuple(map(row_in_path, rows)) for rows in rows_HD.tolist()]
    return Source(path, tuple(dict.fromkeys(heads)))


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "THD": lambda x_NTHD: x_NTHD,
    "HTD": lambda x_NTHD: x_NTHD.transpose(1, 2),
    "T(HD)": lambda x_NTHD: x_NTHD.flatten(2),
}


def _find_norm(
    rows_HD: Tensor, norm_inputs: dict[str, list[Tensor]], codes_NTR: Tensor
) -> tuple[str, str, str]:
    """The norm that these rows go through before they are rotated, if there is one.

    Returns:
        Its dotted path and the axes of its input, both empty if there is none; and the reason why
        a term cannot be added after a norm that there is.
    """
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
            token = partial(torch.select, dim=1 + layout.index("T"), index=0)
            if any(torch.equal(token(seen), token(wanted)) for seen in same_shape):
                reason = f"{path} comes after the rotation"
    return "", "", reason
