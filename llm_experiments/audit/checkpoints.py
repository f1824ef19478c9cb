"""Checkpoints as people have them: a causal language model and its tokenizer from a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_experiments.models import openelm  # noqa: F401  (registers OpenELM with transformers)
from llm_experiments.models.causality import is_causal
from llm_experiments.models.model_folder import (
    check_model_folder,
    check_tokenizer_folder,
    no_larger_than,
)
from run_store.command_line import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLE = 100  # documents on which a tokenizer is compared with its file


def load(
    folder: Path, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from a local folder in transformers' format.

    The model has the number type of its checkpoint. Only safetensors are read, and no code of the
    folder is run; see `check_model_folder`.

    Raises:
        ValueError: not such a folder, weights that are missing or of another shape (transformers
            would draw them at random), or a model whose logits move when a later token changes
            (tried on two lengths and several positions, whatever its class: see `is_causal`).
    """
    from transformers import AutoModelForCausalLM

    weights = check_model_folder(folder)
    tokenizer = load_tokenizer(folder)
    with _in_one_line(folder):
        with no_larger_than(weights):
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        causal = is_causal(model)  # settings can be wrong in what only their use shows
    if lacking := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        raise ValueError(
            f"{str(folder)!r} has no weights for {len(lacking)} parameters of the model, such as "
            f"{min(map(str, lacking))}; expected a whole checkpoint"
        )
    if not causal:
        raise ValueError(
            f"{str(folder)!r} sees the tokens after the one it is asked for (its logits move when "
            "a later token changes); expected a causal language model"
        )
    return model.eval().to(device), tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder: what its tokenizer.json says, to the letter.

    transformers would put a class of the model's type over the file, with rules of its own for
    lower-casing and splitting; such a class is used only where there is no tokenizer.json.

    Raises:
        ValueError: there is no tokenizer, or it cannot be read.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_tokenizer_folder(folder)
    with _in_one_line(folder):
        if (folder / "tokenizer.json").exists():
            read = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=read)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        tokenizer(["a b"], truncation=True, max_length=2)
    return tokenizer


def check_against_file(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> None:
    """ValueError where a tokenizer's class gives other ids than the tokenizer.json it came with.

    Compared on the first documents. A tokenizer that came with no such file passes.
    """
    path = Path(tokenizer.name_or_path or ".") / "tokenizer.json"
    if not tokenizer.name_or_path or not path.is_file():
        return
    of_file = load_tokenizer(path.parent)
    for document in documents[:_SAMPLE]:
        if tokenizer(document)["input_ids"] != of_file(document)["input_ids"]:
            raise ValueError(
                f"{type(tokenizer).__name__} gives other ids than {path} for {document!r:.80}; "
                "expected the tokenizer that the file describes (llm_experiments.audit."
                "load_tokenizer reads it)"
            )


@contextlib.contextmanager
def _in_one_line(folder: Path) -> Iterator[None]:
    """Whatever goes wrong is a ValueError that names the folder."""
    try:
        yield
    except BaseException as error:  # of many kinds, and Rust's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        lines: Any = str(error).strip().splitlines() or [type(error).__name__]
        reason = one_line(ValueError(lines[0]))
        raise ValueError(f"{str(folder)!r} could not be loaded: {reason}") from None
