// The part of TensorRT's interface that gsx does not call. The public classes call it through virtual functions, so a
// library must define them all. Versions differ; where one does not have a function, it is an ordinary function there.

#pragma once

#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>

namespace nvinfer1 {
// From versions later than 10.8.
class IRuntimeConfig;
enum class EngineStat : int32_t;
}  // namespace nvinfer1

namespace standin {

using namespace nvinfer1;

[[noreturn]] inline void uncalled(char const* function) noexcept {
    std::fprintf(stderr, "the stand-in for TensorRT has no %s\n", function);
    std::abort();
}
#define STANDIN_UNCALLED(...) \
    __VA_ARGS__ { uncalled(#__VA_ARGS__); }

struct RestOfRuntime : apiv::VRuntime {
    STANDIN_UNCALLED(ICudaEngine* deserializeCudaEngine(IStreamReader&) noexcept)
    STANDIN_UNCALLED(ICudaEngine* deserializeCudaEngineV2(IStreamReaderV2&) noexcept)
    STANDIN_UNCALLED(int32_t getDLACore() const noexcept)
    STANDIN_UNCALLED(bool getEngineHostCodeAllowed() const noexcept)
    STANDIN_UNCALLED(IErrorRecorder* getErrorRecorder() const noexcept)
    STANDIN_UNCALLED(ILogger* getLogger() const noexcept)
    STANDIN_UNCALLED(int32_t getMaxThreads() const noexcept)
    STANDIN_UNCALLED(int32_t getNbDLACores() const noexcept)
    STANDIN_UNCALLED(TempfileControlFlags getTempfileControlFlags() const noexcept)
    STANDIN_UNCALLED(char const* getTemporaryDirectory() const noexcept)
    STANDIN_UNCALLED(IRuntime* loadRuntime(char const*) noexcept)
    STANDIN_UNCALLED(void setDLACore(int32_t) noexcept)
    STANDIN_UNCALLED(void setEngineHostCodeAllowed(bool) noexcept)
    STANDIN_UNCALLED(void setErrorRecorder(IErrorRecorder*) noexcept)
    STANDIN_UNCALLED(void setGpuAllocator(IGpuAllocator*) noexcept)
    STANDIN_UNCALLED(bool setMaxThreads(int32_t) noexcept)
    STANDIN_UNCALLED(void setPluginRegistryParent(IPluginRegistry*) noexcept)
    STANDIN_UNCALLED(void setTempfileControlFlags(TempfileControlFlags) noexcept)
    STANDIN_UNCALLED(void setTemporaryDirectory(char const*) noexcept)
};

struct RestOfEngine : apiv::VCudaEngine {
    STANDIN_UNCALLED(IEngineInspector* createEngineInspector() const noexcept)
    STANDIN_UNCALLED(IExecutionContext* createExecutionContextWithRuntimeConfig(IRuntimeConfig*) noexcept)
    STANDIN_UNCALLED(IExecutionContext* createExecutionContextWithoutDeviceMemory() noexcept)
    STANDIN_UNCALLED(IRefitter* createRefitter(ILogger&) noexcept)
    STANDIN_UNCALLED(IRuntimeConfig* createRuntimeConfig() noexcept)
    STANDIN_UNCALLED(ISerializationConfig* createSerializationConfig() noexcept)
    STANDIN_UNCALLED(char const* getAliasedInputTensor(char const*) const noexcept)
    STANDIN_UNCALLED(size_t getDeviceMemorySize() const noexcept)
    STANDIN_UNCALLED(size_t getDeviceMemorySizeForProfile(int32_t) const noexcept)
    STANDIN_UNCALLED(int64_t getDeviceMemorySizeForProfileV2(int32_t) const noexcept)
    STANDIN_UNCALLED(EngineCapability getEngineCapability() const noexcept)
    STANDIN_UNCALLED(int64_t getEngineStat(EngineStat) const noexcept)
    STANDIN_UNCALLED(IErrorRecorder* getErrorRecorder() const noexcept)
    STANDIN_UNCALLED(HardwareCompatibilityLevel getHardwareCompatibilityLevel() const noexcept)
    STANDIN_UNCALLED(int64_t getMinimumWeightStreamingBudget() const noexcept)
    STANDIN_UNCALLED(char const* getName() const noexcept)
    STANDIN_UNCALLED(int32_t getNbAuxStreams() const noexcept)
    STANDIN_UNCALLED(int32_t getNbLayers() const noexcept)
    STANDIN_UNCALLED(int32_t getNbOptimizationProfiles() const noexcept)
    STANDIN_UNCALLED(Dims getProfileShape(char const*, int32_t, OptProfileSelector) const noexcept)
    STANDIN_UNCALLED(int32_t const* getProfileTensorValues(char const*, int32_t, OptProfileSelector) const noexcept)
    STANDIN_UNCALLED(int64_t const* getProfileTensorValuesV2(char const*, int32_t, OptProfileSelector) const noexcept)
    STANDIN_UNCALLED(ProfilingVerbosity getProfilingVerbosity() const noexcept)
    STANDIN_UNCALLED(int64_t getStreamableWeightsSize() const noexcept)
    STANDIN_UNCALLED(TacticSources getTacticSources() const noexcept)
    STANDIN_UNCALLED(int32_t getTensorBytesPerComponent(char const*) const noexcept)
    STANDIN_UNCALLED(int32_t getTensorBytesPerComponentV2(char const*, int32_t) const noexcept)
    STANDIN_UNCALLED(int32_t getTensorComponentsPerElement(char const*) const noexcept)
    STANDIN_UNCALLED(int32_t getTensorComponentsPerElementV2(char const*, int32_t) const noexcept)
    STANDIN_UNCALLED(TensorFormat getTensorFormat(char const*) const noexcept)
    STANDIN_UNCALLED(char const* getTensorFormatDesc(char const*) const noexcept)
    STANDIN_UNCALLED(char const* getTensorFormatDescV2(char const*, int32_t) const noexcept)
    STANDIN_UNCALLED(TensorFormat getTensorFormatV2(char const*, int32_t) const noexcept)
    STANDIN_UNCALLED(Dims getTensorShape(char const*) const noexcept)
    STANDIN_UNCALLED(int32_t getTensorVectorizedDim(char const*) const noexcept)
    STANDIN_UNCALLED(int32_t getTensorVectorizedDimV2(char const*, int32_t) const noexcept)
    STANDIN_UNCALLED(int64_t getWeightStreamingAutomaticBudget() const noexcept)
    STANDIN_UNCALLED(int64_t getWeightStreamingBudget() const noexcept)
    STANDIN_UNCALLED(int64_t getWeightStreamingBudgetV2() const noexcept)
    STANDIN_UNCALLED(int64_t getWeightStreamingScratchMemorySize() const noexcept)
    STANDIN_UNCALLED(bool hasImplicitBatchDimension() const noexcept)
    STANDIN_UNCALLED(bool isDebugTensor(char const*) const noexcept)
    STANDIN_UNCALLED(bool isRefittable() const noexcept)
    STANDIN_UNCALLED(bool isShapeInferenceIO(char const*) const noexcept)
    STANDIN_UNCALLED(IHostMemory* serialize() const noexcept)
    STANDIN_UNCALLED(IHostMemory* serializeWithConfig(ISerializationConfig&) const noexcept)
    STANDIN_UNCALLED(void setErrorRecorder(IErrorRecorder*) noexcept)
    STANDIN_UNCALLED(bool setWeightStreamingBudget(int64_t) noexcept)
    STANDIN_UNCALLED(bool setWeightStreamingBudgetV2(int64_t) noexcept)
};

struct RestOfContext : apiv::VExecutionContext {
    STANDIN_UNCALLED(bool allInputDimensionsSpecified() const noexcept)
    STANDIN_UNCALLED(bool allInputShapesSpecified() const noexcept)
    STANDIN_UNCALLED(bool executeV2(void* const*) noexcept)
    STANDIN_UNCALLED(IDebugListener* getDebugListener() noexcept)
    STANDIN_UNCALLED(bool getDebugState(char const*) const noexcept)
    STANDIN_UNCALLED(bool getDebugSync() const noexcept)
    STANDIN_UNCALLED(ICudaEngine const& getEngine() const noexcept)
    STANDIN_UNCALLED(bool getEnqueueEmitsProfile() const noexcept)
    STANDIN_UNCALLED(IErrorRecorder* getErrorRecorder() const noexcept)
    STANDIN_UNCALLED(cudaEvent_t getInputConsumedEvent() const noexcept)
    STANDIN_UNCALLED(int64_t getMaxOutputSize(char const*) const noexcept)
    STANDIN_UNCALLED(char const* getName() const noexcept)
    STANDIN_UNCALLED(ProfilingVerbosity getNvtxVerbosity() const noexcept)
    STANDIN_UNCALLED(int32_t getOptimizationProfile() const noexcept)
    STANDIN_UNCALLED(IOutputAllocator* getOutputAllocator(char const*) noexcept)
    STANDIN_UNCALLED(void* getOutputTensorAddress(char const*) const noexcept)
    STANDIN_UNCALLED(size_t getPersistentCacheLimit() const noexcept)
    STANDIN_UNCALLED(IProfiler* getProfiler() const noexcept)
    STANDIN_UNCALLED(IRuntimeConfig* getRuntimeConfig() const noexcept)
    STANDIN_UNCALLED(IGpuAllocator* getTemporaryStorageAllocator() const noexcept)
    STANDIN_UNCALLED(void const* getTensorAddress(char const*) const noexcept)
    STANDIN_UNCALLED(Dims getTensorShape(char const*) const noexcept)
    STANDIN_UNCALLED(Dims getTensorStrides(char const*) const noexcept)
    STANDIN_UNCALLED(bool getUnfusedTensorsDebugState() const noexcept)
    STANDIN_UNCALLED(int32_t inferShapes(int32_t, char const**) noexcept)
    STANDIN_UNCALLED(bool reportToProfiler() const noexcept)
    STANDIN_UNCALLED(bool setAllTensorsDebugState(bool) noexcept)
    STANDIN_UNCALLED(void setAuxStreams(cudaStream_t*, int32_t) noexcept)
    STANDIN_UNCALLED(bool setCommunicator(void*) noexcept)
    STANDIN_UNCALLED(bool setDebugListener(IDebugListener*) noexcept)
    STANDIN_UNCALLED(void setDebugSync(bool) noexcept)
    STANDIN_UNCALLED(void setDeviceMemory(void*) noexcept)
    STANDIN_UNCALLED(void setEnqueueEmitsProfile(bool) noexcept)
    STANDIN_UNCALLED(void setErrorRecorder(IErrorRecorder*) noexcept)
    STANDIN_UNCALLED(bool setInputConsumedEvent(cudaEvent_t) noexcept)
    STANDIN_UNCALLED(void setName(char const*) noexcept)
    STANDIN_UNCALLED(bool setNvtxVerbosity(ProfilingVerbosity) noexcept)
    STANDIN_UNCALLED(bool setOutputAllocator(char const*, IOutputAllocator*) noexcept)
    STANDIN_UNCALLED(bool setOutputTensorAddress(char const*, void*) noexcept)
    STANDIN_UNCALLED(void setPersistentCacheLimit(size_t) noexcept)
    STANDIN_UNCALLED(void setProfiler(IProfiler*) noexcept)
    STANDIN_UNCALLED(bool setTemporaryStorageAllocator(IGpuAllocator*) noexcept)
    STANDIN_UNCALLED(bool setTensorDebugState(char const*, bool) noexcept)
    STANDIN_UNCALLED(bool setUnfusedTensorsDebugState(bool) noexcept)
    STANDIN_UNCALLED(size_t updateDeviceMemorySizeForShapes() noexcept)
};

struct RestOfPluginRegistry : IPluginRegistry {
    STANDIN_UNCALLED(void setErrorRecorder(IErrorRecorder*) noexcept)
    STANDIN_UNCALLED(IErrorRecorder* getErrorRecorder() const noexcept)
    STANDIN_UNCALLED(bool isParentSearchEnabled() const)
    STANDIN_UNCALLED(void setParentSearchEnabled(bool))
    STANDIN_UNCALLED(void deregisterLibrary(PluginLibraryHandle) noexcept)
    STANDIN_UNCALLED(bool registerCreator(IPluginCreatorInterface&, AsciiChar const*) noexcept)
    STANDIN_UNCALLED(IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept)
    STANDIN_UNCALLED(IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept)
    STANDIN_UNCALLED(
        IPluginCreatorInterface* getCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept)
    STANDIN_UNCALLED(bool deregisterCreator(IPluginCreatorInterface const&) noexcept)
    STANDIN_UNCALLED(IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept)
    STANDIN_UNCALLED(int32_t releasePluginResource(AsciiChar const*) noexcept)
#if NV_TENSORRT_MAJOR < 11
    STANDIN_UNCALLED(bool registerCreator(IPluginCreator&, AsciiChar const*) noexcept)
    STANDIN_UNCALLED(IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept)
    STANDIN_UNCALLED(IPluginCreator* getPluginCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept)
    STANDIN_UNCALLED(bool deregisterCreator(IPluginCreator const&) noexcept)
#endif
};

#undef STANDIN_UNCALLED

}  // namespace standin
