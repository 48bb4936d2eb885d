# Two images, `--target operator` and `--target trainer`; `make images` builds both. The classic builder and BuildKit
# take it alike. Dependencies come hash-locked from requirements/ and have a layer of their own below the code, so that
# a change of code rebuilds, pushes and pulls a few hundred kilobytes. All bytecode is compiled here, since the images
# run with a read-only root filesystem, and is never checked against its source: that makes it the same in every build.
#
# Build arguments:
#   PYTHON_IMAGE          the base image; releases name it by digest, see requirements/base-image.Dockerfile
#   VERSION, REVISION     for the image's labels
#   TORCH                 pip's requirement of another build of torch than the locked one; not checked by hash
#   TORCH_INDEX           one more package index for it
# The folder dist/wheels (git-ignored, may be absent) holds the CPU build of torch that requirements/torch-cpu.txt locks,
# or the build that TORCH names. Without either, torch comes from the package index as requirements/torch.txt locks it.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/app/bin:/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
RUN echo 'pretrain:x:65532:65532:pretrain:/tmp:/usr/sbin/nologin' >> /etc/passwd \
 && echo 'pretrain:x:65532:' >> /etc/group
WORKDIR /tmp

# A virtual environment that finds the workspace's code in /opt/app.
FROM ${PYTHON_IMAGE} AS venv
ENV PYTHONDONTWRITEBYTECODE= PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/venv \
 && echo /opt/app > /opt/venv/lib/python3.11/site-packages/pretrain.pth

FROM venv AS build
COPY requirements/build.txt /build/requirements/
RUN python -m venv /opt/build \
 && /opt/build/bin/pip install --quiet --require-hashes -r /build/requirements/build.txt
WORKDIR /build

FROM venv AS operator-dependencies
COPY requirements/operator.txt /build/requirements/
RUN pip --python /opt/venv/bin/python install --quiet --no-compile --require-hashes -r /build/requirements/operator.txt \
 && find /opt/venv -type d \( -name tests -o -name test \) -prune -exec rm -rf {} + \
 && /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

FROM build AS operator-code
COPY api api
COPY operator operator
RUN /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist ./api ./operator \
 && pip --python /opt/venv/bin/python install --quiet --no-deps --no-compile --target /opt/app dist/*.whl \
 && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/app

FROM base AS operator
COPY LICENSE /licenses/LICENSE
COPY --from=operator-dependencies /opt/venv /opt/venv
COPY --from=operator-code /opt/app /opt/app
USER 65532:65532
ENTRYPOINT ["pretrain-operator"]
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pretrain-operator" \
      org.opencontainers.image.description="Operator of PretrainJobs: elastic, fault-tolerant pre-training on Kubernetes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM venv AS trainer-dependencies
ARG TORCH=
ARG TORCH_INDEX=
# [t]: BuildKit refuses a pattern whose folder is missing unless the folder is a pattern, too.
COPY requirements/trainer.txt requirements/torch.txt requirements/torch-cpu.txt dis[t]/wheels/*.whl /build/requirements/
RUN pip --python /opt/venv/bin/python install --quiet --no-compile --require-hashes -r /build/requirements/trainer.txt \
 && set -- --python /opt/venv/bin/python install --quiet --no-compile --find-links /build/requirements \
 && if [ -n "${TORCH}" ]; then pip "$@" ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${TORCH}"; \
    elif [ -n "$(find /build/requirements -name "torch-2.13.0+cpu-cp311-*_$(uname -m).whl")" ]; then \
      pip "$@" --require-hashes --no-deps -r /build/requirements/torch-cpu.txt; \
    else pip "$@" --require-hashes --no-deps -r /build/requirements/torch.txt; fi \
 && find /opt/venv -type d \( -name tests -o -name test \) -prune -exec rm -rf {} + \
 && /opt/venv/bin/python -m compileall -q -j 0 -x '/torch/testing/_internal/py3' --invalidation-mode unchecked-hash /opt/venv/lib

FROM build AS trainer-code
COPY api api
COPY store store
COPY sdk sdk
COPY data data
COPY agent agent
COPY trainer trainer
RUN /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist ./api ./store ./sdk ./data ./agent ./trainer \
 && pip --python /opt/venv/bin/python install --quiet --no-deps --no-compile --target /opt/app dist/*.whl \
 && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/app

FROM base AS trainer
COPY LICENSE /licenses/LICENSE
COPY --from=trainer-dependencies /opt/venv /opt/venv
COPY --from=trainer-code /opt/app /opt/app
USER 65532:65532
ENTRYPOINT ["pretrain-trainer"]
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pretrain-trainer" \
      org.opencontainers.image.description="The training program and its agent, which PretrainJobs run in their worker pods" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
