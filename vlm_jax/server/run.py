# SPDX-License-Identifier: Apache-2.0
"""Listens, and on SIGTERM takes no more requests, finishes those that it has, and ends.

uvicorn runs in a thread: the main thread waits for the signal, as in every command that has work to
save (vlm_jax/preemption.py).
"""

import asyncio
import logging
import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp

from vlm_jax import preemption, progress
from vlm_jax.server.service import Service

LOOK_SECONDS = 0.2  # between two looks at the signal
CLOSE_SECONDS = 5  # for the last bytes of finished answers
MOST_CONNECTIONS = 1024  # open at once, idle ones included; one more gets status 503


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError, with the way out, where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"--host={host} --port={port}: {reason}: choose another port (0: any free "
                      "one), or a host of this machine") from None  # fmt: skip
    return bound


class Listener:
    """A server in a thread of its own, which takes connections when it is made."""

    def __init__(self, app: ASGIApp, bound: socket.socket):
        quiet()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # answers are logged by the service, without what they say
            lifespan="off",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            server_header=False,
        )
        self.server = uvicorn.Server(config)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(bound,), name="http", daemon=True)
        self.thread.start()
        while not self.server.started:
            self.check()
            time.sleep(0.01)

    def _run(self, bound: socket.socket) -> None:
        try:
            asyncio.run(self.server.serve(sockets=[bound]))
        except BaseException as error:  # told to the main thread
            self.error = error

    def check(self) -> None:
        """Raises RuntimeError if the server has failed."""
        if not self.thread.is_alive():
            raise RuntimeError(f"the server failed: {self.error}")

    def stop(self) -> None:
        """Ends connections that have had their answer, at last all of them."""
        self.server.should_exit = True
        self.thread.join(CLOSE_SECONDS + 5)


def quiet() -> None:
    """One line in the log for each answer, and nothing of what clients send or get.

    Libraries show that at the level of debugging.
    """
    logging.getLogger("vlm_jax.server").setLevel(logging.INFO)
    for name in ("sse_starlette", "sse_starlette.sse", "uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


def until_stopped(service: Service, app: ASGIApp, bound: socket.socket, *, drain: float) -> None:
    """Serves until SIGTERM, then finishes what was taken, at most for `drain` seconds.

    Raises:
      Preempted: after SIGTERM, with what became of the requests.
      RuntimeError: if the server fails.
    """
    listener = Listener(app, bound)
    host, port = bound.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    progress.say(f"{service.name} is served at http://{host}:{port}/ (SIGTERM ends it)")
    try:
        with preemption.held(), progress.listening():
            while not preemption.reached():
                listener.thread.join(LOOK_SECONDS)
                listener.check()
            service.draining = True
            now = service.engine.stats()
            taken = now.running + now.queued
            done = service.engine.drain(drain)
            listener.stop()
            raise preemption.stopped(
                f"{taken} requests were under way, and all were answered"
                if done
                else f"{taken} requests were under way; after {drain:g} s the last ones were cut"
            )
    finally:
        service.close()
        listener.stop()
