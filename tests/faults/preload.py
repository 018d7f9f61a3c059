"""What a forked rank finds imported. Nothing here starts a thread or joins anything."""

from jobs.attempts import prepare_environment

prepare_environment("cpu")

import ray  # noqa: F401

import jobs.worker  # noqa: F401
