"""Colours that can be told apart and read, in both themes."""

from __future__ import annotations

from reports.style import DARK, dark_decay_colours, decay_colours


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast() -> None:
    """WCAG: 4.5 for text, 3 for the strong end of the ramp's lines; every decay told apart."""
    text = [colour for colour in DARK if colour != "#dfe3e8"]
    assert all(_contrast(colour, "#ffffff") >= 4.5 for colour in text)
    assert all(_contrast(DARK[colour], "#14171a") >= 4.5 for colour in text)
    decays = [0.0, 0.1, 0.3, 0.5, 1.0]
    for ramp, paper, least in (
        (decay_colours(decays), "#ffffff", 2.3),
        (dark_decay_colours(decays), "#14171a", 3.0),
    ):
        contrasts = [_contrast(colour, paper) for colour in ramp.values()]
        assert contrasts == sorted(contrasts)
        assert contrasts[0] >= least
