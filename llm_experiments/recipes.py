"""Named sweeps: functions that return one or more grids, which the command line may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llm_experiments.configs import DataConfig, SweepConfig, TrainingConfig


def demo() -> tuple[SweepConfig, ...]:
    """Two tiny models that come close to memorising 10,000 tokens: minutes on two CPU cores.

    The second grid repairs the first at its strongest decay, by weighting rare tokens more.
    """
    damage = SweepConfig(
        study="demo",
        models=("openelm-tiny", "qwen2-tiny"),
        training=TrainingConfig(steps=320, batch_size=16, learning_rate=3e-3, evaluate_every=20),
        data=DataConfig(vocab_size=1024, context=64, packing=True, num_sequences=160),
    )
    repair = replace(
        damage,
        models=("openelm-tiny",),
        weight_decays=(1.0,),
        loss_weight_exponents=(0.25, 0.5),
    )
    return damage, repair


def table1() -> tuple[SweepConfig, ...]:
    """Table 1 of the paper: OpenELM 270M on IMDB, five weight decays, five seeds."""
    return (_published("table1", "openelm-270m"),)


def figure1() -> tuple[SweepConfig, ...]:
    """Figure 1: rare and frequent tokens of four models, weight decay up to 2."""
    models = ("openelm-270m", "qwen2-0.5b", "qwen2-1.5b", "openelm-3b")
    decays = (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0)
    return tuple(_published("figure1", model, weight_decays=decays) for model in models)


def figure4() -> tuple[SweepConfig, ...]:
    """Figure 4: average and token-balanced loss; the runs of Table 1."""
    return table1()


def figure5() -> tuple[SweepConfig, ...]:
    """Figure 5: learning speed of every token; the runs of Table 1 at weight decay 1."""
    return (_published("table1", "openelm-270m", weight_decays=(1.0,)),)


def figure6() -> tuple[SweepConfig, ...]:
    """Figure 6: loss and accuracy of every token; the runs of Figure 5."""
    return figure5()


def figure7() -> tuple[SweepConfig, ...]:
    """Figure 7: loss and learning speed by frequency, on IMDB and IMDB-xl.

    Its caption names weight decays of 0.1 and 1, the text on its learning speed 0 and 1: all three.
    """
    decays = (0.0, 0.1, 1.0)
    return tuple(
        _published("figure7", "openelm-270m", corpus=corpus, weight_decays=decays)
        for corpus in ("imdb", "imdb-xl")
    )


def repair() -> tuple[SweepConfig, ...]:
    """Beyond the paper: loss weights of rare tokens; which parameters are decayed, and until when.

    Loss weights and decay by rows at the exponents that the theory calls best, for features that
    are decayed per sample or as weights (ufm/THEORY.md, section 6), among others. The published
    models have one matrix for embeddings and head; two grids make them two.
    """
    grid = _published("repair", "openelm-270m", seeds=(0,))
    decayed = replace(grid, weight_decays=grid.weight_decays[1:])
    untied = _with(grid, tie_embeddings=False)
    return (
        replace(grid, loss_weight_exponents=(0.0, 0.25, 0.5, 0.75, 1.0)),
        replace(grid, decays=("matrices", "no-embeddings", "embeddings")),
        replace(untied, decays=("all", "embeddings", "head", "body")),
        *(_with(decayed, decay_exponent=q) for q in (0.5, 1.0, 2.0)),
        _with(decayed, decay_exponent=1.0, tie_embeddings=False),
        *(_with(decayed, decay_until=share) for share in (0.5, 0.8)),
    )


def vocabulary() -> tuple[SweepConfig, ...]:
    """Beyond the paper: the same sweep with smaller tokenizers."""
    grid = _published("vocabulary", "openelm-270m", seeds=(0,))
    return tuple(
        replace(grid, data=replace(grid.data, vocab_size=size)) for size in (8005, 16005, 32005)
    )


def regularisers() -> tuple[SweepConfig, ...]:
    """Beyond the paper: is it weight decay, or any regularisation, that costs the rare tokens?

    Dropout, label smoothing, decay of parts of the model, LayerNorm, two matrices for embeddings
    and head, and Qwen2 0.5B with and without experts. The runs without any of them are shared.
    """
    decayed = _published("regularisers", "openelm-270m", seeds=(0,))
    plain = replace(decayed, weight_decays=(0.0,))
    only = replace(decayed, weight_decays=decayed.weight_decays[1:])
    qwen = _published("regularisers", "qwen2-0.5b", seeds=(0,))
    return (
        decayed,
        *(_with(plain, dropout=rate) for rate in (0.1, 0.2, 0.3)),
        *(_with(plain, label_smoothing=share) for share in (0.05, 0.1, 0.2)),
        replace(only, decays=("embeddings", "inner", "last-norm")),
        _with(decayed, norm="layernorm"),
        _with(decayed, tie_embeddings=False),
        qwen,
        _with(replace(qwen, models=("qwen2-moe-0.5b",)), compile=False),
    )


def optimizers() -> tuple[SweepConfig, ...]:
    """Beyond the paper: does another optimizer spare the rare tokens what decay costs them?

    Lion has the third of the learning rate and three times the decay, as its authors advise (Chen
    et al., 2023). SGD is left out: it needs a learning rate of another order, and a search for it.
    """
    grid = _published("optimizers", "openelm-270m", seeds=(0,))
    tripled = tuple(3 * decay for decay in grid.weight_decays)
    return (
        grid,
        replace(_with(grid, optimizer="adam"), weight_decays=(1e-5, 1e-4, 1e-3)),
        _with(grid, optimizer="muon"),
        replace(
            _with(grid, optimizer="lion", beta2=0.99, learning_rate=5e-5 / 3),
            weight_decays=tripled,
        ),
        replace(_with(grid, optimizer="adamw-cautious"), weight_decays=grid.weight_decays[1:]),
    )


def alternatives_small() -> tuple[SweepConfig, ...]:
    """Does the damage show in a task, is it decay alone, and can it be avoided? In half an hour.

    A tiny model on IMDB, on two CPU cores. Models are kept, for `downstream`.
    """
    grid = SweepConfig(
        study="alternatives-small",
        models=("openelm-tiny",),
        weight_decays=(0.0, 0.3, 1.0),
        seeds=(0, 1, 2),
        training=TrainingConfig(steps=320, batch_size=16, learning_rate=3e-3, evaluate_every=100),
        data=DataConfig(
            corpus="imdb", vocab_size=2048, context=64, packing=True, num_sequences=320
        ),
        save_model=True,
    )
    plain = replace(grid, weight_decays=(0.0,))
    decayed = replace(grid, weight_decays=(0.3, 1.0))
    return (
        grid,
        *(_with(plain, dropout=rate) for rate in (0.05, 0.2)),
        *(_with(plain, label_smoothing=share) for share in (0.1, 0.3)),
        _with(grid, norm="layernorm"),
        _with(grid, optimizer="muon"),
        replace(
            _with(grid, optimizer="lion", beta2=0.99, learning_rate=1e-3),
            weight_decays=(0.0, 0.9, 3.0),
        ),
        replace(_with(decayed, optimizer="adamw-cautious"), weight_decays=(1.0, 3.0)),
        replace(grid, loss_weight_exponents=(0.5, 1.0)),
        replace(decayed, decays=("no-embeddings",)),
        _with(decayed, decay_exponent=1.0),
        _with(decayed, decay_until=0.8),
    )


def scale() -> tuple[SweepConfig, ...]:
    """Beyond the paper: 1B to 7B parameters on six million documents, sharded over the GPUs.

    For torchrun with a multiple of 8 processes; `plan` tells what it costs.
    """
    grid = SweepConfig(
        study="scale",
        weight_decays=(0.0, 0.1, 1.0),
        training=TrainingConfig(
            batch_size=64,
            accumulation=8,
            learning_rate=3e-4,
            warmup_steps=500,
            precision="bf16",
            compile=True,
            clip_gradient=1.0,
            initialisation="huggingface",
        ),
        data=DataConfig(
            corpus="wikimedia/wikipedia", subset="20231101.en", context=1024, packing=True
        ),
        parallel="fsdp",
    )
    return (
        *(replace(grid, models=(name,)) for name in ("openelm-1.1b", "qwen2-1.5b", "openelm-3b")),
        _with(replace(grid, models=("qwen2-7b",)), tie_embeddings=False),
    )


def _with(grid: SweepConfig, **changed: Any) -> SweepConfig:
    """The grid with other settings of training."""
    return replace(grid, training=replace(grid.training, **changed))


def mechanism() -> tuple[SweepConfig, ...]:
    """Beyond the paper: what makes rare tokens pay? One thing at a time is changed in the demo.

    What each grid is for, what was predicted and what came out stands in MECHANISM.md.
    """
    base = replace(
        demo()[0],
        study="mechanism",
        models=("openelm-tiny",),
        weight_decays=(0.0, 0.5),
        seeds=(0, 1, 2),
    )
    decayed = replace(base, weight_decays=(0.5,))
    untied = _with(base, tie_embeddings=False)
    settings: tuple[dict[str, Any], ...] = (
        {"batch_size": 8},
        {"batch_size": 32},
        {"steps": 160},
        {"steps": 640},
        {"learning_rate": 1e-3},
        {"schedule": "linear"},
        {"schedule": "constant"},
        {"beta1": 0.0},
        {"beta2": 0.9},
        {"beta2": 0.99},
        {"optimizer": "sign", "learning_rate": 1e-3},
    )
    return (
        replace(base, models=demo()[0].models, weight_decays=(0.0, 0.1, 0.5, 1.0)),
        replace(decayed, decays=("embeddings", "last-norm", "inner", "matrices")),
        untied,
        replace(untied, weight_decays=(0.5,), decays=("head", "embeddings", "last-norm", "inner")),
        *(_with(base, **setting) for setting in settings),
        *(replace(base, data=replace(base.data, vocab_size=size)) for size in (512, 2048)),
        replace(_with(base, decay_mode="l2"), weight_decays=(0.0, 1e-4, 3e-4, 1e-3)),
    )


def published(model: str, corpus: str = "imdb") -> tuple[TrainingConfig, DataConfig]:
    """The paper's settings (section 3), which depend on whether a model has 10^9 parameters.

    It does not print how weights are drawn or whether gradients are clipped. These are CoreNet's
    weights without clipping: on openelm-270m at decays 0 and 1 they gave its accuracies at average
    losses of 0.0530 and 0.0752 against 0.051 and 0.068. With what transformers does by default
    (matrices N(0, 0.02^2) and clipping at norm 1) the window before step 9,300 at decay 1 had a
    mean loss of 0.413 where this one has 0.079.
    """
    large = model in ("openelm-1.1b", "openelm-3b", "qwen2-1.5b", "qwen2-7b")
    batch = {"batch_size": 16, "accumulation": 4} if large else {"batch_size": 64}
    return (
        TrainingConfig(precision="fp16", compile=True, **batch),
        DataConfig(corpus=corpus, vocab_size=32005, context=64 if large else 128),
    )


def for_model(grid: SweepConfig, model: str) -> SweepConfig:
    """The grid for another model: where it has the paper's batch and context, they follow."""
    own, others = _sizes(*published(grid.models[0])), _sizes(*published(model))
    if _sizes(grid.training, grid.data) == own:
        batch_size, accumulation, context = others
        training = replace(grid.training, batch_size=batch_size, accumulation=accumulation)
        grid = replace(grid, training=training, data=replace(grid.data, context=context))
    return replace(grid, models=(model,))


def _sizes(training: TrainingConfig, data: DataConfig) -> tuple[int, int, int]:
    return training.batch_size, training.accumulation, data.context


def _published(
    study: str,
    model: str,
    *,
    corpus: str = "imdb",
    weight_decays: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 1.0),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> SweepConfig:
    training, data = published(model, corpus)
    return SweepConfig(
        study=study,
        models=(model,),
        weight_decays=weight_decays,
        seeds=seeds,
        training=training,
        data=data,
    )


_PUBLISHED = (table1, figure1, figure4, figure5, figure6, figure7)
_BEYOND = (repair, vocabulary, regularisers, optimizers, alternatives_small, scale, mechanism)
RECIPES: dict[str, Callable[[], tuple[SweepConfig, ...]]] = {
    f.__name__.replace("_", "-"): f for f in (demo, *_PUBLISHED, *_BEYOND)
}


def recipe(name: str) -> tuple[SweepConfig, ...]:
    """The grids of a named recipe. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()
