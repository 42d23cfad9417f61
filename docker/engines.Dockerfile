# TensorRT engines: builds and runs them on the GPU at hand. A bundle is mounted at /bundle, writable.
#   docker build -f docker/engines.Dockerfile -t gsx-engines:0.1.0 .
#   docker run --rm --gpus all -v "$PWD/out/demo:/bundle" --user "$(id -u)" gsx-engines:0.1.0
#   docker run --rm --gpus all -v "$PWD/out/demo:/bundle:ro" gsx-engines:0.1.0 generate /bundle "def " --backend tensorrt

FROM nvcr.io/nvidia/tensorrt:26.07-py3 AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY plugins plugins
COPY engines engines
COPY exporter exporter
COPY gsx gsx
COPY docker docker
RUN docker/install.sh /opt/gsx ".[tensorrt]" numpy==2.4.6 && docker/install.sh /opt/build . numpy==2.4.6 cmake
RUN PATH="/opt/build/bin:$PATH" docker/plugins.sh /opt/gsx/lib/libgsx_plugins.so

FROM nvcr.io/nvidia/tensorrt:26.07-py3
COPY --from=build /opt/gsx /opt/gsx
# Any user may run it: timings and compiled kernels are kept in a folder that all may write.
RUN useradd --uid 10001 --create-home gsx && install -d -m 1777 /var/cache/gsx
USER 10001
ENV PATH="/opt/gsx/bin:$PATH" GSX_PLUGIN_LIBRARY=/opt/gsx/lib/libgsx_plugins.so XDG_CACHE_HOME=/var/cache/gsx
HEALTHCHECK --interval=60s --timeout=30s CMD ["gsx", "plugins", "list"]
ENTRYPOINT ["gsx"]
CMD ["build", "/bundle", "--backend", "tensorrt"]
