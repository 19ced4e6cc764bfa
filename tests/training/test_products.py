"""Products in bfloat16: error against float32, who is computed together, and what is cast anew."""

import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rosa_lightning.models.loading import load_base
from rosa_lightning.roae.layer import RoAEConfig, RoAELinear, RowBlocks
from rosa_lightning.training.loss import LossComputer
from rosa_lightning.training.products import HalfProducts
from rosa_lightning.utils.modules import replaced
from tests.conftest import build
from tests.training.test_loss import adapted, batch_of, gradients, single_rows


def projection(rows: int, *, bias: bool = False, term: bool = True, dropout: float = 0.0):
    base = nn.Linear(24, rows, bias=bias).requires_grad_(False)
    if not term:
        return base
    config = RoAEConfig(rank=4, dropout=dropout)
    blocks = RowBlocks.find(range(2, 6), rows)
    layer = RoAELinear(base, in_features=24, blocks=blocks, config=config)
    nn.init.normal_(layer.roae_B)
    return layer


class Block(nn.Module):
    """Three projections of one tensor, and one of another."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.q, self.k = projection(8, bias=True, **options), projection(12, **options)
        self.v, self.out = projection(8, term=False), projection(24, term=False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [self.q(x), self.k(x), self.v(x)]
        q, k, v = self.seen
        return self.out(torch.cat([q, k.float().square().to(k.dtype), v[..., :4]], dim=-1))


def run(block: Block, x: Tensor, *, half: bool = True) -> list[Tensor]:
    """Outputs, and the gradients of the input and of all terms."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", enabled=half):
        out = block(x)
    weights = [weight for weight in block.parameters() if weight.requires_grad]
    total = out.double().square().sum()
    return [*block.seen, out, *torch.autograd.grad(total, [x, *weights], allow_unused=True)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [((one - wanted).norm() / wanted.norm()).item() for one, wanted in pairs]


def groups(products: HalfProducts) -> list[int]:
    return [len(group.modules) for group in products._groups or ()]


@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 24)])
def test_outputs_and_gradients_are_as_exact_as_under_autocast(shape):
    block, x = Block(), torch.randn(shape)
    products, plain = HalfProducts(block, x), run(block, x)
    assert groups(products) == [3, 1]
    with products.running():
        found = run(block, x)
    assert [one.dtype for one in found] == [one.dtype for one in plain]
    exact = run(block, x, half=False)
    for error, of_plain in zip(errors(found, exact), errors(plain, exact), strict=True):
        assert error <= max(1.5 * of_plain, 0.004)
        assert error <= 0.03
    assert not any("forward" in vars(module) for module in block.modules())


def test_in_float32_and_for_other_inputs_projections_run_as_they_are():
    block, x = Block(), torch.randn(2, 5, 24)
    products = HalfProducts(block, x)
    wanted = run(block, x, half=False)
    with products.running():
        found = run(block, x, half=False)
        with torch.autocast("cpu"):
            q, k = block.q(x), block.k(x.clone())  # each alone, in any order
            again = block.q(x)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert torch.equal(q, again)
    assert max(errors([q, k], [block.q(x), block.k(x)])) < 0.01


def test_a_term_with_dropout_draws_its_own_input():
    block, x = Block(dropout=0.5), torch.randn(2, 5, 24)
    with HalfProducts(block, x).running():
        torch.manual_seed(0)
        found = run(block, x)
        torch.manual_seed(1)
        other = run(block, x)
    assert not torch.equal(found[0], other[0])
    torch.manual_seed(0)
    assert max(errors(found, run(block, x))) < 0.02


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[3, 5] += 1


def other_memory(weight: nn.Parameter) -> None:
    """One number, so that nothing but the place tells."""
    weight.data = weight.data.clone()
    weight.data[3, 5] += 1


def behind_autograd(weight: nn.Parameter) -> None:
    """As PEFT merges; in two rows, as a merge of RoAE would."""
    weight.data[2:4] += torch.randn(2, 1) @ torch.randn(1, 24)


def some_columns(weight: nn.Parameter) -> None:
    weight.data[:, :3] = 0


@pytest.mark.parametrize("change", [in_place, other_memory, behind_autograd, some_columns])
def test_a_weight_that_changes_is_cast_anew(change):
    block, x = Block(), torch.randn(2, 5, 24)
    products = HalfProducts(block, x)
    with products.running():
        before = run(block, x)[2].detach()
    change(block.v.weight)
    with products.running():
        after = run(block, x)[2].detach()
    assert not torch.equal(after, before)
    assert torch.equal(after, F.linear(x.bfloat16(), block.v.weight.bfloat16()))


class Casts(TorchDispatchMode):
    """Counts the copies in another dtype of some tensors."""

    def __init__(self, tensors) -> None:
        super().__init__()
        self.counts = {tensor.data_ptr(): 0 for tensor in tensors}
        self.copies: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
            self.copies.append(weakref.ref(out))
        return out


def test_a_weight_is_cast_once_for_all_steps():
    block = Block()
    frozen = [w for w in block.parameters() if w.ndim == 2 and not w.requires_grad]
    products = HalfProducts(block, torch.randn(2, 5, 24))
    with Casts(frozen) as casts:
        for _ in range(2):
            with products.running(), torch.autocast("cpu"):
                prefix, rest = block(torch.randn(1, 3, 24)), block(torch.randn(2, 5, 24))
            (prefix.sum() + rest.sum()).backward()
    assert set(casts.counts.values()) == {1}


def test_casts_made_for_inference_serve_training():
    block, x = Block(), torch.randn(2, 5, 24)
    products = HalfProducts(block, x)
    with products.running():
        with torch.inference_mode(), torch.autocast("cpu"):
            block(x)
        found = run(block, x)
    assert all(torch.equal(*pair) for pair in zip(found, run_anew(block, x), strict=True))


def run_anew(block: Block, x: Tensor) -> list[Tensor]:
    products = HalfProducts(block, x)
    with products.running():
        return run(block, x)


def test_casts_of_projections_that_read_apart_later_are_let_go():
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = projection(8, term=False), projection(12, term=False)
            self.few = False

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x[:, :2] if self.few else x).sum() + self.k(x).sum()

    block, x = Apart(), torch.randn(2, 5, 24, requires_grad=True)
    products = HalfProducts(block, x)
    block.few = True
    with Casts([block.q.weight, block.k.weight]) as casts:
        for _ in range(2):
            with products.running(), torch.autocast("cpu"):
                block(x).backward()
    assert not any(copy() is not None for copy in casts.copies)


@pytest.mark.parametrize("outputs", [32_000, 49_152])
def test_the_cast_of_a_head_lies_row_by_row(outputs):
    """oneDNN 3.12 ends the process at 32 rows of 49,152 on AMX, if the head lies transposed."""
    model = nn.Sequential(nn.Linear(64, outputs, bias=False)).requires_grad_(False)
    x = torch.randn(32, 64, requires_grad=True)
    products = HalfProducts(model, x)
    with products.running(), torch.autocast("cpu"):
        out = model(x)
    assert products._groups[0].halves[model[0]].values.is_contiguous()
    weights = torch.randn_like(out)
    (found,) = torch.autograd.grad((out * weights).sum(), x)
    assert errors([found], [weights.float() @ model[0].weight])[0] < 0.01


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_empty_projection_runs_as_it_is():
    model, x = nn.Sequential(nn.Linear(4, 0, bias=False)).requires_grad_(False), torch.randn(2, 4)
    with HalfProducts(model, x).running(), torch.autocast("cpu"):
        assert model(x).shape == (2, 0)


def test_casts_of_weights_that_begin_to_train_are_let_go():
    block, x = Block(), torch.randn(2, 5, 24)
    products = HalfProducts(block, x)
    with Casts([block.v.weight]) as casts, products.running():
        run(block, x)
    assert [copy() is not None for copy in casts.copies] == [True]
    block.v.requires_grad_(True)
    with products.running():
        pass
    assert casts.copies[0]() is None


def test_a_weight_that_trains_has_its_gradient():
    block, x = Block(), torch.randn(2, 5, 24)
    products = HalfProducts(block, x)
    block.v.weight.requires_grad_(True)
    with products.running():
        found = run(block, x)
    assert max(errors(found, run(block, x, half=False))) < 0.03


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_keeps_its_own_products(dtype, base_folder):
    pytest.importorskip("torchao")
    model, batch = (
        adapted(load_base(str(base_folder), dtype=dtype, quantization="int8")),
        batch_of(),
    )
    with torch.autocast("cpu"):
        wanted = single_rows(model, batch).detach()
        found = LossComputer(model).loss(batch)
        gradients(model, found)
    assert errors([found], [wanted])[0] < 0.02


class AsAutocast(LossComputer):
    """Without products of several projections."""

    @contextmanager
    def saving(self):
        with replaced(self, "_products", None), super().saving():
            yield


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gemma3", "phi"])
@pytest.mark.parametrize("targets", [("q", "k"), ("q", "k", "v", "o", "up", "down")])
def test_losses_and_gradients_of_a_model_are_as_exact_as_under_autocast(family, targets):
    model, batch = adapted(build(family), targets=targets), batch_of()

    def step(half: bool, kind: type[LossComputer] = LossComputer) -> tuple[Tensor, int]:
        computer = kind(model)
        with torch.autocast("cpu", enabled=half):
            computer.loss(batch)  # finds out what can be done, and what is not asked for
            with FlopCounterMode(display=False) as counted:
                loss = computer.loss(batch)
                found = torch.cat([loss[None], gradients(model, loss)])
        return found, counted.get_total_flops()

    exact, _ = step(False)
    found, operations = step(True)
    plain, plain_operations = step(True, AsAutocast)
    assert not torch.equal(found, plain)
    assert errors([found], [exact])[0] <= 1.5 * errors([plain], [exact])[0]
    assert operations <= 1.005 * plain_operations
