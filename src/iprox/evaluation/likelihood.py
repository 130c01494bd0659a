"""Log-likelihoods and greedy generations through the Language Model Evaluation Harness.

Prompts are tokenised by this project, so that a test item has exactly the tokens an influence
query has; models, special tokens, stop texts and precision are those of the harness's ``HFLM``
(Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iprox.errors import DataError, NumericsError
from iprox.evaluation.prefixes import Request, families, log_probabilities
from iprox.models.device import pick_device

__all__ = ["Request", "generations", "harness", "log_likelihoods"]

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 8192}
"""New tokens of one forward pass, padding included; what is cached does not count."""


def harness(model: Any, tokenizer: Any) -> Any:
    """The harness's view of a loaded model; softmaxes in float32 or better."""
    from lm_eval.models.huggingface import HFLM

    precise = model.dtype if model.dtype == torch.float64 else torch.float32
    # The harness warns that its loading options are ignored for a model that is loaded already.
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", softmax_dtype=precise)
    finally:
        logger.setLevel(level)


def log_likelihoods(
    lm: Any,
    requests: Sequence[Request],
    advance: Callable[[int, int], None] = lambda done, tokens: None,
) -> list[float]:
    """Log-likelihood of each continuation given its context, summed over its tokens.

    They are those of the harness's own ``loglikelihood`` but for rounding; beginnings that
    requests share are read once, and requests of similar length together.

    Args:
        lm: From :func:`harness`.
        requests: What is asked.
        advance: Called with the numbers of requests and tokens done since the last call.

    Raises:
        DataError: A request is empty, or longer than the model's window; the harness would cut
            it at the left.
        NumericsError: A likelihood is not finite.
    """
    for request in requests:
        if not request.context or not request.continuation or len(request) > lm.max_length:
            raise DataError(
                "a likelihood cannot be computed",
                value=f"{len(request.context)} + {len(request.continuation)} tokens",
                allowed=f"a context and a continuation, together at most {lm.max_length} tokens",
            )
    results = [math.nan] * len(requests)
    budget = TOKENS_PER_BATCH[pick_device().type]
    for family in families(requests):
        unread = family.shared
        for rows in log_probabilities(lm.model, family, budget, lm.softmax_dtype):
            for reading, log_p in rows:
                for i in reading.asked:
                    tokens = requests[i].continuation
                    own = log_p[-len(tokens) :]
                    results[i] = float(own.gather(1, _column(tokens, own.device)).sum())
            new = sum(len(reading) - family.shared for reading, _ in rows)
            advance(sum(len(reading.asked) for reading, _ in rows), unread + new)
            unread = 0
    bad = sum(not math.isfinite(value) for value in results)
    if bad:
        raise NumericsError(
            "log-likelihoods are not finite",
            value=f"{bad} of {len(results)}",
            fix="the model has diverged, or its precision is too low: evaluate it in float32",
        )
    return results


def generations(
    lm: Any,
    contexts: Sequence[list[int]],
    stop: Sequence[str],
    max_new_tokens: int,
    advance: Callable[[int, int], None] = lambda done, tokens: None,
) -> list[str]:
    """Greedy continuations of contexts, up to the first stop text or end of sequence.

    Args:
        lm: From :func:`harness`.
        contexts: Token ids to start from.
        stop: Texts that end a generation; not part of it.
        max_new_tokens: Longest generation.
        advance: Called with the numbers of contexts and tokens done since the last call.

    Raises:
        DataError: A context leaves no room for the generation in the model's window.
    """
    from lm_eval.models.utils import postprocess_generated_text

    longest = max(map(len, contexts), default=0)
    if longest + max_new_tokens > lm.max_length:
        raise DataError(
            "a prompt leaves no room for an answer",
            value=f"{longest} + {max_new_tokens} tokens",
            allowed=f"at most {lm.max_length}",
        )
    order = sorted(range(len(contexts)), key=lambda i: (-len(contexts[i]), i))
    size = _batch_size(longest + max_new_tokens)
    texts = [""] * len(contexts)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        ids, mask = _left_padded([contexts[i] for i in batch], lm.tokenizer.pad_token_id)
        length = ids.shape[1]
        with torch.no_grad():
            out = lm._model_generate(
                context=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                max_length=length + max_new_tokens,
                stop=list(stop),
            )
        for i, tokens in zip(batch, out[:, length:].tolist(), strict=True):
            texts[i] = postprocess_generated_text(lm.tok_decode(tokens), list(stop), None)
        prompts = sum(len(contexts[i]) for i in batch)
        advance(len(batch), prompts + len(batch) * (out.shape[1] - length))
    return texts


def _batch_size(longest: int) -> int:
    return max(1, TOKENS_PER_BATCH[pick_device().type] // max(longest, 1))


def _column(tokens: Sequence[int], device: torch.device) -> Tensor:
    """Ids as indices of one entry in each row, (tokens, 1)."""
    return torch.tensor(tokens, device=device)[:, None]


def _left_padded(contexts: Sequence[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (contexts, longest) that end where generation begins."""
    longest = max(map(len, contexts))
    ids = torch.full((len(contexts), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        ids[row, longest - len(context) :] = torch.tensor(context)
        mask[row, longest - len(context) :] = 1
    return ids, mask
