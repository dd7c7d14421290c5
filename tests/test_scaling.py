"""The learning rate's laws."""

import pytest

from elite.scaling import LrScaling, scaled_rate, scaling_words


@pytest.mark.parametrize(
    ("scaling", "tokens", "expected"),
    [
        (LrScaling.none, 4_000_000, 2e-4),
        (LrScaling.sqrt, 65536, 2e-4),
        (LrScaling.sqrt, 4 * 65536, 4e-4),
        (LrScaling.sqrt, 65536 // 16, 0.5e-4),
        (LrScaling.linear, 4 * 65536, 8e-4),
        (LrScaling.linear, 65536 // 2, 1e-4),
    ],
)
def test_the_rate_follows_the_batch(scaling: LrScaling, tokens: int, expected: float) -> None:
    assert scaled_rate(2e-4, scaling, tokens, 65536) == pytest.approx(expected)


def test_the_words_name_formula_value_and_source() -> None:
    words = scaling_words(2e-4, LrScaling.sqrt, 262144, 65536)
    assert all(part in words for part in ("0.0004", "√(262,144 / 65,536)", "Malladi et al. 2022"))
    assert "Goyal" in scaling_words(2e-4, LrScaling.linear, 262144, 65536)
    assert scaling_words(2e-4, LrScaling.none, 262144, 65536) == "0.0002, whatever the batch"
