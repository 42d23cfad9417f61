// The attention of a step in float16.

#include "step_attention/launch.cuh"

gsx_status gsx::attendInFloat16(const gsx_attention& given, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
    return attendIn<__half>(given, plan, scratch, stream);
}
