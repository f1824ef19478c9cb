"""Weights to start from: a local checkpoint in the official format, in place of random ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from llm_experiments.models.model_folder import check_model_folder, read_config
from llm_experiments.text.preparation import PreparedCorpus
from run_store.command_line import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a model computes with, beside its weights: fields of OpenELM's config and of Qwen2's.
_SETTINGS = (
    *("head_dim", "num_query_heads", "num_kv_heads", "rope_freq_constant"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters"),
)


def load_weights(model: PreTrainedModel, folder: Path, corpus: PreparedCorpus) -> None:
    """Give a model the weights of a folder with official key names (safetensors, config.json).

    Raises:
        ValueError: no such folder, another model than this one, another vocabulary than the
            corpus has, or a tokenizer in the folder that is not the corpus's.
    """
    check_model_folder(folder)
    own, name = model.config, repr(str(folder))
    try:
        kind = read_config(folder).get("model_type", own.model_type)
        if kind != own.model_type:  # of which transformers would only warn
            raise ValueError(f"its config.json is of {kind!r:.80}")
        theirs = type(own).from_pretrained(folder, local_files_only=True)
        weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
    except Exception as error:  # of many kinds, by what is wrong with the config
        raise ValueError(f"{name} is no {own.model_type} checkpoint: {one_line(error)}") from None
    if theirs.vocab_size != corpus.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {theirs.vocab_size}, the corpus one of "
            f"{corpus.vocab_size}: expected --vocab-size {theirs.vocab_size} and its tokenizer"
        )
    for field in _SETTINGS:
        if getattr(theirs, field, None) != getattr(own, field, None):
            raise ValueError(
                f"{name} has {field} {getattr(theirs, field, None)!r}; "
                f"expected {getattr(own, field, None)!r}"
            )
    _check_tokenizer(folder, corpus)
    if own.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    expected = {key: parameter.shape for key, parameter in model.named_parameters()}
    found = {key: tensor.shape for key, tensor in weights.items()}
    if wrong := sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k)):
        key = wrong[0]
        shapes = [tuple(s[key]) if key in s else "nothing" for s in (found, expected)]
        raise ValueError(f"{name} has {shapes[0]} for {key}; expected {shapes[1]}")
    model.load_state_dict(weights, strict=False)  # a tied head has no key


def _check_tokenizer(folder: Path, corpus: PreparedCorpus) -> None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer: {one_line(error)}") from None
    if vocabulary != corpus.tokenizer().get_vocab():
        raise ValueError(f"{path} is not the tokenizer of the corpus: ids mean other words")
