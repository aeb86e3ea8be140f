# The images of Raddle. Targets: `raddle` (every program), `agent` (the agent alone) and `etcd`.
#
#   docker build --target raddle --tag localhost/raddle:VERSION .
#   docker build --target agent --tag localhost/raddle-agent:VERSION .
#   docker build --target etcd --tag localhost/raddle-etcd:VERSION --build-context servers="$(make -s tools)" .
#
# VERSION is the project's, which the chart asks for.
#
# Requirements are pinned with hashes, and all have wheels for amd64 and arm64 (Kunpeng).
# `make images` builds all three without an image registry.

# A registry's own digest pins it for good: --build-arg BASE=python:3.11.14-slim-bookworm@sha256:...
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS builder
# A pip of its own: this never touches the packages of the base image.
RUN python3 -m venv /opt/builder
ENV PATH=/opt/builder/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source

FROM builder AS wheel
COPY requirements/wheel.txt requirements/
RUN pip install --require-hashes -r requirements/wheel.txt
COPY pyproject.toml README.md LICENSE ./
COPY common common
COPY proto proto
COPY scheduler scheduler
COPY agent agent
RUN hatchling build -t wheel -d /wheel

FROM builder AS agent-packages
RUN python3 -m venv --without-pip /opt/raddle
COPY requirements/agent.txt requirements/
RUN pip --python /opt/raddle install --require-hashes -r requirements/agent.txt
COPY --from=wheel /wheel /wheel
RUN pip --python /opt/raddle install --no-deps /wheel/*.whl

FROM builder AS raddle-packages
RUN python3 -m venv --without-pip /opt/raddle
COPY requirements/raddle.txt requirements/
RUN pip --python /opt/raddle install --require-hashes -r requirements/raddle.txt
COPY --from=wheel /wheel /wheel
RUN pip --python /opt/raddle install --no-deps /wheel/*.whl

FROM scratch AS etcd
LABEL org.opencontainers.image.title=raddle-etcd org.opencontainers.image.licenses=Apache-2.0
COPY --from=servers etcd etcdctl /usr/local/bin/
ENV PATH=/usr/local/bin
USER 65532:65532
CMD ["etcd"]

FROM ${BASE} AS agent
LABEL org.opencontainers.image.title=raddle-agent org.opencontainers.image.licenses=Apache-2.0
COPY --from=agent-packages /opt/raddle /opt/raddle
ENV PATH=/opt/raddle/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
CMD ["raddle-agent", "--help"]

FROM ${BASE} AS raddle
LABEL org.opencontainers.image.title=raddle org.opencontainers.image.licenses=Apache-2.0
COPY --from=raddle-packages /opt/raddle /opt/raddle
ENV PATH=/opt/raddle/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
CMD ["raddle", "--help"]
