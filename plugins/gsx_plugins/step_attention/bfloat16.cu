// The attention of a step in bfloat16.

#include "step_attention/launch.cuh"

gsx_status gsx::attendInBfloat16(const gsx_attention& given, const Plan& plan, const Scratch& scratch, cudaStream_t stream) {
    return attendIn<__nv_bfloat16>(given, plan, scratch, stream);
}
