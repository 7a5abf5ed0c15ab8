"""Published schedules of odd quintics for the polar factor, by name, with source and the band they are verified to keep.

Bands are of singular values in [lower, 1] after the stated number of steps, in exact arithmetic; `safe` is the largest
singular value a schedule sends into (0, 1.6), the room a normalisation has. `tests/facts/test_solver_schedules.py`
recomputes both.
"""

from dataclasses import dataclass

Quintic = tuple[float, float, float]


@dataclass(frozen=True)
class Schedule:
    """Quintics (a, b, c) in order; `repeats` if the only one may be applied any number of times."""

    quintics: tuple[Quintic, ...]
    source: str
    lower: float
    band: tuple[float, float]
    safe: float
    repeats: bool = False

    def steps(self, count: int | None) -> tuple[Quintic, ...]:
        """The first `count` quintics, default all (five where one repeats)."""
        if self.repeats:
            return self.quintics * (5 if count is None else count)
        if count is not None and count > len(self.quintics):
            raise ValueError(
                f"steps must be at most {len(self.quintics)}, the length of this schedule, got {count}: repeating its last "
                f"quintic does not converge; polynomial(tol=...) fits one of any length."
            )
        return self.quintics[:count]


SCHEDULES = {
    "keller": Schedule(
        ((3.4445, -4.7750, 2.0315),),
        "K. Jordan, Muon: An optimizer for hidden layers in neural networks, 2024",
        1e-2,
        (0.682, 1.134),
        1.26,
        repeats=True,
    ),
    # Polar Express, l = 1e-3, each quintic evaluated at sigma / 1.01 except the Taylor quintic at the end: raw, it is
    # safe to 1.0001 only, and a bf16 cast alone lifts singular values by 0.4 %.
    "polar-express": Schedule(
        tuple(
            (a / s, b / s**3, c / s**5)
            for (a, b, c), s in (
                ((8.28721201814563, -23.595886519098837, 17.300387312530933), 1.01),
                ((4.107059111542203, -2.9478499167379106, 0.5448431082926601), 1.01),
                ((3.9486908534822946, -2.908902115962949, 0.5518191394370137), 1.01),
                ((3.3184196573706015, -2.488488024314874, 0.51004894012372), 1.01),
                ((2.300652019954817, -1.6689039845749493, 0.4188073119525673), 1.01),
                ((1.891301407787398, -1.2679958271945868, 0.37680408948524835), 1.01),
                ((1.8750014808534479, -1.2500016453999487, 0.3750001645474248), 1.01),
                ((1.875, -1.25, 0.375), 1.0),
            )
        ),
        "Amsel, Persson, Musco, Gower: The Polar Express, arXiv 2505.16932, with its code's safety factor 1.01",
        1e-3,
        (0.999, 1.001),
        1.01,
    ),
    # CANS, l = 1e-3, safety factor 1.01 for the same reason.
    "cans": Schedule(
        tuple(
            (a / 1.01, b / 1.01**3, c / 1.01**5)
            for a, b, c in (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            )
        ),
        "Grishina, Smirnov, Rakhuba: Accelerating Newton-Schulz by Chebyshev-type polynomials, arXiv 2506.10935",
        1e-3,
        (0.850, 1.121),
        1.01,
    ),
}
