# SPDX-License-Identifier: Apache-2.0
"""Requests that are not answered: one exception with a status, a sentence and the way out.

The body has the form of OpenAI's errors: {"error": {"message", "type", "param", "code"}}.
"""

import json
from typing import Any

from starlette.responses import Response

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}  # every other status is an invalid_request_error


class Refusal(Exception):
    """Why a request is not answered.

    Attributes:
      message: what came, what is allowed, and the way out.
      status: of HTTP.
      param: the field that it is about, such as messages[0].content[1].
      code: one word for programs.
      retry_after: seconds after which the same request may be answered; None if never.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The fields of the response."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = dict(message=self.message, type=kind, param=self.param, code=self.code)
        return {"error": error}

    def response(self) -> Response:
        """The response of HTTP.

        JSON in ASCII: a message may quote half a character of a request.
        """
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        return Response(
            json.dumps(self.body()), self.status, headers, media_type="application/json"
        )
