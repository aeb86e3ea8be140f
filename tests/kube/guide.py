"""The guide to Kubernetes as a reader follows it: its boxes marked `sh`, one after the other."""

from __future__ import annotations

import re

from tools.kubernetes.cluster import Cluster, run_command

from tests.support import ROOT

GUIDE = ROOT / "docs" / "guide" / "kubernetes.md"


class Guide:
    """Follows the guide on a cluster, with the checkout as the current folder."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        #: (title of the section, commands) of what was not followed yet.
        self.left = [
            (section.partition("\n")[0], box)
            for section in GUIDE.read_text().split("\n## ")[1:]
            for box in re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        ]

    def follow(self, title: str) -> str:
        """Run the next box, which must be one of this section; gives what it printed.

        Raises:
            CommandError: a command failed.
        """
        found, box = self.left.pop(0)
        assert found == title, f"the next box of the guide is in section {found!r}"
        return self.run(box)

    def next_lines(self, title: str, count: int) -> str:
        """Run only so many lines of the next box, and leave it the others."""
        found, box = self.left[0]
        assert found == title, f"the next box of the guide is in section {found!r}"
        lines = box.splitlines(keepends=True)
        self.left[0] = (found, "".join(lines[count:]))
        return self.run("".join(lines[:count]))

    def run(self, commands: str) -> str:
        """Commands in a shell that finds the cluster's `kubectl` and `helm`."""
        prepare = f'cd "{ROOT}"; export PATH="{self._cluster.folder}/bin:$PATH"\n'
        return run_command(["bash", "-euo", "pipefail", "-c", prepare + commands])
