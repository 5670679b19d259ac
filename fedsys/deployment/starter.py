"""What starts a device's ClientApps, a process for each message, within the limits of the device.

It does what Flower's superexec does, in a thread of the SuperNode's process: a process of its own
would take a hundred megabytes of a small device, to look five times a second whether there is work.

Private names of Flower's superexec are in this file only.
"""

import logging
import os
import resource
import time
from threading import Thread

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.superexec.executor import SubprocessExecutor
from flwr.supercore.superexec.plugin import AutoExecPlugin

from fedsys.deployment.processes import descendants, kill

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds
_SIGNED = frozenset({"/flwr.proto.Runtime/AcquireTask"})  # calls by which the secret is proved


class Starter:
    """Starts ClientApps until this process ends; see ``fedsys.deployment.gate.Apps``."""

    def __init__(self, address: str, secret: bytes, memory_mb: float | None) -> None:
        """Ask the node at ``address`` for work, as whom ``secret`` proves.

        A ClientApp may write to no more than ``memory_mb``; None: no limit.
        """
        self._memory_mb = memory_mb
        executor = SubprocessExecutor()
        self._client = RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,  # within this machine
            root_certificates=None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_SIGNED),
            ],
            retry_invoker=make_simple_http_retry_invoker(),
        )
        self._plugin = AutoExecPlugin(address, True, None, False, executor=executor)
        self._thread = Thread(target=self._work, name="starter", daemon=True)
        self._thread.start()

    def can_start(self) -> bool:
        """Return whether it still works."""
        return self._thread.is_alive()

    def any_runs(self) -> bool:
        """Return whether a ClientApp lives."""
        return bool(descendants(os.getpid()))

    def end(self) -> None:
        """End all ClientApps."""
        kill(descendants(os.getpid()))

    def _work(self) -> None:
        kinds = sorted(self._plugin.supported_task_types)
        while True:
            found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=kinds))
            if found.HasField("task") and found.token:
                self._plugin.launch_task(token=found.token, task=found.task)
                self._limit()
            time.sleep(_POLL)

    def _limit(self) -> None:
        """Bound what ClientApps write to. Their address space is far larger, above all on GPUs."""
        if self._memory_mb is None:
            return
        most = int(self._memory_mb * 2**20)
        for process in descendants(os.getpid()):
            try:
                resource.prlimit(process, resource.RLIMIT_DATA, (most, most))
            except ProcessLookupError:
                log.debug("a ClientApp has ended at once")
