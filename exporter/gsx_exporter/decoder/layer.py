"""One decoder layer, written for tracing, in which skipped tokens cost no projections.

Norms, gates and K/V projections run over all tokens. Everything else (Q and output projection, attention rows, MLP)
runs over the kept rows only, which the ops of `gsx_plugins` gather and scatter. Calibration calls the same methods
eagerly, one branch at a time.

States are flat, [N, H]: only K, V and attention have an axis for sequences.

Letters: B batch, S tokens of the call, N = B x S, T = past + S, K kept rows, H hidden, D head, W its rotated part,
F MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gsx_engines.bundle.words import BRANCHES, Branch, KvPolicy
from gsx_exporter.checkpoint.tensors import GATE_SCORE
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.experts import RoutedMlp
from gsx_exporter.decoder.modules import Linear, Mlp, WidenedLinear
from gsx_exporter.decoder.norm import RmsNorm, UnitNorm, norm_of
from gsx_exporter.decoder.rule import (
    BranchInput,
    BranchScore,
    ReplacesSkipped,
    TracedRule,
    Values,
    WatchesBranches,
    own_modules,
)
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.full_attention.op import full_attention
from gsx_plugins.gated_scatter_add.op import gated_scatter_add
from gsx_plugins.gathered_attention.op import gathered_attention
from gsx_plugins.threshold_gather.op import threshold_gather
from gsx_plugins.topk_gather.op import topk_gather


@dataclass(frozen=True)
class DecoderOptions:
    """How to trace a model.

    Args:
        rule: decides which tokens run which branch; None to run everything.
        kv_policy: K and V of skipped tokens: `compute` their own, `copy` those of the layer below, or `none` (zeros
            that are never read).
        dtype: type of weights and activations. Gates are computed in float32 (docs/design.md, section 3).
    """

    rule: TracedRule | None = None
    kv_policy: KvPolicy = "compute"
    dtype: torch.dtype = torch.float32

    def of_layer(self, layer: int) -> DecoderOptions:
        """The options of one layer: without the rule if the rule skips nothing there."""
        reaches = self.rule is None or self.rule.layers is None or layer in self.rule.layers
        return self if reaches else replace(self, rule=None)


class CallState(NamedTuple):
    """Values that are computed once per call and read by every layer.

    Args:
        cos, sin: [1, N, W/2], the rotary tables of the layer's kind of RoPE.
        mask: [B, 1, S, T] bool, true where a token attends to another.
        values: what the keep rule reads at this layer (`TracedRule.values_of`); empty without a rule.
        stream: [N, H], where a loop begins that a token may leave out: the state of the tokens that run it
            (`LoopEntry`); None elsewhere.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor
    values: Values
    stream: Tensor | None = None


class KeyValue(NamedTuple):
    """Keys and values, [B, kv heads, tokens, D]; RoPE is applied to the keys."""

    key: Tensor
    value: Tensor

    def append(self, new: KeyValue) -> KeyValue:
        """These, followed by those of a call's tokens, concatenated as a graph does it."""
        return KeyValue(torch.cat((self.key, new.key), dim=2), torch.cat((self.value, new.value), dim=2))


class Past(Protocol):
    """K/V of the tokens before a call: `KeyValue`, or a cache that is written in place."""

    def append(self, new: KeyValue) -> KeyValue:
        """Add those of the call's tokens. Returns: all keys and values, [B, kv heads, T, D]."""
        ...


@dataclass(frozen=True)
class KeptRows:
    """The rows that a branch runs on.

    Args:
        rows: [K, H], rows of the branch's input.
        index: [K] int64, ascending.
        gate: [K, H] or [K, 1], multiplies the branch's output; None for no gate.
        residual: [N, H], what the result is added to.
        passed: values that the rule passes to the layer's next branch.
    """

    rows: Tensor
    index: Tensor
    gate: Tensor | None
    residual: Tensor
    passed: Values = field(default_factory=dict)


class Gate(nn.Module):
    """A branch's gate: a factor for the branch's output, and the token's score.

    Args: dtype: of a vector gate's weight, which is as large as one of attention's; all is computed in float32.
    """

    def __init__(self, config: ModelConfig, gate: GateConfig, branch: Branch, dtype: torch.dtype) -> None:
        super().__init__()
        # A norm behind the branch makes a small factor large again, with its relative error. That of ONNX Runtime's
        # Sigmoid is 0.002 at -10 and 1 at -20.
        self.relative = config.norms[branch].after is not None
        width, out = config.hidden_size, config.hidden_size if gate.kind == "vector" else 1
        self.linear = WidenedLinear(width, out, True, torch.float32)
        if gate.kind == "vector":
            self.linear.weight = nn.Parameter(torch.empty(width, out, dtype=dtype), requires_grad=False)
        self.scalar, self.by_logit = gate.kind == "scalar", gate.score == "logit"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, H] -> gate [N, H] or [N, 1] float32, score [N] float32."""
        logits = self.linear(x.to(torch.float32))
        gate = torch.reciprocal(1 + torch.exp(-logits)) if self.relative else torch.sigmoid(logits)
        if self.by_logit:
            return gate, logits.reshape(-1)
        return gate, gate.reshape(-1) if self.scalar else gate.mean(dim=-1)


class Attention(nn.Module):
    """Attention's projections and norms; the layer decides which rows go through each. Args: rotates: has RoPE."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, rotates: bool) -> None:
        super().__init__()
        self.rotary_dim, self.rotates = config.rotary_dim, rotates
        # As the attention ops take them: 0 for their default.
        self.scale, self.cap = config.scales.attention or 0.0, config.scales.attention_cap or 0.0
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q, config.qkv_bias, dtype)
        self.k_proj = Linear(config.hidden_size, kv, config.qkv_bias, dtype)
        self.v_proj = Linear(config.hidden_size, kv, config.qkv_bias, dtype)
        self.o_proj = Linear(q, config.hidden_size, config.o_bias, dtype)
        self.q_norm: RmsNorm | UnitNorm | None = None
        self.k_norm: RmsNorm | UnitNorm | None = None
        if config.qk_norm != "none":
            widths = (q, kv) if config.qk_norm == "width" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = (norm_of(config, width, dtype) for width in widths)
        self.gated = config.sphere is not None
        if self.gated:
            self.query_scale = nn.Parameter(torch.empty(q, dtype=dtype), requires_grad=False)
            self.gate_proj = Linear(config.hidden_size, q, False, dtype)
            self.sub_norm = norm_of(config, q, dtype)

    def queries(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """rows [K, H], cos and sin [1, K, W/2] -> [1, K, heads x D], RoPE applied if the layer has it."""
        found = self._rotated(self.q_proj(rows), self.q_norm, cos, sin, self.num_heads)
        return found * self.query_scale if self.gated else found

    def keys(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The same for keys: [1, K, kv heads x D]."""
        return self._rotated(self.k_proj(rows), self.k_norm, cos, sin, self.num_kv_heads)

    def heads(self, x: Tensor, mask: Tensor) -> Tensor:
        """K or V of all tokens (N x kv heads x D elements) in the cache's layout, [B, kv heads, S, D]."""
        return x.view(mask.shape[0], mask.shape[2], self.num_kv_heads, self.head_dim).transpose(1, 2)

    def output(self, attended: Tensor, rows: Tensor) -> Tensor:
        """What the branch gives for attended heads [K, heads x D]. Args: rows: [K, H], the branch's input."""
        if self.gated:
            attended = self.sub_norm(attended * torch.sigmoid(self.gate_proj(rows)))
        return self.o_proj(attended)

    def _rotated(self, x: Tensor, norm: RmsNorm | UnitNorm | None, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        if norm is not None:
            x = norm(x.view(x.shape[0], x.shape[1] // norm.width, norm.width)).view(x.shape)
        if not self.rotates:
            return x.unsqueeze(0)
        part = self.rotary_dim if self.rotary_dim < self.head_dim else 0
        return torch.onnx.ops.rotary_embedding(x.unsqueeze(0), cos, sin, num_heads=heads, rotary_embedding_dim=part)


class DecoderLayer(nn.Module):
    """A decoder layer that does no work for skipped tokens.

    Args:
        config: the model.
        options: keep rule, K/V policy and type.
        number: which of the model's layers it is.
    """

    def __init__(self, config: ModelConfig, options: DecoderOptions, number: int) -> None:
        super().__init__()
        options = options.of_layer(number)
        self.config, self.options, self.rule = config, options, options.rule
        dtype = options.dtype
        for norms in config.norms.values():
            for name in filter(None, (norms.before, norms.after)):
                setattr(self, name, norm_of(config, config.hidden_size, dtype))
        self.self_attn = Attention(config, dtype, rotates=config.rotary[number] is not None)
        self.mlp: RoutedMlp | Mlp
        if config.is_routed(number):
            assert config.experts is not None
            self.mlp = RoutedMlp(config.experts, config.hidden_size, dtype)
        else:
            width = config.intermediate_size
            inner = norm_of(config, width, dtype) if config.sphere is not None else None
            self.mlp = Mlp(config.hidden_size, width, config.mlp_bias, dtype, config.activation, inner)
        if config.sphere is not None:
            for branch in BRANCHES:
                rate = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype), requires_grad=False)
                self.register_parameter(f"{branch}_rate", rate)
        for branch in config.gated_branches:
            assert config.gate is not None
            setattr(self, f"{branch}_gate", Gate(config, config.gate, branch, dtype))
            if config.gate.score == "linear":
                setattr(self, f"{branch}_{GATE_SCORE}", Linear(config.hidden_size, 1, True, torch.float32))
        self.skippable = options.rule.branches if options.rule is not None else ()
        self._own = own_modules(options.rule, config) if options.rule is not None else {}
        for name, module in self._own.items():
            setattr(self, name, module)
        skips_attention = "attn" in self.skippable
        self.copies_below = config.below(number) >= 0 and options.kv_policy == "copy" and skips_attention
        self.drops_kv = options.kv_policy == "none" and skips_attention
        # Where a loop begins that a token may leave out, the tokens that run it have another state (`LoopEntry`).
        self.begins_loop = config.enters_loop(number) and skips_attention

    def forward(
        self, hidden: Tensor, call: CallState, past: Past, below: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue, KeyValue, Values]:
        """Run both branches.

        Args: hidden [N, H]; call, past: what all layers read, and this layer's cache; below: K/V of the layer below,
            with the K/V policy `copy`.
        Returns: hidden [N, H]; the cache with this call's K/V appended; only this call's K/V; and what the keep rule
            reads from here on, `call.values` with the carried states updated.
        """
        hidden, present, new, values = self.attention_branch(hidden, call, past, below)
        hidden, values = self.mlp_branch(hidden, call._replace(values=values))
        return hidden, present, new, values

    def attention_branch(
        self, hidden: Tensor, call: CallState, past: Past, below: KeyValue | None, kept: KeptRows | None = None
    ) -> tuple[Tensor, KeyValue, KeyValue, Values]:
        """The attention branch; see `forward`. `kept` replaces the rows that the rule keeps (for calibration)."""
        normed = self.normed("attn", hidden if call.stream is None else call.stream)
        attn = self.self_attn
        if "attn" not in self.skippable:
            new = self._keys_and_values(normed, call)
            present = past.append(new)
            batch, _, length, _ = call.mask.shape
            query = attn.queries(normed, call.cos, call.sin).view(batch, length, attn.num_heads * attn.head_dim)
            rows = full_attention(query, present.key, present.value, call.mask, attn.num_heads, attn.scale, attn.cap)
            out = attn.output(rows.view(hidden.shape[0], query.shape[2]), normed)
            return self._add_all("attn", hidden, normed, out), present, new, call.values

        kept = kept or self.choose("attn", hidden, normed, call)
        cos, sin = call.cos.index_select(1, kept.index), call.sin.index_select(1, kept.index)
        if self.copies_below or self.drops_kv:
            own = KeyValue(attn.keys(kept.rows, cos, sin)[0], attn.v_proj(kept.rows))
            if self.drops_kv:
                below = _no_kv(hidden, call, attn)
            assert below is not None
            new = KeyValue(_replace(below.key, own.key, kept.index), _replace(below.value, own.value, kept.index))
        else:
            new = self._keys_and_values(normed, call)
        present = past.append(new)
        query = attn.queries(kept.rows, cos, sin)[0]
        mask = call.mask
        if self.drops_kv and self.rule is not None and self.rule.hides_skipped:
            # The cache has zeros for skipped tokens; a computed key is never all zeros.
            has_kv = (present.key[:, 0] != 0).any(dim=-1)
            mask = mask & has_kv[:, None, None, :]
        attended = gathered_attention(
            query, kept.index, present.key, present.value, mask, attn.num_heads, attn.scale, attn.cap
        )
        hidden, values = self._add("attn", hidden, attn.output(attended, kept.rows), kept, call)
        return hidden, present, new, values

    def _keys_and_values(self, normed: Tensor, call: CallState) -> KeyValue:
        attn = self.self_attn
        key = attn.heads(attn.keys(normed, call.cos, call.sin), call.mask)
        return KeyValue(key, attn.heads(attn.v_proj(normed), call.mask))

    def mlp_branch(self, hidden: Tensor, call: CallState, kept: KeptRows | None = None) -> tuple[Tensor, Values]:
        """The MLP branch: hidden [N, H] -> the same, and what the rule reads from here on. `kept` as above."""
        normed = self.normed("mlp", hidden)
        if "mlp" not in self.skippable:
            return self._add_all("mlp", hidden, normed, self.mlp(normed)), call.values
        kept = kept or self.choose("mlp", hidden, normed, call)
        return self._add("mlp", hidden, self.mlp(kept.rows), kept, call)

    def gate(self, branch: Branch, hidden: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The checkpoint's gate for some tokens: gate [.., H] or [.., 1] and score [..], float32."""
        assert self.config.gate is not None
        source = normed if self.config.gate.input == "post_norm" else hidden
        gate: tuple[Tensor, Tensor] = getattr(self, f"{branch}_gate")(source)
        return gate

    def _scored(self, branch: Branch, hidden: Tensor, normed: Tensor) -> tuple[Tensor | None, Tensor]:
        """What a rule reads of the checkpoint's gate: as `gate`, or None and a score that needs no gate."""
        assert self.config.gate is not None
        if self.config.gate.score != "linear":
            return self.gate(branch, hidden, normed)
        source = normed if self.config.gate.input == "post_norm" else hidden
        score: Tensor = getattr(self, f"{branch}_{GATE_SCORE}")(source.to(torch.float32))
        return None, score.reshape(-1)

    def normed(self, branch: Branch, hidden: Tensor) -> Tensor:
        """The branch's normalized input, [N, H]; the residual stream itself if no norm comes before the branch."""
        name = self.config.norms[branch].before
        out: Tensor = getattr(self, name)(hidden) if name else hidden
        return out

    def choose(self, branch: Branch, hidden: Tensor, normed: Tensor, call: CallState) -> KeptRows:
        """The rows that the branch runs on, as the keep rule decides."""
        assert self.rule is not None
        x = self.branch_input(branch, hidden, normed)
        return self.kept_by(self.rule.score(x, call.values), x, call)

    def branch_input(self, branch: Branch, hidden: Tensor, normed: Tensor) -> BranchInput:
        """The branch input that the rule reads."""
        return BranchInput(branch, hidden, normed, lambda: self._scored(branch, hidden, normed), self._own)

    def kept_by(self, score: BranchScore, x: BranchInput, call: CallState) -> KeptRows:
        """The rows whose score exceeds the bound; with selection by rank, the best ones."""
        assert self.rule is not None
        branch, hidden, normed = x.branch, x.hidden, x.normed
        gather = topk_gather if self.rule.by_rank else threshold_gather
        rows, index, _ = gather(normed, score.score, score.bound)
        residual = self.rule.skipped(x, score, call.values) if isinstance(self.rule, ReplacesSkipped) else hidden
        stream = self._stream(branch, hidden, normed, call)
        if stream is not hidden:
            residual = torch.where((score.score > score.bound).unsqueeze(1), stream, residual)
        gate = None
        if score.gate is not None:
            gate = score.gate.index_select(0, index).to(rows.dtype)
        elif branch in self.config.gated_branches:
            gate = self.gate(branch, hidden.index_select(0, index), rows)[0].to(rows.dtype)
        return KeptRows(rows, index, gate, residual, score.passed)

    def _add_all(self, branch: Branch, hidden: Tensor, normed: Tensor, out: Tensor) -> Tensor:
        """Add a branch's output for all tokens, multiplied by the checkpoint's gate if the branch has one."""
        if branch in self.config.gated_branches:
            out = self.gate(branch, hidden, normed)[0].to(out.dtype) * out
        stream = hidden if self.config.sphere is None else normed
        return stream + self._normed_after(branch, out, normed)

    def _stream(self, branch: Branch, hidden: Tensor, normed: Tensor, call: CallState) -> Tensor:
        """The state that a kept token's result is added to, [N, H]; for a skipped one it stays `hidden`."""
        if self.config.sphere is not None:
            return normed
        return call.stream if call.stream is not None and branch == "attn" else hidden

    def _normed_after(self, branch: Branch, out: Tensor, normed: Tensor) -> Tensor:
        """What a branch adds: its output, multiplied by its gate, behind the norm after the branch if there is one.

        In a normalized Transformer, what takes the state a part of the way to that. Args: normed: the branch's input.
        """
        name = self.config.norms[branch].after
        found: Tensor = getattr(self, name)(out) if name else out
        if self.config.sphere is None:
            return found
        rate: Tensor = getattr(self, f"{branch}_rate")
        return rate * (found - normed)

    def _add(
        self, branch: Branch, hidden: Tensor, rows: Tensor, kept: KeptRows, call: CallState
    ) -> tuple[Tensor, Values]:
        """Add a branch's output for the kept rows. Returns: the states, and what the rule reads from here on."""
        assert self.rule is not None
        gate = kept.gate
        if self.config.norms[branch].after:
            rows, gate = self._normed_after(branch, rows if gate is None else gate * rows, kept.rows), None
        if gate is None:
            gate = rows.new_ones(rows.shape[0], 1)
        after = gated_scatter_add(kept.residual, rows, gate, kept.index)
        values = {**call.values, **kept.passed}
        if isinstance(self.rule, WatchesBranches):
            values |= self.rule.after(branch, hidden, after, kept.index, values)
        return after, values


def _no_kv(hidden: Tensor, call: CallState, attn: Attention) -> KeyValue:
    """K and V of skipped tokens with the K/V policy `none`: zeros, [B, kv heads, S, D]."""
    batch, _, length, _ = call.mask.shape
    zeros = hidden.new_zeros(batch, attn.num_kv_heads, length, attn.head_dim)
    return KeyValue(zeros, zeros)


def _replace(below: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """K or V of the layer below [B, kv heads, S, D], with the kept tokens replaced by their own [K, kv heads x D]."""
    batch, heads, length, width = below.shape
    flat = below.transpose(1, 2).reshape(batch * length, heads * width)
    return flat.index_copy(0, index, rows).view(batch, length, heads, width).transpose(1, 2)
