# What text needs, as GsxText::text: the library tokenizers of PyTorch (github.com/meta-pytorch/tokenizers, built with
# SUPPORT_REGEX_LOOKAHEAD), the header minja (github.com/google/minja), and utf8proc.
#
# The library is looked for as an installed CMake package (CMAKE_PREFIX_PATH or tokenizers_ROOT). Without one,
# GSX_TOKENIZERS_INCLUDE is its folder of headers and GSX_TOKENIZERS_LIBRARIES what to link, in order.
set(GSX_TOKENIZERS_LIBRARIES "" CACHE STRING "Libraries of PyTorch's tokenizers, where they are no CMake package")
find_path(GSX_MINJA_INCLUDE minja/minja.hpp HINTS ${MINJA_ROOT} PATH_SUFFIXES include DOC "Folder that holds minja/minja.hpp")
find_path(GSX_UTF8PROC_INCLUDE utf8proc.h DOC "Folder that holds utf8proc.h")
find_library(GSX_UTF8PROC_LIBRARY utf8proc DOC "The library utf8proc")
find_package(tokenizers CONFIG QUIET)
if(TARGET tokenizers::tokenizers)
  set(GSX_TEXT_LINKED tokenizers::tokenizers)
elseif(GSX_TOKENIZERS_LIBRARIES)
  find_path(GSX_TOKENIZERS_INCLUDE pytorch/tokenizers/hf_tokenizer.h DOC "Folder of the headers of PyTorch's tokenizers")
  if(GSX_TOKENIZERS_INCLUDE)
    set(GSX_TEXT_LINKED ${GSX_TOKENIZERS_LIBRARIES})
  endif()
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(GsxText
  REQUIRED_VARS GSX_TEXT_LINKED GSX_MINJA_INCLUDE GSX_UTF8PROC_INCLUDE GSX_UTF8PROC_LIBRARY
  REASON_FAILURE_MESSAGE "install PyTorch's tokenizers, minja and utf8proc, and name them in CMAKE_PREFIX_PATH and GSX_MINJA_INCLUDE"
)
if(GsxText_FOUND AND NOT TARGET GsxText::text)
  add_library(GsxText::text INTERFACE IMPORTED)
  target_link_libraries(GsxText::text INTERFACE ${GSX_TEXT_LINKED} ${GSX_UTF8PROC_LIBRARY})
  target_include_directories(GsxText::text INTERFACE ${GSX_MINJA_INCLUDE} ${GSX_TOKENIZERS_INCLUDE} ${GSX_UTF8PROC_INCLUDE})
endif()
