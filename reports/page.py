"""One self-contained HTML page from a collection of runs: offline, and safe with any token text."""

from __future__ import annotations

import base64
import functools
import hashlib
import pickle
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import xarray as xr
from markupsafe import Markup

from reports import figures
from reports.alternative_views import section
from reports.alternatives import compared
from reports.answer import answer, image_answer
from reports.excess import predicted_decays, why_no_excess
from reports.excess_tables import excess_views
from reports.groups import (
    MOST_NAMED_CLASSES,
    corpus,
    display_text,
    for_drawing,
    has_windows,
    weight_decays,
)
from reports.mechanisms import mechanism_view
from reports.reading import Collection
from reports.style import DARK, ReportFigure, dark_decay_colours, decay_colours
from reports.table_views import (
    TableView,
    image_views,
    run_table,
    table_views,
    theory_view,
    verdict_view,
)
from reports.tables import comparisons, unrepaired
from reports.tasks import rises
from reports.token_search import pack
from reports.wording import is_of_text, worded
from reports.workers import PARALLEL_FROM, parallel_map

TEMPLATES = Path(__file__).parent / "templates"
FIGURES: tuple[Callable[..., ReportFigure], ...] = (
    figures.predictions,
    figures.figure_4,
    figures.figure_1,
    figures.figure_7a,
    figures.figure_7b,
    figures.theory_over_losses,
    figures.critical_count,
    figures.figure_6a,
    figures.figure_6b,
    figures.figure_5,
)
OF_TRAINING = (figures.figure_7b, figures.figure_5)
OF_ALTERNATIVES = ("alternatives", "new-text")
CORPUS_FIGURES = (figures.figure_8, figures.figure_3a)
_Themes = tuple[tuple[Sequence[float], str], tuple[Sequence[float], str]]
Drawing = tuple[Callable[..., ReportFigure], tuple[xr.Dataset, ...]]
ENVIRONMENT_FIELDS = ("device", "git_commit", "data_hash", "command")


@dataclass(frozen=True, kw_only=True)
class FigureView:
    """A figure as the page shows it: the same drawing for wide and for narrow screens."""

    key: str
    name: str
    title: str
    caption: str
    wide: Markup
    narrow: Markup
    full_width: bool


def render(collection: Collection, *, first_tables: Sequence[TableView] = ()) -> str:
    """The page as HTML, with `first_tables` before its own.

    Works with no finished run at all: it then lists what there is.
    """
    groups = collection.groups
    main, images = by_kind(groups)
    tested = _with_test_accuracy(images)
    tables = table_views(main) + excess_views(main) + image_views(tested)
    if mechanisms := mechanism_view(main):
        tables.append(mechanisms)
    if images is not main and (uneven := _with_uneven_counts(images)):
        tables += [*excess_views(uneven, of_images=True), theory_view(uneven, of_images=True)]
    views = figure_views(groups)
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    return (
        template_environment(groups)
        .get_template("page.html")
        .render(
            studies=[display_text(study) for study in collection.studies],
            answer=answer(main),
            more=image_answer(tested),
            alternatives=section(groups, collection.downstream),
            alternative_figures=[view for view in views if view.key in OF_ALTERNATIVES],
            figures=[view for view in views if view.key not in OF_ALTERNATIVES],
            tables=[*first_tables, *tables, *([verdict_view()] if groups else [])],
            search=pack(main) if groups else None,
            runs=run_table(groups, collection.manifests),
            manifests=len(collection.manifests),
            environment=_environment_rows(collection),
            configs=_config_rows(groups),
            unfinished=collection.unfinished,
            problems=collection.problems,
            style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
            colours=Markup(colour_variables(groups)),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def by_kind(groups: Sequence[xr.Dataset]) -> tuple[Sequence[xr.Dataset], Sequence[xr.Dataset]]:
    """The groups that the page is about, and those of images; where there is no text, the same."""
    images = [group for group in groups if not is_of_text(group)]
    return [group for group in groups if is_of_text(group)] or images, images


def drawings(groups: Sequence[xr.Dataset]) -> list[Drawing]:
    """The figures that these groups have the data for, each with the groups it shows."""
    if not groups:
        return []
    tested, everything = _with_test_accuracy(groups), tuple(groups)
    groups, images = by_kind(groups)
    corpora = _distinct_corpora(groups)
    damaged = tuple(unrepaired(groups))
    # Equal counts have one loss in the law: nothing to fit.
    uneven = _with_uneven_counts(damaged) or damaged
    watched = tuple(group for group in damaged if has_windows(group))
    # The excess and its law; the fitted n_c alone where there is no run at decay 0 to compare with.
    law, other = figures.theory_over_losses, figures.critical_count
    if all(why_no_excess(group) for group in uneven):
        law, other = other, law
    predicted = tuple(group for group in uneven if predicted_decays(group))
    shown = {law: uneven, other: (), figures.predictions: predicted} | dict.fromkeys(
        OF_TRAINING, watched
    )
    found: list[Drawing] = [(draw, of) for draw in FIGURES if (of := shown.get(draw, damaged))]
    repaired = tuple(group for _, family in comparisons(groups) for group in family)
    if repaired:
        found.insert(4 if predicted else 3, (figures.repair, repaired))
    if is_of_text(groups[0]) and len(weight_decays(groups)) > 1:
        found.insert(0, (figures.glance, repaired or damaged))
    place = len(found)
    found += [(draw, corpora) for draw in CORPUS_FIGURES]
    if len({group.sizes["class"] for group in corpora}) > 1:
        found.append((figures.figure_3b, corpora))
    if settings := compared(everything):
        found.append((figures.alternatives, everything))
        if any(rises(c.group, *c.span) is not None for c in settings):
            found.append((figures.new_text, everything))
    # First on a page of its own kind; else after the text's damage, theory and repair.
    beside_text = bool(images) and groups is not images
    of_images: list[Drawing] = [(figures.figure_9, tested)] if tested else []
    if layered := tuple(group for group in tested if group["classifier_norm"].notnull().any()):
        of_images.append((figures.last_layer, layered))
    fitted = tuple(g for g in _with_uneven_counts(images) if not why_no_excess(g))
    if beside_text and fitted:
        of_images.append((figures.theory_over_images, fitted))
    place = place if beside_text else 0
    return [*found[:place], *of_images, *found[place:]]


def _with_uneven_counts(groups: Sequence[xr.Dataset]) -> tuple[xr.Dataset, ...]:
    return tuple(group for group in groups if len(set(group["class_count"].values.tolist())) > 1)


def _with_test_accuracy(groups: Sequence[xr.Dataset]) -> tuple[xr.Dataset, ...]:
    return tuple(
        group
        for group in groups
        if group.sizes["class"] <= MOST_NAMED_CLASSES and group["test_accuracy"].notnull().any()
    )


def figure_views(groups: Sequence[xr.Dataset]) -> list[FigureView]:
    """Every figure of the page, drawn for both widths; in child processes if the runs are many."""
    many = sum(group.sizes["run"] for group in groups) >= PARALLEL_FROM
    with tempfile.TemporaryDirectory() as folder:
        found: list[Drawing] | Path = drawings(groups)
        number = len(found)
        if many:  # once through a file, since the groups are larger than all else
            light = [for_drawing(group) for group in groups]
            (path := Path(folder) / "drawings").write_bytes(pickle.dumps(drawings(light)))
            found = path
        themes = _themes(groups)
        tasks = [(found, place, themes) for place in range(number)]
        return list(parallel_map(_figure_view, tasks, worth=1 if many else number + 1))


def _figure_view(task: tuple[list[Drawing] | Path, int, _Themes]) -> FigureView:
    found, place, themes = task
    draw, shown = (_stored_drawings(found) if isinstance(found, Path) else found)[place]
    decays, prefix = themes[all(not is_of_text(group) for group in shown)]
    wide, narrow = draw(*shown), draw(*shown, narrow=True)
    key = draw.__name__.replace("_", "-")
    return FigureView(
        key=key,
        name=wide.name,
        title=wide.title,
        caption=wide.caption,
        wide=inline_svg(wide, f"{key}-w", decays, prefix),
        narrow=inline_svg(narrow, f"{key}-n", decays, prefix),
        full_width=wide.get_figwidth() > 5,
    )


@functools.lru_cache(maxsize=1)
def _stored_drawings(path: Path) -> list[Drawing]:
    found: list[Drawing] = pickle.loads(path.read_bytes())  # which this page's process wrote
    return found


def inline_svg(
    figure: ReportFigure, key: str, decays: Sequence[float], prefix: str = "--wd"
) -> Markup:
    """A figure as an SVG element: colours follow the page's theme, ids are this figure's alone."""
    svg = figure.drawn("svg", dpi=160, salt=key, text="none", metadata={"Date": None}).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    referred = set(re.findall(r'(?:url\(|xlink:href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in referred else "", svg)
    svg = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{key}-", svg)
    tag = re.match(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', svg)
    assert tag is not None
    svg = _svg_tag(figure, tag[1]) + svg[tag.end() :]
    for name, (colour, _) in _palette(decays, prefix).items():
        svg = svg.replace(f": {colour}", f": var({name})")
    return Markup(svg)


def template_environment(groups: Sequence[xr.Dataset]) -> jinja2.Environment:
    """The page's templates, which escape whatever they show."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = display_text
    environment.filters["worded"] = lambda text: worded(text, groups)
    return environment


def _svg_tag(figure: ReportFigure, box: str) -> str:
    width = round(figure.get_figwidth() * 72 * 1.5)
    label = Markup.escape(display_text(figure.alt))
    return (
        f'<svg role="img" aria-label="{label}" {box} style="max-width: {width}px" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )


def _themes(groups: Sequence[xr.Dataset]) -> _Themes:
    """Weight decays, and the prefix of their colours' CSS variables: of the page, and of images."""
    main, images = by_kind(groups)
    of_page = weight_decays(main), "--wd"
    return of_page, of_page if main is images else (weight_decays(images), "--image-wd")


def _palette(decays: Sequence[float], prefix: str = "--wd") -> dict[str, tuple[str, str]]:
    """The CSS variable for each colour of a figure: what it is in the light and the dark theme."""
    ramp = zip(decay_colours(decays).values(), dark_decay_colours(decays).values(), strict=True)
    fixed = {f"--c{place}": pair for place, pair in enumerate(DARK.items())}
    return fixed | {f"{prefix}{place}": pair for place, pair in enumerate(ramp)}


def colour_variables(groups: Sequence[xr.Dataset]) -> str:
    """CSS of the colours that figures name, in both themes."""
    variables: dict[str, tuple[str, str]] = {}
    for theme in _themes(groups):
        variables |= _palette(*theme)
    day, night = (
        "".join(f"{name}:{pair[place]};" for name, pair in variables.items()) for place in (0, 1)
    )
    return f":root{{{day}}}@media (prefers-color-scheme:dark){{:root{{{night}}}}}"


def _distinct_corpora(groups: Sequence[xr.Dataset]) -> tuple[xr.Dataset, ...]:
    """One group for each distinct set of class counts, named after its corpus."""
    found: dict[tuple[str, bytes], xr.Dataset] = {}
    for group in groups:
        name = corpus(group)
        named = group.assign_attrs(name=name)
        found.setdefault((name, group["class_count"].values.tobytes()), named)
    return tuple(found.values())


def _environment_rows(collection: Collection) -> list[tuple[str, list[str]]]:
    """Each fact of the manifests with its distinct values, and on how many runs if they differ."""
    seen: dict[str, Counter[str]] = {}
    for manifest in collection.manifests.values():
        facts = {name: manifest.get(name) for name in ENVIRONMENT_FIELDS}
        versions = manifest.get("versions")
        if isinstance(versions, dict):
            facts["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
        for name, value in facts.items():
            if value not in (None, ""):
                shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
                seen.setdefault(name.replace("_", " "), Counter())[display_text(shown)] += 1
    return [
        (name, [v if len(values) == 1 else f"{v} ({n} runs)" for v, n in values.items()])
        for name, values in seen.items()
    ]


def _config_rows(groups: Sequence[xr.Dataset]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What all groups of a kind share, then what is each one's own, as (name, [(field, value)])."""
    main, images = by_kind(groups)
    if main is images or not images:
        return _shared_and_own("Every run", groups)
    of_text, of_images = "Every run on text", "Every run on images"
    return _shared_and_own(of_text, main) + _shared_and_own(of_images, images)


def _shared_and_own(
    title: str, groups: Sequence[xr.Dataset]
) -> list[tuple[str, list[tuple[str, str]]]]:
    shown = [_config(group) for group in groups]
    names = list(dict.fromkeys(name for config in shown for name in config))
    shared = [n for n in names if len({config.get(n) for config in shown}) == 1]
    parts = [(title, [(name, shown[0][name]) for name in shared])] if shared else []
    for group, config in zip(groups, shown, strict=True):
        own = [(name, value) for name, value in config.items() if name not in shared]
        parts += [(display_text(group.attrs["name"]), own)] if own else []
    return parts


def _config(group: xr.Dataset) -> dict[str, str]:
    seeds = sorted(set(group["seed"].values.tolist()))
    swept = {
        "weight_decay": ", ".join(f"{decay:g}" for decay in weight_decays([group])),
        "seed": ", ".join(map(str, seeds)),
    }
    config = group.attrs["config"] | swept
    return {name: display_text(str(value)) for name, value in config.items()}
