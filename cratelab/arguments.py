"""What numbers that functions are given may be: said once, so that NaN and half a step pass nowhere."""

import math
from numbers import Integral


def check_whole(name: str, value: object, least: int = 1, most: float = math.inf) -> None:
    """Raises ValueError unless `value`, known as `name`, is an integer of any library's from `least` to `most`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value <= most:
        limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be {limits}, a whole number; got {value!r}")


def check_seed(seed: object) -> None:
    """Raises ValueError unless `seed` is one of the 2³² that all generators tell apart."""
    check_whole("seed", seed, 0, 2**32 - 1)
