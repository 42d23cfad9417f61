# Headers and library of TensorRT or TensorRT-RTX, whichever GSX_BACKEND names, as GsxTensorRT::runtime.
#
# Looked for under TENSORRT_ROOT (a CMake or an environment variable), then where the system keeps such files. The library
# can be given separately as GSX_TENSORRT_LIBRARY: Python wheels ship it without headers, under a versioned name.
set(GSX_TENSORRT_ROOTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT})
find_path(GSX_TENSORRT_INCLUDE NvInferRuntime.h
  HINTS ${GSX_TENSORRT_ROOTS} PATH_SUFFIXES include
  DOC "Folder of TensorRT's headers"
)
if(GSX_BACKEND STREQUAL "tensorrt-rtx")
  set(GSX_TENSORRT_NAME tensorrt_rtx)
else()
  set(GSX_TENSORRT_NAME nvinfer)
endif()
find_library(GSX_TENSORRT_LIBRARY ${GSX_TENSORRT_NAME}
  HINTS ${GSX_TENSORRT_ROOTS} PATH_SUFFIXES lib lib64
  DOC "TensorRT's library"
)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(GsxTensorRT
  REQUIRED_VARS GSX_TENSORRT_INCLUDE GSX_TENSORRT_LIBRARY
  REASON_FAILURE_MESSAGE "set TENSORRT_ROOT to the folder of ${GSX_BACKEND}, which holds include and lib"
)
if(GsxTensorRT_FOUND AND NOT TARGET GsxTensorRT::runtime)
  add_library(GsxTensorRT::runtime UNKNOWN IMPORTED)
  set_target_properties(GsxTensorRT::runtime PROPERTIES
    IMPORTED_LOCATION ${GSX_TENSORRT_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES ${GSX_TENSORRT_INCLUDE}
  )
endif()
