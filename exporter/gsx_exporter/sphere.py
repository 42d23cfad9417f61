"""A normalized Transformer (nGPT, arXiv:2410.01131): every state has norm 1, and a branch moves it towards its result.

    n = h / |h|;  h = n + rate * (f(n) / |f(n)| - n)      for both branches of a layer

The norms have no weights. Queries and keys have norm 1 (queries then a factor for each channel), and so have what
attention's output projection and the MLP's last one read. Factors for each channel are stored in units of the initial
weights' spread. A gate that reads what attention reads multiplies attention's heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gsx_exporter.errors import CheckpointError
from gsx_exporter.section import finite

if TYPE_CHECKING:
    from gsx_exporter.families import SphereKeys

# Added to a square sum, in transformers' `DoryL2Norm`; no configuration names it.
UNIT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Sphere:
    """What stored factors are multiplied by. From `models/dory/modeling_dory.py`, where each is called `*_scale`.

    Args:
        rate: of `lambda_1` and `lambda_2`, then without sign.
        query: of `sqk`, then squared.
        gate: of `s_gate`, then squared.
        mlp: of `suv_gate` and `suv_up`.
        logits: of `logit_scale`.
    """

    rate: float
    query: float
    gate: float
    mlp: float
    logits: float

    @classmethod
    def of(cls, hf: Any, keys: SphereKeys) -> Sphere:
        """The factors of a model.

        Raises:
            CheckpointError: a value of the configuration that gives none, or one table for embedding and head, whose
                rows have a factor each as a head.
        """
        rate, spread = getattr(hf, keys.rate), getattr(hf, keys.spread)
        for key, value in ((keys.rate, rate), (keys.spread, spread)):
            finite(key, value)
        if spread <= 0:
            raise CheckpointError(
                f"config.json: {keys.spread} is not positive", expected="a number above 0", found=str(spread)
            )
        if hf.tie_word_embeddings:
            raise CheckpointError(
                f"config.json: a {hf.model_type} with one table for embedding and head is not supported",
                expected="tie_word_embeddings false",
                found="true",
            )
        head_dim = hf.head_dim or hf.hidden_size // hf.num_attention_heads
        return cls(
            rate=rate / spread,
            query=head_dim**0.5 / spread,
            gate=hf.hidden_size**0.25 / spread,
            mlp=hf.hidden_size**0.5,
            logits=1 / spread,
        )
