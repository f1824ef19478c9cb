"""What classes are called: tokens of a text, or simply classes where the data are images."""

from __future__ import annotations

from collections.abc import Iterable

import xarray as xr

# In this order: the longer phrases first.
FOR_IMAGES = {
    "token-\nbalanced": "class-\nbalanced",
    "per-token": "per-class",
    "Per-token": "Per-class",
    "next-token": "image",
    "every token of the text once": "every image once",
    "every entry of the vocabulary that occurs once": "every class once",
    "of the text": "of the images",
    "the text": "the images",
    "training text": "training set",
    "entries of the vocabulary": "classes",
    "Vocabulary entries": "Classes",
    "vocabulary": "classes",
    "tokens": "classes",
    "Tokens": "Classes",
    "token": "class",
    "Token": "Class",
}


def is_of_text(group: xr.Dataset) -> bool:
    """Whether its runs were trained on text, and its classes are tokens."""
    return bool({"corpus", "vocab_size"} & set(group.attrs["config"]))


def worded(text: str, groups: Iterable[xr.Dataset]) -> str:
    """Our own words about tokens, as they are where any group was trained on text."""
    shown = list(groups)
    if not shown or any(is_of_text(group) for group in shown):
        return text
    for word, other in FOR_IMAGES.items():
        text = text.replace(word, other)
    return text
