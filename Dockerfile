# A detector in a container, as an ordinary user: predict, the app, and every other command. docs/container.md says how.
#   docker build -t deperceiver_jax .
#   docker build -t deperceiver_jax:cuda --build-arg EXTRAS=app,onnx,report,cuda .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# Of pyproject.toml: cuda brings NVIDIA's libraries; the machine brings the driver.
ARG EXTRAS=app,onnx,report
# Of the user, who must be able to write to the folders that are mounted.
ARG UID=1000

RUN useradd --uid "${UID}" --create-home detector
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

USER ${UID}
WORKDIR /home/detector
EXPOSE 8000
ENTRYPOINT ["deperceiver"]
CMD ["--help"]
