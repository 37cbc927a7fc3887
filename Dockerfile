# A server of one run: docs/serving.md says how to build and start it.
FROM python:3.12-slim AS wheel
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /src

FROM python:3.12-slim
# Builds of torch for CPUs; for GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/
COPY --from=wheel /wheel /tmp/wheel
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --find-links /tmp/wheel \
    -c /tmp/constraints.txt 'llmembed-cache[serve]' \
    && rm -r /tmp/wheel /tmp/constraints.txt \
    && useradd --create-home llmembed
USER llmembed
# A volume that is mounted here takes this folder's owner.
RUN mkdir /home/llmembed/.cache
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz')"]
ENTRYPOINT ["llmembed-serve", "--host", "0.0.0.0"]
CMD ["/srv/run"]
