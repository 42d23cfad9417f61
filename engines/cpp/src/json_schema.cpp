#include "json_schema.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string_view>

namespace gsx {
namespace {

using nlohmann::json;

// Keywords that do not restrict values ("$defs" holds the targets of references; "not" only keeps a tagged form from the
// names of the other forms).
constexpr std::array<std::string_view, 5> kSilent = {"$defs", "title", "description", "default", "not"};
constexpr std::array<std::string_view, 19> kChecked = {
    "$ref",     "anyOf",      "oneOf",    "discriminator", "type",    "const",   "enum",        "properties", "required",
    "maxItems", "minItems",   "items",    "prefixItems",   "maximum", "minimum", "exclusiveMinimum", "pattern",
    "additionalProperties",   "patternProperties"};

template <size_t N>
bool contains(std::array<std::string_view, N> const& names, std::string_view name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

bool hasType(json const& value, std::string const& type) {
    if (type == "object") return value.is_object();
    if (type == "array") return value.is_array();
    if (type == "string") return value.is_string();
    if (type == "number") return value.is_number();
    if (type == "null") return value.is_null();
    if (type == "boolean") return value.is_boolean();
    if (type != "integer") throw std::logic_error("schema: unknown type " + type);
    // Whole numbers are int64 everywhere in gsx.
    return value.is_number_integer() &&
           !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()});
}

// The manifest's schema has two patterns, a hash and a bare file name; any other one is an error until it is added here.
// (std::regex is no alternative: it recurses as deep as the text is long.)
bool matches(std::string const& text, std::string const& pattern) {
    constexpr char const* kHex = "0123456789abcdef";
    constexpr char const* kName = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-";
    if (pattern == "^[0-9a-f]{64}$") {
        return text.size() == 64 && text.find_first_not_of(kHex) == std::string::npos;
    }
    if (pattern == "^[A-Za-z0-9_][A-Za-z0-9_.-]*$") {
        return !text.empty() && text[0] != '.' && text[0] != '-' && text.find_first_not_of(kName) == std::string::npos;
    }
    throw std::logic_error("schema: unknown pattern " + pattern);
}

std::string joined(std::string const& place, std::string const& part) { return place.empty() ? part : place + "." + part; }

class Checker {
public:
    explicit Checker(json const& root) : mRoot(root) {}

    std::vector<SchemaFault> faults;

    void check(json const& value, json const& schema, std::string const& place) {
        for (auto const& [keyword, rule] : schema.items()) {
            static_cast<void>(rule);
            if (!contains(kSilent, keyword) && !contains(kChecked, keyword)) {
                throw std::logic_error("schema: unknown keyword " + keyword);
            }
        }
        if (schema.contains("$ref")) check(value, referred(schema["$ref"].get<std::string>()), place);
        if (schema.contains("anyOf")) checkAny(value, schema["anyOf"], place);
        if (schema.contains("oneOf")) checkTagged(value, schema, place);
        if (schema.contains("type") && !hasType(value, schema["type"].get<std::string>())) {
            add(place, "must be of type " + schema["type"].get<std::string>());
            return;
        }
        if (schema.contains("const") && value != schema["const"]) add(place, "must be " + schema["const"].dump());
        if (schema.contains("enum") && std::find(schema["enum"].begin(), schema["enum"].end(), value) == schema["enum"].end()) {
            add(place, "must be one of " + schema["enum"].dump());
        }
        if (value.is_string() && schema.contains("pattern")) checkPattern(value, schema["pattern"], place);
        if (value.is_number()) checkRange(value.get<double>(), schema, place);
        if (value.is_array()) checkItems(value, schema, place);
        if (value.is_object()) checkProperties(value, schema, place);
    }

private:
    json const& referred(std::string const& reference) const { return mRoot.at(json::json_pointer(reference.substr(1))); }

    void add(std::string const& place, std::string const& reason) { faults.push_back({place, reason}); }

    // If no form matches, report the faults of the closest one: the one with the fewest.
    void checkAny(json const& value, json const& forms, std::string const& place) {
        std::vector<SchemaFault> nearest;
        for (json const& form : forms) {
            Checker attempt(mRoot);
            attempt.check(value, form, place);
            if (attempt.faults.empty()) return;
            bool const absent = form.value("type", "") == "null";  // a value that is present was never meant to be null
            if (nearest.empty() || (!absent && attempt.faults.size() < nearest.size())) nearest = attempt.faults;
        }
        faults.insert(faults.end(), nearest.begin(), nearest.end());
    }

    void checkTagged(json const& value, json const& schema, std::string const& place) {
        std::string const tag = schema.at("discriminator").at("propertyName");
        json const& forms = schema.at("discriminator").at("mapping");
        bool const named = value.is_object() && value.contains(tag) && value[tag].is_string();
        if (named && forms.contains(value[tag].get<std::string>())) {
            check(value, referred(forms.at(value[tag].get<std::string>())), place);
            return;
        }
        // A form that no name is mapped to takes all other names.
        for (json const& form : schema["oneOf"]) {
            bool const mapped = std::any_of(forms.begin(), forms.end(), [&](json const& one) { return one == form["$ref"]; });
            if (named && !mapped) {
                check(value, referred(form["$ref"].get<std::string>()), place);
                return;
            }
        }
        add(joined(place, tag), "must name one of the known kinds");
    }

    void checkPattern(std::string const& text, std::string const& pattern, std::string const& place) {
        if (!matches(text, pattern)) add(place, "does not match " + pattern);
    }

    // Pydantic writes the rule for a mapping's keys as a single pattern, and refuses all keys that do not match it.
    void checkNames(json const& value, json const& patterns, std::string const& place) {
        for (auto const& [pattern, rule] : patterns.items()) {
            for (auto const& [name, member] : value.items()) {
                checkPattern(name, pattern, joined(place, name));
                check(member, rule, joined(place, name));
            }
        }
    }

    void checkRange(double value, json const& schema, std::string const& place) {
        if (schema.contains("maximum") && value > schema["maximum"].get<double>()) {
            add(place, "must be at most " + schema["maximum"].dump());
        }
        if (schema.contains("minimum") && value < schema["minimum"].get<double>()) {
            add(place, "must be at least " + schema["minimum"].dump());
        }
        if (schema.contains("exclusiveMinimum") && value <= schema["exclusiveMinimum"].get<double>()) {
            add(place, "must be above " + schema["exclusiveMinimum"].dump());
        }
    }

    void checkItems(json const& value, json const& schema, std::string const& place) {
        if ((schema.contains("minItems") && value.size() < schema["minItems"].get<size_t>()) ||
            (schema.contains("maxItems") && value.size() > schema["maxItems"].get<size_t>())) {
            add(place, "has the wrong number of items");
            return;
        }
        size_t const first = schema.contains("prefixItems") ? schema["prefixItems"].size() : 0;
        for (size_t i = 0; i < value.size(); ++i) {
            std::string const item = joined(place, std::to_string(i));
            if (i < first) {
                check(value[i], schema["prefixItems"][i], item);
            } else if (schema.contains("items")) {
                check(value[i], schema["items"], item);
            }
        }
    }

    void checkProperties(json const& value, json const& schema, std::string const& place) {
        if (schema.contains("patternProperties")) {
            checkNames(value, schema["patternProperties"], place);
            return;
        }
        json const known = schema.value("properties", json::object());
        for (json const& name : schema.value("required", json::array())) {
            if (!value.contains(name.get<std::string>())) add(joined(place, name), "is missing");
        }
        json const others = schema.value("additionalProperties", json(true));
        for (auto const& [name, member] : value.items()) {
            if (known.contains(name)) {
                check(member, known[name], joined(place, name));
            } else if (others.is_object()) {
                check(member, others, joined(place, name));
            } else if (!others.get<bool>()) {
                add(joined(place, name), "is not known");
            }
        }
    }

    json const& mRoot;
};

}  // namespace

std::vector<SchemaFault> faultsOf(json const& value, json const& schema) {
    Checker checker(schema);
    checker.check(value, schema, "");
    return checker.faults;
}

}  // namespace gsx
