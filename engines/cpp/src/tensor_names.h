// Names of the engines' inputs and outputs, with shape and type: here once for the C++ runtime. Those of the graphs are as
// in gsx_engines/bundle/tensor_names.py, those that only lowered graphs have as in gsx_engines/lowering/tensorrt.py.
//
// B: sequences, S: tokens of each in the call, W: columns of the window, C: capacity of the K/V buffers, L: layers,
// D: head size, V: vocabulary, O: tokens whose logits are wanted (1 or S).

#pragma once

#include <cstdint>
#include <string>

namespace gsx::names {

// Inputs.
inline constexpr char const* kInputIds = "input_ids";            // [B, S] int64
inline constexpr char const* kAttentionMask = "attention_mask";  // [B, W] int64: 1 for a column to read
inline constexpr char const* kPositionIds = "position_ids";      // [B, S] int64
inline constexpr char const* kWriteAt = "write_at";              // [B] int64: column of a sequence's first new token
inline constexpr char const* kLogitsAt = "logits_at";            // [B, O] int64: rows of [B x S] whose logits are wanted

// Run-time inputs of keep rules.
inline constexpr char const* kThresholds = "thresholds";         // [B, L, 2] float32: attn, mlp
inline constexpr char const* kBudget = "budget";                 // [] float32
inline constexpr char const* kCount = "k";                       // [1] int64: replaces the budget where the host counts K
inline constexpr char const* kLayerMask = "layer_mask";          // [B, L, 2] float32: 1 runs, 0 skips
inline constexpr char const* kFullUntil = "full_until";          // [B] int64
inline constexpr char const* kExitThreshold = "exit_threshold";  // [B] float32
inline constexpr char const* kLoops = "loops";                   // [B] int64: how many loops run

// Where the host decides on the branches of whole calls: `run.3.mlp`, whose size is the number of rows that the branch runs
// on, all or none. Nobody reads its content.
inline constexpr char const* kRun = "run.";

// Outputs.
inline constexpr char const* kLogits = "logits";  // [B, O, V] float32
inline constexpr char const* kKept = "kept";      // [skippable branches of the graph] int64: rows that each of them kept
inline constexpr char const* kKeptByToken = "kept_by_token";  // [B, S] int64: how many of these branches kept each token

// Of a step: the C likeliest tokens, their logits, and the sum of exp(logit - largest) over all tokens.
inline constexpr char const* kLikelyIds = "likely_ids";        // [B, S, C] int64
inline constexpr char const* kLikelyLogits = "likely_logits";  // [B, S, C] float32
inline constexpr char const* kLikelyTotal = "likely_total";    // [B, S] float32

// K and V of one layer, `past_key_values.3.key` and `present.3.key`: [B, K/V heads, C, D], sharing one buffer.
inline constexpr char const* kPast = "past_key_values.";
inline constexpr char const* kPresent = "present.";

// Name of the value inside a graph with the numbers of the rows kept by a branch, [K] int64: `layers.3.mlp.index`.
inline std::string keptIndex(int64_t layer, char const* branch) {
    return "layers." + std::to_string(layer) + "." + branch + ".index";
}

inline bool isPast(std::string const& name) { return name.rfind(kPast, 0) == 0; }
inline bool isPresent(std::string const& name) { return name.rfind(kPresent, 0) == 0; }

// Name of the output that continues a K/V input, and of the input that a K/V output continues.
inline std::string presentAfter(std::string const& past) { return kPresent + past.substr(std::string(kPast).size()); }
inline std::string pastBefore(std::string const& present) { return kPast + present.substr(std::string(kPresent).size()); }

}  // namespace gsx::names
