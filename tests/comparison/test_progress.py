"""The estimate of the time that is left, and what is shown."""

import io

import pytest
from rich.console import Console

from rosa_lightning.comparison.plan import ComparisonConfig, Run
from rosa_lightning.comparison.progress import ProgressDisplay, Remaining, duration


def test_nothing_is_known_before_the_first_job_tells():
    remaining = Remaining({"train": 4})
    assert remaining.seconds("train", since=5.0, share=0.0) is None
    assert remaining.seconds("train", since=5.0, share=0.25) == pytest.approx(15 + 3 * 20)


def test_jobs_of_an_earlier_call_shorten_what_is_left():
    remaining = Remaining({"train": 10})
    for _ in range(6):
        remaining.ended("train", 100.0, known=True)
    assert remaining.seconds() == 400.0
    remaining.ended("train", 50.0)  # this machine is faster
    assert remaining.seconds() == 150.0
    assert remaining.seconds("train", since=30.0) == 100.0 + 20.0
    assert remaining.seconds("train", since=70.0) == 100.0  # longer than usual, so about to end


def test_each_kind_has_its_own_time():
    remaining = Remaining({"train": 3, "test": 2})
    remaining.ended("train", 100.0)
    assert remaining.seconds() == 2 * 100.0 + 2 * 100.0  # no test has been seen
    remaining.ended("test", 10.0)
    assert remaining.seconds() == 2 * 100.0 + 10.0
    assert remaining.seconds("test", since=4.0) == 2 * 100.0 + 6.0


def test_more_jobs_than_were_planned_are_no_time():
    remaining = Remaining({"train": 1})
    for _ in range(3):
        remaining.ended("train", 10.0)
    assert remaining.seconds() == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4, "4 s"), (99.6, "2 min"), (5940, "99 min"), (6100, "1 h 42 min"), (180000, "2 d 2 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_where_there_is_no_terminal_a_line_says_what_is_planned_and_what_begins():
    config = ComparisonConfig(
        methods={"A": {}, "B": {}}, learning_rates=[1e-3, 1e-2], seeds=[0, 1], extend_grid=True
    )
    out, run = io.StringIO(), Run("A", 1e-3, 0)
    result = {"status": "finished", "val_loss": 0.5, "train_seconds": 9.0}
    with ProgressDisplay(config, Console(file=out)) as display:
        planned = out.getvalue()
        display.say("size of A")
        display.begin("train", run)
        display.end("train", run, result)
    assert planned == (
        "planned: 2 methods, 6 trainings, 5 tests, more trainings where the best rate is at an "
        "edge. First: their sizes, and the data.\n"
    )
    assert out.getvalue().removeprefix(planned).splitlines()[:2] == [
        "size of A ...",
        "1/6 A, rate 0.001, seed 0 ...",
    ]
    assert "seed 0: val/loss 0.5000" in out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_one_line_in_a_terminal_of_any_width(width):
    names = ("RoAE without selection, all seven targets", "B")
    config = ComparisonConfig(methods={name: {} for name in names}, test=False)
    out = io.StringIO()
    console = Console(width=width, file=out, force_terminal=True, record=True)
    run = Run(names[0], 3e-4, 0)
    with ProgressDisplay(config, console) as display:
        display.begin("train", run)
        for step in range(1, 4):
            display.at(step, 100)
            (line,) = console.render_lines(display._progress.get_renderable())
            shown = "".join(part.text for part in line)
            assert len(shown) <= width
            assert f"{step}/100" in shown
        result = {"status": "finished", "val_loss": 0.5, "train_seconds": 9.0}
        display.end("train", run, result | {"wall_seconds": {"train": 20.0}})
    text = " ".join(console.export_text().split())
    assert "seed 0: val/loss 0.5000, 9 s, 20 s left in all" in text
