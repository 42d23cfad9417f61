"""Outputs of several calls of a stage as one: of parts of a batch, and of tokens of a sequence one after the other."""

from __future__ import annotations

import numpy as np

from gsx_engines.runners.base import Call, Logits, StageOutput


def in_time(first: StageOutput, second: StageOutput) -> StageOutput:
    """The outputs of two calls on neighbouring tokens of a sequence as one."""
    states = None
    if first.state is not None and second.state is not None:
        states = {name: np.concatenate([value, second.state[name]], axis=-2) for name, value in first.state.items()}
    return StageOutput(
        scores=np.concatenate([first.logits, second.logits], axis=1),
        state=states,
        kept=None if first.kept is None or second.kept is None else first.kept + second.kept,
        kept_by_sequence=(
            None
            if first.kept_by_sequence is None or second.kept_by_sequence is None
            else first.kept_by_sequence + second.kept_by_sequence
        ),
        kept_by_token=(
            None
            if first.kept_by_token is None or second.kept_by_token is None
            else np.concatenate([first.kept_by_token, second.kept_by_token], axis=1)
        ),
    )


def joined_rows(parts: list[tuple[slice, StageOutput]], call: Call, logits: Logits) -> StageOutput:
    """The outputs of calls on parts of a batch as one; rows of no part are zero."""
    batch, length = call.ids.shape
    columns = {"none": 0, "last": 1, "all": length}[logits]
    first = parts[0][1]

    def whole(arrays: list[np.ndarray], columns: int) -> np.ndarray:
        """Arrays whose last axis but one is the tokens, put at the rows of their sequences."""
        tail = arrays[0].shape
        out = np.zeros((batch, *tail[1:-2], columns, tail[-1]), arrays[0].dtype)
        for (rows, _), array in zip(parts, arrays, strict=True):
            out[rows, ..., : array.shape[-2], :] = array
        return out

    states = [output.state for _, output in parts if output.state is not None]
    leaving = {name: whole([state[name] for state in states], length) for name in first.state or ()}
    kept = [output.kept for _, output in parts if output.kept is not None]
    kept_by_sequence = None
    if first.kept_by_sequence is not None:
        kept_by_sequence = np.zeros((batch, *first.kept_by_sequence.shape[1:]), np.int64)
        for rows, output in parts:
            assert output.kept_by_sequence is not None
            kept_by_sequence[rows] = output.kept_by_sequence
    kept_by_token = None
    if first.kept_by_token is not None:
        kept_by_token = np.zeros((batch, length), np.int64)
        for rows, output in parts:
            assert output.kept_by_token is not None
            kept_by_token[rows, : output.kept_by_token.shape[1]] = output.kept_by_token
    return StageOutput(
        scores=whole([output.logits for _, output in parts], columns),
        state=leaving or None,
        kept=np.sum(kept, axis=0) if kept else None,
        kept_by_sequence=kept_by_sequence,
        kept_by_token=kept_by_token,
    )
