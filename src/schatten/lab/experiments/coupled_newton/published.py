"""What seeds of the claim say in numbers: as printed, so that the digits say how far they can be trusted."""

from decimal import Decimal

PAPER = "coupled_newton"
POWERS = (0.5, 0.25)

# Relative errors of p = 1/2 and p = 1/4, by input. Random singular values, then prescribed ones of 256x256.
RANDOM = {
    "Gaussian 1024x256": ("6e-5", "6e-5"),
    "Gaussian 256x256": ("2.5e-3", "5.9e-3"),
    "768x768 outer product + 1e-3 noise": ("0.13", "0.73"),
}
PRESCRIBED = {"1 to 1e-2": ("1.8e-3", "2.0e-3"), "1 to 1e-4": ("2.6e-2", "8.5e-2"), "1 to 1e-6": ("2.7e-2", "1.2e-1")}
ERRORS = {**RANDOM, **PRESCRIBED}

# Over draws of a 256x256 Gaussian, and with it the widest factor that is stated between draws.
RANGES = (("2.4e-3", "2.9e-3"), ("5.9e-3", "8.4e-3"))
BETWEEN_DRAWS = 8.4 / 5.9

# Where draws differ in rounding alone.
ROUNDING = 0.02

# (input, c): errors of c times the input. None of the first is above 2e-3.
AT_MOST = {("1 to 1e-2", 1e3): "2e-3", ("1 to 1e-2", 1.0): "2e-3"}
SCALED = {
    ("1 to 1e-2", 0.1): ("1.2e-2", "1.3e-2"),
    ("1 to 1e-2", 1e-2): ("0.12", "0.13"),
    ("1 to 1e-2", 1e-3): ("0.42", "0.37"),
    ("1 to 1e-2", 1e-4): ("0.79", "0.70"),
    ("Gaussian 256x256", 1e4): ("0.10", "0.044"),
}

# What is left of s^p at s / s_max of the spectrum 1 to 1e-4.
DAMPING = {1e-2: ("0.984", "0.992"), 1e-3: ("0.484", "0.687"), 1e-4: ("0.154", "0.210")}

# Square products.
PRODUCTS = {f"{PAPER} p = 0.5": 92, f"{PAPER} p = 0.25": 184, "quintic, 5 steps": 15, "quintic, 15 steps": 45}

# Keller's quintic: its image of [0.01, 1] after 5, 10 or 15 steps, its maximum near 0.004 after 5, and the least singular
# value it makes of a 256x256 Gaussian, one draw each.
STEPS = (5, 10, 15)
BAND = ("0.682", "1.134")
BULGE = "1.202"
SMALLEST = {5: "0.044", 15: "0.67"}


def scales(name: str) -> list[float]:
    """Every c by which an input is multiplied, 1 first."""
    return [1.0, *(c for other, c in (*AT_MOST, *SCALED) if other == name and c != 1)]


def agrees(printed: str, ours: float, tolerance: float = ROUNDING) -> bool:
    """Within half a unit of the last printed digit and a share `tolerance`."""
    number = Decimal(printed)
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    return abs(ours - float(number)) <= 0.5 * 10.0**exponent + tolerance * float(number)


def within_factor(printed: str, ours: float, factor: float = BETWEEN_DRAWS) -> bool:
    """Within a factor of what was printed."""
    return 1 / factor <= ours / float(printed) <= factor
