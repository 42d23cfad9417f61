// Opens a bundle and finds its engines for a machine that the arguments describe, as a loader does before it uses a GPU:
// `gsx_check_bundle DIRECTORY BACKEND TENSORRT_VERSION GPU CAPABILITY GRAPH [PLUGIN_LIBRARY]`.
// Prints the engine's directory and size, or the error; exit code 1 for an error of gsx.

#include <iostream>

#include "gsx/bundle.h"
#include "loading.h"

int main(int count, char** arguments) {
    if (count < 7) return 2;
    std::optional<std::filesystem::path> plugins;
    if (count > 7) plugins = arguments[7];
    std::string const backend = arguments[2];
    try {
        gsx::Bundle const bundle = gsx::openBundle(arguments[1]);
        gsx::Machine const machine{arguments[3], gsx::platformName(), arguments[4], arguments[5]};
        gsx::EngineSet const engines = gsx::findEngines(bundle, backend, machine, plugins);
        std::string const plan = gsx::readEngine(engines, arguments[6], gsx::buildCommand(bundle, backend));
        std::cout << engines.directory.string() << " " << plan.size() << "\n";
    } catch (gsx::Error const& error) {
        std::cout << error.what() << "\n";
        return 1;
    }
    return 0;
}
