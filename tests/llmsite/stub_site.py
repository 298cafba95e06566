"""A site whose web, worker and beat are a few lines each: what the supervisor does shows without models and migrations.

Run as a process: `python -m tests.llmsite.stub_site`. Children write their process id to STATE_DIR/<name>.pid and, when
told to leave, their name to STATE_DIR/order. A file STATE_DIR/stubborn makes the worker ignore TERM; STATE_DIR/stuck
makes it end itself as a worker that stopped consuming does, and goes with it.
"""

from __future__ import annotations

import sys

from llmsite.processes import supervisor
from llmsite.processes.child import ChildPlan

CHILD = """
import os, pathlib, signal, subprocess, sys, time
name, state = sys.argv[1], pathlib.Path(sys.argv[2])
def leave(number, frame):
    with (state / "order").open("a") as file:
        file.write(name + "\\n")
    if not (name == "worker" and (state / "stubborn").exists()):
        sys.exit(0)
signal.signal(signal.SIGTERM, leave)
if name == "worker":  # a grandchild that nobody ends
    grandchild = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    (state / "grandchild.pid").write_text(str(grandchild.pid))
(state / f"{name}.pid").write_text(str(os.getpid()))
print(f"{name} is here", flush=True)
if name == "web":
    import http.server
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_ready = (state / "worker.pid").exists()
            body = b"{}" if is_ready else b'{"message": "no worker"}'
            self.send_response(200 if is_ready else 503)
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *args):
            pass
    http.server.HTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Ready).serve_forever()
while True:
    time.sleep(0.1)
    if name == "worker" and (state / "stuck").exists():
        (state / "stuck").unlink()
        os._exit(75)
"""


class StubSupervisor(supervisor.Supervisor):
    """The real supervisor with other children."""

    def _set_up(self) -> None:
        pass

    def _python(self, name: str, *arguments: str, stop_seconds: float) -> ChildPlan:
        command = [sys.executable, "-c", CHILD, name, str(self.config.state)]
        return ChildPlan(name, command, self._env(), self.config.state, stop_seconds=1.0)


if __name__ == "__main__":
    supervisor.Supervisor = StubSupervisor  # type: ignore[misc]
    sys.exit(supervisor.main(sys.argv[1:]))
