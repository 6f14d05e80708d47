import pytest

from quantlab_lnq import LnqQuantizer


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("iterations", 0, "iterations=0"),
        ("cd_sweeps", 0, "cd_sweeps=0"),
        ("column_order", "act", "natural, hessian_diagonal"),
    ],
)
def test_impossible_options_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        LnqQuantizer(**{option: value})


def test_paper_preset_is_the_published_algorithm():
    paper = LnqQuantizer(**LnqQuantizer.info.presets["paper"])
    assert paper == LnqQuantizer(iterations=2, cd_sweeps=4, column_order="natural")
