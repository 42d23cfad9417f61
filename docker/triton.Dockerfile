# Triton Inference Server with the example bundle, on a CPU.
#   docker build -f docker/triton.Dockerfile -t gsx-triton:0.1.0 .
#   docker run --rm -p 127.0.0.1:8000-8002:8000-8002 --shm-size 256m gsx-triton:0.1.0
# A repository of your own (gsx triton BUNDLE -o REPO) is mounted at /models.

FROM python:3.11.13-slim-bookworm AS repository
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY plugins plugins
COPY engines engines
COPY exporter exporter
COPY gsx gsx
COPY docker docker
RUN docker/install.sh /opt/export ".[export]" numpy==2.4.6
COPY examples/model examples/model
RUN PATH="/opt/export/bin:$PATH" docker/example.sh /bundle && PATH="/opt/export/bin:$PATH" docker/repository.sh /bundle /models

FROM nvcr.io/nvidia/tritonserver:26.07-py3 AS environment
COPY docker /src/docker
COPY --from=repository /models/gsx/requirements.txt /src/requirements.txt
RUN /src/docker/install.sh /opt/model numpy==1.26.4 --requirement /src/requirements.txt

FROM nvcr.io/nvidia/tritonserver:26.07-py3
COPY --from=environment /opt/model /opt/model
COPY --from=repository /models /models
# The model's process takes the Python that it finds first.
ENV PATH="/opt/model/bin:$PATH"
USER 1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["curl", "--fail", "--silent", "--output", "/dev/null", "http://127.0.0.1:8000/v2/models/gsx/ready"]
CMD ["tritonserver", "--model-repository=/models", "--allow-gpu-metrics=false", "--exit-timeout-secs=10"]
