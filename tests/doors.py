"""The same prompts for every way to generate (`test_doors.py` in tests/gsx, tests/serving and tests/engines/cpp).

Each gives the ids and the text that transformers gives for the checkpoint, for tokenizers of two kinds. The prompts
have what tokenizers treat in a way of their own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.answers import Text, by_transformers

NEW_TOKENS = 16
PROMPTS = {
    "ASCII": "def main(self, other):",
    "code on lines": "class Reader:\n    def __init__(self):\n        return",
    "emoji": "a 😀👩‍🚀 ✓",
    "Chinese": "你好，世界",
    "Arabic": "مرحبا بالعالم",
    "a decomposed accent": "cafe\u0301 Ångström",
    "a leading space": " the class",
    "spaces": "   the   class   ",
    "a newline at the end": "import os\n",
    "a tab and a newline": "\t\n",
    "special tokens": "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n",
    "special tokens of the other": "<s>the</s> class",
    "an added token": "a <think> b",
    "almost a special token": "<|im_start|user|>",
    "no space, NUL and control": "a\u200bb\x00c\x1b[0m",
    "long": "for each token in the text, return self and the model: " * 3,
}


@cache
def expected(model: Path) -> dict[str, Text]:
    """What transformers gives for each prompt, by the prompt's name."""
    found = by_transformers(model, [*PROMPTS.values()], NEW_TOKENS)
    texts = {name: answer for name, answer in zip(PROMPTS, found, strict=True) if isinstance(answer, Text)}
    assert len(texts) == len(PROMPTS), found
    return texts
