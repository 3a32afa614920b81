# The product's image, and the sandbox's, which adds third parties to talk to.
#
# Builds with and without BuildKit, and offline: deploy/image/prepare downloads the wheels, then
# `docker build --network none --build-arg PIP_NO_INDEX=1 .`

# deploy/image/pin writes the digest of the newest image behind the tag here
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
LABEL assistance-relay.stage=build
# 1: only wheels that were prepared
ARG PIP_NO_INDEX=
# every date in the result, so that the same sources give the same files
ENV SOURCE_DATE_EPOCH=315532800 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_FIND_LINKS=/prepared \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_COMPILE=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
RUN python -m venv --without-pip /app && python -m venv --without-pip /tools
# the wheels match nothing where none were prepared
COPY requirements.lock deploy/image/*.lock deploy/image/wheels* /prepared/
RUN python -m pip --python /tools/bin/python install --require-hashes --only-binary :all: --requirement /prepared/build.lock
RUN python -m pip --python /app/bin/python install --require-hashes --only-binary :all: --no-deps --requirement /prepared/requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY outbox outbox
COPY assistance assistance
COPY runtime runtime
COPY service service
COPY relay relay
COPY consumers consumers
COPY installation installation
RUN python -m pip --python /tools/bin/python wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels . \
    && python -m pip --python /app/bin/python install --no-index --no-deps /wheels/*.whl \
    && /app/bin/python -m compileall -q --invalidation-mode unchecked-hash /app/lib \
    && find /app -exec touch --no-dereference --date=@$SOURCE_DATE_EPOCH {} +

FROM ${PYTHON_IMAGE} AS product
LABEL org.opencontainers.image.title="assistance-relay" \
      org.opencontainers.image.description="Assistance requests that are never lost: a MongoDB outbox, a change-stream relay to RabbitMQ, and the consumers behind it" \
      org.opencontainers.image.licenses="MIT"
ENV PATH=/app/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
COPY --from=build /app /app
# a number: Kubernetes compares it with 0 before it starts the image
USER 10001:10001
WORKDIR /app
ENTRYPOINT ["python", "-m"]
CMD ["service", "run"]

FROM build AS build-sandbox
LABEL assistance-relay.stage=build
RUN python -m venv --without-pip /sandbox
RUN python -m pip --python /sandbox/bin/python install --require-hashes --only-binary :all: --no-deps --requirement /prepared/sandbox.lock
COPY sandbox /sandbox/lib/python3.11/site-packages/sandbox

FROM product AS sandbox
ENV PYTHONPATH=/sandbox
COPY --from=build-sandbox /sandbox/lib/python3.11/site-packages /sandbox
CMD ["sandbox.third_parties", "--help"]
