"""Learning rates of each step, compared with their formulas."""

import numpy as np
import pytest

from ocrnet.config import Config
from ocrnet.engines.lr_schedule import table


def test_linear_with_warmup_matches_the_mindspore_implementation():
    cfg = Config(total_step=1000, warmup_step=100, lr_init=0.01, end_lr=1e-6)
    up, down = (0.01 - 1e-6) / 100, (0.01 - 1e-6) / 900
    expected = [1e-6 + i * up if i < 100 else 0.01 - (i - 100) * down for i in range(1000)]
    np.testing.assert_allclose(table(cfg), expected, rtol=1e-12)


def test_poly_without_warmup_matches_the_authors_formula():
    cfg = Config(total_step=500, warmup_step=0, lr_init=0.01, end_lr=0.0, schedule="poly", power=0.9)
    np.testing.assert_allclose(table(cfg), [0.01 * (1 - i / 500) ** 0.9 for i in range(500)], rtol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "poly"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (10, 10), (10, 0), (7, 3)])
def test_every_step_has_a_finite_rate_for_any_run_length(schedule, total, warmup):
    rates = table(Config(total_step=total, warmup_step=warmup, schedule=schedule))
    assert rates.shape == (total,)
    assert np.isfinite(rates).all()
    assert (rates >= 1e-6).all()
    assert (rates <= 0.01).all()
