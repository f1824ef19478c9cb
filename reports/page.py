"""One self-contained HTML page from a collection of runs: offline, and safe with any token text."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
import xarray as xr
from markupsafe import Markup

from reports import figures, tables
from reports.answer import answer
from reports.groups import Collection, display_text, weight_decays
from reports.style import DARK, STYLE, ReportFigure, dark_decay_colours, decay_colours
from reports.token_search import pack

TEMPLATES = Path(__file__).parent / "templates"
FIGURES: tuple[Callable[..., ReportFigure], ...] = (
    figures.figure_4,
    figures.figure_1,
    figures.figure_7a,
    figures.figure_7b,
    figures.theory_over_losses,
    figures.critical_count,
    figures.figure_6a,
    figures.figure_5,
)
CORPUS_FIGURES = (figures.figure_8, figures.figure_3a)
ENVIRONMENT_FIELDS = ("device", "git_commit", "data_hash", "command")


@dataclass(frozen=True, kw_only=True)
class FigureView:
    """A figure as the page shows it: the same drawing for wide and for narrow screens."""

    key: str
    figure: ReportFigure
    wide: Markup
    narrow: Markup
    full_width: bool


@dataclass(frozen=True, kw_only=True)
class TableView:
    """A table of text: `bodies` are (heading, rows), and a row's first cell is its header."""

    key: str
    title: str
    caption: str
    head: Sequence[str]
    bodies: Sequence[tuple[str, Sequence[Sequence[str]]]]


def render(collection: Collection) -> str:
    """The page as HTML. Works with no finished run at all: it then lists what there is."""
    groups = collection.groups
    decays = weight_decays(groups)
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("page.html")
        .render(
            studies=[display_text(study) for study in collection.studies],
            answer=answer(groups),
            figures=figure_views(groups),
            tables=table_views(groups),
            search=pack(groups) if groups else None,
            decays=decays,
            runs=_run_table(collection),
            manifests=len(collection.manifests),
            environment=_environment_rows(collection),
            configs=[_config_rows(group) for group in groups],
            unfinished=collection.unfinished,
            problems=collection.problems,
            style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
            colours=Markup(_colour_variables(decays)),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def figure_views(groups: Sequence[xr.Dataset]) -> list[FigureView]:
    """Every figure of the page, drawn for both widths."""
    if not groups:
        return []
    drawn = [(draw, tuple(groups)) for draw in FIGURES]
    drawn += [(draw, _distinct_corpora(groups)) for draw in CORPUS_FIGURES]
    decays = weight_decays(groups)
    views = []
    for draw, shown in drawn:
        wide, narrow = draw(*shown), draw(*shown, narrow=True)
        key = draw.__name__.replace("_", "-")
        views.append(
            FigureView(
                key=key,
                figure=wide,
                wide=inline_svg(wide, f"{key}-w", decays),
                narrow=inline_svg(narrow, f"{key}-n", decays),
                full_width=wide.get_figwidth() > 5,
            )
        )
    return views


def inline_svg(figure: ReportFigure, key: str, decays: Sequence[float]) -> Markup:
    """A figure as an SVG element: colours follow the page's theme, ids are this figure's alone."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    referred = set(re.findall(r'(?:url\(|xlink:href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in referred else "", svg)
    svg = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', _svg_tag(figure), svg, count=1)
    for colour, name in _theme(decays).items():
        svg = svg.replace(f": {colour}", f": var({name})")
    return Markup(svg)


def table_views(groups: Sequence[xr.Dataset]) -> list[TableView]:
    """Every table of the page."""
    if not groups:
        return []
    seeds = "Mean over seeds ± standard deviation where there is more than one seed."
    views = [
        TableView(
            key="table-1",
            title="Table 1: training loss and per-token metrics by weight decay",
            caption=f"At the end of training, over the training set. {seeds}",
            **_by_decay(tables.table_1(*groups), "metric", _mean_std),
        ),
        TableView(
            key="table-bins",
            title="Loss by how often a token occurs",
            caption=f"Mean cross-entropy in nats of the tokens in each frequency bin. {seeds}",
            **_by_decay(
                tables.loss_by_bin(*groups).query("tokens > 0"),
                "count",
                _mean_std,
                {"tokens": ("tokens", "{:,}"), "share_of_text": ("of the text", "{:.1%}")},
            ),
        ),
        TableView(
            key="table-gap",
            title="Fairness gap",
            caption="Loss of the rarest bin minus loss of the most frequent bin, in nats, with its "
            "95 % interval over seeds where there is more than one seed.",
            **_by_decay(
                tables.fairness_gap(*groups).assign(what="gap (nats)"), "what", _mean_interval
            ),
        ),
        TableView(
            key="table-theory",
            title="Theory against measurement",
            caption="n_c is the one number fitted to a run's losses. In the theory a token with "
            "count ≤ n_c is never predicted right; measured are the tokens that the model never "
            "predicts right. R² is over tokens, in the chance of a miss 1 − exp(−loss).",
            **_theory_table(groups),
        ),
    ]
    repaired = tables.repair(*groups)
    if len(repaired):
        views.append(
            TableView(
                key="table-repair",
                title="Repair: what loss weights and spared parameters change",
                caption="Each token's loss is weighted by count^−g. Predicted: the corrected "
                "theory with the n_c fitted at g = 0 and the same weight decay, nothing refitted.",
                **_repair_table(repaired),
            )
        )
    return views


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = display_text
    return environment


def _svg_tag(figure: ReportFigure) -> Callable[[re.Match[str]], str]:
    width = round(figure.get_figwidth() * 72 * 1.5)

    def tag(match: re.Match[str]) -> str:
        label = Markup.escape(display_text(figure.alt))
        return (
            f'<svg role="img" aria-label="{label}" {match[1]} style="max-width: {width}px" '
            'xmlns:xlink="http://www.w3.org/1999/xlink">'
        )

    return tag


def _theme(decays: Sequence[float]) -> dict[str, str]:
    """The CSS variable for each colour of the light theme."""
    names = {colour: f"--c{place}" for place, colour in enumerate(DARK)}
    return names | {
        colour: f"--wd{place}" for place, colour in enumerate(decay_colours(decays).values())
    }


def _colour_variables(decays: Sequence[float]) -> str:
    light = _theme(decays)
    ramp = zip(decay_colours(decays).values(), dark_decay_colours(decays).values(), strict=True)
    dark = DARK | dict(ramp)
    declared = "".join(f"{name}:{colour};" for colour, name in light.items())
    twins = "".join(f"{name}:{dark[colour]};" for colour, name in light.items())
    return f":root{{{declared}}}@media (prefers-color-scheme:dark){{:root{{{twins}}}}}"


def _distinct_corpora(groups: Sequence[xr.Dataset]) -> tuple[xr.Dataset, ...]:
    """One group for each distinct set of class counts, named after its corpus."""
    found: dict[tuple[str, bytes], xr.Dataset] = {}
    for group in groups:
        corpus = str(group.attrs["config"].get("corpus", "corpus"))
        named = group.assign_attrs(name=corpus)
        found.setdefault((corpus, group["class_count"].values.tobytes()), named)
    return tuple(found.values())


def _by_decay(
    frame: pd.DataFrame,
    row: str,
    cell: Callable[[Any], str],
    extra: dict[str, tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Head and bodies of a table with weight decay across and `row` down, a body a group."""
    extra = extra or {}
    decays = sorted(frame["weight_decay"].unique())
    bodies = []
    for name, part in frame.groupby("runs", sort=False):
        rows = []
        for header, cells in part.groupby(row, sort=False):
            found = {entry.weight_decay: cell(entry) for entry in cells.itertuples()}
            shown = [form.format(cells[column].iloc[0]) for column, (_, form) in extra.items()]
            rows.append([str(header), *shown, *(found.get(decay, "") for decay in decays)])
        numbers = part.groupby("weight_decay")["n"].max()
        said = f"{numbers.min()}" if numbers.nunique() == 1 else f"{numbers.min()}–{numbers.max()}"
        bodies.append((f"{name} (n = {said})", rows))
    head = [
        "times seen" if row == "count" else "",
        *(title for title, _ in extra.values()),
        *(f"λ = {decay:g}" for decay in decays),
    ]
    return {"head": head, "bodies": bodies}


def _mean_std(entry: Any) -> str:
    return _plus_minus(entry.mean, entry.std)


def _mean_interval(entry: Any) -> str:
    return _plus_minus(entry.mean, entry.half_width)


def _plus_minus(mean: float, spread: float) -> str:
    if not math.isfinite(mean):
        return "–"
    return f"{mean:.3f} ± {spread:.3f}" if math.isfinite(spread) else f"{mean:.3f}"


def _number(value: float, form: str = "{:.3f}") -> str:
    return form.format(value) if math.isfinite(value) else "–"


def _theory_table(groups: Sequence[xr.Dataset]) -> dict[str, Any]:
    frame = tables.theory(*groups)
    bodies = [
        (
            str(name),
            [
                [
                    f"{row.weight_decay:g}",
                    str(row.n),
                    _number(row.critical_count, "{:.4g}"),
                    _number(row.r_squared),
                    _number(row.predicted_neglected, "{:,.0f}"),
                    _number(row.neglected, "{:,.0f}"),
                ]
                for row in part.itertuples()
            ],
        )
        for name, part in frame.groupby("runs", sort=False)
    ]
    head = ["λ", "runs", "n_c", "R²", "neglected, predicted", "neglected, measured"]
    return {"head": head, "bodies": bodies}


def _repair_table(frame: pd.DataFrame) -> dict[str, Any]:
    bodies = [
        (
            f"weight decay {decay:g}",
            [
                [
                    f"g = {row.loss_weight_exponent:g}, decay on {row.decay}",
                    str(row.n),
                    *(
                        _number(getattr(row, name))
                        for name in (
                            "average_loss",
                            "predicted_average",
                            "token_balanced_loss",
                            "predicted_balanced",
                            "fairness_gap",
                        )
                    ),
                ]
                for row in part.itertuples()
            ],
        )
        for decay, part in frame.groupby("weight_decay")
    ]
    head = ["repair", "runs", "average", "predicted", "token-balanced", "predicted", "gap"]
    return {"head": head, "bodies": bodies}


def _run_table(collection: Collection) -> TableView | None:
    if not collection.groups:
        return None
    frame = tables.runs(*collection.groups)
    bodies = []
    for name, part in frame.groupby("runs", sort=False):
        rows = [
            [
                row.run,
                f"{row.weight_decay:g}",
                str(row.seed),
                _number(row.average_loss),
                _number(row.token_balanced_loss),
                _plus_minus(row.fairness_gap, row.fairness_gap_half_width),
                _number(row.critical_count, "{:.4g}"),
                _number(row.r_squared),
                _minutes(collection.manifests[row.run]),
            ]
            for row in part.itertuples()
        ]
        bodies.append((str(name), rows))
    return TableView(
        key="table-runs",
        title="Every run",
        caption="Losses in nats; the gap with its 95 % interval over the tokens of both bins "
        "(none where a bin holds a single token).",
        head=["run", "λ", "seed", "average", "token-balanced", "fairness gap", "n_c", "R²", "time"],
        bodies=bodies,
    )


def _minutes(manifest: Any) -> str:
    try:
        taken = pd.Timestamp(manifest["finished"]) - pd.Timestamp(manifest["started"])
        return f"{taken.total_seconds():,.0f} s"
    except (KeyError, ValueError, TypeError):
        return "–"


def _environment_rows(collection: Collection) -> list[tuple[str, list[str]]]:
    """Each fact of the manifests with its distinct values, and on how many runs if they differ."""
    seen: dict[str, dict[str, int]] = {}
    for manifest in collection.manifests.values():
        facts = {name: manifest.get(name) for name in ENVIRONMENT_FIELDS}
        versions = manifest.get("versions")
        if isinstance(versions, dict):
            facts["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
        for name, value in facts.items():
            if value not in (None, ""):
                shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
                values = seen.setdefault(name.replace("_", " "), {})
                values[display_text(shown)] = values.get(display_text(shown), 0) + 1
    return [
        (
            name,
            [value if len(values) == 1 else f"{value} ({n} runs)" for value, n in values.items()],
        )
        for name, values in seen.items()
    ]


def _config_rows(group: xr.Dataset) -> tuple[str, list[tuple[str, str]]]:
    config = group.attrs["config"]
    seeds = sorted(set(group["seed"].values.tolist()))
    swept = {
        "weight_decay": ", ".join(f"{decay:g}" for decay in weight_decays([group])),
        "seed": ", ".join(map(str, seeds)),
    }
    rows = [(name, display_text(str(value))) for name, value in (config | swept).items()]
    return display_text(group.attrs["name"]), rows
