"""One answer to each prompt: the likeliest, or the most central of several drawn.

Greedy decoding leaves out what it is not sure of: a joint that may lie in either of two places is least often wrong, token
by token, where it is not drawn at all. Answers drawn from the model have every joint somewhere. The one nearest to
their mean has the least expected squared error among them by what the model believes: minimum-risk decoding (Kumar & Byrne 2004,
for translation), with the difference of blurred pictures as the risk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from lvm_ray.seeds import stable_hash

if TYPE_CHECKING:
    from lvm_ray.model.generate import Decoder, Prompt
    from lvm_ray.tokenizer import Tokenizer

TEMPERATURE = 0.85  # of the draws
BLUR = 1 / 16  # of the picture's side: a joint drawn a little beside another answer's still agrees with it


def respond(
    decoder: Decoder, tokenizer: Tokenizer, prompt: Prompt, tokens: int, draws: int, seeds: Sequence[int]
) -> NDArray[np.uint16]:
    """Answers [B, tokens] to prompts that were read: greedy with `draws` 0, else the most central of so many.

    `seeds` holds one a prompt.
    """
    if not draws:
        return decoder.generate(prompt, tokens)
    drawn_BKN = decoder.draw(prompt, tokens, draws, TEMPERATURE, seeds)
    return np.stack([drawn_KN[most_central(tokenizer.decode(drawn_KN))] for drawn_KN in drawn_BKN])


def voted(tokenizer: Tokenizer, answers_BVN: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Of the answers to several prompts of each question, the most central one: [B, V, N] -> [B, N]."""
    if answers_BVN.shape[1] == 1:
        return answers_BVN[:, 0]
    return np.stack([answers_VN[most_central(tokenizer.decode(answers_VN))] for answers_VN in answers_BVN])


def most_central(pictures_KSSC: NDArray[np.uint8]) -> int:
    """The place of the picture that, blurred, is nearest to the mean of all: [K, S, S, 3] -> 0..K-1, the first of equals."""
    width = BLUR * pictures_KSSC.shape[1]
    blurred_KSSC = gaussian_filter(pictures_KSSC.astype(np.float32), (0, width, width, 0), truncate=3.0)
    away_K = np.square(blurred_KSSC - blurred_KSSC.mean(axis=0)).sum(axis=(1, 2, 3))
    return int(away_K.argmin())


def draw_seed(seed: int, task: str, item: str, view: int) -> int:
    """The seed of a question's draws: the same for every model, whoever asks it."""
    return stable_hash(seed, task, "draws", item, view)
