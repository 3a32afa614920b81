# syntax=docker/dockerfile:1

FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# moments in the wheel are those of no build, so that the same sources give the same wheel
ENV SOURCE_DATE_EPOCH=315532800
WORKDIR /source
COPY requirements.lock deploy/image/build.lock ./
RUN pip install --require-hashes --only-binary :all: --requirement build.lock
RUN pip wheel --require-hashes --only-binary :all: --no-deps --requirement requirements.lock --wheel-dir /wheels
COPY pyproject.toml README.md LICENSE ./
COPY outbox outbox
COPY assistance assistance
COPY runtime runtime
COPY service service
COPY relay relay
COPY consumers consumers
COPY installation installation
RUN pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="assistance-relay" \
      org.opencontainers.image.description="Assistance requests that are never lost: a MongoDB outbox, a change-stream relay to RabbitMQ, and the consumers behind it" \
      org.opencontainers.image.licenses="MIT"
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-index --no-deps --no-cache-dir --disable-pip-version-check --root-user-action ignore /wheels/*.whl
# a number, because who starts the image by number sees that it is not root
USER 10001:10001
WORKDIR /app
ENTRYPOINT ["python", "-m"]
CMD ["service", "run"]
