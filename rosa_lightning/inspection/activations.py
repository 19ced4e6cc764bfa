"""L2 norms of rotated queries and keys, per layer and head dimension: numbers and a figure.

The first figure of the RoSA paper (doi 10.1609/aaai.v40i18.38589): strong activations gather in the
dimensions that rotary position embeddings turn slowly.

Axes: B batch, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from rosa_lightning.models.kv_cache import forward_arguments
from rosa_lightning.roae.inject import roae_layers, roae_report
from rosa_lightning.roae.layer import RoAEConfig, contiguous_runs
from rosa_lightning.roae.targets import select_projections
from rosa_lightning.roae.tracing import MatmulTracer, trace, watch_attention
from rosa_lightning.utils.files import atomic_directory, atomic_write
from rosa_lightning.utils.modules import in_mode

TAG = "activations/rotated_norms"
"""Name of the figure in TensorBoard."""


@dataclass(frozen=True)
class StateNorms:
    """Mean L2 norms of the rotated states of one layer."""

    layer: str
    """Dotted path of the attention module."""
    query: Tensor
    """(H, D), float32 on the CPU."""
    key: Tensor
    """(H, D), likewise; H counts the heads that keys have when they reach the kernel."""


@torch.no_grad()
def rotated_norms(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[StateNorms]:
    """Mean L2 norm of queries and keys, in each head and dimension, as attention sees them.

    ``norms[h, d] = mean over sequences of sqrt(sum over tokens of state[h, token, d] ** 2)``: after
    the rotation and any norm, without padding. Where a layer runs several times, all runs count.

    Args:
        model: A `transformers` language model with its weights, with RoAE or without. It attends
            by its own kernel.
        batches: Token ids (B, T) as ``input_ids``, and ``attention_mask`` (B, T) and
            ``position_ids`` (B, T) where rows are padded. Other entries are ignored.

    Returns:
        The norms of each attention layer, in the order of the calls.

    Raises:
        ValueError: The model has no weights or no attention that can be seen, or there is no batch.
    """
    kind = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"the activations of {kind} need its weights, and it was made from its configuration "
            "alone. Load it with load_base."
        )
    calls = trace(model).attentions
    if not calls:
        raise ValueError(f"{kind} has no attention whose queries and keys can be seen.")
    seen = _Sums(model, {call.path: call.module for call in calls})
    with in_mode(model, training=False):
        for batch in batches:
            seen.add(batch, by_hand=not calls[0].by_interface)
    if not seen.sums:
        raise ValueError("there is no text to run the model on. Give at least one batch of tokens.")
    return [
        StateNorms(path, *(total.cpu() / seen.counts[path] for total in seen.sums[path]))
        for path in seen.modules
        if path in seen.sums
    ]


class _Sums:
    """Adds up the norms of states while a model runs."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.model, self.modules = model, modules
        self.device = next(model.parameters()).device
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.counts: dict[str, int] = {}
        self.mask_BT = torch.empty(0)
        self.running: list[str] = []
        """Attention modules that are running and have not shown their states."""

    def add(self, batch: Mapping[str, Any], *, by_hand: bool) -> None:
        """Run one batch."""
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: batch[name].to(self.device) for name in names if name in batch}
        ids_BT = inputs["input_ids"]
        self.mask_BT = inputs.get("attention_mask", torch.ones_like(ids_BT)).float()
        if "logits_to_keep" in forward_arguments(self.model):
            inputs["logits_to_keep"] = 1
        tracer = MatmulTracer(self.see, lambda _: None, ids_BT.shape[1])
        with ExitStack() as stack:
            for path, module in self.modules.items():
                before = module.register_forward_pre_hook(lambda *_, p=path: self.running.append(p))
                after = module.register_forward_hook(lambda *_: self.running.clear())
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(watch_attention(self.see))
            if by_hand:
                stack.enter_context(tracer)
            self.model(**inputs, use_cache=False)

    def see(self, query: Tensor, key: Tensor) -> None:
        """Add the norms of one call; a second product in the same call is none of queries."""
        if not self.running:
            return
        path = self.running.pop()
        batch_size, num_tokens = self.mask_BT.shape
        norms = []
        for states in (query, key):
            # Products over (B * H, T, D) come apart again.
            states_BHTD = states.reshape(batch_size, -1, num_tokens, states.shape[-1]).float()
            squares_BHD = (states_BHTD.square() * self.mask_BT[:, None, :, None]).sum(2)
            norms.append(squares_BHD.sqrt().sum(0))
        before = self.sums.get(path, (0, 0))
        self.sums[path] = norms[0] + before[0], norms[1] + before[1]
        self.counts[path] = self.counts.get(path, 0) + batch_size


def adapted_dims(model: nn.Module, config: RoAEConfig | None = None) -> dict[str, tuple[int, ...]]:
    """The head dimensions that RoAE adapts in each layer, by the attention module's dotted path.

    Args:
        model: A language model.
        config: What RoAE would add, if the model does not carry it.

    Raises:
        ValueError: The model's rotation cannot be read, if it does not carry RoAE.
    """
    if any(True for _ in roae_layers(model)):
        return {p.layer: p.dims for p in roae_report(model).projections if p.dims}
    terms, _ = select_projections(model, config or RoAEConfig())
    return {term.layer: term.dims for term in terms if term.dims}


def activation_figure(
    norms: Sequence[StateNorms],
    low_dims: Mapping[str, Sequence[int]] | None = None,
    title: str = "",
) -> Figure:
    """Heat maps of the norms, the mean over heads: queries on the left, keys on the right.

    Args:
        norms: From `rotated_norms`.
        low_dims: Head dimensions to frame in each layer, from `adapted_dims`.
        title: What stands above.
    """
    height = min(max(3.2, 1.6 + 0.11 * len(norms)), 12.0)
    figure = Figure(figsize=(11, height), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    kinds = {"queries Q": [n.query for n in norms], "keys K": [n.key for n in norms]}
    for ax, (name, states) in zip(axes, kinds.items(), strict=True):
        _heat_map(figure, ax, [state_HD.mean(0) for state_HD in states])
        ax.set_title(f"rotated {name}", fontsize=11)
        _frame(ax, [tuple((low_dims or {}).get(n.layer, ())) for n in norms])
    _label_layers(axes[0], [n.layer for n in norms])
    framed = "\nframed: the low-frequency dimensions that RoAE adapts" if low_dims else ""
    figure.suptitle(f"{title or 'Mean L2 norm per layer and head dimension'}{framed}", fontsize=12)
    return figure


def _heat_map(figure: Figure, ax: Axes, rows: Sequence[Tensor]) -> None:
    """One row a layer; heads of another size in some layers leave their rest white."""
    width = max(len(row) for row in rows)
    image = torch.full((len(rows), width), float("nan"))
    for number, row in enumerate(rows):
        image[number, : len(row)] = row
    shown = ax.imshow(image.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    ax.set_xlabel("head dimension")
    # As wide in high figures as in low ones.
    aspect = 7 * figure.get_figheight()
    figure.colorbar(shown, ax=ax, label="mean L2 norm", pad=0.02, aspect=aspect)


def _frame(ax: Axes, dims: Sequence[tuple[int, ...]]) -> None:
    """A frame around the same dimensions of adjacent layers."""
    first = 0
    for row in range(1, len(dims) + 1):
        if row < len(dims) and dims[row] == dims[first]:
            continue
        for start, stop in contiguous_runs(dims[first]):
            corner, width, height = (start - 0.5, first - 0.5), stop - start, row - first
            # Whole at the edges, and above the axes' own lines.
            edge: dict[str, Any] = {"fill": False, "clip_on": False, "zorder": 3}
            ax.add_patch(Rectangle(corner, width, height, edgecolor="red", linewidth=1.5, **edge))
        first = row


def _label_layers(ax: Axes, layers: Sequence[str]) -> None:
    """The numbers of layers, at most 20 of them."""
    numbers = [next((p for p in path.split(".") if p.isdigit()), path) for path in layers]
    step = -(-len(layers) // 20)
    ax.set_yticks(range(0, len(layers), step), numbers[::step])
    ax.set_ylabel("layer")


def save_figure(figure: Figure, png: Path) -> Path:
    """Write a figure as PNG, and as an image that TensorBoard shows under ``TAG``.

    Args:
        figure: From `activation_figure`.
        png: The file to write. The folder beside it of the same name, without the suffix, must not
            exist.

    Returns:
        That folder, which TensorBoard is to read.

    Raises:
        OSError: It cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with atomic_directory(png.with_suffix("")) as folder:
        with SummaryWriter(str(folder)) as writer:
            writer.add_figure(TAG, figure, close=False)
        atomic_write(png, content.getvalue())
    return png.with_suffix("")
