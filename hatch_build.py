"""Build hook: compile the native relay where a C compiler is, and go on without it where none is."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeRelay(BuildHookInterface[Any]):
    """Puts gostnet/dataplane/native/_relay.so into wheels and, for editable installs, into the source tree."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this platform and any Python 3: the library does not know Python."""
        if self.target_name != "wheel":
            return
        build = runpy.run_path(str(Path(self.root, "gostnet", "dataplane", "native", "build.py")))
        problem = build["compile_relay"]()
        if problem:
            self.app.display_warning(f"gostnet works without its native relay: {problem}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append("gostnet/dataplane/native/_relay.so")
