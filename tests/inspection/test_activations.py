from __future__ import annotations

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rosa_lightning.inspection.activations import (
    TAG,
    StateNorms,
    activation_figure,
    adapted_dims,
    rotated_norms,
    save_figure,
)
from rosa_lightning.models.loading import load_skeleton
from rosa_lightning.roae.inject import inject_roae
from rosa_lightning.roae.layer import RoAEConfig
from tests.conftest import build
from tests.model_zoo.small import build_small


def padded_batch(*lengths: int) -> dict[str, torch.Tensor]:
    """Rows of random tokens, padded on the left, and an entry that is none of the model's."""
    width = max(lengths)
    mask_BT = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return {
        "input_ids": torch.randint(3, 90, mask_BT.shape) * mask_BT,
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0),
        "index": torch.arange(len(lengths)),
    }


@torch.no_grad()
def norms_by_hand(model, batches, name: str) -> list[torch.Tensor]:
    """Mean norms (H, D) of each layer from a hook on its q_proj or k_proj and Llama's rotation."""
    layers: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for batch in batches:
        outputs = []
        handles = [
            layer.self_attn.get_submodule(name).register_forward_hook(
                lambda _, __, out, outputs=outputs: outputs.append(out.clone())
            )
            for layer in model.model.layers
        ]
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}
        model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        cos, sin = model.model.rotary_emb(torch.zeros(1), batch["position_ids"])
        for number, out in enumerate(outputs):
            states_BHTD = out.unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
            rotated_BHTD, _ = apply_rotary_pos_emb(states_BHTD, states_BHTD, cos, sin)
            for states_HTD, mask_T in zip(rotated_BHTD, batch["attention_mask"], strict=True):
                layers[number].append(states_HTD[:, mask_T.bool()].norm(dim=1))
    return [torch.stack(norms).mean(0) for norms in layers]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_norms_are_those_of_the_rotated_states_without_padding(kernel):
    model = build("llama", num_hidden_layers=3)
    model.config._attn_implementation = kernel
    batches = [padded_batch(9, 4), padded_batch(7), padded_batch(2, 5, 12)]
    norms = rotated_norms(model, batches)
    assert [n.layer for n in norms] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert norms[0].query.shape == (4, 16)
    assert norms[0].key.shape == (2, 16)
    for name, states in {"q_proj": "query", "k_proj": "key"}.items():
        for found, expected in zip(norms, norms_by_hand(model, batches, name), strict=True):
            torch.testing.assert_close(getattr(found, states), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize("family", ["GPTJ", "Llama", "Glm", "GPTNeoX", "RoFormer"])
def test_a_rotation_keeps_the_norm_of_each_pair(family, num_tokens):
    """Whatever the layout, in models that multiply by hand as well; 16 is a head's size too."""
    model = build_small(f"{family}Config")
    report = inject_roae(model, RoAEConfig(rank=2, low_freq_ratio=1.0))
    outputs: dict[str, torch.Tensor] = {}
    for projection in report.projections:
        model.get_submodule(projection.projection).register_forward_hook(
            lambda _, __, out, path=projection.projection: outputs.update({path: out[0].clone()})
        )
    norms = rotated_norms(model, [{"input_ids": torch.randint(3, 90, (1, num_tokens))}])
    assert len(norms) == len({projection.layer for projection in report.projections})
    assert adapted_dims(model) == {p.layer: p.dims for p in report.projections}
    by_layer = {n.layer: {"q": n.query, "k": n.key} for n in norms}
    for projection in report.projections:
        rows_TR = outputs[projection.projection][:, list(projection.rows)]
        states_THD = rows_TR.unflatten(-1, (projection.num_heads, -1))
        squares_HD = by_layer[projection.layer][projection.target].square()
        for first, second in projection.table.pairs:
            columns = [projection.dims.index(dim) for dim in (first, second)]
            expected_H = states_THD[..., columns].square().sum((0, 2))
            found_H = squares_HD[:, first] + squares_HD[:, second]
            torch.testing.assert_close(found_H, expected_H)


def test_the_model_is_left_as_it_was():
    model = build("llama").train()
    get_interface, kernel = AttentionInterface.get_interface, model.config._attn_implementation
    batch = padded_batch(9)
    rotated_norms(model, [batch])
    with pytest.raises(KeyError):
        rotated_norms(model, [batch, {"labels": batch["input_ids"]}])
    assert AttentionInterface.get_interface is get_interface
    assert model.training
    assert model.config._attn_implementation == kernel
    modules = list(model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_states_to_show_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Give at least one batch"):
        rotated_norms(build("llama"), [])
    with pytest.raises(ValueError, match="MambaForCausalLM has no attention"):
        rotated_norms(build_small("MambaConfig"), [padded_batch(4)])
    build("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="need its weights"):
        rotated_norms(load_skeleton(str(tmp_path), dtype="float32"), [padded_batch(4)])


def frames(ax) -> list[tuple[float, float, float, float]]:
    return [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in ax.patches]


def test_the_figure_shows_the_mean_over_heads_and_frames_low_frequencies():
    layers = [f"model.layers.{index}.self_attn" for index in (0, 1, 3)]
    norms = [StateNorms(layer, torch.rand(4, 8), torch.rand(2, 8)) for layer in layers]
    dims = {layers[0]: (2, 3, 7), layers[1]: (2, 3, 7), layers[2]: (6, 7)}
    figure = activation_figure(norms, dims, "Llama")
    left, right = figure.axes[:2]
    for ax, states in ((left, "query"), (right, "key")):
        expected = torch.stack([getattr(n, states).mean(0) for n in norms])
        assert torch.equal(torch.tensor(ax.images[0].get_array().data), expected)
        assert frames(ax) == [(1.5, -0.5, 2, 2), (6.5, -0.5, 1, 2), (5.5, 1.5, 2, 1)]
        assert ax.get_xlabel() == "head dimension"
    assert left.get_ylabel() == "layer"
    assert [label.get_text() for label in left.get_yticklabels()] == ["0", "1", "3"]
    assert "Llama" in figure.get_suptitle()
    assert [ax.get_ylabel() for ax in figure.axes[2:]] == ["mean L2 norm"] * 2


def test_the_figure_is_written_as_png_and_for_tensorboard(tmp_path):
    model = build("llama")
    norms = rotated_norms(model, [padded_batch(9)])
    figure = activation_figure(norms)
    log_dir = save_figure(figure, tmp_path / "new" / "norms.png")
    assert (tmp_path / "new" / "norms.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(log_dir)).Reload()
    assert events.Tags()["images"] == [TAG]
    (image,) = events.Images(TAG)
    assert (image.width, image.height) == tuple(int(size) for size in figure.bbox.size)
