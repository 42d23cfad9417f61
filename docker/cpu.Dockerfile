# gsx on a CPU, with the example bundle.
#   docker build -f docker/cpu.Dockerfile -t gsx:0.1.0 .
#   docker run --rm gsx:0.1.0

FROM python:3.11.13-slim-bookworm AS environment
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY plugins plugins
COPY engines engines
COPY exporter exporter
COPY gsx gsx
COPY docker docker
RUN docker/install.sh /opt/gsx . numpy==2.4.6

FROM environment AS example
RUN docker/install.sh /opt/export ".[export]" numpy==2.4.6
COPY examples/model examples/model
RUN PATH="/opt/export/bin:$PATH" docker/example.sh /bundle

FROM python:3.11.13-slim-bookworm
COPY --from=environment /opt/gsx /opt/gsx
COPY --from=example /bundle /bundle
RUN useradd --uid 10001 --create-home gsx
USER 10001
ENV PATH="/opt/gsx/bin:$PATH"
HEALTHCHECK --interval=60s --timeout=30s CMD ["gsx", "generate", "/bundle", "--ids", "1,2,3", "--max-new-tokens", "1"]
ENTRYPOINT ["gsx"]
CMD ["generate", "/bundle", "def main("]
