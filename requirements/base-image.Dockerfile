# Base of the release images, by digest of its multi-platform index. The release workflow passes it as PYTHON_IMAGE.
# Update tag and digest together: Dependabot does.
FROM python:3.11-slim-bookworm@sha256:fe556eaffd0d96abd8685b83bb8a69addd0dc730fa193669a7df0d49ddcfac02
