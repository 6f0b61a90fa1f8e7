# syntax=docker/dockerfile:1
# The daemon's image, and one for engines.
#
#   docker build --build-arg DEVICE_PLANE=off  --tag kvservice:0.1.0-cpu  --target daemon .
#   docker build --build-arg DEVICE_PLANE=auto --tag kvservice:0.1.0-cuda --target daemon .
#   docker build --build-arg ENGINE_IMAGE=vllm/vllm-openai:v0.32.0 --tag kvservice-vllm:0.1.0-cuda --target engine .
#
# BASE_IMAGE should be pinned by digest where images are released. scripts/build_image_in_chroot.py runs the stages of
# the daemon without a container engine.
ARG BASE_IMAGE=debian:12.11-slim
ARG ENGINE_IMAGE=vllm/vllm-openai:v0.32.0

# --------------------------------------------------------------------------- a virtual environment, and the wheel in it
FROM ${BASE_IMAGE} AS build
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Without a cache, and without bytecode until the end, which the read-only image cannot write later.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /source
COPY image/build-constraints.txt constraints.txt ./
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --quiet --requirement build-constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY kvservice kvservice
COPY client client
COPY engine_adapters engine_adapters
RUN /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .
# pip itself is of no use in the image.
RUN python3 -m venv /opt/kvservice \
    && /opt/kvservice/bin/pip install --quiet --constraint constraints.txt "$(echo /wheels/kvservice-*.whl)[daemon]" \
    && /opt/kvservice/bin/pip check \
    && /opt/kvservice/bin/pip uninstall --quiet --yes pip setuptools \
    && python3 -m compileall -q /opt/kvservice

# ------------------------------------------------------------------------------------------------------------ the daemon
FROM ${BASE_IMAGE} AS daemon
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 65532 kvservice \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin kvservice \
    && install -d -o 65532 -g 65532 -m 0755 /run/kvservice /var/lib/kvservice
COPY --from=build /opt/kvservice /opt/kvservice
ENV PATH=/opt/kvservice/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# The variant: off for nodes without a GPU, auto where NVIDIA's runtime brings libcuda. No CUDA package is installed.
ARG DEVICE_PLANE=off
ENV KVSERVICE_DEVICE_PLANE=${DEVICE_PLANE}
USER 65532:65532
EXPOSE 9477
# Kubernetes has probes of its own (k8s/) and ignores this.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9477/livez', timeout=4)"]
ENTRYPOINT ["kvservice"]
CMD ["serve"]

# ------------------------------------------------------------------- an engine's image, with the client and the adapters
FROM ${ENGINE_IMAGE} AS engine
COPY --from=build /wheels /wheels
RUN python3 -m pip install --no-cache-dir /wheels/kvservice-*.whl
