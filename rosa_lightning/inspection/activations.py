"""L2 norms of rotated queries and keys, per layer and head dimension: numbers and a figure.

The first figure of the RoSA paper (doi 10.1609/aaai.v40i18.38589): strong activations gather in the
dimensions that rotary position embeddings turn slowly.

Axes: B batch, T tokens, H heads, D head dimension.
"""

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
from rosa_lightning.roae.inject import roae_report
from rosa_lightning.roae.layer import contiguous_runs
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
        model: A `transformers` language model with its weights, with RoAE or without.
        batches: Token ids (B, T) as ``input_ids``, and ``attention_mask`` (B, T) and
            ``position_ids`` (B, T) where rows are padded. Other entries are ignored.

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
    seen = _Sums()
    names = ["input_ids", "attention_mask", "position_ids"]
    last = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(model) else {}
    device = next(model.parameters()).device
    with in_mode(model, training=False), ExitStack() as stack:
        for path, module in {call.path: call.module for call in calls}.items():
            enter = module.register_forward_pre_hook(lambda *_, p=path: seen.running.append(p))
            leave = module.register_forward_hook(lambda *_: seen.running.clear())
            for hook in (enter, leave):
                stack.enter_context(hook)
        for batch in batches:
            inputs = {name: batch[name].to(device) for name in names if name in batch}
            ids_BT = inputs["input_ids"]
            seen.mask_BT = inputs.get("attention_mask", torch.ones_like(ids_BT)).float()
            with ExitStack() as watching:
                watching.enter_context(watch_attention(seen.add))
                if not calls[0].by_interface:
                    tracer = MatmulTracer(seen.add, lambda _: None, ids_BT.shape[1])
                    watching.enter_context(tracer)
                model(**inputs, **last, use_cache=False)
    if not seen.sums:
        raise ValueError("there is no text to run the model on. Give at least one batch of tokens.")
    return [
        StateNorms(path, *(total.cpu() / seen.counts[path] for total in seen.sums[path]))
        for path in dict.fromkeys(call.path for call in calls)
        if path in seen.sums
    ]


class _Sums:
    """Sums of the norms of states, by attention module."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.counts: dict[str, int] = {}
        self.mask_BT = torch.empty(0)
        self.running: list[str] = []
        """Attention modules that are running and have not shown their states."""

    def add(self, query: Tensor, key: Tensor) -> None:
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


def adapted_dims(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The head dimensions that RoAE adapts in each layer, by the attention module's dotted path."""
    return {term.layer: term.dims for term in roae_report(model).projections if term.dims}


def activation_figure(
    norms: Sequence[StateNorms],
    low_dims: Mapping[str, Sequence[int]] | None = None,
    title: str = "",
) -> Figure:
    """Heat maps of the norms, the mean over heads: queries on the left, keys on the right.

    ``low_dims``, from `adapted_dims`, are the head dimensions to frame in each layer.
    """
    height = min(max(3.2, 1.6 + 0.11 * len(norms)), 12.0)
    figure = Figure(figsize=(11, height), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    kinds = {"queries Q": [n.query for n in norms], "keys K": [n.key for n in norms]}
    for ax, (name, states) in zip(axes, kinds.items(), strict=True):
        # Heads of another size in some layers leave their rest white.
        rows = [state_HD.mean(0) for state_HD in states]
        image = torch.full((len(rows), max(map(len, rows))), float("nan"))
        for number, row in enumerate(rows):
            image[number, : len(row)] = row
        shown = ax.imshow(image.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
        ax.set(title=f"rotated {name}", xlabel="head dimension")
        # As wide in high figures as in low ones.
        figure.colorbar(shown, ax=ax, label="mean L2 norm", pad=0.02, aspect=7 * height)
        _frame(ax, [tuple((low_dims or {}).get(n.layer, ())) for n in norms])
    numbers = [next((p for p in n.layer.split(".") if p.isdigit()), n.layer) for n in norms]
    step = -(-len(norms) // 20)
    axes[0].set_yticks(range(0, len(norms), step), numbers[::step])
    axes[0].set_ylabel("layer")
    framed = "\nframed: the low-frequency dimensions that RoAE adapts" if low_dims else ""
    figure.suptitle(f"{title or 'Mean L2 norm per layer and head dimension'}{framed}", fontsize=12)
    return figure


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


def save_figure(figure: Figure, png: Path) -> Path:
    """Write a figure as PNG, and as an image that TensorBoard shows under ``TAG``.

    Returns the folder for TensorBoard, beside the PNG and of its name without the suffix.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with atomic_directory(png.with_suffix("")) as folder:
        with SummaryWriter(str(folder)) as writer:
            writer.add_figure(TAG, figure, close=False)
        atomic_write(png, content.getvalue())
    return png.with_suffix("")
