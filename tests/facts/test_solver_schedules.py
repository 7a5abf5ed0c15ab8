"""Published schedules keep their bands, and those that must never ship are refused."""

import pytest
import torch

from schatten.solvers import newton_schulz
from schatten.solvers.fit import grid, scalar_iterates
from schatten.solvers.schedules import SCHEDULES


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_keeps_its_band_and_its_room(name):
    schedule = SCHEDULES[name]
    quintics = schedule.steps(None)
    y = scalar_iterates(quintics, grid(schedule.lower, 1.0, 20_000))[-1]
    low, high = schedule.band
    assert low - 5e-4 <= float(y.min()) and float(y.max()) <= high + 5e-4
    assert float(y.min()) < low + 0.01 or float(y.max()) > high - 0.01, "the stated band is not wider than the schedule's"
    room = scalar_iterates(quintics, torch.linspace(1, schedule.safe, 2000).double())[-1]
    assert 0 < room.min() and room.max() < 1.6


# reference/coefficients.md, section 2; both circulate in other libraries.
AOL_A = [(4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169)]
CANS_RAW = [
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
]


def test_a_schedule_that_turns_a_sign_is_refused():
    with pytest.raises(ValueError, match="turns its sign, so that a step ascends"):
        newton_schulz(AOL_A)


def test_a_schedule_without_room_is_refused():
    with pytest.raises(ValueError, match=r"which overflows.*a safety factor"):
        newton_schulz(CANS_RAW)


def test_polar_express_truncated_to_five_steps_has_its_published_band():
    # PE 5 with s = 1.01: 0.846 to 1.124 on [1e-3, 1] (reference/coefficients.md, 1).
    y = scalar_iterates(newton_schulz("polar-express", steps=5).quintics, grid(1e-3, 1.0, 20_000))[-1]
    assert float(y.min()) == pytest.approx(0.846, abs=1e-3) and float(y.max()) == pytest.approx(1.124, abs=1e-3)
