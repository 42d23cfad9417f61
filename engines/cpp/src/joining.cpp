#include "joining.h"

#include "token_axis.h"

namespace gsx {

StageOutput joinedPieces(std::vector<StageOutput> const& pieces) {
    StageOutput joined;
    std::vector<Array<float> const*> scores;
    for (StageOutput const& piece : pieces) scores.push_back(&piece.logits);
    joined.logits = joinedTokens(scores);
    for (auto const& [name, first] : pieces.front().state) {
        std::vector<Array<float> const*> parts;
        for (StageOutput const& piece : pieces) parts.push_back(&piece.state.at(name));
        joined.state[name] = joinedTokens(parts);
    }
    joined.kept = pieces.front().kept;
    for (size_t i = 1; i < pieces.size(); ++i) addKept(joined.kept, pieces[i].kept);
    if (pieces.front().keptByToken.data.empty()) return joined;
    std::vector<Array<int64_t> const*> byToken;
    for (StageOutput const& piece : pieces) byToken.push_back(&piece.keptByToken);
    joined.keptByToken = joinedTokens(byToken);
    return joined;
}

StageOutput joinedRows(std::vector<std::pair<int64_t, StageOutput>> const& parts, Call const& call, Logits logits) {
    StageOutput const& first = parts.front().second;
    StageOutput joined;
    auto const whole = [&](auto const& arrayOf, int64_t tokens) {
        Shape shape = arrayOf(first).shape;
        shape[0] = call.batch();
        shape[shape.size() - 2] = tokens;
        Array<float> all(shape);
        for (auto const& [row, output] : parts) putRows(arrayOf(output), all, row);
        return all;
    };
    int64_t const columns = logits == Logits::kNone ? 0 : logits == Logits::kLast ? 1 : call.size();
    joined.logits = whole([](StageOutput const& output) -> Array<float> const& { return output.logits; }, columns);
    for (auto const& entry : first.state) {
        std::string const& name = entry.first;
        joined.state[name] =
            whole([&](StageOutput const& output) -> Array<float> const& { return output.state.at(name); }, call.size());
    }
    joined.kept = first.kept;
    for (size_t i = 1; i < parts.size(); ++i) addKept(joined.kept, parts[i].second.kept);
    if (first.keptByToken.data.empty()) return joined;
    joined.keptByToken = Array<int64_t>({call.batch(), call.size()});
    for (auto const& [row, output] : parts) putRows(output.keptByToken, joined.keptByToken, row);
    return joined;
}

}  // namespace gsx
