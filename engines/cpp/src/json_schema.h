// Checking JSON against a schema: the part of JSON Schema that the manifest's uses, no more.

#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace gsx {

// Where a value breaks the schema, e.g. "decoder.num_layers", and how.
struct SchemaFault {
    std::string place;
    std::string reason;
};

// All faults of a value, in the schema's order. Throws std::logic_error for a schema with a keyword that is not known
// here, so that no rule goes unchecked.
std::vector<SchemaFault> faultsOf(nlohmann::json const& value, nlohmann::json const& schema);

}  // namespace gsx
