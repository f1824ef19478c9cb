"""Checkpoints as people have them: a causal language model and its tokenizer from a folder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from llm_experiments.models import openelm  # noqa: F401  (registers OpenELM with transformers)
from llm_experiments.models.causality import is_causal
from llm_experiments.models.model_folder import (
    ADAPTER,
    Weights,
    check_adapter_folder,
    check_model_folder,
    check_tokenizer_folder,
    no_larger_than,
)
from run_store.command_line import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?|[\w.-]+@[\w./-]+")
_FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.bpe", "*.tiktoken")
_SAMPLE = 100  # documents on which a tokenizer is compared with its file


def locate(name: str | Path) -> Path:
    """The folder of a checkpoint: one that is here, or a hub's ``owner/name`` or ``name@revision``.

    Of the hub (or its cache on this machine, where HF_HUB_OFFLINE is set) safetensors and what
    describes model and tokenizer are fetched, nothing else.

    Raises:
        ValueError: the hub has no such checkpoint, or cannot be reached.
    """
    folder = Path(name)
    if folder.exists() or not _HUB_NAME.fullmatch(str(name)):
        return folder
    from huggingface_hub import snapshot_download

    repository, _, revision = str(name).partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=_FETCHED)
        )
    except Exception as error:  # of many kinds, by what the hub answers
        raise ValueError(
            f"{str(name)!r} is no folder here, and could not be fetched: {one_line(error)}"
        ) from None


def load(
    folder: Path | str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    tokenizer: Path | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer in transformers' format.

    ``folder`` is a local folder or a name on the hub, see `locate`; ``tokenizer`` another one for
    the tokenizer. Only safetensors are read, and no code of the folder is run; see
    `check_model_folder`. A PEFT adapter is merged into the model that it names. ``dtype`` is the
    type of the weights and their products; by default that of the checkpoint.

    Raises:
        ValueError: not such a folder, weights that are missing or of another shape (transformers
            would draw them at random), or a model whose logits move when a later token changes
            (tried on two lengths and several positions, whatever its class: see `is_causal`).
    """
    folder = locate(folder)
    read = folder if tokenizer is None else locate(tokenizer)
    if (folder / ADAPTER).exists() and not (folder / "config.json").exists():
        adapter, base_name = check_adapter_folder(folder)
        base = locate(base_name)
        own = any(folder.glob("tokenizer*"))
        words = load_tokenizer(base if tokenizer is None and not own else read)
        model = _merged(_model(base, dtype), folder, adapter)
    else:
        check_model_folder(folder)  # before the tokenizer, since it says more
        words = load_tokenizer(read)
        model = _model(folder, dtype)
    with _in_one_line(folder):
        causal = is_causal(model)  # settings can be wrong in what only their use shows
    if not causal:
        raise ValueError(
            f"{str(folder)!r} sees the tokens after the one it is asked for (its logits move when "
            "a later token changes); expected a causal language model"
        )
    return model.eval().to(device), words


def _model(folder: Path, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    weights = check_model_folder(folder)
    with _in_one_line(folder), no_larger_than(weights):
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    if lacking := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        raise ValueError(
            f"{str(folder)!r} has no weights for {len(lacking)} parameters of the model, such as "
            f"{min(map(str, lacking))}; expected a whole checkpoint"
        )
    return model


def _merged(base: PreTrainedModel, folder: Path, weights: Weights) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(
            f"{str(folder)!r} holds a PEFT adapter; expected the package peft, to merge it"
        ) from None
    with _in_one_line(folder), no_larger_than(weights):
        return PeftModel.from_pretrained(base, folder, use_safetensors=True).merge_and_unload()


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
