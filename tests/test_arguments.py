import math

import numpy as np
import pytest

from cratelab.arguments import check_seed, check_whole


@pytest.mark.parametrize("value", [0, 6, -1, 2.0, 2.5, math.nan, math.inf, True, None, "3", np.float64(3)])
def test_what_is_no_whole_number_in_range_is_named(value):
    with pytest.raises(ValueError, match="n must be from 1 to 5, a whole number; got"):
        check_whole("n", value, 1, 5)


def test_whole_numbers_of_any_library_pass():
    for value in 1, 5, np.int64(3), np.uint8(2):
        check_whole("n", value, 1, 5)
    check_whole("n", 10**30)


def test_seeds_are_those_that_all_generators_tell_apart():
    for seed in 0, np.uint32(2**32 - 1):
        check_seed(seed)
    for seed in -1, 2**32, 0.0, math.nan, None:
        with pytest.raises(ValueError, match="seed must be from 0 to 4294967295"):
            check_seed(seed)
