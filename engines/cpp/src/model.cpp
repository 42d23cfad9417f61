#include "gsx/model.h"

#include <utility>

#include "draft.h"
#include "loop.h"
#include "runner.h"

namespace gsx {
namespace {

// The draft to use; unset for plain decoding.
std::optional<DraftKind> chosenDraft(Manifest const& manifest, Drafting const& drafting) {
    if (!drafting.speculative) {
        if (drafting.draft) throw UsageError("both plain decoding and a draft were requested", {"one of them", {}, {}});
        return std::nullopt;
    }
    if (drafting.draft) {
        DraftKind draft = parseDraft(*drafting.draft);
        checkDraft(draft, manifest);
        return draft;
    }
    if (manifest.draft) return manifest.draft->draft;
    return std::nullopt;
}

}  // namespace

// The stages refer to the bundle and the entries, so all are kept together and never move.
struct Model::Parts {
    Bundle bundle;
    EngineEntry entry;
    std::vector<EngineEntry> stepEntries;
    std::optional<DraftKind> kind;
    std::unique_ptr<Runner> runner;
    std::unique_ptr<Draft> draft;

    std::unique_ptr<Stage> stage(std::string const& graph, MakeEngine const& makeEngine,
                                 std::vector<Engines> const& steps) const {
        std::unique_ptr<Engine> engine = makeEngine(graph);
        std::vector<StepEngine> made;
        for (size_t i = 0; i < steps.size(); ++i) {
            if (std::unique_ptr<Engine> step = steps[i].make(graph)) made.push_back({stepEntries[i], std::move(step)});
        }
        return std::make_unique<Stage>(bundle.manifest, entry, graph, std::move(engine), std::move(made));
    }
};

Model::Model(Bundle bundle, EngineEntry entry, MakeEngine const& makeEngine, Drafting const& drafting,
             std::vector<Engines> const& steps)
    : mParts(std::make_unique<Parts>(Parts{std::move(bundle), std::move(entry), {}, {}, {}, {}})) {
    Parts& parts = *mParts;
    for (Engines const& set : steps) parts.stepEntries.push_back(set.entry);
    auto const stage = [&](char const* graph) { return parts.stage(graph, makeEngine, steps); };
    parts.kind = chosenDraft(parts.bundle.manifest, drafting);
    if (parts.kind && std::holds_alternative<ExitDraft>(*parts.kind)) {
        auto runner = std::make_unique<SplitRunner>(stage("draft"), stage("verify"));
        parts.draft = std::make_unique<EarlyExitDraft>(*runner);
        parts.runner = std::move(runner);
        return;
    }
    parts.runner = std::make_unique<WholeRunner>(stage("model"));
    if (parts.kind) parts.draft = std::make_unique<FullDepthDraft>(*parts.runner, *parts.kind);
}

Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

Bundle const& Model::bundle() const { return mParts->bundle; }

std::optional<DraftKind> Model::draft() const { return mParts->kind; }

Generation Model::generate(std::vector<Tokens> const& prompts, Options const& options) {
    std::optional<DraftEntry> const& own = mParts->bundle.manifest.draft;
    std::optional<int64_t> first;
    if (own && mParts->kind && own->draft == *mParts->kind) first = own->length;
    return gsx::generate(*mParts->runner, mParts->draft.get(), first, prompts, options);
}

}  // namespace gsx
