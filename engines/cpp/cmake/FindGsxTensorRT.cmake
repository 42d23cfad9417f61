# TensorRT's or TensorRT-RTX's headers and library, whichever GSX_BACKEND names, as GsxTensorRT::runtime.
#
# Looked for below TENSORRT_ROOT (a variable, or of the environment), else where the system keeps such files. The library
# alone may be given as GSX_TENSORRT_LIBRARY: Python wheels have it without headers, under a versioned name.
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
