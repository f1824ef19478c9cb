"""The study's answer in one sentence: which classes paid for weight decay, with the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from reports.excess import decays_with_excess, fitted_law
from reports.groups import bin_range, end_bins, over_seeds, weight_decays
from reports.tables import class_falls, unrepaired
from reports.wording import worded


@dataclass(frozen=True, kw_only=True)
class Change:
    """What happened to one group of runs between its smallest and its largest weight decay."""

    name: str
    decays: tuple[float, float]
    average: tuple[float, float]
    balanced: tuple[float, float]
    rare: tuple[float, float]
    frequent: tuple[float, float]
    rare_counts: str
    frequent_counts: str
    most_hurt_counts: str | None
    """Counts of the bin whose loss rose most; None where no bin's loss rose."""

    @property
    def rare_paid(self) -> bool:
        """Whether the rarest tokens' loss rose, and more than that of any other bin."""
        return self.most_hurt_counts == self.rare_counts


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sentence for the top of the page and the numbers behind it.

    `relation`: how what decay adds goes with the count; "" where no law fits it.
    """

    sentence: str
    relation: str = ""
    changes: tuple[Change, ...] = ()


def answer(groups: Sequence[xr.Dataset]) -> Answer:
    """The answer, or the reason why there is none yet."""
    tokens = worded("tokens", groups)
    compared = [group for group in groups if len(weight_decays([group])) > 1]
    changes = tuple(_change(group) for group in compared if len(set(end_bins(group))) > 1)
    if changes:
        relation = _relation(unrepaired(compared), worded("token", groups))
        return Answer(sentence=_sentence(changes, tokens), relation=relation, changes=changes)
    if compared:
        sentence = f"No answer: all {tokens} occur about equally often, in one frequency bin."
    elif groups:
        shown = ", ".join(f"{decay:g}" for decay in weight_decays(groups))
        sentence = (
            f"No answer yet: only weight decay {shown} is finished, and it takes "
            "two weight decays to compare."
        )
    else:
        sentence = "No answer yet: no run of this study has a final loss."
    return Answer(sentence=sentence)


def image_answer(groups: Sequence[xr.Dataset]) -> str:
    """What happened to images: the two claims of the paper's Figure 9, each shown or not; or ""."""
    falls = class_falls(*groups)
    if not len(falls):
        return ""
    said = []
    for name, part in falls.groupby("runs", sort=False):
        if part["balanced"].all():
            last = part.iloc[-1]
            said.append(
                f"with as many images of every class ({name}), weight decay "
                f"{last['weight_decay']:g} changed their test accuracies by between "
                + f"{-last['most']:+.0f} and {-last['least']:+.0f} points".replace("-", "−")
            )
            continue
        paid = part[part["difference"] > part["difference_half_width"].fillna(np.inf)]
        row = (paid if len(paid) else part.iloc[-1:]).iloc[0]
        verb = "had fallen" if len(paid) else "had not clearly fallen"
        band = row["difference_half_width"]
        width = f" ± {band:.0f}" if np.isfinite(band) else ""
        said.append(
            f"with few images of some ({name}), the three rarest classes {verb} further than the "
            f"three most frequent at weight decay {row['weight_decay']:g}, by "
            f"{row['difference']:.0f}{width} points of test accuracy"
        )
    return f"In images: {'; '.join(said)}."


def _change(group: xr.Dataset) -> Change:
    bins = over_seeds(group, "bin_loss")["mean"].values
    rare, frequent = end_bins(group)
    rise = bins[-1] - bins[0]
    worst = int(np.nanargmax(rise))
    decays = weight_decays([group])

    def ends(name: str) -> tuple[float, float]:
        mean = over_seeds(group, name)["mean"].values
        return float(mean[0]), float(mean[-1])

    return Change(
        name=group.attrs["name"],
        decays=(decays[0], decays[-1]),
        average=ends("average_loss"),
        balanced=ends("token_balanced_loss"),
        rare=(float(bins[0, rare]), float(bins[-1, rare])),
        frequent=(float(bins[0, frequent]), float(bins[-1, frequent])),
        rare_counts=bin_range(group, rare),
        frequent_counts=bin_range(group, frequent),
        most_hurt_counts=bin_range(group, worst) if rise[worst] > 0 else None,
    )


def _sentence(changes: Sequence[Change], tokens: str) -> str:
    paid = sum(change.rare_paid for change in changes)
    if paid == len(changes):
        verdict = f"The rarest {tokens} paid"
    elif paid:
        verdict = f"The rarest {tokens} paid most in {paid} of {len(changes)} settings"
    elif any(change.most_hurt_counts for change in changes):
        hurt = " and ".join(
            dict.fromkeys(c.most_hurt_counts for c in changes if c.most_hurt_counts)
        )
        verdict = f"Not the rarest {tokens}, but those seen {hurt} times paid most"
    else:
        verdict = f"No {tokens} paid: no bin's loss rose"
    decays = {change.decays for change in changes}
    span = (
        f"as weight decay went from {changes[0].decays[0]:g} to {changes[0].decays[1]:g}"
        if len(decays) == 1
        else "from the smallest to the largest weight decay"
    )
    if len(changes) > 3:
        return (
            f"{verdict}: {span}, the loss of the rarest changed by "
            f"{_span_of(changes, 'rare')} nats, and the average by "
            f"{_span_of(changes, 'average')} nats."
        )
    rare = _and([_went(c.rare, c.name, len(changes)) for c in changes])
    average = _and([_went(c.average, c.name, len(changes)) for c in changes])
    counts = _and(list(dict.fromkeys(change.rare_counts for change in changes)))
    return (
        f"{verdict}: {span}, the loss of {tokens} seen {counts} times went from {rare} nats, while "
        f"the average that training monitors went from {average}."
    )


def _relation(groups: Sequence[xr.Dataset], token: str) -> str:
    """What the exponent says at each group's strongest decay, where the law stands.

    It stands with an R² of at least 0.9, a p above its error's reach and a range of at least a
    factor of ten beyond n_0.
    """
    factors, saturations = [], []
    for group in groups:
        if not (decays := decays_with_excess(group)):
            continue
        law, errors = fitted_law(group, max(decays))
        beyond = group["class_count"].values.max() / law["saturation_count"]
        steep = law["exponent"] > 2 * errors["exponent"]  # not where either is NaN or inf
        if law["r_squared"] >= 0.9 and steep and beyond >= 10:
            factors.append(10 ** law["exponent"])
            seen = group["class_count"].values
            if errors["saturation_count"] < law["saturation_count"] >= seen[seen > 0].min():
                saturations.append(law["saturation_count"])
    if not factors:
        return ""
    said = (
        f"What decay adds is no straight line in the count: a {token} ten times rarer pays about "
        f"{_range(factors)} times as much"
    )
    if len(saturations) == len(factors):
        said += (
            f", down to about n_0 = {_range(saturations)} occurrences, below which all pay alike"
        )
    return f"{said}."


def _range(values: Sequence[float]) -> str:
    """ "3.2" or "3.2 to 3.7"."""
    return " to ".join(dict.fromkeys(f"{value:.2g}" for value in (min(values), max(values))))


def _went(ends: tuple[float, float], name: str, among: int) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}" + (f" ({name})" if among > 1 else "")


def _span_of(changes: Sequence[Change], name: str) -> str:
    rises = [getattr(change, name)[1] - getattr(change, name)[0] for change in changes]
    ends = [f"{rise:+.2f}" for rise in (min(rises), max(rises))]
    return " to ".join(dict.fromkeys(ends))


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
