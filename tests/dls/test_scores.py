import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.dls.scores import ScoreHistory, layer_scores


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# --- scores ---------------------------------------------------------------------------------


def test_score_is_the_norm_over_all_norm_gradients_of_a_layer():
    gradients = [[torch.randn(5, generator=generator(s)), torch.randn(3)] for s in range(4)]
    expected = [math.sqrt(sum(x * x for g in layer for x in g.tolist())) for layer in gradients]
    assert layer_scores(gradients).tolist() == pytest.approx(expected, rel=1e-14)


def test_score_is_divided_by_the_loss_scale():
    gradients = [[torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 1.0])]]
    scaled = [[g * 65536 for g in layer] for layer in gradients]
    assert layer_scores(scaled, 65536.0).tolist() == [5.0, 1.0]


def test_low_precision_gradients_are_summed_without_overflow():
    gradients = [[torch.full((1000,), 60000.0, dtype=torch.float16)]]
    assert layer_scores(gradients).item() == pytest.approx(59999 * math.sqrt(1000), rel=1e-3)


def test_missing_gradients_count_as_zero():
    scores = layer_scores([[None, torch.ones(4)], [None], []])
    assert scores.tolist() == [2.0, 0.0, 0.0]
    assert scores.dtype == torch.float64


def test_non_finite_gradients_give_non_finite_scores():
    scores = layer_scores([[torch.tensor([math.nan])], [torch.tensor([math.inf])]])
    assert not scores.isfinite().any()


# --- history --------------------------------------------------------------------------------


def updates(history, rows):
    return [history.update(tensor(row)).tolist() for row in rows]


def histories(length):
    rows = st.lists(st.floats(0, 1e6), min_size=length, max_size=length)
    return st.lists(rows, min_size=1, max_size=8)


@given(histories(3), st.floats(0, 0.99))
def test_smoothing_is_the_mean_with_weights_that_fall_geometrically(rows, smoothing):
    seen = updates(ScoreHistory(smoothing, "none", [1, 1, 1]), rows)
    for t in range(len(rows)):
        weights = [smoothing ** (t - i) for i in range(t + 1)]
        for layer in range(3):
            total = math.fsum(w * row[layer] for w, row in zip(weights, rows, strict=False))
            assert seen[t][layer] == pytest.approx(total / math.fsum(weights), rel=1e-9)


def test_smoothing_agrees_with_a_bias_corrected_average_as_adam_keeps_it():
    beta, average, rows = 0.9, 0.0, [[4.0], [1.0], [7.0]]
    for t, (seen, (row,)) in enumerate(
        zip(updates(ScoreHistory(beta, "none", [1]), rows), rows, strict=True), start=1
    ):
        average = beta * average + (1 - beta) * row
        assert seen[0] == pytest.approx(average / (1 - beta**t), rel=1e-12)


@given(histories(2))
def test_without_smoothing_and_normalization_scores_stay_bit_for_bit(rows):
    assert updates(ScoreHistory(0.0, "none", [3, 5]), rows) == rows


def test_sqrt_size_makes_scores_of_equal_gradients_equal():
    sizes = [4, 9, 100]
    scores = layer_scores([[torch.full((size,), 0.5)] for size in sizes])
    seen = ScoreHistory(0.0, "sqrt_size", sizes).update(scores)
    assert seen.tolist() == pytest.approx([0.5, 0.5, 0.5])


@given(histories(2))
def test_running_mean_measures_a_layer_by_what_it_is_used_to(rows):
    seen = updates(ScoreHistory(0.0, "running_mean", [1, 1]), rows)
    assert seen[0] == rows[0]
    for t in range(1, len(rows)):
        for layer in range(2):
            mean = math.fsum(row[layer] for row in rows[: t + 1]) / (t + 1)
            # Of an all but vanishing mean nothing can be told exactly.
            if mean > 1e-290:
                assert seen[t][layer] == pytest.approx(rows[t][layer] / mean, rel=1e-9)
            assert 0 <= seen[t][layer] <= t + 1 + 1e-6


def test_a_layer_that_never_had_a_gradient_stays_at_zero():
    history = ScoreHistory(0.5, "running_mean", [1, 1])
    assert updates(history, [[0.0, 1.0], [0.0, 1.0]])[1] == [0.0, 1.0]


def test_running_mean_divides_what_is_smoothed_by_what_is_not():
    rows = [[1.0], [5.0]]
    seen = updates(ScoreHistory(0.5, "running_mean", [1]), rows)
    assert seen[1][0] == pytest.approx(((0.5 * 1 + 5) / 1.5) / 3)


@pytest.mark.parametrize("normalization", ["none", "sqrt_size", "running_mean"])
def test_a_restored_history_goes_on_exactly(normalization, tmp_path):
    rows = torch.rand(9, 4, generator=generator(), dtype=torch.float64).tolist()
    straight = ScoreHistory(0.7, normalization, [1, 2, 3, 4])
    expected = updates(straight, rows)
    first, second = (ScoreHistory(0.7, normalization, [1, 2, 3, 4]) for _ in range(2))
    updates(first, rows[:4])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    # The loaded state is the second history's own.
    updates(first, rows[:2])
    assert updates(second, rows[4:]) == expected[4:]
