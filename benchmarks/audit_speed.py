"""`audit` beside what one would use instead: a padded loop, lm-eval's rolling loss, minicons.

    python -m benchmarks.audit_speed [--vocab-sizes 32005 151936 256000] [--rounds 3]

A random Qwen2 of 2 layers and D = 128 over documents of 8 to 128 words, each a token, on two
threads. Every loop runs in a process of its own, in turn: seconds of CPU and of the clock for the
losses of all next tokens, median of the rounds, and the peak of memory beyond what was there after
the first document. lm-eval and minicons are left out where they are not installed. The sum of the
losses stands beside them: all but lm-eval's, which has a token more a document, must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")
DOCUMENTS, BATCH = 60, 8


def documents(vocab_size: int) -> list[str]:
    """Words of a Zipf-like draw, one document after the other."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 129, (DOCUMENTS,), generator=generator).tolist()
    draws = [torch.rand(length, generator=generator).double() for length in lengths]
    return [
        " ".join(f"w{int(rank)}" for rank in vocab_size ** (0.2 + 0.79 * draw)) for draw in draws
    ]


def made(vocab_size: int):
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    vocabulary = {"<e>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<e>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<e>", pad_token="<e>"
    )
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "intermediate_size": 512, "max_position_embeddings": 256}
    config = transformers.Qwen2Config(vocab_size=vocab_size, **shape, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(config).eval(), tokenizer


def ours(model, tokenizer) -> Callable[[Sequence[str]], float]:
    from llm_experiments.audit import measure, tokenize

    return lambda texts: float(measure(model, tokenize(tokenizer, texts, 128)).loss.double().sum())


def padded(model, tokenizer) -> Callable[[Sequence[str]], float]:
    import torch
    from torch.nn import functional as F

    @torch.no_grad()
    def total(texts: Sequence[str]) -> float:
        found = 0.0
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(list(texts[start : start + BATCH]), padding=True, return_tensors="pt")
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, 1:]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
            found += float(loss)
        return found

    return total


def lm_eval(model, tokenizer) -> Callable[[Sequence[str]], float]:
    """It scores the first token too, after one of its own, which is taken off."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=129)

    def total(texts: Sequence[str]) -> float:
        asked = [
            Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
            for text in texts
        ]
        return -sum(wrapped.loglikelihood_rolling(asked, disable_tqdm=True))

    return total


def minicons(model, tokenizer) -> Callable[[Sequence[str]], float]:
    from minicons.scorer import IncrementalLMScorer

    scorer = IncrementalLMScorer(model, "cpu", tokenizer=tokenizer)

    def total(texts: Sequence[str]) -> float:
        found = 0.0
        for start in range(0, len(texts), BATCH):
            scores = scorer.token_score(list(texts[start : start + BATCH]))
            found -= sum(score for scored in scores for _, score in scored[1:])
        return found

    return total


LOOPS = {"audit": ours, "padded loop": padded, "lm-eval": lm_eval, "minicons": minicons}


def one(loop: str, vocab_size: int) -> None:
    """Measure one loop and print what came out."""
    import torch

    torch.set_num_threads(2)
    model, tokenizer = made(vocab_size)
    texts = documents(vocab_size)
    run = LOOPS[loop](model, tokenizer)
    run(texts[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, clock = time.process_time(), time.perf_counter()
    nats = run(texts)
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more = (peak - before) / 2**20
    print(json.dumps({"cpu": cpu, "clock": clock, "more": more, "nats": nats}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32005, 151936, 256000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2)
    options = parser.parse_args()
    if options.one:
        one(options.one[0], int(options.one[1]))
        return
    print("| V | loop | CPU | clock | memory beyond the start | nats of all documents |")
    print("|---|---|---|---|---|---|")
    for size in options.vocab_sizes:
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            for loop in LOOPS:
                words = [sys.executable, "-m", "benchmarks.audit_speed", "--one", loop, str(size)]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode == 0:
                    found.setdefault(loop, []).append(json.loads(done.stdout.splitlines()[-1]))
                else:
                    print(f"{loop}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        for loop, rounds in found.items():
            middle = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            print(
                f"| {size:,} | {loop} | {middle['cpu']:.1f} s | {middle['clock']:.1f} s "
                f"| {middle['more']:.2f} GiB | {middle['nats']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
