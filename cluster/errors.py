"""Every error that Luthier raises on purpose.

    LuthierError                     exit 1
    ├── InputError                   exit 2: what the person gave is at fault
    │   ├── ConfigError              keys, types and values; all faults at once
    │   ├── DataError                rows or files that cannot be used
    │   │   └── AskedOtherwise       a chat template asks in another way than it writes the turn
    │   ├── ModelError               unknown, unsupported or incomplete model
    │   ├── LicenceRefused           a licence does not allow the use, or wants a sign-off
    │   ├── ReleaseRefused           an alias may not move to a version that has not passed its evaluation
    │   └── PlanError                it cannot fit, or the cluster has too little
    │       ├── ClusterSilent        nothing answers there as Ray's dashboard does
    │       ├── TokenRefused         the cluster has another token
    │       └── VersionMismatch      the cluster has another Ray or Python
    ├── StoreError
    │   ├── StoreUnreachable         no answer after the retries
    │   ├── StoreDenied              exit 2: credentials or rights refused
    │   ├── StoreUnfit               exit 2: the server ignores create-if-absent
    │   ├── ObjectNotFound
    │   ├── ObjectExists             create-if-absent lost
    │   └── ObjectDamaged            size or SHA-256 is not what the manifest says
    ├── RegistryError
    │   ├── AdapterNotFound          exit 2
    │   └── AdapterRefused           an adapter that must not be published
    ├── RequestError                 exit 2: an HTTP caller's request is at fault
    │   ├── InvalidRequest           a parameter that cannot be taken
    │   ├── UnknownModel             names a model or adapter that is not served
    │   └── Overloaded               exit 1: full; try again later
    │       └── NotServing           not full: nothing answers for now
    └── RunFailed                    a run ended without its result
        └── OutOfMemory              a worker's memory is too small for its micro-batch

A message gives the value, the place and the next step. Constructors take positional
arguments only, because an exception with required keywords does not survive a Ray hop.
HTTP codes are given in one place, serving/protocol.py; exit codes here.
"""

from dataclasses import dataclass


class LuthierError(Exception):
    """Root of the tree. `str(error)` is the whole message for the person."""


class InputError(LuthierError):
    """What the person gave is at fault; nothing was changed."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a config: where it stands, and what to write instead."""

    place: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.message}" if self.key else f"{self.place}: {self.message}"


class ConfigError(InputError):
    """All faults of one config, found together."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        count = len(self.faults)
        head = "1 fault in the config" if count == 1 else f"{count} faults in the config"
        return "\n  ".join([f"{head}:", *map(str, self.faults)])


class DataError(InputError):
    """A data file, or too many of its rows, cannot be used."""


class AskedOtherwise(DataError):
    """The generation prompt is not how the turn is written: a fault of this row only if others have it right."""


class ModelError(InputError):
    """A base model is unknown, unsupported or incomplete."""


class LicenceRefused(InputError):
    """A licence, or several together, do not allow what was asked, or want somebody's sign-off first."""


class ReleaseRefused(InputError):
    """An alias may not move to this version: its evaluation is missing, out of date, or failed."""


class PlanError(InputError):
    """The job cannot run as asked: it does not fit, or the cluster has too little."""


class ClusterSilent(PlanError):
    """Nothing answers at that address as Ray's dashboard does."""


class TokenRefused(PlanError):
    """The cluster wants a token, and has another than this one."""


class VersionMismatch(PlanError):
    """The cluster has another Ray or Python than this machine: they cannot read each other's pickles."""


class StoreError(LuthierError):
    """The object store did not do what was asked."""


class StoreUnreachable(StoreError):
    """No usable answer after all retries."""


class StoreDenied(StoreError):
    """The credentials are wrong, expired, or lack a right."""


class StoreUnfit(StoreError):
    """The server ignores create-if-absent, so nothing built on it would be safe."""


class ObjectNotFound(StoreError):
    """No object under that key."""


class ObjectExists(StoreError):
    """Create-if-absent found the key taken."""


class ObjectDamaged(StoreError):
    """An object's size or SHA-256 differs from its record."""


class RegistryError(LuthierError):
    """The registry cannot do what was asked."""


class AdapterNotFound(RegistryError):
    """No such adapter, version or alias."""


class AdapterRefused(RegistryError):
    """The adapter is empty, zero, non-finite, wrongly shaped, or changes nothing."""


class RequestError(LuthierError):
    """A request over HTTP that cannot be served as it stands."""


class InvalidRequest(RequestError):
    """A 400 that names the parameter (`param`) and, where OpenAI has one, the code."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownModel(RequestError):
    """The request names a model or adapter that is not served here."""


class Overloaded(RequestError):
    """The engine is full. `retry_after_s` is the whole number of seconds to wait."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class NotServing(Overloaded):
    """What would answer is starting, restarting or lost. Not the caller's doing, but to be tried again all the same."""


class RunFailed(LuthierError):
    """A run ended without its result."""


class OutOfMemory(RunFailed):
    """A worker's memory is too small for its micro-batch."""


def exit_code(error: LuthierError) -> int:
    """The process exit code for an error: 2 when what the person gave is at fault, else 1."""
    at_fault = (InputError, StoreDenied, StoreUnfit, AdapterNotFound, RequestError)
    return 2 if isinstance(error, at_fault) and not isinstance(error, Overloaded) else 1
