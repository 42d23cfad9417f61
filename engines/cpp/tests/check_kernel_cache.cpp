// One run of a program that keeps compiled kernels: `gsx_check_kernel_cache ENGINE_SHA256 CAPABILITY FITTING COMPILED`.
// Prints the file's path and the content that the runtime accepted. The runtime accepts what begins with FITTING, and has
// compiled COMPILED in addition when it ends.

#include <iostream>

#include "kernel_cache.h"

int main(int count, char** arguments) {
    if (count != 5) return 2;
    std::filesystem::path const path = gsx::kernelCachePath(arguments[1], arguments[2]);
    std::string const fitting = arguments[3];
    auto const take = [&](std::string const& content) { return content.compare(0, fitting.size(), fitting) == 0; };
    std::string const known = gsx::loadKernels(path, take);
    std::cout << path.string() << "\n" << known << "\n";
    gsx::saveKernels(path, known + arguments[4], known);
    return 0;
}
