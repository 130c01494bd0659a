"""The benchmark's scorers agree on a tiny model; nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny_model

from iprox.data.chat import Encoded

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import fit, floor, ours, report, sections  # noqa: E402
from bench.agreement import compare  # noqa: E402
from bench.peers import less  # noqa: E402
from bench.problem import Answer, Problem, pose  # noqa: E402
from bench.rows import MEASURED  # noqa: E402
from bench.timing import in_turn, ratio_to_best  # noqa: E402


@pytest.fixture
def problem() -> Problem:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(4, 260, (n,), generator=generator).tolist() for n in (9, 21, 5, 13, 8)]
    texts = [Encoded(i, [-100, -100, *i[2:]]) for i in ids]
    return pose(tiny_model().requires_grad_(False), texts[:3], texts[3:], pad_id=0)


def test_ours_equals_the_loop_of_backward_passes(problem: Problem, tmp_path: Path) -> None:
    found, truth = ours.prepare(problem)(), less.prepare(problem, tmp_path)()
    # transformers takes the loss of its logits in float32, whatever the model's precision
    torch.testing.assert_close(found.dots, truth.dots, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.norms, truth.norms, rtol=1e-5, atol=1e-6)
    error, spearman = compare(found, truth, problem.query_norms())
    assert error < 1e-6
    assert spearman == 1


def test_a_wrong_answer_is_seen(problem: Problem, tmp_path: Path) -> None:
    truth = less.prepare(problem, tmp_path)()
    error, spearman = compare(Answer(truth.dots.flip(0), None), truth, problem.query_norms())
    assert error > 1e-3
    assert spearman < 1


def test_plain_passes_leave_the_model_as_it_was(problem: Problem) -> None:
    before = {name: p.clone() for name, p in problem.model.named_parameters()}
    for run in floor.floors(problem, sections.padded(problem)).values():
        run()
    for name, parameter in problem.model.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


def test_a_fit_is_that_of_one_text_at_a_time(problem: Problem) -> None:
    fitted = fit.Fit(problem)
    for step in (fitted.first_pass, fitted.eigenbases, fitted.second_pass):
        step()
    assert fitted.squares
    norms = less.prepare(problem, Path())().norms
    assert norms is not None
    squares = sum(float(s.sum()) for s in fitted.squares.sums.values())
    assert squares == pytest.approx(float(norms.square().sum()), rel=1e-4)
    directions = fitted.directions(problem.gradients)
    assert all(directions[n].shape == g.shape for n, g in problem.gradients.items())


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio_to_best([3.0, 30.0, 8.0], [[1.0, 20.0, 4.0], [2.0, 10.0, 5.0]]) == (3.0, 0.5)


def test_cases_are_run_in_turn() -> None:
    seen: list[str] = []
    in_turn({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=2)
    assert seen == ["a", "b", "a", "b"]


def test_lengths_have_a_long_tail_and_the_total_asked_for() -> None:
    lengths = sections.long_tail(1536, longest=512)
    assert sum(lengths) == 1536
    assert max(lengths) > 4 * sorted(lengths)[len(lengths) // 2]


def test_the_readme_shows_what_was_not_installed(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n{}\nold\n{}\nafter\n".format(*report.TABLES))
    row = {"section": "peers", "case": "bergson", "model": "target", "dtype": "float32"}
    row |= {"queries": 1, "status": "not installed", "date": "2026-11-22", "cores": 2}
    table = pd.DataFrame([row | dict.fromkeys(MEASURED, float("nan"))])
    report.update(readme, report.TABLES, report.tables(table))
    text = readme.read_text()
    assert "| bergson | target | 1 | not installed |" in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
