"""What Python callers catch: a request that is wrong, and an engine that is gone."""

from __future__ import annotations

import msgspec

from megatron_medha.core.errors import ConfigError, MedhaError
from megatron_medha.python_api.outputs import RequestOutput
from megatron_medha.server.http.http_errors import ApiError

# A rank that refuses what the user asked for reports the name of the error first.
_USER_ERRORS = ("ConfigError: ", "CheckpointError: ", "UnsupportedModelError: ", "DependencyError: ")


class RequestError(MedhaError, ValueError):
    """A request cannot be served as it is; others are not affected."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        """param: the field at fault. code: as in the error object of the HTTP API."""
        super().__init__(message)
        self.param = param
        self.code = code
        self.outputs: list[RequestOutput] = []  # of generate() and chat(): of all requests, in order


class EngineError(MedhaError, RuntimeError):
    """The engine has failed or was closed; no request can be served any more."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.outputs: list[RequestOutput] = []  # as above


def invalid_fields(error: msgspec.ValidationError) -> RequestError:
    """Names the field of which msgspec complains."""
    what, _, path = str(error).partition(" - at `$.")
    param = path.rstrip("`") or None
    return RequestError(f"{param}: {what[0].lower()}{what[1:]}" if param else what, param)


def python_error(error: ApiError) -> RequestError | EngineError:
    """The same without HTTP."""
    return RequestError(error.message, error.param, error.code) if error.status < 500 else EngineError(error.message)


def start_error(detail: str) -> MedhaError:
    """Why the engine did not come up, from its status."""
    kind = next((kind for kind in _USER_ERRORS if detail.startswith(kind)), None)
    return EngineError(detail) if kind is None else ConfigError(detail.removeprefix(kind))
