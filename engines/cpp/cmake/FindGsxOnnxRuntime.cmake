# Headers and library of ONNX Runtime, as GsxOnnxRuntime::runtime.
#
# Looked for under ONNXRUNTIME_ROOT (a CMake or an environment variable), which is a release archive or an installation, then
# where the system keeps such files. The library can be given separately as GSX_ONNXRUNTIME_LIBRARY: Python's wheel ships it
# without headers, under a versioned name. It must be at least as new as the headers.
set(GSX_ONNXRUNTIME_ROOTS ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT})
find_path(GSX_ONNXRUNTIME_INCLUDE onnxruntime_c_api.h
  HINTS ${GSX_ONNXRUNTIME_ROOTS}
  PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime
  DOC "Folder of ONNX Runtime's headers"
)
find_library(GSX_ONNXRUNTIME_LIBRARY onnxruntime
  HINTS ${GSX_ONNXRUNTIME_ROOTS} PATH_SUFFIXES lib lib64
  DOC "ONNX Runtime's library"
)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(GsxOnnxRuntime
  REQUIRED_VARS GSX_ONNXRUNTIME_INCLUDE GSX_ONNXRUNTIME_LIBRARY
  REASON_FAILURE_MESSAGE "set ONNXRUNTIME_ROOT to the folder of a release of ONNX Runtime, which holds include and lib"
)
if(GsxOnnxRuntime_FOUND AND NOT TARGET GsxOnnxRuntime::runtime)
  add_library(GsxOnnxRuntime::runtime UNKNOWN IMPORTED)
  set_target_properties(GsxOnnxRuntime::runtime PROPERTIES
    IMPORTED_LOCATION ${GSX_ONNXRUNTIME_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES ${GSX_ONNXRUNTIME_INCLUDE}
  )
endif()
