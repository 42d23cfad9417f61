// Checking JSON against a schema: only the part of JSON Schema that the manifest's schema uses.
//
// Our own, in place of a library such as pboettch/json-schema-validator, so that the runtime has no dependency beyond
// nlohmann/json.

#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace gsx {

// Where a value violates the schema, e.g. "decoder.num_layers", and how.
struct SchemaFault {
    std::string place;
    std::string reason;
};

// All faults of a value, in the order of the schema. Throws std::logic_error for a schema with an unknown keyword, so that
// no rule goes unchecked.
std::vector<SchemaFault> faultsOf(nlohmann::json const& value, nlohmann::json const& schema);

}  // namespace gsx
